"""Which samples each data-parallel rank reads, and in which order.

The order is that of a stock `transformers.Trainer` in one process: batch `k` of the epoch goes to data-parallel rank `k
% dp_size`, so an optimizer step sees the same samples for every `dp_size` at the same global batch. If the last round
does not reach every rank, the others get a filler of one sample without labels, which adds nothing to loss or gradient;
no sample is seen twice. The same holds for the last round of each optimizer step, where the micro-batches of a step do
not divide among the ranks (`step_batches`).

In a run that may be resumed, each batch records where its round ends (`Position`). Loaders prefetch, so the position is
that of the last batch yielded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate.data_loader import DataLoaderStateMixin
from accelerate.state import GradientState
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader, IterableDataset, Sampler, SequentialSampler
from transformers.trainer_pt_utils import find_batch_size

from ..ops.cross_entropy import IGNORE_INDEX
from .dealing import (
    DataParallelBatchSampler,
    DataParallelStream,
    Filler,
    FillerBatch,
    Mark,
    Position,
    Share,
    repeatable,
)
from .hashing import combined


class _MarkedDataset(torch.utils.data.Dataset):
    """Hands a `Share` of indices on as a `Share` of samples. Its other attributes are those of the user's dataset."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self._epoch: int | None = None

    def set_epoch(self, epoch: int) -> None:
        """Of a dataset that has rows of its own for each epoch."""
        self._epoch = epoch
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "dataset":  # asked for before there is one, by pickle
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        if isinstance(indices, Share) and indices.epoch not in (None, self._epoch):
            self.set_epoch(indices.epoch)
        if hasattr(self.dataset, "__getitems__"):
            samples = self.dataset.__getitems__(indices)
        else:
            samples = [self.dataset[index] for index in indices]
        if not isinstance(indices, Share):
            return samples
        share = type(indices)(samples)
        share.end, share.ends_round, share.first = indices.end, indices.ends_round, indices.first
        return share


