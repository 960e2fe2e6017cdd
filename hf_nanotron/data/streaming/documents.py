"""The documents of one lane, in order: shards in the order of an epoch, and buffers of documents, each shuffled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from transformers.utils import logging

from ..tokens.permutation import Permutation
from .sources import Source

logger = logging.get_logger(__name__)

PASSES = 10  # over a data set for one buffer, from which on the lanes are told to be too many
_END = object()


@dataclass(frozen=True)
class BufferStart:
    """Before the first document of a buffer.

    Attributes:
        turn: place of the shard in `LaneOrder.shard`.
        read: examples of this shard before it.
        state: of the shard; None for its beginning.
        number: buffers before it.
    """

    turn: int
    read: int = 0
    state: Any = None
    number: int = 0


@dataclass(frozen=True)
class LaneOrder:
    """Which documents a lane reads, and in which order.

    The shards of all epochs, each epoch in an order of its own, are one sequence of turns without end, and lane l of n
    takes the turns l, l + n, ... So each shard is read once an epoch, whatever the number of lanes. Where there are
    more lanes than shards, every shard counts as several parts, which take its examples in turn.

    Attributes:
        first: turn of lane 0.
        end: turn before which all lanes end; None for never.
        buffer: documents that are shuffled together.
    """

    source: Source
    lane: int
    lanes: int
    seed: int
    shuffle: bool
    buffer: int
    first: int = 0
    end: int | None = None

    @property
    def parts(self) -> int:
        """Of a shard."""
        return parts_of(self.source.shards, self.lanes)

    @property
    def turns(self) -> int:
        """Of an epoch."""
        return self.source.shards * self.parts

    @property
    def start(self) -> BufferStart:
        return BufferStart(self.first + self.lane)

    def shard(self, turn: int) -> tuple[int, int]:
        """The shard that is read in a turn, and which part of it."""
        epoch, place = divmod(turn, self.turns)
        if self.shuffle:
            place = int(Permutation(self.turns, self.seed, epoch)(np.array([place]))[0])
        return place % self.source.shards, place // self.source.shards

    def permuted(self, count: int, start: BufferStart) -> np.ndarray:
        """`[count]`: a permutation of the buffer's own; none without `shuffle`."""
        if not self.shuffle:
            return np.arange(count)
        stream = (start.number + 1) * self.lanes + self.lane
        return Permutation(count, self.seed, start.turn // self.turns, stream)(np.arange(count))


def parts_of(shards: int, lanes: int) -> int:
    return -(-lanes // shards)


def buffers(
    order: LaneOrder, content: Callable[[Any], Any], start: BufferStart
) -> Iterator[tuple[BufferStart, list[Any]]]:
    """Buffers of a lane from `start` on: where each begins, and its documents in their order. One is in memory.

    Args:
        content: of an example; None for one that is left out.

    Raises:
        ValueError: if a lane without end finds no document in as many turns as an epoch has.
    """
    documents: list[Any] = []
    begin = here = start
    empty = 0  # turns without a document
    while order.end is None or here.turn < order.end:
        shard, part = order.shard(here.turn)
        reader = order.source.open(shard, here.state)
        empty += 1
        while (example := next(reader, _END)) is not _END:
            mine, here = here.read % order.parts == part, replace(here, read=here.read + 1)
            if mine and (document := content(example)) is not None:
                documents.append(document)
                empty = 0
            if len(documents) == order.buffer:
                here = replace(here, state=reader.state(), number=here.number + 1)
                yield begin, [documents[place] for place in order.permuted(len(documents), begin).tolist()]
                documents, begin = [], here
        passes = (here.turn - begin.turn) // order.turns
        here = BufferStart(here.turn + order.lanes, number=here.number)
        if passes < PASSES <= (here.turn - begin.turn) // order.turns:
            logger.warning_once(
                f"With lanes={order.lanes} and shuffle_buffer={order.buffer} a lane of this stream reads its data set "
                f"{PASSES} times and more to fill its buffer, before its first row: the set has few documents. Use "
                "fewer lanes, or a smaller shuffle_buffer."
            )
        begin = begin if documents else here
        if empty > order.turns and order.end is None:
            raise ValueError(
                f"lane {order.lane} of {order.lanes} has found no document with text in {order.turns} shards; the "
                f"dataset has {order.source.shards}."
            )
    if documents:
        yield begin, [documents[place] for place in order.permuted(len(documents), begin).tolist()]
