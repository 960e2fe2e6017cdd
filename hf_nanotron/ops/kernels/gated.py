"""The Triton kernels of `gated.py`."""

from __future__ import annotations

import torch

from .language import tl, triton

MAX_BLOCK = 1024


@triton.jit
def _forward_kernel(x, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(x + row * 2 * width + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * width + width + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + columns, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(grad, x, grad_x, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(x + row * 2 * width + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * width + width + columns, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    part = tl.sigmoid(gate)
    silu = gate * part
    grad_gate = g * up * (part + silu * (1.0 - part))
    place = grad_x + row * 2 * width + columns
    tl.store(place, grad_gate.to(grad_x.dtype.element_ty), mask=inside)
    tl.store(place + width, (g * silu).to(grad_x.dtype.element_ty), mask=inside)


def _grid(rows: int, width: int) -> tuple[tuple[int, int], int]:
    block = min(MAX_BLOCK, triton.next_power_of_2(width))
    return (rows, triton.cdiv(width, block)), block


def forward(x: torch.Tensor) -> torch.Tensor:
    """`[rows, 2 I] -> [rows, I]`; `x` is contiguous."""
    rows, width = x.shape[0], x.shape[1] // 2
    out = x.new_empty(rows, width)
    if out.numel():
        grid, block = _grid(rows, width)
        with torch.cuda.device_of(x):
            _forward_kernel[grid](x, out, width, BLOCK=block)
    return out


def backward(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The gradient of `x`; both are contiguous."""
    grad_x = torch.empty_like(x)
    if x.numel():
        grid, block = _grid(*grad.shape)
        with torch.cuda.device_of(x):
            _backward_kernel[grid](grad, x, grad_x, grad.shape[1], BLOCK=block)
    return grad_x
