"""Products of matrices that are symmetric, as a Triton kernel: half of the tiles are computed, each is written twice.

`ops/newton_schulz.py` says where they are, and computes whole products elsewhere.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .language import tl, triton


class Tile(NamedTuple):
    """How a program computes: `rows` by `columns` of the result, `inner` at a time."""

    rows: int = 128
    columns: int = 128
    inner: int = 64
    warps: int = 8
    stages: int = 4


TILE = Tile()


@triton.jit
def _product_kernel(
    a,
    b,
    c,
    out,
    size,
    inner,
    a_matrix,
    a_row,
    a_column,
    b_matrix,
    b_row,
    b_column,
    alpha,
    beta,
    diagonal,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    per_row = tl.cdiv(size, COLUMNS)
    first_row = tl.program_id(0) // per_row * ROWS
    first_column = tl.program_id(0) % per_row * COLUMNS
    if first_column > first_row + ROWS - 1:
        return  # above the diagonal: the mirror image of another tile
    matrix = tl.program_id(1).to(tl.int64)
    rows = first_row + tl.arange(0, ROWS)
    columns = first_column + tl.arange(0, COLUMNS)
    steps = tl.arange(0, INNER)
    # What is outside is read from inside, and not written.
    read_rows, read_columns = rows % size, columns % size
    a_tile = a + matrix * a_matrix + read_rows[:, None] * a_row + steps[None, :] * a_column
    b_tile = b + matrix * b_matrix + steps[:, None] * b_row + read_columns[None, :] * b_column
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, inner, INNER):
        if WHOLE:
            x, y = tl.load(a_tile), tl.load(b_tile)
        else:
            x = tl.load(a_tile, mask=steps[None, :] < inner - start, other=0.0)
            y = tl.load(b_tile, mask=steps[:, None] < inner - start, other=0.0)
        total = tl.dot(x, y, total)
        a_tile += INNER * a_column
        b_tile += INNER * b_row
    total *= alpha
    lower = (rows[:, None] >= columns[None, :]) & (rows[:, None] < size) & (columns[None, :] < size)
    here = matrix * size * size + rows[:, None] * size + columns[None, :]
    if c is not None:
        total += beta * tl.load(c + here, mask=lower, other=0.0).to(tl.float32)
    total += tl.where(rows[:, None] == columns[None, :], diagonal, 0.0)
    found = total.to(out.dtype.element_ty)
    tl.store(out + here, found, mask=lower)
    there = matrix * size * size + columns[:, None] * size + rows[None, :]
    upper = (columns[:, None] < rows[None, :]) & (columns[:, None] < size) & (rows[None, :] < size)
    tl.store(out + there, tl.trans(found), mask=upper)


def symmetric_product(
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    diagonal: float = 0.0,
    tile: Tile = TILE,
) -> torch.Tensor:
    """`alpha a b + beta c + diagonal I`, of which only what is on and below the diagonal is computed.

    Args:
        a: `[count, size, inner]`, bfloat16 or float16, of any strides, on a GPU.
        b: `[count, inner, size]`, of the same dtype; such that `a b` is symmetric but for rounding.
        c: `[count, size, size]`, symmetric, of the same dtype, contiguous.

    Returns:
        `[count, size, size]`, in the same dtype; equal to its transpose in every bit.

    Raises:
        ValueError: for shapes or dtypes that do not go together.
    """
    count, size, inner = a.shape
    if b.shape != (count, inner, size) or (c is not None and c.shape != (count, size, size)):
        shapes = ", ".join(str(list(x.shape)) for x in (a, b, c) if x is not None)
        raise ValueError(f"matrices of shapes {shapes} have no symmetric product.")
    if a.dtype not in (torch.bfloat16, torch.float16) or b.dtype != a.dtype or (c is not None and c.dtype != a.dtype):
        raise ValueError(f"symmetric_product takes float16 or bfloat16, one for all, not {a.dtype} and {b.dtype}.")
    out = torch.empty(count, size, size, dtype=a.dtype, device=a.device)
    if out.numel() == 0:
        return out
    tiles = triton.cdiv(size, tile.rows) * triton.cdiv(size, tile.columns)
    with torch.cuda.device_of(a):
        _product_kernel[(tiles, count)](
            a,
            b,
            c if c is None else c.contiguous(),
            out,
            size,
            inner,
            *a.stride(),
            *b.stride(),
            float(alpha),
            float(beta),
            float(diagonal),
            WHOLE=inner % tile.inner == 0,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            INNER=tile.inner,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return out
