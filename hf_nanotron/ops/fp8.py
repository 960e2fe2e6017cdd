"""FP8: scales, operands in both orders, and their products (Micikevicius et al. 2022, arXiv:2209.05433).

A matrix becomes e4m3 values times a scale: one for the whole matrix ("tensorwise"), or one per row and, in the
transposed copy, per column ("rowwise"). Scales are computed from the current values, so there is no state between
steps. Gradients are e4m3 too: with a scale of their own it covers 15 bits below the largest value at full precision,
and rounds half as coarsely as e5m2.

Hopper's tensor cores read both operands along the summed dimension, so a factor of two products is needed in both
orders; one kernel makes both in one pass. Devices other than CUDA multiply the same values in fp32.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch

Recipe = Literal["tensorwise", "rowwise"]
RECIPES: tuple[Recipe, ...] = ("tensorwise", "rowwise")

DTYPE = torch.float8_e4m3fn
LARGEST = 448.0
ALIGNMENT = 16  # bytes, of the rows that tensor cores read
# No scale is smaller, so that its inverse is finite: zeros stay zeros.
SMALLEST_SCALE = 2.0**-100


class Operands(NamedTuple):
    """A matrix `[tokens, width]` in FP8, in both orders, with the fp32 scales to multiply by.

    Args:
        rows: `[tokens, width]`, with `row_scale` `[]` or `[tokens]`.
        columns: `[width, tokens]`, tokens padded with zeros to a multiple of `ALIGNMENT`, with `column_scale` `[]` or
            `[width]`.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    row_scale: torch.Tensor
    column_scale: torch.Tensor


def aligned(size: int) -> int:
    """The next multiple of `ALIGNMENT`."""
    return (size + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


def scales(x: torch.Tensor, recipe: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales of the rows and of the columns of `x` (`[tokens, width]`); the same one twice if tensorwise.

    Plain operations, so that a compiler fuses the maximum of a row with what computes the row. A value that is not
    finite makes a scale that is not, and thereby every product.
    """
    sizes = x.detach().abs()
    of_rows = sizes.amax(-1)
    if recipe == "tensorwise":
        scale = _scale(of_rows.amax())
        return scale, scale
    return _scale(of_rows), _scale(sizes.amax(0))


def weight_scales(weight: torch.Tensor, recipe: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for a weight, outside of compiled code: each largest number in one pass."""
    if recipe == "tensorwise":
        scale = _scale(_largest(weight))
        return scale, scale
    return _scale(_largest(weight, 1)), _scale(_largest(weight, 0))


def _largest(x: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    return torch.linalg.vector_norm(x.detach(), float("inf"), dim=dim)


def _scale(largest: torch.Tensor) -> torch.Tensor:
    return (largest.float() / LARGEST).clamp(min=SMALLEST_SCALE)


def quantize(x: torch.Tensor, row_scale: torch.Tensor, column_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`rows` and `columns` of `Operands` from one read of `x` (`[tokens, width]`), with scales as `scales` returns
    them.
    """
    tokens, width = x.shape
    if not x.is_cuda:
        return quantize_rows(x, row_scale), quantize_columns(x, column_scale)
    from .kernels.fp8 import quantize as kernel

    rows, columns = x.new_empty(x.shape, dtype=DTYPE), x.new_empty(width, aligned(tokens), dtype=DTYPE)
    kernel(x.contiguous(), row_scale, column_scale, rows, columns)
    return rows, columns


def quantize_rows(x: torch.Tensor, scale: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """`rows` of `Operands` alone, in `out` if there is one."""
    rows = x.new_empty(x.shape, dtype=DTYPE) if out is None else out
    if x.is_cuda:
        from .kernels.fp8 import quantize as kernel

        kernel(x.contiguous(), scale, None, rows, None)
        return rows
    return rows.copy_(_round(x, scale.view(-1, 1)))


def quantize_columns(x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """`columns` of `Operands` alone. Without a scale `x` holds FP8 numbers already, and is transposed."""
    tokens, width = x.shape
    columns = x.new_empty(width, aligned(tokens), dtype=DTYPE)
    if x.is_cuda:
        from .kernels.fp8 import quantize as kernel

        kernel(x.contiguous(), None, scale, None, columns)
        return columns
    columns.zero_()
    columns[:, :tokens].copy_((x if scale is None else _round(x, scale.view(1, -1))).t())
    return columns


def _round(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (x.float() * scale.reciprocal()).to(DTYPE)  # what exceeds LARGEST by rounding becomes LARGEST


def product(
    left: torch.Tensor,
    right: torch.Tensor,
    left_scale: torch.Tensor,
    right_scale: torch.Tensor,
    dtype: torch.dtype,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """`left @ right.T + bias`, of `[a, n]` and `[b, n]` FP8 values and their scales, in `dtype` (bf16 on CUDA).

    Tensor cores accumulate with fewer bits than fp32; for sums as short as a layer is wide, rounding to bf16 hides it.
    """
    if left.is_cuda:
        left_scale, right_scale = _as_columns(left_scale, right_scale)
        return torch._scaled_mm(
            left, right.t(), left_scale, right_scale, bias=bias, out_dtype=dtype, use_fast_accum=True
        )
    out = (left.float() @ right.float().t()) * left_scale.view(-1, 1) * right_scale.view(1, -1)
    return (out if bias is None else out + bias).to(dtype)


def _as_columns(left_scale: torch.Tensor, right_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales of rows as `_scaled_mm` takes them; it wants both of one kind."""
    if left_scale.dim() == 0:
        return left_scale, right_scale
    return left_scale.view(-1, 1), right_scale.view(1, -1)


def add_scaled_product(
    total: torch.Tensor,
    grad_output: torch.Tensor,
    input: torch.Tensor,
    grad_scale: torch.Tensor,
    input_scale: torch.Tensor,
    overwrite: bool,
) -> None:
    """`total += grad_output @ input.T`, of FP8 values and their scales, accumulated in fp32.

    `total` is `[out, in]` in fp32; `overwrite` takes it as zero. `grad_output` (`[out, tokens]`, scale `[]` or `[out]`)
    and `input` (`[in, tokens]`, scale `[]` or `[in]`) are the `columns` of their `Operands`.
    """
    by_row = grad_scale.dim() > 0
    if not total.is_cuda:
        left = grad_output.float() * grad_scale.view(-1, 1)
        right = input.float() * input_scale.view(-1, 1)
        torch.addmm(total, left, right.t(), beta=0.0 if overwrite else 1.0, out=total)
        return
    # Sums over thousands of tokens: here the tensor cores' own precision would show, so partial sums go to fp32.
    # torch's products with a scale of each row round to bf16, so those scales come after.
    one = torch.ones((), device=total.device) if by_row else None
    scaled: Any = (one, one) if by_row else (grad_scale, input_scale)
    options: dict[str, Any] = {"out_dtype": torch.float32, "use_fast_accum": False}
    if overwrite and total.dtype == torch.float32:
        torch._scaled_mm(grad_output, input.t(), *scaled, **options, out=total)
        if by_row:
            total.mul_(grad_scale.view(-1, 1)).mul_(input_scale)
        return
    part = torch._scaled_mm(grad_output, input.t(), *scaled, **options)
    if by_row:
        total.addcmul_(part.mul_(grad_scale.view(-1, 1)), input_scale)
    else:
        total.add_(part)
