"""The Triton kernels of `permute.py`: each reads what it needs once, and writes once."""

from __future__ import annotations

import torch

from .language import tl, triton

MAX_BLOCK = 1024  # columns a turn: 8 values of 128 threads


@triton.jit
def _gather_kernel(x, out, order, width, K, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    pair = tl.load(order + row)
    token = tl.where(pair < 0, 0, pair // K)
    values = tl.load(x + token * width + columns, mask=inside & (pair >= 0), other=0.0)
    tl.store(out + row * width + columns, values, mask=inside)


@triton.jit
def _sum_kernel(y, out, inverse, weights, width, K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for k in tl.static_range(K):
        row = tl.load(inverse + token * K + k)
        values = tl.load(y + tl.where(row < 0, 0, row) * width + columns, mask=inside & (row >= 0), other=0.0)
        if weights is not None:
            total += values.to(tl.float32) * tl.load(weights + token * K + k).to(tl.float32)
        else:
            total += values.to(tl.float32)
    tl.store(out + token * width + columns, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gradients_kernel(grad, y, order, weights, grad_y, grad_weights, width, K, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    pair = tl.load(order + row)
    is_pair = pair >= 0
    pair = tl.where(is_pair, pair, 0)
    weight = tl.load(weights + pair, mask=is_pair, other=0.0).to(tl.float32)
    source = grad + pair // K * width
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, width, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < width
        g = tl.load(source + columns, mask=inside & is_pair, other=0.0).to(tl.float32)
        values = tl.load(y + row * width + columns, mask=inside & is_pair, other=0.0).to(tl.float32)
        sums += g * values
        tl.store(grad_y + row * width + columns, (g * weight).to(grad_y.dtype.element_ty), mask=inside)
    tl.store(grad_weights + pair, tl.sum(sums, 0).to(grad_weights.dtype.element_ty), mask=is_pair)


def _block(width: int) -> int:
    return min(MAX_BLOCK, triton.next_power_of_2(width))


def gather_rows(x: torch.Tensor, order: torch.Tensor, pairs_per_token: int) -> torch.Tensor:
    """See `permute.gather_rows`. `x` is contiguous."""
    rows, width = order.shape[0], x.shape[1]
    out = x.new_empty(rows, width)
    if out.numel():
        block = _block(width)
        with torch.cuda.device_of(x):
            _gather_kernel[(rows, triton.cdiv(width, block))](x, out, order, width, pairs_per_token, BLOCK=block)
    return out


def sum_rows(y: torch.Tensor, inverse: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """See `permute.sum_rows`. `y` is contiguous."""
    (tokens, pairs), width = inverse.shape, y.shape[1]
    out = y.new_empty(tokens, width)
    if out.numel():
        block = _block(width)
        if weights is not None:
            weights = weights.contiguous()
        with torch.cuda.device_of(y):
            _sum_kernel[(tokens, triton.cdiv(width, block))](
                y, out, inverse.contiguous(), weights, width, K=pairs, BLOCK=block
            )
    return out


def unpermute_gradients(
    grad: torch.Tensor, y: torch.Tensor, order: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `permute.unpermute_gradients`. All tensors are contiguous."""
    rows, width = y.shape
    grad_y, grad_weights = torch.empty_like(y), torch.zeros_like(weights)  # pairs without a row get zero
    if y.numel():
        with torch.cuda.device_of(y):
            _gradients_kernel[(rows,)](
                grad, y, order, weights, grad_y, grad_weights, width, weights.shape[1], BLOCK=_block(width)
            )
    return grad_y, grad_weights
