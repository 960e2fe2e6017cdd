"""What FP8 gains in the linear layers of one decoder layer, on one GPU: products, what makes their operands, and sums.

    python examples/benchmarks/fp8.py                       # the two shapes below
    python examples/benchmarks/fp8.py --model 8b --tokens 8192

Prints one JSON object a line: ms, TFLOP/s, GB/s of what must be read and written, errors against float64. The last
lines of a model are sums over its layer, forward and backward, once with a linear each for queries, keys, values, gate
and up, and once with those merged that read one input. "amax_ms" is what finding scales takes where no other kernel
does it.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional as F

from hf_nanotron.ops.fp8 import Operands, add_scaled_product, product, quantize, scales
from hf_nanotron.ops.kernels.fp8 import TILES, quantize as quantize_kernel
from hf_nanotron.ops.linear import add_product

BF16, FP32 = torch.bfloat16, torch.float32


class Model(NamedTuple):
    """Sizes of a decoder layer."""

    tokens: int
    hidden: int
    key_value: int
    inner: int

    def separate(self) -> list[list[tuple[int, int]]]:
        """`(in, out)` of the linears, those that read one input together."""
        h, kv, i = self.hidden, self.key_value, self.inner
        return [[(h, h), (h, kv), (h, kv)], [(h, h)], [(h, i), (h, i)], [(i, h)]]

    def merged(self) -> list[list[tuple[int, int]]]:
        return [[(group[0][0], sum(out for _, out in group))] for group in self.separate()]


MODELS = {"1b": Model(32768, 2048, 512, 8192), "8b": Model(16384, 4096, 1024, 14336)}


torch._dynamo.config.cache_size_limit = 64  # sizes that `find_scale` is compiled for


def measure(function: Callable[[], object], repeats: int) -> float:
    """Median in ms."""
    for _ in range(3):
        function()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


class Bench:
    """Times functions once for each name and prints them."""

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats
        self.times: dict[str, float] = {}

    def __call__(
        self, name: str, function: Callable[[], object], flops: float = 0.0, moved: float = 0.0, **more: object
    ) -> float:
        if name in self.times:
            return self.times[name]
        try:
            time = measure(function, self.repeats)
        except Exception as error:  # a tiling that this GPU cannot run, or an operation that this torch lacks
            print(json.dumps({"name": name, "error": f"{type(error).__name__}: {error}"[:300]}), flush=True)
            time = float("nan")
        else:
            line: dict[str, object] = {"name": name, "ms": round(time, 4)}
            if flops:
                line["tflops"] = round(flops / time / 1e9, 1)
            if moved:
                line["gb_per_s"] = round(moved / time / 1e6, 1)
            print(json.dumps({**line, **more}), flush=True)
        self.times[name] = time
        return time


def operands(x: torch.Tensor, recipe: str) -> Operands:
    row_scale, column_scale = scales(x, recipe)
    return Operands(*quantize(x, row_scale, column_scale), row_scale, column_scale)


def linear(bench: Bench, tokens: int, wide: int, out: int, thorough: bool) -> dict[str, float]:
    """Times of one layer's three products in bf16 and in FP8; `thorough`: also what is not used."""
    label, flops = f"{tokens}x{wide}x{out}", 2.0 * tokens * wide * out
    x, grad = torch.randn(tokens, wide, device="cuda", dtype=BF16), torch.randn(tokens, out, device="cuda", dtype=BF16)
    weight = torch.randn(out, wide, device="cuda", dtype=BF16) / wide**0.5
    total, one = torch.zeros(out, wide, device="cuda"), torch.ones((), device="cuda")
    found = {
        "bf16": bench(f"{label} bf16 forward", lambda: F.linear(x, weight), flops)
        + bench(f"{label} bf16 input gradient", lambda: grad @ weight, flops)
        + bench(f"{label} bf16 weight gradient", lambda: add_product(total, grad, x, False), flops)
    }
    for recipe in ("tensorwise", "rowwise") if thorough else ("tensorwise",):
        a, g, w = operands(x, recipe), operands(grad, recipe), operands(weight, recipe)
        both, update, first = products(bench, f"{label} {recipe}", a, g, w, total, flops)
        found[recipe], found[f"{recipe} first"] = both + update, both + first
        if thorough:
            variants(bench, f"{label} {recipe}", a, g, w, total, flops)
    found["quantize"] = bench(f"{label} quantize gradient", lambda: quantize(grad, one, one), moved=4.0 * grad.numel())
    find = find_scale()
    found["amax"] = bench(f"{label} amax of gradient", lambda: find(grad), moved=2.0 * grad.numel())
    return found


def products(
    bench: Bench, label: str, a: Operands, g: Operands, w: Operands, total: torch.Tensor, flops: float
) -> tuple[float, float, float]:
    """Times of forward and input gradient, of a weight gradient that is added, and of the first one of a step."""

    def update(overwrite: bool) -> None:
        add_scaled_product(total, g.columns, a.columns, g.column_scale, a.column_scale, overwrite)

    return (
        bench(f"{label} forward", lambda: product(a.rows, w.rows, a.row_scale, w.row_scale, BF16), flops)
        + bench(
            f"{label} input gradient", lambda: product(g.rows, w.columns, g.row_scale, w.column_scale, BF16), flops
        ),
        bench(f"{label} weight gradient, added", lambda: update(False), flops),
        bench(f"{label} weight gradient, first", lambda: update(True), flops),
    )


