"""One matrix product per expert over rows that are sorted by expert, with weight gradients accumulated in fp32.

Rows `[offsets[e - 1], offsets[e])` belong to expert `e`. Rows from `offsets[-1]` on belong to none: they are not
computed, and come out as zeros, forward and backward. On CUDA with bf16, and widths that are multiples of 8, no
function here waits for the device. Elsewhere the experts are a loop on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Public since torch 2.10.
_grouped_mm: Callable[..., torch.Tensor] | None = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)

ALIGNMENT = 16  # bytes, of addresses and of strides, in the kernel of torch


class GroupedWeightGradient(Protocol):
    """Where the gradient of a stack of weights `[experts, a, b]` is accumulated."""

    def takes_product(self, dtype: torch.dtype) -> bool:
        """Whether `add_grouped_product` works for operands of `dtype` on this device (see `linear.can_add_product`)."""

    def add_grouped_product(self, left: torch.Tensor, right: torch.Tensor, offsets: torch.Tensor) -> None:
        """Add `left[rows of e].T @ right[rows of e]`, of `[rows, a]` and `[rows, b]`, to the gradient of expert e."""


def add_grouped_product(
    total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, offsets: torch.Tensor, overwrite: bool
) -> None:
    """`total[e] += left[rows of e].T @ right[rows of e]`, without rounding the products to the operands' dtype.

    Args:
        total: `[experts, a, b]`, contiguous; fp32, or the operands' dtype. `overwrite` takes it as zero.
        left, right: `[rows, a]` and `[rows, b]` of one dtype, sorted by expert; bf16 on CUDA, else that of `total`.
        offsets: `[experts]`, int32: the end of each expert's rows.
    """
    experts, a, b = total.shape
    if left.shape != (left.shape[0], a) or right.shape != (left.shape[0], b) or offsets.shape != (experts,):
        raise ValueError(
            f"the gradient of weights {tuple(total.shape)} is the product of [rows, {a}] and [rows, {b}] with "
            f"[{experts}] offsets, not of {tuple(left.shape)} and {tuple(right.shape)} with {tuple(offsets.shape)}."
        )
    if left.shape[0] == 0:
        if overwrite:
            total.zero_()
    elif total.is_cuda and left.dtype == torch.bfloat16:
        from .kernels.grouped import add_grouped_product as kernel

        kernel(total, left.contiguous(), right.contiguous(), offsets, overwrite)
    else:
        beta = 0.0 if overwrite else 1.0
        for expert, rows in enumerate(_segments(offsets)):
            torch.addmm(total[expert], left[rows].t(), right[rows], beta=beta, out=total[expert])


def _segments(offsets: torch.Tensor) -> list[slice]:
    """The rows of each expert, on the host."""
    ends = offsets.tolist()
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def _is_aligned(x: torch.Tensor) -> bool:
    """Whether torch's kernel can read `x`, whose last two dimensions are a matrix or its transpose."""
    step = max(x.stride()[-2:]) * x.element_size()
    return x.data_ptr() % ALIGNMENT == 0 and step % ALIGNMENT == 0 and min(x.stride()[-2:]) == 1


def _product(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """`[rows, a] @ [experts, a, b] -> [rows, b]`, zeros in rows of no expert."""
    x = x.contiguous()
    rows, width = x.shape[0], weight.shape[2]
    if rows == 0:
        return x.new_zeros(rows, width)
    if x.is_cuda and x.dtype == torch.bfloat16 and _grouped_mm is not None:
        # A width that is no multiple of 8 breaks the alignment of the output's rows.
        if _is_aligned(x) and _is_aligned(weight) and width * x.element_size() % ALIGNMENT == 0:
            from .kernels.grouped import zero_tail

            out = _grouped_mm(x, weight, offs=offsets)
            zero_tail(out, offsets)
            return out
    out = x.new_zeros(rows, width)
    for expert, segment in enumerate(_segments(offsets)):
        torch.mm(x[segment], weight[expert], out=out[segment])
    return out


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        offsets: torch.Tensor,
        transposed: bool,
        sink: GroupedWeightGradient | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight, offsets)
        ctx.transposed, ctx.sink = transposed, sink
        return _product(x, weight if transposed else weight.transpose(1, 2), offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, offsets = ctx.saved_tensors
        grad_weight = None
        if ctx.needs_input_grad[1]:
            left, right = (x, grad) if ctx.transposed else (grad, x)
            if ctx.sink is not None:
                ctx.sink.add_grouped_product(left, right, offsets)
            else:
                grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
                add_grouped_product(grad_weight, left, right, offsets, overwrite=True)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _product(grad, weight.transpose(1, 2) if ctx.transposed else weight, offsets)
        return grad_x, grad_weight, None, None, None


def grouped_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor,
    transposed: bool = False,
    gradient_sink: GroupedWeightGradient | None = None,
) -> torch.Tensor:
    """Each row times the weight of its expert: `[rows, out]`, zeros from row `offsets[-1]` on.

    Args:
        x: `[rows, in]`, sorted by expert.
        weight: `[experts, out, in]`, or `[experts, in, out]` if `transposed`.
        offsets: `[experts]`, int32, on the device of `x`: the end of each expert's rows.
        gradient_sink: accumulates the weight's gradient if it accepts the dtype; else autograd gets the gradient.
    """
    experts, wide = weight.shape[0], weight.shape[1 if transposed else 2]
    if x.dim() != 2 or x.shape[1] != wide or offsets.shape != (experts,):
        raise ValueError(
            f"weights {tuple(weight.shape)}{' (transposed)' if transposed else ''} take rows [rows, {wide}] and "
            f"[{experts}] offsets, not {tuple(x.shape)} and {tuple(offsets.shape)}."
        )
    if x.dtype != weight.dtype:
        raise ValueError(f"rows are {x.dtype}, but the experts' weights {weight.dtype}; cast the rows.")
    sink = gradient_sink
    if sink is not None and not sink.takes_product(x.dtype):
        sink = None
    return _GroupedLinear.apply(x, weight, offsets, transposed, sink)


class _AddExpertBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(offsets)
        ctx.dtype = bias.dtype
        rows = torch.arange(x.shape[0], device=x.device, dtype=offsets.dtype)
        expert = torch.searchsorted(offsets, rows, right=True).clamp_(max=offsets.shape[0] - 1)
        return x + bias[expert]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        grad_bias = None
        if ctx.needs_input_grad[1]:
            (offsets,) = ctx.saved_tensors
            # As a product with ones: summed in fp32, in a fixed order, without the rows of no expert.
            total = grad.new_empty(offsets.shape[0], 1, grad.shape[1])
            add_grouped_product(total, grad.new_ones(grad.shape[0], 1), grad, offsets, overwrite=True)
            grad_bias = total[:, 0].to(ctx.dtype)
        return grad, grad_bias, None


def add_expert_bias(x: torch.Tensor, bias: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """`x[rows of e] + bias[e]`, of `[rows, out]` and `[experts, out]`. Rows of no expert get some bias."""
    return _AddExpertBias.apply(x, bias, offsets)