class _Collate:
    """Collates samples, and marks the batch. A filler loses its labels, so that it weighs nothing."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: Share) -> tuple[Any, Mark]:
        own = 0 if isinstance(samples, Filler) else len(samples)
        return self._batch(samples), Mark(own, samples.end, samples.ends_round, samples.first)

    def _batch(self, samples: Share) -> Any:
        batch = self.collate(list(samples))
        if not isinstance(samples, Filler):
            return batch
        filler = FillerBatch(batch)
        for name in ("labels", "shift_labels"):
            if isinstance(filler.get(name), torch.Tensor):
                filler[name] = torch.full_like(filler[name], IGNORE_INDEX)
        return filler


class DataParallelLoader(DataLoader, DataLoaderStateMixin):
    """A `DataLoader` that tells accelerate when it is at its last batch (`batch_eval_metrics` asks).

    Attributes:
        tracks_position: whether `position` is kept.
        position: after the last yielded batch; None before the first.
        samples: of the last yielded batch; 0 for a filler.
        samples_read: of all batches of this iteration.
        counted_rows: rows of what is computed from the last yielded batch that count in stock Trainer, which truncates
            only the last batch of an epoch: of a dataset, to the samples of a short batch; of a stream, to the rows of
            the batch.
        rounds: batches of this iteration.
        order: hash of the first samples of those rounds, the same on all ranks that read in the same order.
        is_finished: whether the last yielded batch is the last of the epoch.
        device: where iterating over it puts batches; None leaves them on the host.
    """

    device: torch.device | None = None

    def __init__(
        self, dataset: Any, collate: Callable[[list[Any]], Any], positions: bool = False, **kwargs: Any
    ) -> None:
        self.gradient_state = GradientState()
        self._drop_last = True  # no sample comes twice: nothing for accelerate to cut off
        self.tracks_position = positions
        self.position: Position | None = None
        self.rounds = self.samples = self.samples_read = self.order = 0
        self.counted_rows: int | None = None
        self.is_finished = False
        super().__init__(dataset, collate_fn=self._collator(collate), **kwargs)

    def _collator(self, collate: Callable[[list[Any]], Any]) -> Callable[[Any], Any]:
        """What torch's loader calls, in a worker process."""
        return _Collate(collate)

    def _marked_batches(self) -> Iterator[tuple[Any, Mark]]:
        return super().__iter__()

    def _counted_rows(self, batch: Any, mark: Mark) -> int | None:
        if not mark.samples or not (self.is_finished and mark.ends_round):
            return None if mark.samples else 0
        if isinstance(self.dataset, DataParallelStream):
            return find_batch_size(batch)
        return mark.samples if mark.samples < self._source.batch_size else None

    @property
    def _source(self) -> DataParallelStream | DataParallelBatchSampler:
        return self.dataset if isinstance(self.dataset, DataParallelStream) else self.batch_sampler  # type: ignore

    def set_epoch(self, epoch: int) -> None:
        """Of the order; and of a dataset that has rows of its own for each epoch, as accelerate does in one process."""
        self._source.set_epoch(epoch)
        if self._source is not self.dataset and hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def start_at(self, position: Position) -> None:
        """Begin the next iteration, and only that, at a position. Samples before it are not read."""
        self._source.start = position

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Batches as Trainer's loader gives them: on `device`, if there is one."""
        for batch in self.host_batches():
            yield batch if self.device is None else send_to_device(batch, self.device, non_blocking=True)

    def host_batches(self) -> Iterator[Any]:
        """Batches on the host."""
        self.begin()
        self.position, self.is_finished = None, False
        self.rounds = self.samples = self.samples_read = self.order = 0
        self.counted_rows = None
        try:
            batches = self._marked_batches()
            current = next(batches, None)
            while current is not None:
                following = next(batches, None)
                self.end_of_dataloader = self.is_finished = following is None
                batch, mark = current
                self.rounds += 1
                self.order = combined([self.order, mark.first])
                self.samples = mark.samples
                self.samples_read += mark.samples
                self.counted_rows = self._counted_rows(batch, mark)
                self.position = mark.end if self.tracks_position else None
                yield batch
                current = following
        finally:
            self._source.start = None  # a worker process has used up its own copy
            self.end()


def order_of(loader: Any) -> int:
    """`order` of a loader of ours; 0 of any other, which says nothing of what other ranks should read."""
    return loader.order if isinstance(loader, DataParallelLoader) else 0


def build_loader(
    dataset: Any,
    sampler: Sampler[int] | None,
    collate: Callable[[list[Any]], Any],
    batch_size: int,
    dp_rank: int,
    dp_size: int,
    drop_last: bool,
    seed: int,
    positions: bool = False,
    step_batches: int | None = None,
    **kwargs: Any,
) -> DataParallelLoader:
    """The loader of one data-parallel rank; all ranks of one model replica build the same.

    `sampler` is None for an `IterableDataset`; `positions` keeps `DataParallelLoader.position`, to resume from;
    `step_batches`, if given, are the micro-batches of an optimizer step over all ranks; `kwargs` are for
    `torch.utils.data.DataLoader`.
    """
    if isinstance(dataset, IterableDataset):
        if kwargs.get("num_workers", 0) > 1:
            raise ValueError(
                f"dataloader_num_workers={kwargs['num_workers']} with an IterableDataset: several workers would each "
                "read a part of the stream and change its order; use dataloader_num_workers=0 or 1, or a "
                "hf_nanotron.data.TokenStream."
            )
        stream = DataParallelStream(dataset, batch_size, dp_rank, dp_size, drop_last, positions, step_batches)
        return DataParallelLoader(stream, collate, positions, batch_size=None, **kwargs)
    sampler = SequentialSampler(dataset) if sampler is None else repeatable(sampler, seed)
    batches = DataParallelBatchSampler(sampler, batch_size, dp_rank, dp_size, drop_last, step_batches)
    return DataParallelLoader(_MarkedDataset(dataset), collate, positions, batch_sampler=batches, **kwargs)
