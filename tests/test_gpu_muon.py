"""Muon on a GPU: batched Newton-Schulz and the two element-wise kernels against the plain code of the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hf_nanotron.ops.kernels.symmetric import quack_kernel, supports, symmetric_product
from hf_nanotron.ops.newton_schulz import COEFFICIENTS, orthogonalize
from hf_nanotron.optim.muon import Muon

DEVICE = "cuda"
SHAPES = ((256, 512), (512, 256), (384, 384), (256, 512), (7, 64))
STEPS = 3

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def run(device: str, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Weights and momentum after a few steps, on the host. The last step is skipped by `found_inf`."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in SHAPES]
    rounded = {p: torch.zeros_like(p, dtype=torch.bfloat16) for p in parameters}
    optimizer = Muon(parameters, lr=1e-2, matrix_dtype=dtype, batch_elements=1 << 18, rounded=rounded)
    for step in range(STEPS + 1):
        for parameter in parameters:
            parameter.grad = (1000 * torch.randn(parameter.shape, generator=generator)).to(device)
        optimizer.grad_scale = torch.tensor(1000.0, device=device)
        optimizer.found_inf = torch.tensor(float(step == STEPS), device=device)
        optimizer.step()
    assert all(torch.equal(rounded[p], p.bfloat16()) for p in parameters)
    state = [optimizer.state[p]["momentum_buffer"].cpu() for p in parameters]
    return [p.detach().cpu() for p in parameters], state


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_steps_are_those_of_the_cpu(dtype: torch.dtype, tolerance: float) -> None:
    ours, momentum = run(DEVICE, dtype)
    reference, expected = run("cpu", dtype)
    torch.testing.assert_close(momentum, expected, rtol=1e-6, atol=1e-6)
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=tolerance)


@pytest.mark.parametrize("shape", [(512, 1024), (1024, 512), (768, 768), (64, 4096)])
def test_batches_are_plain_newton_schulz(shape: tuple[int, int]) -> None:
    """A batch on the GPU against one matrix at a time in fp32, as far as bfloat16 goes; singular values near 1."""
    matrices = torch.randn(3, *shape, device=DEVICE)
    found = orthogonalize(matrices.bfloat16()).float()
    expected = orthogonalize(matrices.cpu()).to(DEVICE)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() < 0.05 * other.norm()
        values = torch.linalg.svdvals(one)
        assert values.max() < 1.3 and values.median() > 0.7
        if shape[0] != shape[1]:  # the smallest of a square random matrix are too near to 0 for five steps
            assert values.min() > 0.5


def test_it_is_torchs() -> None:
    """As far as bfloat16 goes: torch computes one matrix after the other."""
    arguments: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
    generator = torch.Generator(DEVICE).manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape, generator=generator, device=DEVICE)) for shape in SHAPES[:3]]
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    optimizer = Muon(ours, **arguments)
    reference = torch.optim.Muon(theirs, ns_coefficients=COEFFICIENTS, adjust_lr_fn="match_rms_adamw", **arguments)
    for _ in range(STEPS):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator, device=DEVICE)
            b.grad = a.grad.clone()
        optimizer.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=5e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("size", "inner"), [(512, 256), (1000, 72), (640, 2048)])
def test_half_of_a_symmetric_product(dtype: torch.dtype, size: int, inner: int) -> None:
    """Of rows and of columns, and a polynomial of it: as in fp64, and the same above the diagonal as below."""
    if quack_kernel() is None:
        pytest.skip("needs quack, and a GPU that it is for")
    generator = torch.Generator(DEVICE).manual_seed(size)
    epsilon = torch.finfo(dtype).eps
    for is_tall in (False, True):
        shape = (3, inner, size) if is_tall else (3, size, inner)
        x = (torch.randn(shape, generator=generator, device=DEVICE) / inner**0.5).to(dtype)
        a, b = (x.mT, x) if is_tall else (x, x.mT)
        assert supports(a, b)
        gram = symmetric_product(a, b)
        assert torch.equal(gram, gram.mT)
        expected = a.double() @ b.double()
        assert (gram.double() - expected).norm() < epsilon * expected.norm()
        found = symmetric_product(gram, gram, gram, alpha=2.0, beta=-4.75, diagonal=3.5)
        exact = gram.double()
        expected = 2.0 * exact @ exact - 4.75 * exact + 3.5 * torch.eye(size, device=DEVICE)
        assert torch.equal(found, found.mT)
        assert (found.double() - expected).norm() < 2 * epsilon * expected.norm()


def test_what_the_kernel_is_not_for() -> None:
    x = torch.zeros(2, 1024, 512, device=DEVICE, dtype=torch.bfloat16)
    unaligned, small, fp32 = x[:, :, :510].contiguous(), x[:, :64].contiguous(), x.float()
    cut = x[:, :, 1:505]
    assert not any(supports(one, one.mT) for one in (unaligned, small, fp32, cut))
