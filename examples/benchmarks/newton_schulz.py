"""What Muon adds to a step on one GPU: Newton-Schulz of all matrices of a shape, and the passes over memory beside it.

    python newton_schulz.py --shape 1b --out newton_schulz.jsonl

A JSON line for each way to compute what is symmetric: whole products by cuBLAS (`whole`), and half of the tiles by
quack's kernel where it is installed (`half`), with the seconds of its first call, which compiles. Milliseconds of all
matrices of the model (median of `--repeats`, each shape in batches as the optimizer makes them, on random numbers),
TFLOP/s counted as whole products by the plain iteration, and the distance from the iteration in fp32. A last line has
the ms of the element-wise passes over momentum and masters, and of AdamW's for as many elements.
"""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from figures import shapes_of
from shapes import SHAPES, make_config
from timing import measure

from hf_nanotron.ops import newton_schulz
from hf_nanotron.ops.kernels.momentum import apply_update, update_momentum
from hf_nanotron.ops.kernels.symmetric import quack_kernel
from hf_nanotron.parallel.zero.whole_matrices import BATCH_ELEMENTS

Symmetric = Callable[..., torch.Tensor]


def whole(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None = None, **factors: float) -> torch.Tensor:
    """Every element, by cuBLAS."""
    if c is None:
        return torch.bmm(a, b)
    product = torch.baddbmm(c, a, b, beta=factors.get("beta", 1.0), alpha=factors.get("alpha", 1.0))
    if factors.get("diagonal"):
        product.diagonal(dim1=1, dim2=2).add_(factors["diagonal"])
    return product


def ways() -> dict[str, Symmetric]:
    return {"whole": whole, **({} if quack_kernel() is None else {"half": newton_schulz.symmetric})}


def matrices_of(shape: str) -> Counter[tuple[int, int]]:
    """Sizes of the matrices of the layers of a model, with how many it has of each."""
    shapes = shapes_of(make_config(shape, 4096))
    return Counter((one[0], one[1]) for name, one in shapes.items() if ".layers." in name and len(one) == 2)


def milliseconds(sizes: Counter[tuple[int, int]], repeats: int) -> dict[str, float]:
    """Of all matrices of each size."""
    found = {}
    for (rows, columns), count in sizes.items():
        batch = max(1, min(count, BATCH_ELEMENTS // (rows * columns)))
        x = torch.randn(batch, rows, columns, device="cuda", dtype=torch.bfloat16)
        found[f"{count} x {rows} x {columns}"] = (
            measure(lambda x=x: newton_schulz.orthogonalize(x), repeats)[0] * count / batch
        )  # type: ignore[misc]
    return found


def distance(rows: int, columns: int) -> float:
    """From the iteration in fp32, of a matrix whose singular values fall to a thousandth."""
    generator = torch.Generator("cuda").manual_seed(0)
    size = min(rows, columns)
    left, right = (
        torch.linalg.qr(torch.randn(n, size, device="cuda", generator=generator))[0] for n in (rows, columns)
    )
    x = ((left * torch.logspace(0, -3, size, device="cuda")) @ right.T)[None].bfloat16()
    exact = newton_schulz.orthogonalize(x.float())
    return float((newton_schulz.orthogonalize(x.clone()).float() - exact).norm() / exact.norm())


def passes(elements: int, repeats: int) -> dict[str, float]:
    """ms of what is element-wise, of so many elements, in pieces of 2^27."""
    piece = min(elements, 1 << 27)
    gradient, master, first, second = (torch.randn(piece, device="cuda") for _ in range(4))
    second.abs_()
    half, rounded = (torch.empty(piece, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    options: dict[str, Any] = {"grad_scale": None, "found_inf": None}
    ms = {
        "momentum": lambda: update_momentum(gradient, first, half, beta=0.95, nesterov=True, **options),
        "update": lambda: apply_update(master, half, rounded, decay=0.999, rate=1e-5, found_inf=None),
    }
    found = {name: measure(call, repeats)[0] * elements / piece for name, call in ms.items()}
    optimizer = adamw_optimizer(master, gradient, rounded)
    found["adamw"] = measure(optimizer.step, repeats)[0] * elements / piece
    return {name: round(value, 3) for name, value in found.items()}


def adamw_optimizer(master: torch.Tensor, gradient: torch.Tensor, rounded: torch.Tensor) -> torch.optim.Optimizer:
    from hf_nanotron.optim.adamw import AdamW

    parameter = torch.nn.Parameter(master)
    parameter.grad = gradient
    return AdamW([parameter], lr=1e-4, rounded={parameter: rounded})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    cli = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "newton_schulz.py measures a GPU, and torch sees none.\n")
    sizes = matrices_of(cli.shape)
    elements = sum(rows * columns * count for (rows, columns), count in sizes.items())
    flops = sum(newton_schulz.flops(rows, columns) * count for (rows, columns), count in sizes.items())
    widest = max(sizes, key=lambda size: max(size))

    def write(line: dict[str, Any]) -> None:
        print(text := json.dumps(line), flush=True)
        if cli.out is not None:
            with cli.out.open("a") as file:
                file.write(text + "\n")

    for name, product in ways().items():
        with mock.patch.object(newton_schulz, "symmetric", product):
            began = time.perf_counter()
            newton_schulz.orthogonalize(torch.randn(1, *widest, device="cuda", dtype=torch.bfloat16))
            torch.cuda.synchronize()
            first = round(time.perf_counter() - began, 2)
            ms = milliseconds(sizes, cli.repeats)
            far = {"x".join(map(str, size)): round(distance(*size), 4) for size in ((2048, 2048), widest)}
        total = sum(ms.values())
        parts = {size: round(value, 3) for size, value in ms.items()}
        write(
            {
                "way": name,
                "ms": round(total, 2),
                "tflops_as_whole": round(flops / total / 1e9),
                "by_size": parts,
                "first_call_s": first,
                "distance": far,
            }
        )
    write({"passes_ms": passes(elements, cli.repeats), "elements": elements, "plain_tflop": round(flops / 1e12, 1)})


if __name__ == "__main__":
    sys.exit(main())
