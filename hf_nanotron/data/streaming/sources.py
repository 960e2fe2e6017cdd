"""What a stream reads its documents from: shards, each of which can be read from a state on."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, Protocol

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from transformers.utils import logging

from ..cursor import shuffle_buffer

logger = logging.get_logger(__name__)

READ_TOGETHER = 64  # examples that are asked for at a time

# Parts of a datasets.IterableDataset whose shards, read one by one, hold the same examples as the whole.
_SHARDABLE = {
    "ArrowExamplesIterable",
    "BufferShuffledExamplesIterable",  # of one example; larger ones are refused
    "ExamplesIterable",
    "FilteredExamplesIterable",
    "FormattedExamplesIterable",
    "MappedExamplesIterable",
    "RebatchedArrowExamplesIterable",
    "SelectColumnsIterable",
    "VerticallyConcatenatedMultiSourcesExamplesIterable",
}


class ShardReader(Protocol):
    """One pass over a shard."""

    def __next__(self) -> Any: ...

    def state(self) -> Any:
        """From which `Source.open` goes on with the next example; JSON types."""


class Source(Protocol):
    """Shards of examples.

    Attributes:
        shards: number of them.
        columns: of an example; None if that is not known before one is read.
    """

    shards: int
    columns: list[str] | None

    def open(self, shard: int, state: Any = None) -> ShardReader: ...


class DatasetSource:
    """A `datasets.IterableDataset`."""

    def __init__(self, dataset: IterableDataset) -> None:
        if size := shuffle_buffer(dataset._ex_iterable):
            raise ValueError(
                f"the dataset has a shuffle buffer of its own (buffer_size={size}), whose contents its state does not "
                "hold. Pass the dataset from before .shuffle(), and shuffle_buffer to TokenStream."
            )
        if dataset._distributed is not None:
            raise ValueError(
                "the dataset was divided by split_dataset_by_node: pass the whole dataset on every rank, and each "
                "rank reads its share."
            )
        self.dataset, self.columns = dataset, dataset.column_names
        self.shards = dataset.num_shards
        if self.shards < 1:
            raise ValueError("the dataset has no shards: there is nothing to read.")
        if self.shards > 1 and (names := _not_shardable(dataset._ex_iterable)):
            logger.warning(
                f"The dataset has {self.shards} shards, but is read as one: its shards do not hold the examples of "
                f"the whole after {', '.join(names)} (take, skip, interleave_datasets, ...)."
            )
            self.shards = 1

    def open(self, shard: int, state: Any = None) -> _DatasetReader:
        if self.shards > 1:
            part = self.dataset.shard(self.shards, shard, contiguous=False)
        else:  # a copy of its own: lanes that read the shard at the same time must not share a state
            part = copy.deepcopy(self.dataset)
            part._starting_state_dict = None  # of the user; it would hold in every epoch
        return _DatasetReader(part, state)


class _DatasetReader:
    """Its state is that of the dataset before the examples read last, and how many of those were given."""

    def __init__(self, part: IterableDataset, state: Any) -> None:
        self.part = part
        self.before: Any  # None: nothing has been read
        self.before, skipped = (None, 0) if state is None else state
        if self.before is not None:
            part.load_state_dict(self.before)
        # Unlike iter(part), this does not divide the shards over the workers of a torch DataLoader.
        self.batches: Iterator[dict[str, list[Any]]] = part.iter(batch_size=READ_TOGETHER)
        self.batch: list[dict[str, Any]] = []
        self.given = 0
        for _ in range(skipped):
            next(self)

    def __next__(self) -> dict[str, Any]:
        if self.given == len(self.batch):
            if self.batch:
                self.before = self.part.state_dict()
            columns = next(self.batches)
            self.batch = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            self.given = 0
        self.given += 1
        return self.batch[self.given - 1]

    def state(self) -> Any:
        return [self.before, self.given]


class IterableSource:
    """Any other iterable that can be begun anew: one shard. Exact, and cheap to resume, if it has a `state_dict`."""

    shards = 1
    columns: list[str] | None = None

    def __init__(self, iterable: Iterable[Any]) -> None:
        self.iterable = iterable
        own = (callable(getattr(iterable, name, None)) for name in ("state_dict", "load_state_dict"))
        self.has_states = all(own)
        self.beginning = copy.deepcopy(iterable.state_dict()) if self.has_states else None  # type: ignore[attr-defined]

    def open(self, shard: int, state: Any = None) -> _IterableReader:
        """One reader at a time: the object itself holds the state."""
        return _IterableReader(self.iterable, self.has_states, self.beginning if state is None else state)


class _IterableReader:
    def __init__(self, source: Any, has_states: bool, state: Any) -> None:
        self.source, self.has_states, self.given = source, has_states, 0
        if has_states:
            source.load_state_dict(copy.deepcopy(state))
        self.examples = iter(source)
        if not has_states and state:
            logger.warning(
                f"The stream ({type(source).__name__}) has no state_dict: its first {state} documents are read again "
                "and left out. None is trained on twice if it gives the same ones in the same order."
            )
            self.given = sum(1 for _ in islice(self.examples, state))
            if self.given < state:
                raise ValueError(
                    f"the stream ({type(source).__name__}) ended after {self.given} documents, but the checkpoint was "
                    f"saved after {state}: it is another stream, or can be iterated over only once."
                )

    def __next__(self) -> Any:
        example = next(self.examples)
        self.given += 1
        return example

    def state(self) -> Any:
        return copy.deepcopy(self.source.state_dict()) if self.has_states else self.given


def source_of(dataset: Any) -> Source:
    """The source of what a user calls a stream.

    Raises:
        ValueError: for splits, a dataset that is no stream, and one whose order would not be ours.
    """
    if isinstance(dataset, IterableDatasetDict | DatasetDict):
        raise ValueError(f"the dataset has the splits {', '.join(map(str, dataset))}: choose one, as dataset['train'].")
    if isinstance(dataset, Dataset):
        raise ValueError(
            "this datasets.Dataset is not a stream: use dataset.to_iterable_dataset(num_shards=64), or load it with "
            "load_dataset(..., streaming=True)."
        )
    if isinstance(dataset, IterableDataset):
        return DatasetSource(dataset)
    if isinstance(dataset, Iterator) or not callable(getattr(dataset, "__iter__", None)):
        raise ValueError(
            f"a {type(dataset).__name__} cannot be begun anew, which every epoch and every resume needs: pass a "
            "datasets.IterableDataset, or an object whose __iter__ begins with the first document."
        )
    return IterableSource(dataset)


def _not_shardable(part: Any) -> list[str]:
    """Kinds of parts of a dataset whose shards are not parts of its examples."""
    own = [] if type(part).__name__ in _SHARDABLE else [type(part).__name__]
    inner = [getattr(part, "ex_iterable", None), *getattr(part, "ex_iterables", ())]
    return own + [name for other in inner if other is not None for name in _not_shardable(other)]