def make_operands(x: torch.Tensor) -> Callable[[], object]:
    one = torch.ones((), device=x.device)
    return lambda: quantize(x, one, one)


@functools.cache
def find_scale() -> Callable[[torch.Tensor], torch.Tensor]:
    """Compiled as in a model, for every size anew."""
    return torch.compile(lambda x: scales(x, "tensorwise")[0], dynamic=False)


def variants(
    bench: Bench, label: str, a: Operands, g: Operands, w: Operands, total: torch.Tensor, flops: float
) -> None:
    """Other ways to the same products, with their errors against float64 on a corner of the result."""
    corner = 256
    by_row = a.row_scale.dim() > 0
    left, right = g.columns[:corner].double(), a.columns[:corner].double()
    exact = left @ right.t() * g.column_scale.view(-1, 1)[:corner].double() * a.column_scale.view(-1)[:corner].double()

    def error(config: object, run: Callable[[], object]) -> dict[str, float]:
        total.fill_(float("nan"))
        run()
        return {"error": float((total[:corner, :corner].double() - exact).norm() / exact.norm())}

    if by_row:
        return
    for fast in (False, True):

        def torch_product(fast: bool = fast) -> None:
            torch._scaled_mm(
                g.columns,
                a.columns.t(),
                g.column_scale,
                a.column_scale,
                out_dtype=FP32,
                use_fast_accum=fast,
                out=total,
            )

        more = error(fast, torch_product)
        bench(f"{label} weight gradient, torch, fast_accum={fast}", torch_product, flops, **more)
        bench(
            f"{label} forward, torch, fast_accum={fast}",
            lambda fast=fast: torch._scaled_mm(
                a.rows, w.rows.t(), a.row_scale, w.row_scale, out_dtype=BF16, use_fast_accum=fast
            ),
            flops,
        )


def quantization(bench: Bench, tokens: int, width: int) -> None:
    """Every tile of the kernel that makes operands, and what else can be compared with it."""
    x = torch.randn(tokens, width, device="cuda", dtype=BF16)
    scale, moved = scales(x, "tensorwise")[0], 4.0 * x.numel()
    rows, columns = quantize(x, scale, scale)
    for tile in TILES:
        name = f"{tokens}x{width} quantize {tuple(tile)}"
        bench(name, lambda tile=tile: quantize_kernel(x, scale, scale, rows, columns, tile), moved=moved)
    by_row = scales(x, "rowwise")
    for tile in TILES[:3]:
        name = f"{tokens}x{width} quantize rowwise {tuple(tile)}"
        bench(name, lambda tile=tile: quantize_kernel(x, *by_row, rows, columns, tile), moved=moved)
    for tile in TILES:  # a weight's copy, turned over in each backward
        name = f"{tokens}x{width} transpose {tuple(tile)}"
        bench(name, lambda tile=tile: quantize_kernel(rows, None, None, None, columns, tile), moved=moved / 2)
    bench(f"{tokens}x{width} copy", lambda: x.clone(), moved=moved)
    gate, up = torch.randn_like(x), torch.randn_like(x)
    activation = torch.compile(lambda g, u: F.silu(g) * u)

    def with_scale(g: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = F.silu(g) * u
        return out, scales(out, "tensorwise")[0]

    fused = torch.compile(with_scale)
    bench(f"{tokens}x{width} gated activation", lambda: activation(gate, up), moved=6.0 * x.numel())
    bench(f"{tokens}x{width} gated activation and its scale", lambda: fused(gate, up), moved=6.0 * x.numel())


def layer(bench: Bench, name: str, model: Model) -> None:
    quantization(bench, model.tokens, model.inner)
    for kind, groups in (("separate", model.separate()), ("merged", model.merged())):
        sums = dict.fromkeys(("bf16", "tensorwise", "tensorwise first", "quantize", "amax"), 0.0)
        for group in groups:
            wide = group[0][0]
            x = torch.randn(model.tokens, wide, device="cuda", dtype=BF16)
            find = find_scale()
            label = f"{model.tokens}x{wide}"
            sums["quantize"] += bench(f"{label} quantize input", make_operands(x), moved=4.0 * x.numel())
            sums["amax"] += bench(f"{label} amax of input", functools.partial(find, x), moved=2.0 * x.numel())
            del x
            for wide, out in group:
                thorough = (wide, out) in ((model.inner, model.hidden), (model.hidden, model.hidden))
                for key, value in linear(bench, model.tokens, wide, out, thorough).items():
                    if key in sums:
                        sums[key] += value
        fp8, made = sums["tensorwise"], sums["quantize"]
        line = {
            "name": f"{name} layer, {kind}",
            "bf16_ms": round(sums["bf16"], 3),
            "fp8_products_ms": round(fp8, 3),
            "fp8_products_first_ms": round(sums["tensorwise first"], 3),
            "quantize_ms": round(made, 3),
            "amax_ms": round(sums["amax"], 3),
            "speedup_amax_fused": round(sums["bf16"] / (fp8 + made), 3),
            "speedup_amax_apart": round(sums["bf16"] / (fp8 + made + sums["amax"]), 3),
        }
        print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), action="append", help="default: all")
    parser.add_argument("--tokens", type=int, help="instead of the model's")
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    print(json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__}), flush=True)
    for name in args.model or MODELS:
        model = MODELS[name]
        model = model._replace(tokens=args.tokens or model.tokens)
        layer(Bench(args.repeats), name, model)


if __name__ == "__main__":
    main()
