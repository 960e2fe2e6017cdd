"""The Triton kernels of `fp8.py`.

Raises:
    ImportError: if Triton is not installed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(
        "FP8 on a GPU needs triton, which torch's CUDA builds for Linux bring along; `pip install triton` adds it."
    ) from error


class Tile(NamedTuple):
    """What one program of `quantize` turns over: a tile `[rows, columns]` of the matrix."""

    rows: int
    columns: int
    warps: int


# The first is used; `examples/benchmarks/fp8.py` compares it with the others. Small ones leave room for several
# programs on a multiprocessor, one of which loads while another stores.
TILES = (
    Tile(64, 64, 4),
    Tile(128, 64, 8),
    Tile(64, 128, 8),
    Tile(128, 128, 16),
    Tile(128, 128, 8),
    Tile(64, 64, 8),
    Tile(32, 128, 4),
    Tile(128, 32, 4),
)


@triton.jit
def _quantize_kernel(
    x,
    rows,
    columns,
    row_scale,
    column_scale,
    tokens,
    width,
    padded,
    BY_ROW: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # Neighbours in time take neighbouring columns of the same rows.
    tiles = tl.cdiv(width, COLUMNS)
    row = (tl.program_id(0) // tiles) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % tiles) * COLUMNS + tl.arange(0, COLUMNS)
    in_rows, in_columns = row < tokens, column < width
    places = row.to(tl.int64)[:, None] * width + column[None, :]
    inside = in_rows[:, None] & in_columns[None, :]
    values = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
    if BY_ROW:
        by_row = tl.load(row_scale + row, mask=in_rows, other=1.0)
        by_column = tl.load(column_scale + column, mask=in_columns, other=1.0)
        straight = (values * tl.math.div_rn(1.0, by_row)[:, None]).to(rows.dtype.element_ty)
        turned = (values * tl.math.div_rn(1.0, by_column)[None, :]).to(rows.dtype.element_ty)
    else:
        straight = (values * tl.math.div_rn(1.0, tl.load(row_scale))).to(rows.dtype.element_ty)
        turned = straight
    tl.store(rows + places, straight, mask=inside)
    # Rows past the last token are zeros that fill up `columns`.
    places = column.to(tl.int64)[:, None] * padded + row[None, :]
    tl.store(columns + places, tl.trans(turned), mask=in_columns[:, None] & (row < padded)[None, :])


def quantize(
    x: torch.Tensor,
    row_scale: torch.Tensor,
    column_scale: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    tile: Tile = TILES[0],
) -> None:
    """Write `rows` and `columns` of `fp8.Operands`.

    Args:
        x: `[tokens, width]`, contiguous.
        row_scale, column_scale: `[]` both (they are one), or `[tokens]` and `[width]`.
        rows: `[tokens, width]`, contiguous.
        columns: `[width, tokens]`, contiguous, the tokens filled up to some multiple.
    """
    tokens, width = x.shape
    padded = columns.shape[1]
    if x.numel() == 0:
        return
    with torch.cuda.device_of(x):
        _quantize_kernel[(triton.cdiv(padded, tile.rows) * triton.cdiv(width, tile.columns),)](
            x,
            rows,
            columns,
            row_scale,
            column_scale,
            tokens,
            width,
            padded,
            BY_ROW=row_scale.dim() > 0,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            num_warps=tile.warps,
        )
