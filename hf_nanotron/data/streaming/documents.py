"""The documents of one lane, in order: shards in the order of an epoch, and buffers of documents, each shuffled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..tokens.permutation import Permutation
from .sources import ShardReader, Source

_END = object()


@dataclass(frozen=True)
class BufferStart:
    """Before the first document of a buffer.

    Attributes:
        epoch: of the lane.
        shard: place in the epoch's order of the lane's shards.
        read: examples of this shard before it.
        state: of the shard; None for its beginning.
        number: buffers before it, in all epochs.
    """

    epoch: int = 0
    shard: int = 0
    read: int = 0
    state: Any = None
    number: int = 0


@dataclass(frozen=True)
class LaneOrder:
    """Which documents a lane reads, and in which order.

    Lane l of n reads the shards l, l + n, ... If there are more lanes than shards, the lanes of one shard take its
    examples in turn.

    Attributes:
        buffer: documents that are shuffled together.
    """

    source: Source
    lane: int
    lanes: int
    seed: int
    shuffle: bool
    buffer: int

    @property
    def shards(self) -> list[int]:
        return list(range(self.lane % self.source.shards, self.source.shards, self.lanes))

    @property
    def turn(self) -> tuple[int, int]:
        """Of the examples of a shard, this lane takes those whose number is the first modulo the second."""
        first, shards = self.lane % self.source.shards, self.source.shards
        return self.lane // shards, len(range(first, self.lanes, shards))

    def shard(self, epoch: int, place: int) -> int:
        """The shard that is read at a place of an epoch."""
        if self.shuffle:
            place = int(Permutation(len(self.shards), self.seed, epoch, self.lane)(np.array([place]))[0])
        return self.shards[place]

    def shuffled(self, documents: int, start: BufferStart) -> np.ndarray:
        """`[documents]`: places in the order of the source, in the order of the lane."""
        return self.permuted(documents, start) if self.shuffle else np.arange(documents)

    def permuted(self, count: int, start: BufferStart) -> np.ndarray:
        """A permutation of the buffer's own."""
        stream = (start.number + 1) * self.lanes + self.lane
        return Permutation(count, self.seed, start.epoch, stream)(np.arange(count))


def buffers(
    order: LaneOrder, content: Callable[[Any], Any], start: BufferStart, epochs: int | None
) -> Iterator[tuple[BufferStart, list[Any]]]:
    """Buffers of a lane from `start` on: where each begins, and its documents in their order.

    A buffer ends with the epoch. At most one is in memory.

    Args:
        content: of an example; None for one that is left out.
        epochs: after which the lane ends; None for a lane without end.

    Raises:
        ValueError: for an epoch without documents.
    """
    here = start
    while epochs is None or here.epoch < epochs:
        documents: list[Any] = []
        begin, reader = here, _open(order, here)
        while reader is not None:
            example = next(reader, _END)
            if example is _END:
                here = replace(here, shard=here.shard + 1, read=0, state=None)
                reader = _open(order, here)
                continue
            turn, of = order.turn
            mine, here = here.read % of == turn, replace(here, read=here.read + 1)
            if mine and (document := content(example)) is not None:
                documents.append(document)
            if len(documents) == order.buffer:
                here = replace(here, state=reader.state(), number=here.number + 1)
                yield begin, [documents[place] for place in order.shuffled(len(documents), begin).tolist()]
                documents, begin = [], here
        if documents:
            yield begin, [documents[place] for place in order.shuffled(len(documents), begin).tolist()]
            here = replace(here, number=here.number + 1)
        elif begin == BufferStart(here.epoch, number=here.number):
            raise ValueError(
                f"lane {order.lane} of {order.lanes} has no documents with text (shards "
                f"{', '.join(map(str, order.shards[:8]))} of {order.source.shards}); use fewer lanes."
            )
        here = BufferStart(here.epoch + 1, number=here.number)


def _open(order: LaneOrder, here: BufferStart) -> ShardReader | None:
    if here.shard >= len(order.shards):
        return None
    return order.source.open(order.shard(here.epoch, here.shard), here.state)
