"""Tensor-parallel communication beside matrix products, over messages of a process group.

The same code as on GPUs but for the transport (`test_gpu_tp_overlap.py` has the other one).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from family_runs import compare, reference
from pool import WorkerPool
from test_compile import compiled_steps
from test_gradients import BIASES, TIED, Case, gradient_errors
from torch import nn
from torch.nn import functional as F

from hf_nanotron import ParallelConfig
from hf_nanotron.ops.linear import Linear
from hf_nanotron.parallel.collectives import gather_sequence, reduce_scatter, scatter_sum
from hf_nanotron.parallel.mesh import ParallelMesh
from hf_nanotron.parallel.tp.held_products import ProductQueue
from hf_nanotron.parallel.tp.layers import ColumnParallelLinear, RowParallelLinear
from hf_nanotron.parallel.tp.overlap import BlockOverlap, Overlap
from hf_nanotron.parallel.tp.regions import Region
from hf_nanotron.parallel.tp.transport import Messages

TOLERANCE = 1e-5  # of the largest value of a parameter's gradient
ON: dict[str, Any] = {"tp_overlap": True}
CASES = {
    "tp2": Case({"tp_size": 2, **ON}, batches="padded"),
    "tp2-biases-dp2-zero2": Case({"tp_size": 2, "zero_stage": 2, **ON}, overrides=BIASES, dp=2),
    "tp2-checkpointed": Case({"tp_size": 2, **ON}, "qwen2", checkpoint_every=1, frozen=("embed_tokens", "layernorm")),
    "tp2-pp2-tied": Case({"tp_size": 2, "pp_size": 2, **ON}, "qwen3", TIED, "packed"),
    "tp4-two-kv-heads": Case({"tp_size": 4, **ON}, "qwen2", TIED, "packed"),
}


def counted(function: Any, *args: Any) -> tuple[Any, dict[str, int]]:
    """The result of a job, and how often what overlaps did so on this rank."""
    counts: Counter[str] = Counter()
    gather, take, run, flush = Overlap.gather, Overlap.take, ProductQueue._run, ProductQueue.flush

    def counted_gather(self: Overlap, x: torch.Tensor, layers: list[Linear]) -> Any:
        counts["products ahead"] += len(layers)
        return gather(self, x, layers)

    def counted_take(self: Overlap, output: torch.Tensor) -> torch.Tensor | None:
        taken = take(self, output)
        counts["not sent" if taken is None else "sent"] += 1
        return taken

    def counted_run(self: ProductQueue) -> int:
        counts["weight gradients"] += 1
        return run(self)

    def counted_flush(self: ProductQueue) -> None:
        counts["exposed weight gradients"] += len(self)
        flush(self)

    with (
        mock.patch.multiple(Overlap, gather=counted_gather, take=counted_take),
        mock.patch.multiple(ProductQueue, _run=counted_run, flush=counted_flush),
    ):
        return function(*args), dict(counts)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_gradients(pool: WorkerPool, case: Case) -> None:
    """Every gradient of stock transformers, and everything overlaps but what the first micro-batch learns from."""
    results = pool.run(case.world_size, counted, gradient_errors, case)
    trained = set(results[0][0][1])
    assert set().union(*(errors for (errors, _, _), _ in results)) == trained, "a gradient is on no rank"
    wrong = {name: error for (errors, _, _), _ in results for name, error in errors.items() if not error <= TOLERANCE}
    assert not wrong, wrong
    assert all(loss <= 1e-6 for (_, _, loss), _ in results)
    blocks = 2 * 4 // case.sizes.get("pp_size", 1)
    for _, counts in results:
        assert counts["not sent"] == blocks and counts["sent"] >= 2 * blocks
        assert counts["products ahead"] >= 2 * (5 * blocks // 2)  # q, k, v, gate and up, in two micro-batches
        assert counts["weight gradients"] == 3 * (7 * blocks // 2)
        assert counts["exposed weight gradients"] == 0


def test_a_missing_sum_is_seen(pool: WorkerPool) -> None:
    results = pool.run(2, gradient_errors, replace(CASES["tp2"], forget_partial_sums=True))
    assert any(error > TOLERANCE for errors, _, _ in results for error in errors.values())


@pytest.mark.parametrize("family", ["gemma2", "deepseek_v3", "gpt_neox", "afmoe"])
def test_families(pool: WorkerPool, tmp_path: Path, family: str) -> None:
    """Norms behind the sum, low-rank inputs, two blocks side by side, a router that is handed flat tokens."""
    path = str(tmp_path / "reference")
    torch.save(reference(family), path)
    for (errors,) in pool.run(2, compare, family, path, [{"tp_size": 2, **ON}], {}):
        assert errors["loss"] <= 1e-6 and errors["norm"] <= TOLERANCE and errors["gradient"] <= TOLERANCE


def test_compiled_blocks(pool: WorkerPool, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Linears find what was made ahead from inside of a compiled block too."""
    path = str(tmp_path / "reference")
    torch.save(reference("qwen3"), path)
    backends = ["aot_eager"]
    if request.config.getoption("--full-matrix"):
        backends.append("inductor")  # which overwrites what the queue holds unless it is told not to
    for backend in backends:
        for (errors, _, breaks), counts in pool.run(2, counted, compiled_with, backend, path):
            assert max(errors) < TOLERANCE and breaks == 0
            assert counts["sent"] == 7 * counts["not sent"] and counts["products ahead"] > 0


def compiled_with(backend: str, path: str) -> Any:
    from hf_nanotron.prepare import compile as module

    blocks = module.compile_layers
    with mock.patch.object(module, "compile_layers", lambda model, _, *rest: blocks(model, backend, *rest)):
        return compiled_steps("qwen3", path, {"tp_size": 2, **ON}, {})


