"""Time and memory of the output layer with its loss, forwards and backwards, on one GPU in bf16.

    python head.py --tokens 8192 16384 --hidden 2048 4096 --vocabulary 128256 151936 --out head.json

Compares, for each shape, the fused head and loss of this package (with the weight's gradient in fp32 memory of its own,
as in training; also with other chunk sizes, if given), whole logits with `cross_entropy` in fp32 as stock models
compute it, and Liger-Kernel's fused function if it is installed (both hand autograd a bf16 gradient of the weight).
Prints one JSON line for each row: median, quartiles and range over the repetitions in milliseconds, and the peak of
memory above what weights, hidden states and labels (and our fp32 gradient) take, in MiB. A row that runs out of memory
says so.
"""

import argparse
import gc
import json
import statistics
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from hf_nanotron.ops.linear import add_product
from hf_nanotron.parallel.mesh import Group
from hf_nanotron.parallel.tp.loss import linear_causal_lm_loss

ALONE = Group((0,), 0, None)
MIB = 2**20


class Accumulator:
    """The fp32 gradient of the weight, as the trainer keeps one."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.total = torch.zeros_like(weight, dtype=torch.float32)

    def takes_product(self, dtype: torch.dtype) -> bool:
        return True

    def takes_early(self) -> bool:
        return True

    def add_product(self, grad_output: torch.Tensor, input: torch.Tensor) -> None:
        add_product(self.total, grad_output, input, overwrite=False)


def fused(weight: torch.Tensor, chunk: int | None) -> Callable[..., torch.Tensor]:
    gradient = Accumulator(weight)

    def loss(hidden: torch.Tensor, labels: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        return linear_causal_lm_loss(
            hidden, weight, None, labels, 0, ALONE, items, chunk=chunk, weight_gradient=gradient
        )

    return loss


def whole_logits(weight: torch.Tensor) -> Callable[..., torch.Tensor]:
    def loss(hidden: torch.Tensor, labels: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        logits = F.linear(hidden, weight).float().flatten(0, 1)
        target = F.pad(labels, (0, 1), value=-100)[:, 1:].flatten()
        return F.cross_entropy(logits, target, reduction="sum") / items

    return loss


def liger(weight: torch.Tensor) -> Callable[..., torch.Tensor]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    module = LigerFusedLinearCrossEntropyLoss(reduction="sum")

    def loss(hidden: torch.Tensor, labels: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        target = F.pad(labels, (0, 1), value=-100)[:, 1:].flatten()
        return module(weight, hidden.flatten(0, 1), target) / items

    return loss


def measure(
    make: Callable[[torch.Tensor], Callable[..., torch.Tensor]], shape: tuple[int, int, int], repeats: int
) -> dict[str, Any]:
    """Times of one forward and backward, on the GPU's own clock."""
    tokens, size, vocabulary = shape
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(1, tokens, size, generator=generator, device="cuda").bfloat16().requires_grad_()
    weight = (0.02 * torch.randn(vocabulary, size, generator=generator, device="cuda")).bfloat16().requires_grad_()
    labels = torch.randint(0, vocabulary, (1, tokens), generator=generator, device="cuda")
    items = torch.tensor(tokens, device="cuda")
    loss = make(weight)
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    times, value = [], None
    for turn in range(repeats + 3):
        hidden.grad = weight.grad = None
        if turn == 3:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        value = loss(hidden, labels, items)
        value.backward()
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    assert value is not None
    taken = sorted(start.elapsed_time(end) for start, end in times[3:])
    low, median, high = statistics.quantiles(taken, n=4)
    return {
        "median_ms": round(median, 3),
        "quartiles_ms": [round(low, 3), round(high, 3)],
        "range_ms": [round(taken[0], 3), round(taken[-1], 3)],
        "peak_mib": round((torch.cuda.max_memory_allocated() - held) / MIB),
        "tflops": round(6 * tokens * size * vocabulary / median / 1e9, 1),
        "loss": round(value.item(), 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 16384])
    parser.add_argument("--hidden", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[128256, 151936])
    parser.add_argument("--chunk", type=int, nargs="*", default=[], help="tokens at a time, besides the default")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path)
    cli = parser.parse_args()

    rows: dict[str, Callable[[torch.Tensor], Callable[..., torch.Tensor]]] = {}
    for chunk in (None, *cli.chunk):
        rows["fused" if chunk is None else f"fused, {chunk} tokens"] = lambda weight, size=chunk: fused(weight, size)
    rows["whole logits"] = whole_logits
    try:
        rows[f"liger-kernel {version('liger-kernel')}"] = liger
    except PackageNotFoundError:
        pass
    results = []
    for vocabulary in cli.vocabulary:
        for size in cli.hidden:
            for tokens in cli.tokens:
                for name, make in rows.items():
                    row: dict[str, Any] = {"row": name, "tokens": tokens, "hidden": size, "vocabulary": vocabulary}
                    try:
                        row.update(measure(make, (tokens, size, vocabulary), cli.repeats))
                    except torch.OutOfMemoryError:
                        row["error"] = "out of memory"
                    gc.collect()
                    torch.cuda.empty_cache()
                    results.append(row)
                    print(json.dumps(row), flush=True)
    if cli.out is not None:
        setup = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "repeats": cli.repeats}
        cli.out.write_text(json.dumps({"setup": setup, "rows": results}, indent=1))


if __name__ == "__main__":
    main()
