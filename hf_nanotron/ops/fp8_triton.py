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


class Config(NamedTuple):
    """How the weight gradient is cut: tiles `[a, b]`, tokens a turn, turns loaded ahead.

    Args:
        group: tiles of `a` that neighbours in time share a column of.
        exact: tokens after which the tensor cores' sum, of fewer bits than fp32 has, is added to one in fp32; None for
            never.
    """

    a: int
    b: int
    tokens: int
    warps: int
    stages: int
    group: int = 8
    exact: int | None = 128


CONFIGS = (Config(128, 256, 128, 8, 3), Config(128, 128, 128, 4, 4), Config(128, 128, 128, 8, 4))


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


@triton.jit
def _product_kernel(
    total,
    left,
    right,
    left_scale,
    right_scale,
    a,
    b,
    tokens,
    OVERWRITE: tl.constexpr,
    BY_ROW: tl.constexpr,
    EVEN: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    EXACT: tl.constexpr,
):
    tiles_a, tiles_b = tl.cdiv(a, A), tl.cdiv(b, B)
    group = tl.program_id(0) // (GROUP * tiles_b)
    height = tl.minimum(tiles_a - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * tiles_b)
    row = (group * GROUP + within % height) * A + tl.arange(0, A)
    column = (within // height) * B + tl.arange(0, B)
    in_a, in_b = row < a, column < b
    token = tl.arange(0, TOKENS)
    # Past the end the last rows are read again: their products are not written.
    left_rows = left + tl.minimum(row, a - 1).to(tl.int64)[:, None] * tokens + token[None, :]
    right_rows = right + tl.minimum(column, b - 1).to(tl.int64)[:, None] * tokens + token[None, :]
    sums = tl.zeros((A, B), dtype=tl.float32)
    for turn in range(0, tokens, TOKENS):
        if EVEN:
            x = tl.load(left_rows + turn)
            y = tl.load(right_rows + turn)
        else:
            left_over = (token < tokens - turn)[None, :]
            x = tl.load(left_rows + turn, mask=left_over, other=0.0)
            y = tl.load(right_rows + turn, mask=left_over, other=0.0)
        sums = tl.dot(x, tl.trans(y), sums, max_num_imprecise_acc=EXACT)
    if BY_ROW:
        sums *= tl.load(left_scale + row, mask=in_a, other=0.0)[:, None]
        sums *= tl.load(right_scale + column, mask=in_b, other=0.0)[None, :]
    else:
        sums *= tl.load(left_scale) * tl.load(right_scale)
    places = total + row.to(tl.int64)[:, None] * b + column[None, :]
    inside = in_a[:, None] & in_b[None, :]
    if not OVERWRITE:
        sums += tl.load(places, mask=inside, other=0.0)
    tl.store(places, sums, mask=inside)


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


def add_scaled_product(
    total: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    left_scale: torch.Tensor,
    right_scale: torch.Tensor,
    overwrite: bool,
    config: Config = CONFIGS[0],
) -> None:
    """`total (+)= left @ right.T` with their scales; see `fp8.add_scaled_product`.

    Args:
        total: `[a, b]`, fp32, contiguous.
        left, right: `[a, tokens]` and `[b, tokens]`, FP8, contiguous, not empty.
        left_scale, right_scale: `[]` both, or `[a]` and `[b]`.
    """
    (a, tokens), b = left.shape, right.shape[0]
    with torch.cuda.device_of(total):
        _product_kernel[(triton.cdiv(a, config.a) * triton.cdiv(b, config.b),)](
            total,
            left,
            right,
            left_scale,
            right_scale,
            a,
            b,
            tokens,
            OVERWRITE=overwrite,
            BY_ROW=left_scale.dim() > 0,
            EVEN=tokens % config.tokens == 0,
            A=config.a,
            B=config.b,
            TOKENS=config.tokens,
            GROUP=config.group,
            EXACT=config.exact,
            num_warps=config.warps,
            num_stages=config.stages,
        )
