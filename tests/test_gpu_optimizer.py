"""The AdamW kernel against the plain torch code of the CPU; skips where there is no GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hf_nanotron.optim.adamw import AdamW

DEVICE = "cuda"
COUNTS = (1, 1000, 1 << 20)
STEPS = 3

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def run(device: str, count: int, **arguments: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Weights and state after a few steps, on the host. The last step is skipped by `found_inf`."""
    generator = torch.Generator().manual_seed(count)
    weights = [torch.randn(count, generator=generator), torch.randn(7, generator=generator)]
    parameters = [nn.Parameter(weight.to(device)) for weight in weights]
    groups = [{"params": parameters[1:], "weight_decay": 0.0}, {"params": parameters[:1], "weight_decay": 0.1}]
    streams = {parameters[0]: (5, (1 << 32) - 500)}  # across the border of 32 bits
    rounded = {parameters[0]: torch.zeros(count, dtype=torch.bfloat16, device=device)}
    optimizer = AdamW(groups, lr=1e-2, seed=3, streams=streams, rounded=rounded, **arguments)
    for step in range(STEPS + 1):
        for parameter in parameters:
            # Away from zero, so that relative errors mean something.
            gradient = torch.rand(parameter.shape, generator=generator) + 0.5
            parameter.grad = (1000 * gradient).to(device)
        optimizer.grad_scale = torch.tensor(1000.0, device=device)
        optimizer.found_inf = torch.tensor(float(step == STEPS), device=device)
        optimizer.step()
    assert torch.equal(rounded[parameters[0]], parameters[0].bfloat16())
    state = {name: value.cpu() for name, value in optimizer.state[parameters[0]].items()}
    return parameters[0].detach().cpu(), state


@pytest.mark.parametrize("count", COUNTS)
def test_fp32_moments(count: int) -> None:
    ours, state = run(DEVICE, count)
    reference, expected = run("cpu", count)
    assert state["step"] == STEPS
    torch.testing.assert_close(ours, reference, rtol=1e-6, atol=1e-6)
    for name in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(state[name], expected[name], rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("count", COUNTS)
def test_bfloat16_moments(count: int) -> None:
    """The same random bits, so the same moments, but where the GPU's last bit of fp32 tips the balance."""
    ours, state = run(DEVICE, count, state_dtype=torch.bfloat16)
    reference, expected = run("cpu", count, state_dtype=torch.bfloat16)
    exact, _ = run("cpu", count)
    for name in ("exp_avg", "exp_avg_sq"):
        assert state[name].dtype == torch.bfloat16
        assert state[name].ne(expected[name]).float().mean() < 2e-3
    assert ours.sub(reference).abs().gt(1e-6).float().mean() < 2e-3
    torch.testing.assert_close(ours, exact, rtol=0.0, atol=1e-3)  # 3 % of three steps of 1e-2


def test_rounding_is_unbiased() -> None:
    """Over a million elements the rounding errors, each up to 0.8 %, average out."""
    parameter = nn.Parameter(torch.zeros(1 << 20, device=DEVICE))
    optimizer = AdamW([parameter], betas=(0.9, 0.999), state_dtype=torch.bfloat16)
    parameter.grad = torch.full_like(parameter, 1.2345)
    optimizer.step()
    state = optimizer.state[parameter]
    for name, expected in (("exp_avg", 0.1 * 1.2345), ("exp_avg_sq", 0.001 * 1.2345**2)):
        assert state[name].unique().numel() == 2  # the neighbours on both sides
        assert state[name].double().mean().item() == pytest.approx(expected, rel=2e-5)
    up = [state[name] == state[name].max() for name in ("exp_avg", "exp_avg_sq")]
    first, second, both = (x.float().mean().item() for x in (*up, up[0] & up[1]))
    assert both == pytest.approx(first * second, abs=5e-3)  # independent


def test_nan_stays_nan() -> None:
    """A GPU's NaN has all payload bits set, and must not round to a number."""
    parameter = nn.Parameter(torch.zeros(3, device=DEVICE))
    optimizer = AdamW([parameter], state_dtype=torch.bfloat16)
    parameter.grad = torch.tensor([0x7FFFFFFF, 0x7F800000, 0], dtype=torch.int32).view(torch.float32).to(DEVICE)
    optimizer.step()
    state = optimizer.state[parameter]
    assert state["exp_avg"].isnan().tolist() == [True, False, False]
    assert state["exp_avg_sq"].isinf().tolist() == [False, True, False]
    assert state["exp_avg_sq"][0].isnan()
    assert parameter.isnan().tolist() == [True, True, False]
