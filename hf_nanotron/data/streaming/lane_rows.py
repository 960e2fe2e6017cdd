"""The rows of one lane: its documents cut into rows, or packed into them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ...ops.cross_entropy import IGNORE_INDEX
from ..tokens.packing import PackedRows, pack
from ..tokens.row_reader import FILL, empty_rows, separate
from .documents import BufferStart, LaneOrder, buffers
from .token_ids import TOGETHER, TokenIds

Row = dict[str, np.ndarray]  # int64 `[S]`, by column


class LaneRows(Protocol):
    """Rows of a lane, one after the other.

    Attributes:
        rows: given before, or left out, since the beginning.
    """

    rows: int

    def next_row(self) -> Row | None:
        """None at the end of the lane."""

    def state(self) -> dict[str, Any]:
        """Behind the rows given, in JSON types: a few numbers, and the state of a shard. `rows` is one of them."""


class CutLane:
    """Row i begins at token i * S of the lane's documents, one after the other.

    The state is where a row begins: the start of the buffer, the document in it, and the token in that. Going on reads
    the documents of at most one buffer again.

    Args:
        masked: documents are kept apart.
    """

    def __init__(self, order: LaneOrder, ids: TokenIds, length: int, masked: bool, state: Mapping[str, Any]) -> None:
        self.ids, self.length, self.masked = ids, length, masked
        self.rows = state.get("rows", 0)
        self._start = BufferStart(**state["buffer"]) if state else order.start
        self._document, self._token = state.get("document", 0), state.get("token", 0)
        self._ahead: deque[tuple[BufferStart, int, np.ndarray]] = deque()  # buffer, document, its ids
        self._documents = self._read(buffers(order, ids.content, self._start), self._document)

    def _read(
        self, parts: Iterator[tuple[BufferStart, list[Any]]], skipped: int
    ) -> Iterator[tuple[BufferStart, int, np.ndarray]]:
        for start, documents in parts:
            for first in range(skipped, len(documents), TOGETHER):
                found = self.ids.of(documents[first : first + TOGETHER])
                yield from ((start, first + number, ids) for number, ids in enumerate(found))
            skipped = 0

    def next_row(self) -> Row | None:
        length = self.length
        ids, filled, begins = np.empty(length + 1, np.int64), 0, []
        for _, _, piece in self._pieces():
            skipped = self._token if filled == 0 else 0
            if skipped == 0:
                begins.append(filled)
            part = piece[skipped : skipped + length + 1 - filled]
            ids[filled : filled + len(part)] = part
            filled += len(part)
            if filled > length:
                break
        if filled < length:
            return None
        self._advance()
        self.rows += 1
        rows = empty_rows(1, length)
        rows["input_ids"][0] = rows["labels"][0] = ids[:length]
        rows["shift_labels"][0] = ids[1:]
        if filled == length:  # nothing comes after it
            rows["shift_labels"][0, -1] = IGNORE_INDEX
        if self.masked:
            separate(rows, np.zeros(len(begins), np.int64), np.array(begins, np.int64))
        return {name: column[0] for name, column in rows.items()}

    def _pieces(self) -> Iterator[tuple[BufferStart, int, np.ndarray]]:
        """Documents from the one on with which the row begins."""
        yield from list(self._ahead)
        for piece in self._documents:
            self._ahead.append(piece)
            yield piece

    def _advance(self) -> None:
        """To the beginning of the next row."""
        left = self.length
        while left:
            start, document, ids = self._ahead[0]
            rest = len(ids) - self._token
            self._start, self._document, self._token = start, document, self._token + left
            if left >= rest:
                self._ahead.popleft()
                self._document, self._token = document + 1, 0
            left -= min(left, rest)

    def state(self) -> dict[str, Any]:
        return {"rows": self.rows, "buffer": dict(vars(self._start)), "document": self._document, "token": self._token}


@dataclass(frozen=True)
class PackedBuffer:
    """The packed documents of a buffer.

    Attributes:
        start: of the buffer.
        tokens: of its documents, one after the other.
        places: `[rows]`: numbers of the packed rows, in the order in which they are given.
    """

    start: BufferStart
    tokens: np.ndarray
    packed: PackedRows
    places: np.ndarray

    def row(self, number: int, length: int) -> Row:
        return packed_row(self.tokens, self.packed.row(int(self.places[number])), length)


class PackLane:
    """Whole documents, best fit: those of a buffer are packed together, and its rows shuffled.

    The next buffer is tokenized bit by bit while rows of this one are given, so that no row waits for all of it. The
    state is the start of the buffer, and the rows given of it. Going on packs this buffer again.
    """

    def __init__(self, order: LaneOrder, ids: TokenIds, length: int, state: Mapping[str, Any]) -> None:
        self.order, self.ids, self.length = order, ids, length
        self.rows = state.get("rows", 0)
        self._start = BufferStart(**state["buffer"]) if state else order.start
        self._given = state.get("row", 0)  # rows of this buffer
        self._work = self._prepare(buffers(order, ids.content, self._start))
        self._steps = 0  # of the work on the next buffer
        self._next: PackedBuffer | None = None
        self._now: PackedBuffer | None = None

    def _prepare(self, parts: Iterator[tuple[BufferStart, list[Any]]]) -> Iterator[PackedBuffer | None]:
        """A buffer, after steps of work on it."""
        for start, documents in parts:
            ids: list[np.ndarray] = []
            for first in range(0, len(documents), TOGETHER):
                ids += self.ids.of(documents[first : first + TOGETHER])
                yield None
            packed = pack(np.cumsum([0, *map(len, ids)], dtype=np.int64), self.length)
            yield PackedBuffer(start, np.concatenate(ids), packed, self.order.permuted(len(packed), start))

    def next_row(self) -> Row | None:
        while self._now is None or self._given >= len(self._now.places):
            while self._next is None:
                try:
                    self._next = next(self._work)
                except StopIteration:
                    return None
            if self._now is not None:
                self._given = 0
            self._now, self._next, self._steps = self._next, None, 0
            self._start = self._now.start
        row = self._now.row(self._given, self.length)
        self._given += 1
        self.rows += 1
        all_steps = -(-self.order.buffer // TOGETHER) + 1
        while self._next is None and self._steps * len(self._now.places) < self._given * all_steps:
            self._next, self._steps = next(self._work, None), self._steps + 1
        return row

    def state(self) -> dict[str, Any]:
        return {"rows": self.rows, "buffer": dict(vars(self._start)), "row": self._given}


def packed_row(tokens: np.ndarray, pieces: list[tuple[int, int, bool]], length: int) -> Row:
    """A row of pieces of `tokens`: start, length, and whether its last token predicts the one behind it."""
    rows = empty_rows(1, length)
    inputs, labels, shifted = (rows[name][0] for name in ("input_ids", "labels", "shift_labels"))
    inputs[:], labels[:], shifted[:] = FILL, IGNORE_INDEX, IGNORE_INDEX
    begins, column = [], 0
    for start, size, goes_on in pieces:
        stop = column + size
        inputs[column:stop] = labels[column:stop] = tokens[start : start + size]
        following = size if goes_on else size - 1
        shifted[column : column + following] = tokens[start + 1 : start + 1 + following]
        begins.append(column)
        column = stop
    if column < length:
        begins.append(column)
    # As TokenDataset does it, the first token of a row counts as predicted in `labels`: no model reads that one.
    begins = begins[1:]
    separate(rows, np.zeros(len(begins), np.int64), np.array(begins, np.int64))
    return {name: values[0] for name, values in rows.items()}
