"""The kernels of the fused head and loss against plain torch in fp64; skips where there is no GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from hf_nanotron.ops.cross_entropy import ABSENT, IGNORE_INDEX, token_statistics, write_gradient
from hf_nanotron.ops.linear import add_product
from hf_nanotron.parallel.mesh import Group
from hf_nanotron.parallel.tp.loss import linear_causal_lm_loss

DEVICE = "cuda"
ALONE = Group((0,), 0, None)
COLUMNS = (1, 5, 120, 4096, 4097, 50257, 128256, 151936)
ROWS = 9
# Relative to 1 for statistics, to the factor for gradients: fp32 mathematics, then one rounding to the logits' dtype.
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def rows(columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, some of them far from zero, with rows as far apart as `ops/columns.py` puts them, and targets: first and
    last column, absent and ignored ones."""
    generator = torch.Generator().manual_seed(columns)
    logits = 4 * torch.randn(ROWS, columns, generator=generator)
    logits[1] += 300
    logits[2] -= 300
    target = torch.randint(0, columns, (ROWS,), generator=generator)
    target[3], target[4], target[5], target[6] = 0, columns - 1, ABSENT, IGNORE_INDEX
    return F.pad(logits, (0, -columns % 8)).to(dtype).to(DEVICE)[:, :columns], target.to(DEVICE)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("scale", [1.0, 0.25, -0.5])
def test_kernels(columns: int, dtype: torch.dtype, scale: float) -> None:
    logits, target = rows(columns, dtype)
    exact = logits.double()
    got, expected = token_statistics(logits, target, scale), token_statistics(exact, target, scale)
    assert all(value.dtype == torch.float32 for value in got)
    torch.testing.assert_close(got[0].double(), expected[0], rtol=1e-6, atol=0.0)
    torch.testing.assert_close(got[1].double(), expected[1], rtol=2e-5, atol=0.0)  # sums of up to 151,936 terms
    torch.testing.assert_close(got[2].double(), expected[2], rtol=1e-6, atol=0.0)

    factor = torch.linspace(0.5, 2.0, ROWS, device=DEVICE) / got[1]
    weight = torch.linspace(1.0, 3.0, ROWS, device=DEVICE)
    write_gradient(logits, target, got[0], factor, weight, scale)
    write_gradient(exact, target, got[0].double(), factor.double(), weight.double(), scale)
    # exp of a difference of numbers up to 300 in fp32 is exact to 1e-5
    torch.testing.assert_close(logits.double(), exact, rtol=ROUNDING[dtype] + 5e-5, atol=1e-7)
    assert not logits[6].any()
    assert float(logits[4, -1]) < 0 or columns == 1


def test_not_a_number_is_not_lost() -> None:
    """One in a million logits, the first or the last that a lane sees."""
    for place in (0, 151935):
        logits, target = rows(151936, torch.bfloat16)
        logits[0, place] = float("nan")
        logits[1, place] = float("-inf")
        maximum, total, chosen = token_statistics(logits, target)
        loss = total.log() + maximum - chosen
        assert loss[0].isnan() and loss[1:].isfinite().all()


def problem(dtype: torch.dtype, columns: int, bias: bool) -> tuple[list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(0)
    shapes = [(2, 96, 64), (columns, 64), *([(columns,)] if bias else [])]
    # Logits about as large as one, whose rounding to bf16 the gradients do not magnify.
    tensors = [0.3 * torch.randn(s, generator=generator, device=DEVICE) for s in shapes]
    tensors = [tensor.to(dtype).requires_grad_() for tensor in tensors]
    labels = torch.randint(0, columns, (2, 96), generator=generator, device=DEVICE)
    labels[0, :30] = -100
    return tensors, labels


def plain_loss(tensors: list[torch.Tensor], labels: torch.Tensor, z_loss: float) -> torch.Tensor:
    logits = F.linear(*tensors)[:, :-1].flatten(0, 1)
    target = labels[:, 1:].flatten()
    z = logits.logsumexp(-1)[target != -100].square().sum()
    return (F.cross_entropy(logits, target, reduction="sum") + z_loss * z) / 100


@pytest.mark.parametrize("columns", [120, 50257, 151936])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loss_and_gradients(columns: int, bias: bool, dtype: torch.dtype) -> None:
    tensors, labels = problem(dtype, columns, bias)
    hidden, weight = tensors[:2]
    items = torch.tensor(100, device=DEVICE)
    loss = linear_causal_lm_loss(
        hidden, weight, tensors[2] if bias else None, labels, 0, ALONE, items, z_loss=1e-3, chunk=37
    )
    got = torch.autograd.grad(loss, tensors)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    reference = plain_loss(exact, labels, 1e-3)
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 8e-3}[dtype]
    assert float(((loss - reference).abs() / reference).detach()) < tolerance / 4
    for one, other in zip(got, torch.autograd.grad(reference, exact), strict=True):
        assert one.dtype == dtype and float((one - other).norm() / other.norm()) < tolerance


class Sink:
    """fp32 memory that takes bf16 products."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.total, self.is_fresh = torch.full(weight.shape, 7.0, device=DEVICE), True

    def takes_product(self, dtype: torch.dtype) -> bool:
        return True

    def takes_early(self) -> bool:
        return True

    def add_product(self, grad_output: torch.Tensor, input: torch.Tensor) -> None:
        add_product(self.total, grad_output, input, overwrite=self.is_fresh)
        self.is_fresh = False


@pytest.mark.parametrize("columns", [120, 123])
def test_a_sink(columns: int) -> None:
    tensors, labels = problem(torch.bfloat16, columns, False)
    arguments: dict[str, Any] = {"num_items_in_batch": 100, "chunk": 37}
    linear_causal_lm_loss(*tensors, None, labels, 0, ALONE, **arguments).backward()
    sink = Sink(tensors[1])
    linear_causal_lm_loss(*tensors, None, labels, 0, ALONE, **arguments, weight_gradient=sink).backward()
    expected = tensors[1].grad
    assert expected is not None
    assert float((sink.total - expected).norm() / expected.norm()) < 3e-3  # one rounding to bf16


def test_memory() -> None:
    """A chunk of logits, the gradients, and nothing of the size of all logits; no waiting for the GPU either."""
    tokens, columns, chunk = 8192, 65536, 256
    hidden = torch.randn(1, tokens, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(columns, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, columns, (1, tokens), device=DEVICE)
    items = torch.tensor(tokens, device=DEVICE)
    linear_causal_lm_loss(hidden, weight, None, labels, 0, ALONE, items, chunk=chunk).backward()  # compiles
    hidden.grad = weight.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_causal_lm_loss(hidden, weight, None, labels, 0, ALONE, items, chunk=chunk).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    taken = torch.cuda.max_memory_allocated() - before
    # a chunk of bf16 logits, both gradients, and the weight's in fp32
    assert taken < chunk * columns * 2 + hidden.nbytes + 3 * weight.nbytes + 2**23
    assert taken < tokens * columns * 2 / 8