class Restless(nn.Module):
    """A block that does something else with its hidden states in every call."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.first, self.other = Linear(6, 8, bias=False), Linear(6, 8)
        self.last = Linear(8, 6)
        self.calls = 0

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, str]:
        self.calls += 1
        x = hidden_states
        if self.calls == 3:
            x = x.clone()
            x[:, 0] = 0  # not what the products were made of
        if self.calls == 4:
            x = x.mul_(0.5) if self.in_place else x * 0.5  # the very tensor, but other values
        y = self.first(x) * (self.other(x) if self.calls != 5 else 1)
        if self.calls == 6:
            y = y + self.first(x)  # a second time
        y = self.last(y)
        if self.calls in (2, 7):
            y = 2 * y
        return y, "more"


def restless(world: int, overlaps: bool) -> list[list[torch.Tensor]]:
    """Outputs and gradients of every call."""
    mesh = ParallelMesh(ParallelConfig(tp_size=world))
    torch.manual_seed(3)
    block = Restless(in_place=overlaps).double()
    block.first.__class__ = block.other.__class__ = ColumnParallelLinear
    block.last.__class__ = RowParallelLinear
    block.last.adds_bias = mesh.tp_rank == 0  # type: ignore[assignment]

    class Total:
        def takes_product(self, dtype: torch.dtype) -> bool:
            return True

        def hold(self) -> None:
            pass

        def add_product(self, grad: torch.Tensor, input: torch.Tensor) -> None:
            products.append(grad.T @ input)

        add_held_product = add_product

    products: list[torch.Tensor] = []
    overlap = BlockOverlap(Overlap(mesh.tp, Messages(mesh.tp)), block) if overlaps else None
    Region(mesh.tp, True, False, overlap=overlap).attach(block)
    for layer in (block.first, block.other, block.last):
        layer.accumulate_into(Total())
    found = []
    for call in range(9):
        torch.manual_seed(10 * call + mesh.tp_rank)
        x = torch.randn(1 + call % 3, 4, 6, dtype=torch.float64, requires_grad=True)
        y, more = block(x.clone())
        assert more == "more"
        if call != 6:  # whose backward never comes
            y.square().sum().backward()
            found.append([y.detach(), x.grad, *products])
        products.clear()
    mesh.close()
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_a_block_that_does_something_else(pool: WorkerPool, world: int) -> None:
    """Nothing made ahead is taken for something else."""
    for got, expected in zip(
        pool.run(world, restless, world, True), pool.run(world, restless, world, False), strict=True
    ):
        for one, other in zip(got, expected, strict=True):
            assert len(one) == len(other)
            for name, (a, b) in enumerate(zip(one[:2], other[:2], strict=True)):
                torch.testing.assert_close(a, b, msg=str(name))
            order = [sorted((tuple(p.shape), float(p.sum())) for p in products[2:]) for products in (one, other)]
            for (shape, total), (other_shape, other_total) in zip(*order, strict=True):
                assert shape == other_shape and total == pytest.approx(other_total)


def exchanged(world: int) -> None:
    """Gathers and sums of odd shapes, in any dtype, are those of the collectives, bit by bit where two are added."""
    mesh = ParallelMesh(ParallelConfig(tp_size=world))
    for pieces, dtype, (samples, tokens) in (
        (1, torch.float32, (1, 1)),
        (2, torch.bfloat16, (3, 5)),
        (4, torch.float32, (2, 3)),
        (2, torch.float32, (1, 1)),
    ):
        overlap = Overlap(mesh.tp, Messages(mesh.tp), pieces)
        torch.manual_seed(mesh.tp_rank)
        x = torch.randn(samples, tokens, 8).to(dtype)
        layer, last = nn.Linear(8, 5).to(dtype), nn.Linear(8, 4, bias=False).to(dtype)
        whole, (output,) = overlap.gather(x, [layer])  # type: ignore[list-item]
        assert torch.equal(whole, gather_sequence(x, mesh.tp))
        torch.testing.assert_close(output, layer(whole).detach())
        summed, expected = overlap.reduce(whole * mesh.tp_rank), reduce_scatter(whole * mesh.tp_rank, mesh.tp, 1)
        if world == 2:
            assert torch.equal(summed, expected)
        loose = {"rtol": 0.02, "atol": 0.2} if dtype == torch.bfloat16 else {}  # gloo rounds after each addition
        torch.testing.assert_close(summed, expected, **loose)
        sent = overlap.multiply_and_send(whole, last.weight, last.bias)
        torch.testing.assert_close(sent, F.linear(whole, last.weight).detach())
        taken = overlap.take(sent.view(-1, 4))
        assert taken is not None
        torch.testing.assert_close(taken, scatter_sum(sent, mesh.tp), **loose)
        overlap.multiply_and_send(whole, last.weight, last.bias)
        assert overlap.take(sent.clone()) is None and overlap.take(sent) is None
    mesh.close()


@pytest.mark.parametrize("world", [2, 4])
def test_exchanges(pool: WorkerPool, world: int) -> None:
    pool.run(world, exchanged, world)


def test_what_cannot_overlap_is_refused() -> None:
    for sizes in ({"tp_size": 1}, {"tp_size": 2, "sequence_parallel": False}):
        with pytest.raises(ValueError, match=r"tp_overlap=True with tp_size=.*leave tp_overlap unset"):
            ParallelConfig(**sizes, **ON)
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert ParallelConfig(tp_size=2).overlaps_tp(gpu) and not ParallelConfig(tp_size=2).overlaps_tp(cpu)
    assert not ParallelConfig().overlaps_tp(gpu) and not ParallelConfig(tp_size=2, tp_overlap=False).overlaps_tp(gpu)
