"""The loader of a stream of lanes: each data-parallel rank, and each of its workers, reads its own lanes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers.utils import logging

from ..dealing import Mark, Position
from ..hashing import combined
from ..loader import DataParallelLoader
from .lane_rows import Row
from .lane_stream import LaneStream, State, tensors

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class LaneShare:
    """What one data-parallel rank reads of the lanes.

    Sample i goes to rank i modulo the number of ranks, row by row and not batch by batch, so that which lanes a rank
    reads does not depend on the batch size.
    """

    lanes: int
    ranks: int

    @property
    def lanes_of_rank(self) -> int:
        """Lanes that a rank reads. Its samples come from them in turn."""
        return self.lanes // math.gcd(self.lanes, self.ranks)

    @property
    def readers(self) -> int:
        """Ranks that read the same lanes, each for some of their rows."""
        return self.ranks // math.gcd(self.lanes, self.ranks)

    def workers(self, wanted: int) -> int:
        """Workers, up to as many, that can divide the lanes of a rank."""
        return max((n for n in range(1, wanted + 1) if self.lanes_of_rank % n == 0), default=0)

    def __str__(self) -> str:
        said = f"each data-parallel rank reads {self.lanes_of_rank} of {self.lanes} lanes"
        if self.readers == 1:
            return said
        return (
            f"{said} and trains on one in {self.readers} of their rows; where the data-parallel size ({self.ranks}) "
            "divides the number of lanes, it trains on all that it reads"
        )


class _RankRows(IterableDataset[Any]):
    """The rows of one rank; in a worker process, those of the worker: its lanes, with their states."""

    start: Position | None = None

    def __init__(self, dataset: LaneStream, dp_rank: int, dp_size: int) -> None:
        self.dataset, self.dp_rank, self.dp_size = dataset, dp_rank, dp_size

    def set_epoch(self, epoch: int) -> None:
        self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[int, Row, State]]:
        start, self.start = self.start or Position(0), None
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        # Torch takes an item from each worker in turn.
        first, step = self.dp_rank + self.dp_size * number, self.dp_size * workers
        return self.dataset.samples(start.samples, start.state, first, step)


class LaneLoader(DataParallelLoader):
    """Batches of one rank. Workers make rows; they are collated here, so that a batch may be of several workers' lanes.

    `position` has the states of this rank's lanes behind its last batch; `joined` makes one of those of all ranks.
    """

    def __init__(
        self, stream: LaneStream, collate: Callable[[list[Any]], Any], rows: int, share: _RankRows, **kwargs: Any
    ) -> None:
        self.rows_of_batch, self._collate, self._pins = rows, collate, kwargs.pop("pin_memory", False)
        super().__init__(share, collate, batch_size=None, **kwargs)

    def _collator(self, collate: Callable[[list[Any]], Any]) -> Callable[[Any], Any]:
        return _unchanged

    @property
    def _source(self) -> Any:
        return self.dataset

    def _counted_rows(self, batch: Any, mark: Mark) -> int | None:
        return None

    def _marked_batches(self) -> Iterator[tuple[Any, Mark]]:
        source: _RankRows = self.dataset  # type: ignore[assignment]
        start = source.start or Position(0)
        samples, lanes = start.samples, {} if start.state is None else dict(start.state["lanes"])
        read = DataLoader.__iter__(self)
        source.start = None  # the workers, if any, have it
        source.dataset.begin_at(start.state, start.samples)  # here, too: workers have copies
        while rows := list(islice(read, self.rows_of_batch)):
            for lane, _, state in rows:
                lanes[str(lane)] = state
            samples += len(rows) * source.dp_size
            batch = self._collate([tensors(row) for _, row, _ in rows])
            end = Position(samples, {"lanes": dict(lanes), **source.dataset.common_state()})
            yield _pinned(batch) if self._pins else batch, Mark(len(rows), end, False, combined([samples]))


def build_lane_loader(
    stream: LaneStream,
    collate: Callable[[list[Any]], Any],
    batch_size: int,
    dp_rank: int,
    dp_size: int,
    positions: bool = False,
    **kwargs: Any,
) -> LaneLoader:
    """The loader of one data-parallel rank over a stream without end; see `build_loader`."""
    share = LaneShare(stream.lanes, dp_size)
    wanted = kwargs.pop("num_workers", 0)
    workers = share.workers(wanted)
    if dp_rank == 0:
        (logger.info if share.readers == 1 else logger.warning)(f"{str(share).capitalize()}.")
        if workers != wanted:
            logger.warning(
                f"{workers} of dataloader_num_workers={wanted} are used: {share.lanes_of_rank} lanes of a rank divide "
                "over no more."
            )
    prefetch = kwargs.pop("prefetch_factor", None)
    if workers:
        kwargs["prefetch_factor"] = (2 if prefetch is None else prefetch) * batch_size  # batches of each worker
    else:
        kwargs.update(persistent_workers=False, multiprocessing_context=None)
    rows = _RankRows(stream, dp_rank, dp_size)
    return LaneLoader(stream, collate, batch_size, rows, positions=positions, num_workers=workers, **kwargs)


def _unchanged(item: Any) -> Any:
    return item


def _pinned(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v.pin_memory() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
