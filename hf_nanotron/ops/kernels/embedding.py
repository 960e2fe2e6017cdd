"""The Triton kernel of `embedding.py`."""

from __future__ import annotations

import torch

from .language import tl, triton

ROWS = 16  # of one id, read at a time
MAX_BLOCK = 512


@triton.jit
def _add_rows_kernel(total, rows, ids, order, count, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """One program for each place in the sorted ids; those at which an id begins add up all of its rows."""
    first = tl.program_id(0)
    own = tl.load(ids + first)
    before = tl.load(ids + tl.maximum(first - 1, 0))
    if (first == 0) | (own != before):
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < width
        added = tl.zeros((BLOCK,), tl.float32)
        start = first
        found = ROWS
        while found == ROWS:
            places = start + tl.arange(0, ROWS)
            there = places < count
            same = there & (tl.load(ids + places, mask=there, other=0) == own)
            which = tl.load(order + places, mask=same, other=0)
            block = tl.load(
                rows + which[:, None] * width + columns[None, :], mask=same[:, None] & inside[None, :], other=0.0
            )
            added += tl.sum(block.to(tl.float32), 0)
            found = tl.sum(same.to(tl.int32), 0)
            start += ROWS
        place = total + own * width + columns
        tl.store(place, tl.load(place, mask=inside, other=0.0) + added, mask=inside)


def add_rows(total: torch.Tensor, ids: torch.Tensor, rows: torch.Tensor) -> None:
    """As `embedding.add_rows`, on a GPU; `total` and `rows` are contiguous, ids int64."""
    count, width = rows.shape
    if rows.numel() == 0:
        return
    ordered, order = torch.sort(ids, stable=True)
    block = min(MAX_BLOCK, triton.next_power_of_2(width))
    with torch.cuda.device_of(total):
        _add_rows_kernel[(count, triton.cdiv(width, block))](
            total, rows, ordered, order, count, width, ROWS=ROWS, BLOCK=block
        )
