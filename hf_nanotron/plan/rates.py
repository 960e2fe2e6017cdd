"""How fast a GPU and its links are: measured on the user's machine, or taken from what we know of the GPU.

A file of rates is what `hf-nanotron bench --rates OUT.json` writes. Every figure is a plain number in SI units: FLOP/s,
bytes/s and seconds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

FORMAT = 1
PRODUCT_KINDS = ("forward", "input_gradient", "weight_gradient")
OPERATIONS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "send")
PLACES = ("inside", "between")
# Of the bytes of a product, what arithmetic does not hide: its first tiles are read and its last written alone.
UNHIDDEN = 0.6


@dataclass(frozen=True)
class ProductRate:
    """A product of a linear layer: `tokens` x `inner` by `inner` x `outer`.

    Args:
        kind: one of `PRODUCT_KINDS`; a weight gradient is added to fp32 memory.
        seconds: of one.
    """

    tokens: int
    inner: int
    outer: int
    kind: str
    seconds: float

    @property
    def flops(self) -> float:
        """Of one product."""
        return 2.0 * self.tokens * self.inner * self.outer


@dataclass(frozen=True)
class AttentionRate:
    """Causal attention of documents of `tokens` tokens, FLOP/s of the products that run: two forwards, five backwards
    (Dao 2023, arXiv:2307.08691), of `2 * heads * head_dim` FLOPs for each pair of a token and one that it sees."""

    head_dim: int
    tokens: int
    forward: float
    backward: float


@dataclass(frozen=True)
class LinkRate:
    """A collective of `ranks` ranks: `latency` seconds, and bytes/s that a rank receives from others (bus bandwidth).

    Args:
        place: `"inside"` a host, or `"between"` hosts; then `ranks` have one rank on each.
    """

    operation: str
    ranks: int
    latency: float
    bytes_per_second: float
    place: str = "inside"


@dataclass(frozen=True)
class Rates:
    """What a plan's seconds come from.

    Args:
        gpu: name in the table of GPUs, or that of the device.
        source: where the figures are from, in a sentence.
        measured: whether on such a device.
        products: in the dtype of training; at least one.
        fp8: FLOP/s of large FP8 products, None where there are none.
        attention: at least one.
        memory: bytes/s read and written by kernels that compute little.
        launch: seconds of the host for one kernel.
        host_copy: bytes/s of copies between device and pinned host memory, both directions together.
        links: collectives, and sends between two ranks.
        made: date, versions, device: what the file says about itself.
    """

    gpu: str
    source: str
    measured: bool
    products: tuple[ProductRate, ...]
    fp8: float | None
    attention: tuple[AttentionRate, ...]
    memory: float
    launch: float
    host_copy: float
    links: tuple[LinkRate, ...]
    made: Mapping[str, Any]

    def write(self, path: str | Path) -> None:
        """As JSON."""
        Path(path).write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n", encoding="utf-8")


def load_rates(path: str | Path) -> Rates:
    """Rates from a file of `hf-nanotron bench --rates`.

    Raises:
        ValueError: if there is no such file, or it is another one: the path, what is wrong, and what makes such a file.
    """
    again = f"write it anew with `hf-nanotron bench --rates {path}`."
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the file of rates {path} cannot be read ({error}); {again}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"the file of rates {path} is no JSON ({error}); {again}") from None
    if not isinstance(found, dict) or found.pop("format", None) != FORMAT:
        raise ValueError(f"{path} is no file of rates of format {FORMAT}; {again}")
    names = {entry.name for entry in fields(Rates)}
    if odd := sorted(names ^ set(found)):
        raise ValueError(f"{path}: a file of rates has the keys {', '.join(sorted(names))}, not {odd[0]!r}; {again}")
    try:
        for key, kind in (("products", ProductRate), ("attention", AttentionRate), ("links", LinkRate)):
            found[key] = tuple(kind(**entry) for entry in found[key])
        rates = Rates(**found)
        check_rates(rates)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the file of rates {path} is damaged ({error}); {again}") from None
    return rates


def check_rates(rates: Rates) -> None:
    """Refuse rates that would make nonsense of every plan.

    Raises:
        ValueError: for a figure that is not a positive number, a list without an entry, or another type.
    """
    for name, kind in (("gpu", str), ("source", str), ("measured", bool), ("made", Mapping)):
        if not isinstance(getattr(rates, name), kind):
            raise ValueError(f"{name}={getattr(rates, name)!r} must be of type {kind.__name__}")
    single = {"memory": rates.memory, "launch": rates.launch, "host_copy": rates.host_copy}
    if rates.fp8 is not None:
        single["fp8"] = rates.fp8
    for index, product in enumerate(rates.products):
        single |= {f"products[{index}].{name}": getattr(product, name) for name in ("tokens", "inner", "outer")}
        single[f"products[{index}].seconds"] = product.seconds
        if product.kind not in PRODUCT_KINDS:
            raise ValueError(f"products[{index}].kind={product.kind!r} is not one of {', '.join(PRODUCT_KINDS)}")
    for index, kernel in enumerate(rates.attention):
        single |= {f"attention[{index}].{name}": value for name, value in asdict(kernel).items()}
    for index, link in enumerate(rates.links):
        if link.operation not in OPERATIONS or link.place not in PLACES:
            raise ValueError(f"links[{index}] is of {link.operation!r} {link.place!r}")
        single |= {f"links[{index}].ranks": link.ranks, f"links[{index}].bytes_per_second": link.bytes_per_second}
        single[f"links[{index}].latency"] = link.latency
    for name, value in single.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not (0 < value < math.inf):
            raise ValueError(f"{name}={value!r} must be a positive number")
    if not rates.products or not rates.attention:
        raise ValueError("it has no products or no attention")


def product_seconds(rates: Rates, tokens: float, inner: int, outer: int, kind: str, gain: float = 1.0) -> float:
    """Seconds of one product: its FLOPs at the rate of measured products of like sizes, and its bytes.

    A product of `F` FLOPs that moves `b` bytes takes `F / R + UNHIDDEN * b / memory`: small and narrow products are
    slow since they move more bytes for a FLOP. `R` is a mean over the measured products of a kind (over all, if it has
    none), those of near sizes first: by the inverse square of the distance of the logarithms.

    Args:
        gain: of products in a step over those alone.
    """
    if min(tokens, inner, outer) <= 0:
        return 0.0
    found = [rate for rate in rates.products if rate.kind == kind] or rates.products
    weights, inverse = 0.0, 0.0
    for rate in found:
        sizes = zip((tokens, inner, outer), (rate.tokens, rate.inner, rate.outer), strict=True)
        distance = sum(math.log2(wanted / known) ** 2 for wanted, known in sizes)
        moved = UNHIDDEN * _bytes(rate.tokens, rate.inner, rate.outer, rate.kind) / rates.memory
        # A product is never slower than its bytes alone by less than half of its time.
        own = max(rate.seconds - moved, 0.5 * rate.seconds) / rate.flops
        weight = 1.0 / (distance + 0.1)
        weights, inverse = weights + weight, inverse + weight * own
    moved = UNHIDDEN * _bytes(tokens, inner, outer, kind) / rates.memory
    return 2.0 * tokens * inner * outer * inverse / weights / gain + moved


def _bytes(tokens: float, inner: int, outer: int, kind: str) -> float:
    """Bytes of a product in 16 bits; a weight gradient reads and writes its fp32 sum."""
    weight = 8.0 if kind == "weight_gradient" else 2.0
    return 2.0 * tokens * (inner + outer) + weight * inner * outer


def attention_rate(rates: Rates, head_dim: int, tokens: float) -> AttentionRate:
    """FLOP/s of attention over documents of `tokens`: between measured lengths of the nearest head size."""
    nearest = min(rates.attention, key=lambda rate: abs(math.log2(rate.head_dim / max(1, head_dim))))
    known = sorted((rate for rate in rates.attention if rate.head_dim == nearest.head_dim), key=lambda r: r.tokens)
    forward = interpolate([(rate.tokens, rate.forward) for rate in known], tokens)
    backward = interpolate([(rate.tokens, rate.backward) for rate in known], tokens)
    return AttentionRate(nearest.head_dim, round(tokens), forward, backward)


def interpolate(points: Sequence[tuple[float, float]], at: float) -> float:
    """Between points in order, straight over the logarithm; below the first in proportion to its fourth root, as
    attention of short rows on Hopper (Shah et al. 2024, arXiv:2407.08608, figure 5); above the last as there."""
    if at <= points[0][0]:
        return points[0][1] * (max(at, 1.0) / points[0][0]) ** 0.25
    for (low, below), (high, above) in zip(points, points[1:], strict=False):
        if at <= high:
            share = math.log(at / low) / math.log(high / low)
            return below + share * (above - below)
    return points[-1][1]
