"""How batches are dealt to data-parallel ranks, in the order of one process."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import IterableDataset, RandomSampler, Sampler, get_worker_info

from .cursor import rounds_of, why_not_resumable
from .hashing import of_the_model, sample_hash
from .legs import RunSampler


class Position(NamedTuple):
    """Between two samples of an epoch: `samples` before it over all data-parallel ranks, and a stream's state."""

    samples: int
    state: Any = None


class Mark(NamedTuple):
    """What accompanies the tensors of a batch.

    Attributes:
        samples: that it was collated from; 0 for a filler.
        end: where its round ends.
        ends_round: whether no batch of the round comes after it in the order of one process.
        first: hash of the round's first sample, or of its index: what all ranks must have read.
    """

    samples: int
    end: Position
    ends_round: bool
    first: int = 0


class Share(list):
    """Indices, or samples, of one rank in a round; `end`, `ends_round` and `first` as in `Mark`.

    `epoch` is that of the indices: a worker process that outlives an epoch is not told of `set_epoch` otherwise.
    """

    end: Position
    ends_round: bool = False
    first: int = 0
    epoch: int | None = None


class Filler(Share):
    """Stands in where a rank has none of its own."""


class FillerBatch(dict):
    """A batch that only keeps this rank in step with the others."""


def repeatable(sampler: Sampler[int], seed: int) -> Sampler[int]:
    """A sampler whose order in an epoch can be drawn again, for a resume: one without a generator would draw from the
    global one. torch's `RandomSampler` becomes accelerate's, as in stock Trainer.
    """
    if type(sampler) is RandomSampler:
        source, count = sampler.data_source, sampler._num_samples
        return SeedableRandomSampler(source, sampler.replacement, count, sampler.generator, data_seed=seed)
    if getattr(sampler, "generator", seed) is None and not hasattr(sampler, "set_epoch"):
        sampler.generator = torch.Generator().manual_seed(seed)  # type: ignore[attr-defined]
    return sampler


class DataParallelBatchSampler(Sampler[list[int]]):
    """Every `dp_size`-th batch of `sampler` (in the order of one process), the same number on every rank.

    The first seed of `sampler.generator` plus the epoch seeds it, unless the sampler has its own `set_epoch`: the order
    of an epoch is that of its number. The next iteration, and only that, begins at `start`. `step_batches` are those of
    an optimizer step over all ranks, at which a round ends; a leg of a run has its own number.
    """

    start: Position | None = None
    epoch: int | None = None

    def __init__(
        self,
        sampler: Sampler[int],
        batch_size: int,
        dp_rank: int,
        dp_size: int,
        drop_last: bool,
        step_batches: int | None = None,
    ) -> None:
        self.sampler, self.batch_size, self.drop_last = sampler, batch_size, drop_last
        generator = getattr(sampler, "generator", None)
        self._generator = generator if isinstance(generator, torch.Generator) else None
        self._seed = 0 if self._generator is None else self._generator.initial_seed()
        self.dp_rank, self.dp_size, self._step_batches = dp_rank, dp_size, step_batches

    @property
    def step_batches(self) -> int | None:
        """None where a step needs no rounds of its own."""
        batches = self._step_batches
        if batches is not None and isinstance(self.sampler, RunSampler) and self.sampler.legs:
            batches = self.sampler.leg.batch // self.batch_size
        return None if batches is None or batches % self.dp_size == 0 else batches

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)
        elif self._generator is not None:
            self._generator.manual_seed(self._seed + epoch)

    def __len__(self) -> int:
        samples = len(self.sampler)  # type: ignore[arg-type]
        batches = samples // self.batch_size if self.drop_last else math.ceil(samples / self.batch_size)
        return rounds_of(batches, self.dp_size, self.step_batches)

    def __iter__(self) -> Iterator[list[int]]:
        start, self.start = self.start, None
        samples = start.samples if start else 0
        indices = islice(self.sampler, samples, None)
        batches = batched(indices, self.batch_size, self.drop_last)
        for share in deal(batches, self.dp_rank, self.dp_size, self.step_batches):
            samples += share.end.samples
            share.end, share.epoch = Position(samples), self.epoch
            yield share


class DataParallelStream(IterableDataset):
    """Every `dp_size`-th batch of a stream, as lists of samples. Each rank reads the whole stream.

    Splitting the stream's shards among the ranks instead would make the order depend on `dp_size`. With `positions`,
    the stream is asked for its state after every round. The next iteration, and only that, begins at `start`.
    """

    start: Position | None = None

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        dp_rank: int,
        dp_size: int,
        drop_last: bool,
        positions: bool = False,
        step_batches: int | None = None,
    ) -> None:
        self.dataset, self.batch_size, self.drop_last = dataset, batch_size, drop_last
        self.dp_rank, self.dp_size, self.step_batches = dp_rank, dp_size, step_batches
        self.has_states = positions and why_not_resumable(dataset) is None
        self._epoch = torch.tensor(-1).share_memory_()  # also for a worker process that outlives an epoch

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[Any]]:
        start, self.start = self.start, None
        epoch = int(self._epoch)
        if get_worker_info() is not None and epoch >= 0 and hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        source, samples = self.dataset, 0
        if start is not None and start.samples:
            source, samples = twin(self.dataset), start.samples
            try:
                source.load_state_dict(start.state)
            except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
                raise ValueError(
                    f"the checkpoint's state of the stream is not valid for a {type(source).__name__} "
                    f"({type(error).__name__}: {error}); use an earlier checkpoint."
                ) from error
        batches = batched(source, self.batch_size, self.drop_last)
        for share in deal(batches, self.dp_rank, self.dp_size, self.step_batches):
            samples += share.end.samples
            # Nothing behind the round has been read yet.
            share.end = Position(samples, source.state_dict() if self.has_states else None)
            yield share


def twin(dataset: Any) -> Any:
    """The same stream, for a state that the user's own object, and its later epochs, must not get.

    (`copy.copy` of a `datasets.IterableDataset` shares its attributes with the original.)
    """
    other = object.__new__(type(dataset))
    other.__dict__.update(vars(dataset))
    return other


def batched(items: Any, size: int, drop_last: bool) -> Iterator[list[Any]]:
    batch: list[Any] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch and not drop_last:
        yield batch


def deal(batches: Iterator[list[Any]], rank: int, size: int, step_batches: int | None = None) -> Iterator[Share]:
    """Batch `k` to rank `k % size`; in a last, incomplete round the ranks left out get a `Filler`.

    With `step_batches`, `k` is counted anew after each so many batches, so that a round ends there, too. The `end` of a
    share counts only the samples of its round. A round is yielded before the next one is read.
    """
    last: list[Any] = []
    mine: Share | None = None
    position = samples = first = in_step = 0
    for batch in batches:
        if position == 0 and size > 1:
            first = sample_hash(of_the_model(batch[0]))
        if position == rank:
            mine = Share(batch)
        last, position, samples, in_step = batch, position + 1, samples + len(batch), in_step + 1
        ends_step = in_step == step_batches
        if position == size or ends_step:
            mine = mine if mine is not None else Filler(last[:1])
            mine.end, mine.ends_round, mine.first = Position(samples), rank == position - 1, first
            yield mine
            mine, position, samples = None, 0, 0
            in_step = 0 if ends_step else in_step
    if position:
        mine = mine if mine is not None else Filler(last[:1])
        mine.end, mine.ends_round, mine.first = Position(samples), rank == position - 1, first
        yield mine
