"""Which tokens of each row the ranks of a context-parallel group hold.

A row is cut into `2 * pairs * size` chunks of equal length. They are dealt by cost, the keys that their tokens see: the
most expensive chunk goes to the rank with the least work, and each rank gets `2 * pairs` chunks of each row. In rows
without documents that is the usual deal, one chunk from the head and one from the tail (Llama 3, arXiv:2407.21783,
3.3.2); rows with documents differ in what their chunks cost, and the deal follows.

All ranks compute it on the host from the bounds of the documents, and come to the same result.
"""

from __future__ import annotations

import functools
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

MOST_PAIRS = 4
GOOD_BALANCE = 1.03  # of the most work on a rank to the mean: not worth more and smaller chunks

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Layout:
    """How rows of `length` tokens are dealt to `size` ranks.

    Attributes:
        bounds: `[documents + 1]`, counted over the tokens of all rows.
        ranks: `[rows, chunks]`, the rank that holds each chunk.
        work: `[size]`, the keys that the tokens of each rank see, summed over the windows that were planned for.
    """

    bounds: Ints
    rows: int
    length: int
    size: int
    ranks: Ints
    work: Ints

    @property
    def chunk(self) -> int:
        """Tokens of a chunk."""
        return self.length // self.ranks.shape[1]

    @property
    def imbalance(self) -> float:
        """The most work on a rank to the mean; 1 is perfect."""
        return float(self.work.max() * self.size / self.work.sum())

    @functools.cached_property
    def held(self) -> Ints:
        """`[size, rows, chunks of a rank and row]`: the chunks of each rank, ascending: the order of its tokens."""
        order = np.argsort(self.ranks, axis=1, kind="stable")
        return order.reshape(self.rows, self.size, -1).swapaxes(0, 1)

    def tokens(self, rank: int) -> torch.Tensor:
        """`[rows, length / size]`, int64, on the host: the columns that `rank` holds, in its order.

        `x.gather(1, tokens)` are its tokens of an `x` `[rows, length]`.
        """
        columns = self.held[rank][..., None] * self.chunk + np.arange(self.chunk)
        return torch.from_numpy(columns.reshape(self.rows, -1))

    def places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Two permutations of the chunks of all rows, `[rows * chunks]`, int64, on the host.

        The tokens of all ranks, one rank after another, are chunks, too. The first permutation has the place there of
        each chunk of the rows; the second the place in the rows of each chunk there. So `joined[first]` are the rows,
        and `rows[second]` are the ranks one after another.
        """
        chunks = self.ranks.shape[1]
        second = (self.held + np.arange(self.rows)[:, None] * chunks).reshape(-1)
        first = np.empty_like(second)
        first[second] = np.arange(len(second))
        return torch.from_numpy(first), torch.from_numpy(second)


def filled_length(length: int, size: int, tp: int = 1, most_pairs: int = MOST_PAIRS) -> int:
    """Tokens of a row once it is filled up for `plan`, and for sequence parallelism over `tp` ranks.

    What is added is a document of its own (or right padding, which no token sees), without labels.
    """
    multiple = size * math.lcm(2 * most_pairs, tp)
    return -(-length // multiple) * multiple


def plan(
    bounds: torch.Tensor | Sequence[int] | Ints,
    rows: int,
    length: int,
    size: int,
    windows: Sequence[int | None] = (None,),
    most_pairs: int = MOST_PAIRS,
    other_work: int = 0,
) -> Layout:
    """Deal `rows` of `length` tokens to `size` ranks, with the fewest chunks that balance well.

    The same on every rank; takes the time of sorting the documents and the chunks.

    Args:
        bounds: `[documents + 1]`, ascending, counted over the tokens of all rows; no document crosses the end of a row.
        windows: what the layers see, one entry for each layer or kind of layer: so many tokens including itself, or
            None for all before it.
        most_pairs: a rank has at most so many pairs of chunks of a row.
        other_work: what the layers cost for a token besides attention, in keys that a token sees, summed over
            `windows`: with P weights in the products of a layer, P / (2 * heads * head_dim). All ranks have the same of
            it. The more there is, the less is gained by smaller chunks.

    Raises:
        ValueError: if `2 * size` does not divide `length`, or `bounds` do not describe such rows.
    """
    edges = np.unique(np.asarray(bounds, dtype=np.int64))
    _check(edges, rows, length, size, windows, most_pairs, other_work)
    found: Layout | None = None
    other = other_work * rows * length / size
    for pairs in range(1, most_pairs + 1):
        if length % (2 * pairs * size):
            continue
        costs = _costs(edges, rows, length, 2 * pairs * size, windows)
        ranks, work = _deal(costs, size)
        layout = Layout(edges, rows, length, size, ranks, work)
        if found is None or layout.imbalance < found.imbalance:
            found = layout
        mean = found.work.mean()
        if (found.work.max() + other) / (mean + other) <= GOOD_BALANCE:
            break
    assert found is not None
    return found


def _check(
    edges: Ints, rows: int, length: int, size: int, windows: Sequence[int | None], most_pairs: int, other_work: int
) -> None:
    if min(rows, length, size, most_pairs, len(windows)) < 1 or any(x is not None and x < 1 for x in windows):
        raise ValueError(
            f"{rows} rows of {length} tokens over {size} ranks in up to {most_pairs} pairs of chunks, windows of "
            f"{list(windows)} tokens: each must be at least 1."
        )
    if other_work < 0:
        raise ValueError(f"other_work={other_work} keys a token: it must not be negative.")
    if length % (2 * size):
        raise ValueError(
            f"rows of {length} tokens cannot be cut into 2 * {size} equal chunks for {size} context-parallel ranks: "
            f"fill them up to {-(-length // (2 * size)) * 2 * size}."
        )
    ends = np.arange(rows + 1) * length
    if len(edges) < 2 or edges[0] != 0 or edges[-1] != rows * length or not np.isin(ends, edges).all():
        raise ValueError(
            f"documents with bounds {edges.tolist()[:8]}... do not fill {rows} rows of {length} tokens: bounds begin "
            "with 0 and have the end of each row."
        )


def _costs(edges: Ints, rows: int, length: int, chunks: int, windows: Sequence[int | None]) -> Ints:
    """`[rows, chunks]`: the keys that the tokens of each chunk see, summed over `windows`."""
    cuts = np.arange(rows * chunks) * (length // chunks)
    starts = np.union1d(cuts, edges[:-1])  # of pieces that lie in one chunk and one document
    begin = edges[np.searchsorted(edges, starts, side="right") - 1]  # of their documents
    ends = np.append(starts[1:], rows * length)
    seen = sum((_seen(ends - begin, window) - _seen(starts - begin, window) for window in windows), np.int64(0))
    return np.add.reduceat(np.asarray(seen), np.searchsorted(starts, cuts)).reshape(rows, chunks)


def _seen(tokens: Ints, window: int | None) -> Ints:
    """Keys that the first `tokens` tokens of a document see together."""
    near = tokens if window is None else np.minimum(tokens, window)
    return near * (near + 1) // 2 + (tokens - near) * (0 if window is None else window)


def _deal(costs: Ints, size: int) -> tuple[Ints, Ints]:
    """The rank of each chunk, and the work of each rank."""
    each = costs.shape[1] // size
    ranks, work = np.empty_like(costs), [0] * size
    for row, cost in enumerate(costs):
        free = [(work[rank], rank) for rank in range(size)]
        left = [each] * size
        heapq.heapify(free)
        for index in np.argsort(-cost, kind="stable").tolist():
            done, rank = heapq.heappop(free)
            work[rank] = done + int(cost[index])
            ranks[row, index] = rank
            left[rank] -= 1
            if left[rank]:
                heapq.heappush(free, (work[rank], rank))
    return ranks, np.asarray(work, dtype=np.int64)
