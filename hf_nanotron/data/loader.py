"""Which samples each data-parallel rank reads, and in which order.

The order is that of a stock `transformers.Trainer` in one process: batch `k` of the epoch goes to data-parallel rank
`k % dp_size`, so one optimizer step sees the same samples for every `dp_size` at the same global batch. Where the last
round does not reach every rank, the others get a filler of one sample without labels. It adds nothing to loss or
gradient, and no sample is seen twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate.data_loader import DataLoaderStateMixin
from accelerate.state import GradientState
from torch.utils.data import DataLoader, IterableDataset, Sampler

from ..parallel.loss import IGNORE_INDEX


class Filler(list):
    """Indices, or samples, that stand in where a rank has none of its own."""


class FillerBatch(dict):
    """A batch that only keeps this rank in step with the others."""


class DataParallelBatchSampler(Sampler[list[int]]):
    """Every `dp_size`-th batch of `sampler`, the same number on every rank.

    Args:
        sampler: sample indices in the order of one process.
        batch_size: samples a batch.
        dp_rank, dp_size: whose batches.
        drop_last: leave out the last batch of the epoch if it is short.
        seed: of a `sampler.generator`, with the epoch added, unless the sampler has a `set_epoch` of its own.
    """

    def __init__(
        self, sampler: Sampler[int], batch_size: int, dp_rank: int, dp_size: int, drop_last: bool, seed: int
    ) -> None:
        self.sampler, self.batch_size, self.drop_last, self.seed = sampler, batch_size, drop_last, seed
        self.dp_rank, self.dp_size = dp_rank, dp_size

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)
        elif isinstance(generator := getattr(self.sampler, "generator", None), torch.Generator):
            generator.manual_seed(self.seed + epoch)

    def __len__(self) -> int:
        samples = len(self.sampler)  # type: ignore[arg-type]
        batches = samples // self.batch_size if self.drop_last else math.ceil(samples / self.batch_size)
        return math.ceil(batches / self.dp_size)

    def __iter__(self) -> Iterator[list[int]]:
        return deal(batched(self.sampler, self.batch_size, self.drop_last), self.dp_rank, self.dp_size)


class DataParallelStream(IterableDataset):
    """Every `dp_size`-th batch of a stream, as lists of samples. Each rank reads the whole stream.

    Splitting the stream's shards among the ranks instead would change the order with `dp_size`.
    """

    def __init__(self, dataset: Any, batch_size: int, dp_rank: int, dp_size: int, drop_last: bool) -> None:
        self.dataset, self.batch_size, self.drop_last = dataset, batch_size, drop_last
        self.dp_rank, self.dp_size = dp_rank, dp_size

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[Any]]:
        return deal(batched(self.dataset, self.batch_size, self.drop_last), self.dp_rank, self.dp_size)


def batched(items: Any, size: int, drop_last: bool) -> Iterator[list[Any]]:
    batch: list[Any] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch and not drop_last:
        yield batch


def deal(batches: Iterator[list[Any]], rank: int, size: int) -> Iterator[list[Any]]:
    """Batch `k` to rank `k % size`; in a last, incomplete round the ranks left out get a `Filler`."""
    last: list[Any] = []
    mine: list[Any] | None = None
    position = 0
    for batch in batches:
        if position == rank:
            mine = batch
        last, position = batch, position + 1
        if position == size:
            assert mine is not None
            yield mine
            mine, position = None, 0
    if position:
        yield mine if mine is not None else Filler(last[:1])


class _MarkedDataset(torch.utils.data.Dataset):
    """Hands a `Filler` of indices on as a `Filler` of samples."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        if hasattr(self.dataset, "__getitems__"):
            samples = self.dataset.__getitems__(indices)
        else:
            samples = [self.dataset[index] for index in indices]
        return Filler(samples) if isinstance(indices, Filler) else samples


class _Collate:
    """Collates samples; a filler loses its labels, so that it weighs nothing."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: list[Any]) -> Any:
        batch = self.collate(list(samples))
        if not isinstance(samples, Filler):
            return batch
        filler = FillerBatch(batch)
        for name in ("labels", "shift_labels"):
            if isinstance(filler.get(name), torch.Tensor):
                filler[name] = torch.full_like(filler[name], IGNORE_INDEX)
        return filler


class DataParallelLoader(DataLoader, DataLoaderStateMixin):
    """A `DataLoader` that tells accelerate when it is at its last batch (`batch_eval_metrics` asks)."""

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any], **kwargs: Any) -> None:
        self.gradient_state = GradientState()
        self._drop_last = True  # no sample comes twice: nothing for accelerate to cut off
        super().__init__(dataset, collate_fn=_Collate(collate), **kwargs)

    def set_epoch(self, epoch: int) -> None:
        target = self.dataset if isinstance(self.dataset, DataParallelStream) else self.batch_sampler
        target.set_epoch(epoch)  # type: ignore[union-attr]

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self.begin()
        try:
            batches = super().__iter__()
            current = next(batches, None)
            while current is not None:
                following = next(batches, None)
                self.end_of_dataloader = following is None
                yield current
                current = following
        finally:
            self.end()


def build_loader(
    dataset: Any,
    sampler: Sampler[int] | None,
    collate: Callable[[list[Any]], Any],
    batch_size: int,
    dp_rank: int,
    dp_size: int,
    drop_last: bool,
    seed: int,
    **kwargs: Any,
) -> DataParallelLoader:
    """The loader of one data-parallel rank; all ranks that hold one copy of the model build the same.

    Args:
        sampler: order of a dataset with indices; None for an `IterableDataset`.
        kwargs: for `torch.utils.data.DataLoader` (workers, pinning, prefetching).
    """
    if isinstance(dataset, IterableDataset):
        if kwargs.get("num_workers", 0) > 1:
            raise ValueError(
                f"dataloader_num_workers={kwargs['num_workers']} with an IterableDataset: several workers would each "
                "read a part of the stream and change its order; use 0 or 1."
            )
        stream = DataParallelStream(dataset, batch_size, dp_rank, dp_size, drop_last)
        return DataParallelLoader(stream, collate, batch_size=None, **kwargs)
    assert sampler is not None
    batches = DataParallelBatchSampler(sampler, batch_size, dp_rank, dp_size, drop_last, seed)
    return DataParallelLoader(_MarkedDataset(dataset), collate, batch_sampler=batches, **kwargs)
