"""The Triton kernels of `grouped_mm.py`."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .language import tl, triton


class Config(NamedTuple):
    """How a product is cut: tiles `[a, b]` of the result, rows a turn, and how many turns are loaded ahead."""

    a: int
    b: int
    rows: int
    warps: int
    stages: int


# The fastest first, as measured on an H100 by `examples/benchmarks/experts.py`. Loads by the tensor memory accelerator
# gained 2 % and need a driver context that autograd's threads do not have.
CONFIGS = (Config(128, 256, 64, 8, 3), Config(128, 128, 64, 4, 3))


@triton.jit
def _halves(x, A: tl.constexpr, B: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(x, (A, 2, B // 2)), (0, 2, 1)))


@triton.jit
def _write_part(matrix, sums, first_a, first_b, a, b, OVERWRITE: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    rows, columns = first_a + tl.arange(0, A), first_b + tl.arange(0, B)
    places = matrix + rows.to(tl.int64)[:, None] * b + columns[None, :]
    inside = (rows < a)[:, None] & (columns < b)[None, :]
    if not OVERWRITE:
        sums += tl.load(places, mask=inside, other=0.0).to(tl.float32)
    tl.store(places, sums.to(matrix.dtype.element_ty), mask=inside)


@triton.jit
def _write(matrix, sums, first_a, first_b, a, b, OVERWRITE: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    left_half, right_half = _halves(sums, A, B)
    _write_part(matrix, left_half, first_a, first_b, a, b, OVERWRITE, A, B // 2)
    _write_part(matrix, right_half, first_a, first_b + B // 2, a, b, OVERWRITE, A, B // 2)


@triton.jit
def _product_kernel(
    total,
    left,
    right,
    offsets,
    a,
    b,
    OVERWRITE: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    ROWS: tl.constexpr,
):
    expert = tl.program_id(1)
    start = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offsets + expert)
    if OVERWRITE or end > start:
        # Neighbours in time share a column of tiles of `right`.
        tiles = tl.cdiv(a, A)
        first_a = tl.program_id(0) % tiles * A
        first_b = tl.program_id(0) // tiles * B
        columns_a = first_a + tl.arange(0, A)
        columns_b = first_b + tl.arange(0, B)
        in_a, in_b = columns_a < a, columns_b < b
        # Both operands are masked: a number of another expert's rows that is not finite would survive a zero.
        row = tl.arange(0, ROWS)
        left_rows = left + (start + row).to(tl.int64)[:, None] * a + columns_a[None, :]
        right_rows = right + (start + row).to(tl.int64)[:, None] * b + columns_b[None, :]
        whole = (end - start) // ROWS * ROWS
        sums = tl.zeros((A, B), dtype=tl.float32)
        for turn in range(0, whole, ROWS):
            step = tl.cast(turn, tl.int64)
            x = tl.load(left_rows + step * a, mask=in_a[None, :], other=0.0)
            y = tl.load(right_rows + step * b, mask=in_b[None, :], other=0.0)
            sums = tl.dot(tl.trans(x), y, sums)
        if start + whole < end:
            step = tl.cast(whole, tl.int64)
            left_over = (row < end - start - whole)[:, None]
            x = tl.load(left_rows + step * a, mask=left_over & in_a[None, :], other=0.0)
            y = tl.load(right_rows + step * b, mask=left_over & in_b[None, :], other=0.0)
            sums = tl.dot(tl.trans(x), y, sums)
        matrix = total + tl.cast(expert, tl.int64) * a * b
        # In quarters: the old gradient of a whole tile would not fit into registers beside the sums.
        left_half, right_half = _halves(sums, A, B)
        _write(matrix, left_half, first_a, first_b, a, b, OVERWRITE, A, B // 2)
        _write(matrix, right_half, first_a, first_b + B // 2, a, b, OVERWRITE, A, B // 2)


@triton.jit
def _zero_tail_kernel(x, last, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.load(last)
    first = tl.program_id(0) * ROWS
    if first + ROWS > start:
        row = first + tl.arange(0, ROWS)
        kept = (row >= start) & (row < rows)
        for column in range(0, width, BLOCK):
            columns = column + tl.arange(0, BLOCK)
            zeros = tl.zeros((ROWS, BLOCK), dtype=x.dtype.element_ty)
            places = x + row.to(tl.int64)[:, None] * width + columns[None, :]
            tl.store(places, zeros, mask=kept[:, None] & (columns < width)[None, :])


def add_grouped_product(
    total: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    offsets: torch.Tensor,
    overwrite: bool,
    config: Config = CONFIGS[0],
) -> None:
    """As `grouped_mm.add_grouped_product`, for contiguous, nonempty bf16 operands; `total` of any floating dtype."""
    experts, a, b = total.shape
    with torch.cuda.device_of(total):
        _product_kernel[(triton.cdiv(a, config.a) * triton.cdiv(b, config.b), experts)](
            total,
            left,
            right,
            offsets,
            a,
            b,
            OVERWRITE=overwrite,
            A=config.a,
            B=config.b,
            ROWS=config.rows,
            num_warps=config.warps,
            num_stages=config.stages,
        )


def zero_tail(x: torch.Tensor, offsets: torch.Tensor) -> None:
    """Zero the rows of `x` (`[rows, width]`, contiguous) from `offsets[-1]` on: the product does not write them."""
    rows, width = x.shape
    block = 32
    if rows == 0 or width == 0:
        return
    with torch.cuda.device_of(x):
        _zero_tail_kernel[(triton.cdiv(rows, block),)](x, offsets[-1:], rows, width, ROWS=block, BLOCK=128)
