"""The Triton kernels of `fp8.py`."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .language import tl, triton


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
    values = tl.load(x + places, mask=inside, other=0.0)
    # What is not asked for is None, and then a branch of the compiler's.
    if rows is not None:
        by_row = tl.load(row_scale + row, mask=in_rows, other=1.0)[:, None] if BY_ROW else tl.load(row_scale)
        straight = (values.to(tl.float32) * tl.math.div_rn(1.0, by_row)).to(tl.float8e4nv)
        tl.store(rows + places, straight, mask=inside)
    if columns is not None:
        turned = values
        if column_scale is not None:
            by_column = (
                tl.load(column_scale + column, mask=in_columns, other=1.0)[None, :] if BY_ROW else tl.load(column_scale)
            )
            turned = (values.to(tl.float32) * tl.math.div_rn(1.0, by_column)).to(tl.float8e4nv)
        # Rows past the last token are zeros that fill up `columns`.
        places = column.to(tl.int64)[:, None] * padded + row[None, :]
        tl.store(columns + places, tl.trans(turned), mask=in_columns[:, None] & (row < padded)[None, :])


def quantize(
    x: torch.Tensor,
    row_scale: torch.Tensor | None,
    column_scale: torch.Tensor | None,
    rows: torch.Tensor | None,
    columns: torch.Tensor | None,
    tile: Tile = TILES[0],
) -> None:
    """Write `rows` and `columns` of `fp8.Operands`, or one of them.

    Args:
        x: `[tokens, width]`, contiguous; FP8 values already if there is no scale.
        row_scale, column_scale: `[]`, or `[tokens]` and `[width]`; without `column_scale`, `x` is transposed as it is.
        rows, columns: `[tokens, width]` and `[width, padded tokens]`, contiguous.
    """
    tokens, width = x.shape
    padded = tokens if columns is None else columns.shape[1]
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
            BY_ROW=any(scale is not None and scale.dim() > 0 for scale in (row_scale, column_scale)),
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            num_warps=tile.warps,
        )
