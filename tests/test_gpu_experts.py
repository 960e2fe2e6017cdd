"""The kernels of the experts against float64 on the same numbers; skips where there is no GPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_experts import GPT_OSS, NEMOTRON, QWEN, build, parallel
from torch import nn

from hf_nanotron.ops.gated import silu_and_multiply
from hf_nanotron.ops.grouped_mm import add_grouped_product, grouped_linear
from hf_nanotron.ops.permute import permute, sort_by_expert, sort_into_slots, unpermute

DEVICE = "cuda"
BF16 = torch.bfloat16
# A bf16 result is rounded to 2^-9. fp32 sums of exact products are far better, and no bf16 product passes for one.
ROUNDED, EXACT = 1e-2, 1e-4

COUNTS = [70, 0, 257, 64, 1, 0, 0, 500, 128, 0]
TAIL = 13  # rows of no expert

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def error(x: torch.Tensor, reference: torch.Tensor) -> float:
    x, reference = x.detach().double(), reference.detach().double()
    return float((x - reference).norm() / reference.norm())


def random(*shape: int, seed: int = 0, dtype: torch.dtype = BF16) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, device=DEVICE).to(dtype)


def ends(counts: list[int]) -> torch.Tensor:
    return torch.tensor(counts, device=DEVICE).cumsum(0).to(torch.int32)


def product(left: torch.Tensor, right: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """`[experts, a, b]` in float64."""
    parts = zip(left.double().split([*counts, TAIL]), right.double().split([*counts, TAIL]), strict=True)
    return torch.stack([x.t() @ y for x, y in parts][:-1])


def configs() -> list[Any]:
    if not torch.cuda.is_available():
        return []
    from hf_nanotron.ops.kernels.grouped import CONFIGS

    return list(CONFIGS)


@pytest.mark.parametrize("config", configs(), ids=str)
@pytest.mark.parametrize(("a", "b"), [(256, 384), (136, 72), (100, 36), (37, 19), (8, 1), (1, 256)])
def test_weight_gradient(config: Any, a: int, b: int) -> None:
    """Every tiling, on uneven and empty experts, over poisoned memory and beside poisoned rows."""
    from hf_nanotron.ops.kernels.grouped import add_grouped_product as kernel

    rows = sum(COUNTS) + TAIL
    left, right = random(rows, a), random(rows, b, seed=1)
    reference = product(left, right, COUNTS)
    left[-TAIL:], right[-TAIL:] = math.nan, math.nan
    total = torch.full_like(reference, math.nan, dtype=torch.float32)
    kernel(total, left, right, ends(COUNTS), True, config)
    assert error(total, reference) < EXACT
    assert not total[[expert for expert, count in enumerate(COUNTS) if count == 0]].any()
    kernel(total, left, right, ends(COUNTS), False, config)
    assert error(total, 2 * reference) < EXACT
    rounded = torch.full_like(total, math.nan, dtype=BF16)
    kernel(rounded, left, right, ends(COUNTS), True, config)
    assert error(rounded, reference) < ROUNDED


def test_weight_gradient_of_one_expert() -> None:
    counts = [0, 0, 3000, 0]
    left, right = random(3000 + TAIL, 128), random(3000 + TAIL, 256, seed=1)
    total = torch.full((4, 128, 256), math.nan, device=DEVICE)
    add_grouped_product(total, left, right, ends(counts), overwrite=True)
    assert error(total, product(left, right, counts)) < EXACT
    again = torch.empty_like(total)
    add_grouped_product(again, left, right, ends(counts), overwrite=True)
    assert torch.equal(again, total)


def test_weight_gradient_without_rows() -> None:
    total = torch.full((2, 16, 8), math.nan, device=DEVICE)
    empty = torch.zeros(0, 16, device=DEVICE, dtype=BF16), torch.zeros(0, 8, device=DEVICE, dtype=BF16)
    add_grouped_product(total, *empty, ends([0, 0]), overwrite=True)
    assert not total.any()


def test_weight_gradient_of_large_stack() -> None:
    """More than 2^31 elements."""
    experts, a, b = 300, 2048, 4096
    counts = [0] * (experts - 2) + [64, 40]
    left, right = random(104 + TAIL, a), random(104 + TAIL, b, seed=1)
    total = torch.empty(experts, a, b, device=DEVICE)
    add_grouped_product(total, left, right, ends(counts), overwrite=True)
    assert error(total[-1], left[64:104].double().t() @ right[64:104].double()) < EXACT
    assert not total[:-2].any()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("wide", "out"), [(256, 384), (64, 24), (37, 19)])
def test_grouped_linear(transposed: bool, wide: int, out: int) -> None:
    """Forward and gradients; rows of no expert are zeros, whatever they read."""
    rows = sum(COUNTS) + TAIL
    x, grad = random(rows, wide), random(rows, out, seed=1)
    shape = (len(COUNTS), wide, out) if transposed else (len(COUNTS), out, wide)
    weight = random(*shape, seed=2)
    matrices = weight.double() if transposed else weight.double().transpose(1, 2)
    parts = [*COUNTS, TAIL]
    expected = torch.cat([r @ m for r, m in zip(x.double().split(parts), matrices, strict=False)])
    expected_x = torch.cat([g @ m.t() for g, m in zip(grad.double().split(parts), matrices, strict=False)])
    expected_w = product(x, grad, COUNTS) if transposed else product(grad, x, COUNTS)

    x[-TAIL:], grad[-TAIL:] = math.nan, math.nan
    x.requires_grad_()
    weight.requires_grad_()
    y = grouped_linear(x, weight, ends(COUNTS), transposed)
    y.backward(grad)
    assert x.grad is not None and weight.grad is not None
    assert error(y[:-TAIL], expected) < ROUNDED and not y[-TAIL:].any()
    assert error(x.grad[:-TAIL], expected_x) < ROUNDED and not x.grad[-TAIL:].any()
    assert weight.grad.dtype == BF16 and error(weight.grad, expected_w) < ROUNDED


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("width", [2048, 1000, 7])
@pytest.mark.parametrize("top_k", [1, 8, 6])
@pytest.mark.parametrize("capacity", [None, 20])
def test_permutation(dtype: torch.dtype, width: int, top_k: int, capacity: int | None) -> None:
    """The fused kernels against plain torch in float64 on the CPU."""
    tokens, experts = 203, 16
    generator = torch.Generator().manual_seed(0)
    index = torch.rand(tokens, experts, generator=generator).topk(top_k).indices
    index[::5, 0], index[1::7, -1] = experts, -1
    weights = torch.rand(tokens, top_k, generator=generator)

    def results(device: str, dtype: torch.dtype) -> list[torch.Tensor]:
        sorting = (
            sort_by_expert(index.to(device), experts)
            if capacity is None
            else sort_into_slots(index.to(device), experts, capacity)
        )
        x = random(tokens, width).to(device, dtype).requires_grad_()
        y = random(len(sorting.order), width, seed=1).to(device, dtype).requires_grad_()
        w = weights.to(device, dtype if dtype == torch.float64 else torch.float32).requires_grad_()
        rows, out = permute(x, sorting), unpermute(y, sorting, w)
        grad_rows = random(*rows.shape, seed=2).to(device, dtype)
        grad_out = random(*out.shape, seed=3).to(device, dtype)
        found = torch.autograd.grad((rows, out), (x, y, w), (grad_rows, grad_out))
        return [*sorting, rows.detach(), out.detach(), *found]

    ours, again, reference = results(DEVICE, dtype), results(DEVICE, dtype), results("cpu", torch.float64)
    for mine, expected in zip(ours[:4], reference[:4], strict=True):
        assert torch.equal(mine.cpu(), expected)
    assert torch.equal(ours[4].cpu().double(), reference[4])
    for mine, expected in zip(ours[5:], reference[5:], strict=True):
        assert error(mine.cpu(), expected) < (ROUNDED if dtype == BF16 else 1e-5)
    assert all(torch.equal(mine, other) for mine, other in zip(ours, again, strict=True))


def test_permutation_of_many_rows() -> None:
    """More than 2^31 elements."""
    tokens, width = 1_100_000, 2048
    x = random(16, width).repeat(tokens // 16, 1)
    sorting = sort_by_expert(torch.zeros(tokens, 1, dtype=torch.int64, device=DEVICE), 2)
    rows = permute(x, sorting)
    assert torch.equal(rows[-16:], x[-16:])
    out = unpermute(rows, sorting, torch.full((tokens, 1), 2.0, device=DEVICE))
    assert torch.equal(out[-16:], 2 * x[-16:])


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("width", [768, 1500, 5])
def test_silu_and_multiply(dtype: torch.dtype, width: int) -> None:
    x, grad = random(300, 2 * width, dtype=dtype).requires_grad_(), random(300, width, seed=1, dtype=dtype)
    out = silu_and_multiply(x)
    out.backward(grad)
    exact = x.detach().cpu().double().requires_grad_()
    expected = silu_and_multiply(exact)
    expected.backward(grad.cpu().double())
    limit = ROUNDED if dtype == BF16 else 1e-6
    assert x.grad is not None and exact.grad is not None
    assert error(out.cpu(), expected) < limit
    assert error(x.grad.cpu(), exact.grad) < limit
    assert silu_and_multiply(x[:0]).shape == (0, width)


class Sink:
    """Poisoned fp32 memory that the first product overwrites."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.total = torch.full_like(parameter, math.nan, dtype=torch.float32)
        self.is_fresh = True

    def takes_product(self, dtype: torch.dtype) -> bool:
        return dtype == BF16

    def add_grouped_product(self, left: torch.Tensor, right: torch.Tensor, offsets: torch.Tensor) -> None:
        add_grouped_product(self.total, left, right, offsets, self.is_fresh)
        self.is_fresh = False


