"""Experts in parts on two GPUs: the same numbers for any number of parts, close to those of experts that wait for all.

Skips without two GPUs.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from test_gpu_tp_overlap import launch

GPUS = torch.cuda.device_count()
BF16 = torch.bfloat16
ROUNDS = 20
ROUNDED = 1e-2  # relative, of whole tensors


class Total:
    """fp32 memory of a weight's gradient."""

    def __init__(self, parameter: torch.nn.Parameter) -> None:
        self.total = torch.full_like(parameter, math.nan, dtype=torch.float32)
        self.is_fresh, self.held = True, 0

    def takes_product(self, dtype: torch.dtype) -> bool:
        return True

    def add_grouped_product(self, left: torch.Tensor, right: torch.Tensor, offsets: torch.Tensor) -> None:
        from hf_nanotron.ops.grouped_mm import add_grouped_product

        add_grouped_product(self.total, left, right, offsets, self.is_fresh)
        self.is_fresh = False

    def hold(self) -> None:
        self.held += 1

    def add_held_grouped_product(self, left: torch.Tensor, right: torch.Tensor, offsets: torch.Tensor) -> None:
        self.held -= 1
        self.add_grouped_product(left, right, offsets)


def parts(directory: str, _: Any) -> None:
    """What torchrun starts: a layer with ranks that are late at random, and tokens that prefer some experts."""
    from test_experts import QWEN, build, parallel

    from hf_nanotron import ParallelConfig
    from hf_nanotron.parallel.mesh import ParallelMesh

    mesh = ParallelMesh(ParallelConfig(ep_size=int(os.environ["WORLD_SIZE"])))
    sizes = {"hidden_size": 256, "moe_intermediate_size": 128, "num_experts": 16, "num_local_experts": 16}
    ours = parallel(build(*QWEN, **sizes), group=mesh.ep)
    for name, parameter in list(ours.named_parameters()):
        setattr(ours, name, torch.nn.Parameter(parameter.detach().chunk(mesh.ep.size)[mesh.ep.rank].clone() / 5))
    ours.to(mesh.device, BF16).train()
    delays = torch.Generator().manual_seed(mesh.rank)
    different = []
    for index in range(ROUNDS):
        tokens = (3000, 0, 517, 2048)[(index + mesh.rank) % 4]
        generator = torch.Generator(mesh.device).manual_seed(100 * index + mesh.rank)
        draw = lambda *shape: torch.randn(shape, generator=generator, device=mesh.device)  # noqa: B023, E731
        x, grad = draw(tokens, 256).to(BF16), draw(tokens, 256).to(BF16)
        preferred = torch.linspace(0, index % 5, 16, device=mesh.device)
        weights, chosen = (draw(tokens, 16) + preferred).softmax(1).topk(4)
        # With a capacity, ranks have as many rows whatever they are: all follow from 3,000 tokens.
        ours.capacity_factor, ours.capacity_tokens = (None, None) if index % 3 else (1.25, 3000)
        found: list[list[torch.Tensor]] = []
        for number in (1, 2, 3, 8):
            ours.parts = number
            totals = {name: Total(parameter) for name, parameter in ours.named_parameters()}
            ours.weight_gradients = totals
            mine, routing = x.clone().requires_grad_(), weights.clone().requires_grad_()
            torch.cuda._sleep(int(torch.randint(0, 2_000_000, (), generator=delays)))
            out = ours(mine, chosen, routing)
            torch.cuda._sleep(int(torch.randint(0, 2_000_000, (), generator=delays)))
            out.backward(grad)
            assert mine.grad is not None and routing.grad is not None
            assert all(total.held == 0 for total in totals.values())
            found.append([out.detach(), mine.grad, routing.grad, *(total.total for total in totals.values())])
        plain, two, *others = found
        for number, result in zip((3, 8), others, strict=True):
            errors = [float((a - b).abs().max()) if a.numel() else 0.0 for a, b in zip(result, two, strict=True)]
            if not all(error == 0.0 for error in errors):  # nor is NaN
                different.append((index, number, errors))
        # Without parts a token's outputs are summed on each rank before they travel: another rounding to bf16.
        errors = [float((a - b).norm() / b.norm().clamp(min=1e-9)) for a, b in zip(two, plain, strict=True)]
        if not all(error < ROUNDED for error in errors):
            different.append((index, 1, errors))
        assert all(bool(torch.isfinite(x).all()) for x in plain)
    if mesh.rank == 0:
        Path(directory, "parts.json").write_text(json.dumps(different))
    mesh.close()


@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
def test_parts_change_no_bit(tmp_path: Path) -> None:
    launch(2, "parts", str(tmp_path), "null", file=__file__)
    assert json.loads((tmp_path / "parts.json").read_text()) == []


if __name__ == "__main__":
    import sys

    {"parts": parts}[sys.argv[1]](sys.argv[2], json.loads(sys.argv[3]))
