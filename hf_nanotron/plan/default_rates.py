"""Rates of GPUs that nobody has measured on the spot: H200 and H100 as we measured them, others scaled from these.

Each figure names its place in `examples/benchmarks/NOTEBOOK.md`. Which rows of the benchmarks they come from, and which
test them, is in `examples/benchmarks/measured_rows.json`.
"""

from __future__ import annotations

from dataclasses import replace

from ..monitor.gpus import GPU, find_gpu
from .rates import AttentionRate, LinkRate, ProductRate, Rates

# Section "Power": tokens, out, in -> TFLOP/s of forward, input gradient, weight gradient, after 1.2 s without a pause.
SUSTAINED = {
    (16384, 14336, 4096): (693, 689, 688),
    (16384, 4096, 14336): (683, 690, 689),
    (32768, 8192, 2048): (668, 704, 692),
}
KINDS = ("forward", "input_gradient", "weight_gradient")
# README, "Floor" (head size 64 at 4,096 and 128 at 8,192); notebook, "A mixture of experts" (128 at 4,096) and "Context
# parallelism on two GPUs" (one call over a row of 32,768). A call over 131,072 tokens alone reaches up to 667, and in a
# step, where power limits it, what its row in "Long sequences on one GPU" leaves for it.
ATTENTION = {(64, 4096): 442e12, (128, 4096): 525e12, (128, 8192): 567e12, (128, 32768): 587e12, (128, 131072): 580e12}
# "What each change gave": FP8 products with their sums in fp32.
FP8 = 1346e12
# "What is left" (H100: gated activation); the same bytes in the H200's 33.0 and 36.1 ms of "Where the time goes".
MEMORY = {"h100": 3.0e12, "h200": 4.15e12}
MEMORY_SHARE = 0.88  # of the data sheet's: the mean of these two
# "ZeRO stages" (two H200): 6.5 GB received in 30 ms a micro-batch at stage 2, 3.2 GB in 14.5 ms at stage 1, 12.9 GB in
# 66 ms at stage 0; "Tokens are sent once": 17 GB in 98 ms. Sends were not measured alone: as all-gathers.
PAIR = {"all_gather": 223e9, "reduce_scatter": 215e9, "all_reduce": 195e9, "all_to_all": 175e9, "send": 200e9}
# Not measured by us: what NCCL's own tests reach through the switches of a host, of a link's bytes in one direction.
SWITCHED = 0.8
INSIDE, BETWEEN = 20e-6, 40e-6  # seconds of a small collective
NETWORK_SHARE = 0.9
LAUNCH = 5e-6
# "The optimizer's state on the host": 12 GB each way in 0.264 s, with the update of what is there.
HOST_COPY = 91e9


def default_rates(gpu: str | GPU) -> Rates:
    """Rates of a GPU of the table.

    Raises:
        ValueError: for a GPU that is not in the table, with those that are.
    """
    row = find_gpu(gpu) if isinstance(gpu, str) else gpu
    known = find_gpu("h200")
    share = row.bf16 / known.bf16
    products = tuple(
        ProductRate(tokens, inner, outer, kind, 2.0 * tokens * outer * inner / (rate * 1e12 * share))
        for (tokens, outer, inner), found in SUSTAINED.items()
        for kind, rate in zip(KINDS, found, strict=True)
    )
    attention = tuple(
        AttentionRate(size, length, rate * share, rate * share) for (size, length), rate in ATTENTION.items()
    )
    measured = row.name in MEMORY
    return Rates(
        gpu=row.name,
        source=(
            "measured on one and two GPUs of this kind (examples/benchmarks/NOTEBOOK.md)"
            if measured
            else "scaled from what an H200 reaches of its data sheet, and not measured on this GPU"
        ),
        measured=measured,
        products=products,
        fp8=None if row.fp8 is None else FP8 * row.fp8 / (known.fp8 or 1.0),
        attention=attention,
        memory=MEMORY.get(row.name, MEMORY_SHARE * row.memory),
        launch=LAUNCH,
        host_copy=HOST_COPY,
        links=(*_inside(row, known), *_between(row)),
        made={},
    )


def completed(rates: Rates) -> Rates:
    """`rates`, with the links of the GPU's data sheet where none were measured: inside a host, or between hosts.

    A GPU that is not in the table has none; a plan that needs them is refused.
    """
    missing = {"inside", "between"} - {link.place for link in rates.links}
    try:
        known = default_rates(rates.gpu).links if missing else ()
    except ValueError:
        return rates
    return replace(rates, links=(*rates.links, *(link for link in known if link.place in missing)))


def refuse_other_gpu(rates: Rates, gpu: GPU) -> None:
    """Refuse rates that were measured on another GPU of the table than the one that is planned for.

    Those of a GPU that is not in the table may stand for one that is.

    Raises:
        ValueError: with both names.
    """
    try:
        own = find_gpu(rates.gpu)
    except ValueError:
        if rates.made.get("device_type") != "cpu":
            return
        named = "a CPU"
    else:
        if own == gpu:
            return
        named = own.name
    raise ValueError(
        f"the rates are of {named}, and the plan is for {gpu.name}: measure them on {gpu.name} with `hf-nanotron bench "
        f"--rates OUT.json`, leave them out{'' if named == 'a CPU' else f', or plan for {named}'}."
    )


def assumed_links(rates: Rates, gpus: int, gpus_per_node: int) -> str | None:
    """Which links of a job of `gpus` GPUs were not measured, in a sentence; None if all were."""
    own = rates.links if rates.made else ()  # of defaults, pairs were measured alone
    pairs = 2 if rates.measured and not rates.made else 1
    inside = max((link.ranks for link in own if link.place == "inside"), default=pairs)
    said = []
    if min(gpus, gpus_per_node) > inside:
        said.append(f"between more than {inside} GPUs of a node" if inside > 1 else "between GPUs of a node")
    if gpus > gpus_per_node and not any(link.place == "between" for link in own):
        said.append(f"between nodes ({NETWORK_SHARE:.0%} of the data sheet's)")
    return None if not said else f"Not measured: links {' and '.join(said)}."


def _inside(row: GPU, known: GPU) -> list[LinkRate]:
    """A pair as two H200, larger groups through switches; a link without switches is shared by all."""
    links = [LinkRate(name, 2, INSIDE, rate * row.link / known.link) for name, rate in PAIR.items()]
    return [*links, *(LinkRate(name, 8, INSIDE, SWITCHED * row.link) for name in PAIR if name != "send")]


def _between(row: GPU) -> list[LinkRate]:
    return [LinkRate(name, 2, BETWEEN, NETWORK_SHARE * row.network, "between") for name in PAIR]