@pytest.mark.parametrize("capacity_factor", [None, 8.0])
@pytest.mark.parametrize("family", [QWEN, GPT_OSS, NEMOTRON], ids=lambda family: family[1])
def test_experts(family: tuple[str, str], capacity_factor: float | None) -> None:
    """A whole layer in bf16 against stock code in float64, over sinks, and without waiting for the device."""
    tokens, top_k = 700, 2
    generator = torch.Generator().manual_seed(0)
    # A limit that nothing meets: there, rounding would switch gradients on and off.
    wide = {"hidden_size": 128, "moe_intermediate_size": 64, "intermediate_size": 64, "swiglu_limit": 50.0}
    stock = build(*family, **wide)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.copy_((parameter / 5).to(BF16))
    scores = torch.rand(tokens, stock.num_experts, generator=generator)
    scores[:, 3] = -1.0
    index = scores.topk(top_k).indices
    x = torch.randn(tokens, 128, generator=generator).to(BF16).double().requires_grad_()
    weights = torch.rand(tokens, top_k, generator=generator).double().requires_grad_()
    expected = stock(x, index, weights)
    grad = torch.randn(expected.shape, generator=generator).to(BF16)
    expected.backward(grad.double())

    ours = parallel(build(*family, **wide), capacity_factor=capacity_factor)
    ours.load_state_dict(stock.state_dict())
    ours.to(DEVICE, BF16)
    matrices = {name: parameter for name, parameter in ours.named_parameters() if parameter.dim() == 3}
    gpu_x = x.detach().to(DEVICE, BF16).requires_grad_()
    gpu_weights = weights.detach().float().to(DEVICE).requires_grad_()
    gpu_index, gpu_grad = index.to(DEVICE), grad.to(DEVICE)
    for attempt in range(2):  # the first one compiles
        ours.zero_grad()
        gpu_x.grad = gpu_weights.grad = None
        sinks = {name: Sink(parameter) for name, parameter in matrices.items()}
        ours.weight_gradients = sinks
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if attempt else "default")
        try:
            out = ours(gpu_x, gpu_index, gpu_weights)
            out.backward(gpu_grad)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert error(out.cpu(), expected) < ROUNDED
    assert gpu_x.grad is not None and gpu_weights.grad is not None and x.grad is not None and weights.grad is not None
    assert error(gpu_x.grad.cpu(), x.grad) < ROUNDED
    assert error(gpu_weights.grad.cpu(), weights.grad) < ROUNDED
    for name, parameter in stock.named_parameters():
        gradient = sinks[name].total if name in sinks else getattr(ours, name).grad
        assert error(gradient.cpu(), parameter.grad) < ROUNDED, name
        assert name not in sinks or getattr(ours, name).grad is None
