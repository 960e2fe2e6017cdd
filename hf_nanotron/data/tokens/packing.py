"""Whole documents packed into rows: best fit decreasing, over the documents of one window.

Documents are placed from the longest to the shortest, each into the fullest row that has room for it (Johnson et al.
1974, "Worst-case performance bounds for simple one-dimensional packing algorithms"). All documents of one length are
placed at once, and rows with the same lengths in them are kept as one group, so that the work grows with the number of
lengths, not of documents. A document longer than a row is cut into full rows; only what is left of it is packed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

WINDOW = 2**16  # documents that are packed together


@dataclass(frozen=True)
class PackedRows:
    """Pieces of documents, in the order in which rows hold them.

    Attributes:
        first_piece: `[rows + 1]` int64: the pieces of row r are `first_piece[r]` to `first_piece[r + 1]`.
        starts, lengths: `[pieces]` int64, in tokens.
        goes_on: `[pieces]` bool: the document does, in another row.
    """

    first_piece: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    goes_on: np.ndarray

    def __len__(self) -> int:
        return len(self.first_piece) - 1

    def row(self, number: int) -> list[tuple[int, int, bool]]:
        """Start, length and `goes_on` of the pieces of a row."""
        part = slice(self.first_piece[number], self.first_piece[number + 1])
        columns = (self.starts[part].tolist(), self.lengths[part].tolist(), self.goes_on[part].tolist())
        return list(zip(*columns, strict=True))


Group = tuple[int, tuple[tuple[int, int], ...]]  # rows, and (length, pieces of it in each row)


def row_count(lengths: np.ndarray, capacity: int) -> int:
    """Rows that `pack` makes of documents of these lengths, in far less time than it takes."""
    full = int((lengths // capacity).sum())
    return full + sum(rows for rows, _ in _groups(np.bincount(lengths % capacity, minlength=capacity), capacity))


def pack(edges: np.ndarray, capacity: int) -> PackedRows:
    """Pack documents into rows of `capacity` tokens. The same edges give the same rows.

    Args:
        edges: `[documents + 1]` int64, where each begins and the last one ends, in tokens.
    """
    lengths = np.diff(edges)
    rests = lengths % capacity
    full_rows = lengths // capacity
    # The full rows of each long document, one after the other.
    owner = np.repeat(np.arange(len(lengths)), full_rows)
    within = np.arange(len(owner)) - np.repeat(np.cumsum(full_rows) - full_rows, full_rows)
    starts = [edges[owner] + within * capacity]
    counts, sizes = [np.ones(len(owner), np.int64)], [np.full(len(owner), capacity, np.int64)]
    by_length = np.argsort(rests, kind="stable")
    histogram = np.bincount(rests, minlength=capacity)
    following = np.cumsum(histogram) - histogram  # the next piece of each length, in `by_length`
    rest_starts = (edges[:-1] + full_rows * capacity)[by_length]
    for rows, content in _groups(histogram, capacity):
        columns, widths = [], []
        for length, pieces in content:
            first = following[length]
            following[length] += rows * pieces
            columns.append(rest_starts[first : first + rows * pieces].reshape(rows, pieces))
            widths += [length] * pieces
        starts.append(np.concatenate(columns, 1).ravel())
        sizes.append(np.tile(np.array(widths, np.int64), rows))
        counts.append(np.full(rows, len(widths), np.int64))
    first_piece = np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int64)
    goes_on = np.zeros(first_piece[-1], bool)
    goes_on[: len(owner)] = (within + 1 < full_rows[owner]) | (rests[owner] > 0)
    return PackedRows(first_piece, np.concatenate(starts), np.concatenate(sizes), goes_on)


def _groups(histogram: np.ndarray, capacity: int) -> list[Group]:
    """Best fit decreasing of `histogram[length]` pieces of each length from 1 to `capacity - 1`."""
    rooms: dict[int, list[Group]] = {}  # rows by the tokens that they have room for
    known = 0  # bit r: rows with room for r tokens exist
    done: list[Group] = []

    def put(room: int, group: Group) -> None:
        nonlocal known
        if room == 0:
            done.append(group)
            return
        rooms.setdefault(room, []).append(group)
        known |= 1 << room

    for length in np.flatnonzero(histogram)[::-1].tolist():
        if length == 0:
            continue
        left = int(histogram[length])
        while left:
            fitting = known >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                rows, content = rooms[room].pop()
                if not rooms[room]:
                    del rooms[room]
                    known &= ~(1 << room)
            else:
                room, content = capacity, ()
                rows = -(-left // (room // length))
            each = room // length  # a row that was begun stays the fullest until it has no room for another
            whole = min(rows, left // each)
            if whole:
                put(room - each * length, (whole, (*content, (length, each))))
                left -= whole * each
            if whole < rows and left:  # fewer than `each`
                put(room - left * length, (1, (*content, (length, left))))
                whole, left = whole + 1, 0
            if whole < rows:
                put(room, (rows - whole, content))
    return done + [group for room in sorted(rooms) for group in rooms[room]]
