"""Backwards split in two: where the products run, how often, and that nobody overwrites what they wait for."""

from __future__ import annotations

import shutil
from collections import Counter
from typing import Any
from unittest import mock

import pytest
import torch
from pool import WorkerPool
from test_gradients import ACCUMULATION, TOLERANCE, Case, gradient_errors
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from hf_nanotron.ops.linear import Linear, add_product
from hf_nanotron.parallel.zero import gradients
from hf_nanotron.parallel.zero.deferred import DeferredWork
from hf_nanotron.parallel.zero.gradients import GradientBuckets
from hf_nanotron.prepare.compile import backend_of, inductor_options

PP2: dict[str, Any] = {"pp_size": 2}
SPLIT = {**PP2, "pp_schedule": "zb"}
LINEARS = 32 * (2 * 32 + 2 * 16 + 3 * 48)  # elements of the weights of the layer that each of two ranks has


def products(case: Case) -> tuple[Counter[str], dict[str, float]]:
    """On one rank: elements of weight gradients that products were added to, by where, and the gradients' errors."""
    counts: Counter[str] = Counter()
    where = ["elsewhere"]
    start, stop = GradientBuckets.start_deferring, GradientBuckets.stop_deferring
    run = GradientBuckets.run_deferred

    def counting(total: torch.Tensor, *operands: Any, **kwargs: Any) -> None:
        counts[where[-1]] += total.numel()
        add_product(total, *operands, **kwargs)

    def starting(self: GradientBuckets, stage: int, micro_batch: int) -> None:
        where.append("B")
        start(self, stage, micro_batch)

    def stopping(self: GradientBuckets) -> None:
        stop(self)
        where.pop()

    def running(self: GradientBuckets, stage: int, micro_batch: int, is_last: bool) -> None:
        where.append("W")
        run(self, stage, micro_batch, is_last)
        where.pop()

    with (
        mock.patch.object(gradients, "add_product", counting),
        mock.patch.object(GradientBuckets, "start_deferring", starting),
        mock.patch.object(GradientBuckets, "stop_deferring", stopping),
        mock.patch.object(GradientBuckets, "run_deferred", running),
    ):
        errors, _, _ = gradient_errors(case)
    return counts, errors


def test_each_product_is_computed_once_and_not_in_the_backward(pool: WorkerPool) -> None:
    whole, split, compiled = (
        pool.run(2, products, Case(sizes, overrides={"num_hidden_layers": 2}, compiled=compiles))
        for sizes, compiles in ((PP2, False), (SPLIT, False), (SPLIT, True))
    )
    for before, *after in zip(whole, split, compiled, strict=True):
        for counts, errors in after:
            assert counts["W"] == LINEARS * ACCUMULATION and counts["B"] == 0
            assert counts.total() == before[0].total()  # the rest is the head's, in the forward
            assert max(errors.values()) <= TOLERANCE


class KeepingGradient:
    """Holds on to the operands of every product, and to copies of what they were."""

    def __init__(self) -> None:
        self.products: list[tuple[torch.Tensor, ...]] = []

    def takes_product(self, dtype: torch.dtype) -> bool:
        return True

    def add_product(self, grad_output: torch.Tensor, input: torch.Tensor) -> None:
        self.products.append((grad_output.detach(), grad_output.clone(), input.detach(), input.clone()))


class Branched(nn.Module):
    """The gradient of `wide`'s output is read once more after its product, and may be written to in the same kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.last = Linear(32, 16, bias=False), Linear(16, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.exp()
        return self.last(self.wide(torch.cat((x, x), -1)) + x)


class Chained(nn.Module):
    """The operands of the first product are as large as what the backward makes next, far from its peak memory."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.last = Linear(256, 16, bias=False), Linear(16, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.wide(x.exp()).sin()).sin()


def overwritten(block: nn.Module, width: int, options: dict[str, Any], device: str = "cpu") -> int:
    """Operands that a compiled backward has written to after their product was handed over."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    gradient = KeepingGradient()
    for linear in block.children():
        assert isinstance(linear, Linear)
        linear.accumulate_into(gradient)
    block.to(device)
    x = torch.randn(8, width, device=device, requires_grad=True)
    with torch._inductor.config.patch(compile_threads=1):  # starting processes takes longer than compiling
        torch.compile(block, backend="inductor", options=options)(x).sum().backward()
    assert len(gradient.products) == 2
    pairs = [pair for g, g_then, i, i_then in gradient.products for pair in ((g, g_then), (i, i_then))]
    return sum(not torch.equal(now, then) for now, then in pairs)


@pytest.mark.full_matrix  # compiles for twenty seconds; by default `test_what_a_backend_is_told` has the options
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler")
@pytest.mark.parametrize(
    ("block", "width", "option"), [(Branched, 16, "inplace_buffers"), (Chained, 256, "allow_buffer_reuse")]
)
def test_compiled_code_leaves_operands_alone(block: type[nn.Module], width: int, option: str) -> None:
    """Each of the options is needed: without it, inductor overwrites what a weight gradient waits for."""
    options = inductor_options(None, keeps_operands=True)
    assert overwritten(block(), width, options) == 0
    assert overwritten(block(), width, {**options, option: True}) > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("block", "width"), [(Branched, 16), (Chained, 256)])
def test_compiled_kernels_leave_operands_alone(block: type[nn.Module], width: int) -> None:
    options = inductor_options("max-autotune-no-cudagraphs", keeps_operands=True)
    assert overwritten(block(), width, options, "cuda") == 0


def test_what_a_backend_is_told() -> None:
    assert "inplace_buffers" not in inductor_options("default", keeps_operands=False)
    kept = inductor_options(None, keeps_operands=True)
    assert kept["inplace_buffers"] is False and kept["allow_buffer_reuse"] is False
    assert inductor_options("max-autotune-no-cudagraphs", keeps_operands=True)["max_autotune"]
    backend_of("aot_eager", None, keeps_operands=True)
    with pytest.raises(ValueError, match="torch_compile_backend='cudagraphs'.*'inductor' or 'aot_eager'"):
        backend_of("cudagraphs", None, keeps_operands=True)


def test_work_is_done_in_order_and_frees_its_operands() -> None:
    work, seen = DeferredWork(), []
    operands = [torch.full((1,), float(index)) for index in range(3)]
    alive = [StorageWeakRef(operand.untyped_storage()) for operand in operands]

    def see(operand: torch.Tensor) -> None:
        seen.append((float(operand), sum(not reference.expired() for reference in alive)))

    work.start(0, 1)
    for operand in operands:
        work.do(see, operand)
    work.stop()
    del operands, operand
    assert not seen and len(work) == 1
    work.run(0, 1)
    assert seen == [(0.0, 3), (1.0, 2), (2.0, 1)] and len(work) == 0
    work.do(see, torch.ones(1))
    assert len(seen) == 4, "outside of a split backward, work is done at once"


def test_an_operand_that_was_written_to_is_seen() -> None:
    work, operand = DeferredWork(), torch.ones(2)
    work.start(0, 0)
    work.do(torch.neg, operand)
    work.stop()
    operand.view(2, 1).add_(1)
    with pytest.raises(RuntimeError, match="stage 0 was modified in place"):
        work.run(0, 0)
