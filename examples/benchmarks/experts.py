"""Speed of the experts' kernels on one GPU: products by expert, permutation and activation.

    python examples/benchmarks/experts.py --experts 64 --tokens 8192 --top-k 8 --hidden 2048 --inner 768

Prints one JSON object a line. Products are in TFLOP/s, beside `torch._grouped_mm` for the weight gradient (which rounds
it to bf16 and leaves the addition to fp32 to be done); the others in ms and in GB/s of what must be read and written.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import torch
from timing import measure
from torch.nn import functional as F

from hf_nanotron.ops.gated import silu_and_multiply
from hf_nanotron.ops.grouped_mm import grouped_linear
from hf_nanotron.ops.kernels.grouped import CONFIGS, add_grouped_product
from hf_nanotron.ops.permute import gather_rows, permute, sort_by_expert, sum_rows, unpermute, unpermute_gradients

BF16 = torch.bfloat16


def report(name: str, function: Callable[[], object], repeats: int, flops: float = 0.0, moved: float = 0.0) -> None:
    try:
        time, spread = measure(function, repeats)
    except Exception as error:  # a tiling that this GPU cannot run, or an operation that this torch lacks
        print(json.dumps({"name": name, "error": f"{type(error).__name__}: {error}"[:300]}), flush=True)
        return
    line: dict[str, object] = {"name": name, "ms": round(time, 4), "spread_ms": round(spread, 4)}
    if flops:
        line["tflops"] = round(flops / time / 1e9, 1)
    if moved:
        line["gb_per_s"] = round(moved / time / 1e6, 1)
    print(json.dumps(line), flush=True)


def products(offsets: torch.Tensor, rows: int, wide: int, out: int, name: str, repeats: int) -> None:
    """One stack `[experts, out, wide]`: forward, gradient of the rows, gradient of the weights."""
    experts, flops = offsets.shape[0], 2.0 * rows * wide * out
    x, grad = torch.randn(rows, wide, device="cuda", dtype=BF16), torch.randn(rows, out, device="cuda", dtype=BF16)
    weight = torch.randn(experts, out, wide, device="cuda", dtype=BF16)
    total = torch.zeros(experts, out, wide, device="cuda")
    grouped = getattr(F, "grouped_mm", None) or torch._grouped_mm

    with torch.no_grad():
        report(f"{name} forward", lambda: grouped_linear(x, weight, offsets), repeats, flops)
        transposed = weight.transpose(1, 2)
        report(f"{name} forward, torch", lambda: grouped(x, transposed, offs=offsets), repeats, flops)
        report(f"{name} dgrad", lambda: grouped_linear(grad, weight, offsets, True), repeats, flops)
        report(f"{name} dgrad, torch", lambda: grouped(grad, weight, offs=offsets), repeats, flops)
        report(f"{name} wgrad, torch, bf16", lambda: grouped(grad.t(), x, offs=offsets), repeats, flops)
        report(
            f"{name} wgrad, torch, added to fp32",
            lambda: total.add_(grouped(grad.t(), x, offs=offsets)),
            repeats,
            flops,
        )
        for config in CONFIGS:
            for overwrite in (True, False):
                report(
                    f"{name} wgrad, {'overwritten' if overwrite else 'added'}, {tuple(config)}",
                    lambda config=config, overwrite=overwrite: add_grouped_product(
                        total, grad, x, offsets, overwrite, config
                    ),
                    repeats,
                    flops,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=768, help="features of one expert")
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    experts, tokens, top_k = arguments.experts, arguments.tokens, arguments.top_k
    hidden, inner, repeats = arguments.hidden, arguments.inner, arguments.repeats
    torch.manual_seed(0)
    print(json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__, **vars(arguments)}))

    rows = tokens * top_k
    even = torch.arange(1, experts + 1, device="cuda", dtype=torch.int32) * (rows // experts)
    even[-1] = rows
    # As a router that is not balanced makes it: the busiest expert has several times the mean, some have few rows.
    scores = torch.randn(tokens, experts, device="cuda") + torch.randn(experts, device="cuda")
    index = scores.topk(top_k).indices
    sorting = sort_by_expert(index, experts)
    counts = sorting.counts.float()
    print(json.dumps({"uneven: max/mean": round(float(counts.max() / counts.mean()), 2), "min": int(counts.min())}))
    for kind, offsets in (("even", even), ("uneven", sorting.offsets)):
        products(offsets, rows, hidden, 2 * inner, f"{kind} gate_up", repeats)
        products(offsets, rows, inner, hidden, f"{kind} down", repeats)

    row = hidden * 2.0  # bytes
    x = torch.randn(tokens, hidden, device="cuda", dtype=BF16)
    y = torch.randn(rows, hidden, device="cuda", dtype=BF16)
    weights = torch.rand(tokens, top_k, device="cuda")
    report("sort", lambda: sort_by_expert(index, experts), repeats)
    report("permute", lambda: permute(x, sorting), repeats, moved=(tokens + rows) * row)
    report("permute, backward", lambda: sum_rows(y, sorting.inverse, None), repeats, moved=(tokens + rows) * row)
    report("unpermute", lambda: unpermute(y, sorting, weights), repeats, moved=(tokens + rows) * row)
    report(
        "unpermute, backward",
        lambda: unpermute_gradients(x, y, sorting.order, weights),
        repeats,
        moved=(tokens + 2 * rows) * row,
    )
    report("gather, torch", lambda: x[sorting.order // top_k], repeats, moved=(tokens + rows) * row)
    assert torch.equal(gather_rows(x, sorting.order, top_k), x[sorting.order // top_k])

    gate_up = torch.randn(rows, 2 * inner, device="cuda", dtype=BF16)
    leaf, grad = gate_up.clone().requires_grad_(), torch.randn(rows, inner, device="cuda", dtype=BF16)
    report("activation", lambda: silu_and_multiply(gate_up), repeats, moved=rows * inner * 6.0)

    def plain() -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    report("activation, torch", plain, repeats, moved=rows * inner * 6.0)
    out = silu_and_multiply(leaf)
    report(
        "activation, backward",
        lambda: torch.autograd.grad(out, leaf, grad, retain_graph=True),
        repeats,
        moved=rows * inner * 10.0,
    )


if __name__ == "__main__":
    main()
