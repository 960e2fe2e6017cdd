"""Rows of tokens out of a stream of documents, tokenized and packed while it is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import islice
from typing import Any, Literal

from ..tokens.same_tokenizer import vocabulary_hash
from .documents import LaneOrder, parts_of
from .lane_rows import CutLane, LaneRows, PackLane
from .lane_stream import LaneStream
from .sources import IterableSource, source_of
from .token_ids import TokenIds

HANDLING = ("cross", "mask", "pack")
MOST_LANES = 64  # by default; more take memory where few ranks read them all


class TokenStream(LaneStream):
    """Rows of `sequence_length` tokens out of a `datasets.IterableDataset`, with the columns of `TokenDataset`.

    The stream is divided into lanes, to which shards are given in turn. Each lane reads its shards, shuffles documents
    in a buffer of its own, and makes rows of its own; sample i is the next row of lane `i % lanes`. So the order
    follows from the data, `lanes`, `seed` and the arguments below, and neither from the number of ranks nor from
    workers or batches; and a rank reads only the lanes that its samples come from. Where the ranks' number divides
    `lanes`, no two ranks read one lane.

    A row is a dict of int64 tensors `[S]`: `input_ids`; `labels`, the same, -100 where not predicted; `shift_labels`,
    what each token predicts; and with documents kept apart `position_ids`, which begin anew with each.

    Args:
        dataset: with a shard for each file, say; or any object whose `__iter__` gives examples from the first on,
            which has one shard. Not shuffled with a buffer, and not divided over ranks.
        sequence_length: tokens of a row, S.
        tokenizer: of the texts; None for a stream of ids.
        text_column: of the texts; the ids are in `input_ids`. Examples in which it is empty or null are left out.
        documents: `"cross"`: the documents of a lane, one after the other, are cut every S tokens. `"mask"`: the same,
            and documents are kept apart. `"pack"`: rows are packed of whole documents of a buffer, best fit; longer
            ones are cut, and what stays empty is not predicted.
        eos_token_id: ends each document, unless it does already; the tokenizer's if None. To ids nothing is added then.
        seed: of all orders.
        shuffle: the shards of a lane in each epoch, the documents of a buffer, and the packed rows of a buffer.
        shuffle_buffer: documents of a lane that are in memory at a time, and are shuffled or packed together.
        lanes: the largest power of two up to the number of shards and 64 if None. More lanes than shards read shards
            several times, each for a part of the documents.
        epochs: None: when all shards have been given to lanes, they are given again, in another order, so that the
            stream has no end and no rank waits for another. A number: they are given as often, and the stream ends with
            the last lane; then every rank reads all of it.
        vocab_size: ids must be smaller; the tokenizer's length if None.

    Raises:
        ValueError: for arguments that cannot be; data without shards, with a shuffle buffer or divided over ranks; a
            column that is not there; texts without a tokenizer, or one without an end-of-text token. While reading, for
            an id that the vocabulary does not have, and a lane without documents.
    """

    def __init__(
        self,
        dataset: Any,
        sequence_length: int,
        *,
        tokenizer: Any = None,
        text_column: str = "text",
        documents: Literal["cross", "mask", "pack"] = "cross",
        eos_token_id: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
        shuffle_buffer: int = 1000,
        lanes: int | None = None,
        epochs: int | None = None,
        vocab_size: int | None = None,
    ) -> None:
        least = {"sequence_length": sequence_length, "shuffle_buffer": shuffle_buffer, "lanes": lanes, "epochs": epochs}
        for name, value in least.items():
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}={value!r} must be a positive integer{_INSTEAD.get(name, '')}.")
        if documents not in HANDLING:
            raise ValueError(f"documents={documents!r} is not one of {', '.join(map(repr, HANDLING))}.")
        if seed < 0:
            raise ValueError(f"seed={seed} must not be negative.")
        self.source = source_of(dataset)
        if lanes is not None and lanes > 1 and isinstance(self.source, IterableSource):
            raise ValueError(
                f"lanes={lanes}: a {type(dataset).__name__} has no shards to divide; use a datasets.IterableDataset "
                "(IterableDataset.from_generator with a list in gen_kwargs has a shard for each of its items)."
            )
        self.sequence_length, self.documents, self.epochs = sequence_length, documents, epochs
        self.seed, self.shuffle, self.shuffle_buffer = seed, shuffle, shuffle_buffer
        self.lanes = lanes or 2 ** (min(self.source.shards, MOST_LANES).bit_length() - 1)
        column = "input_ids" if tokenizer is None else text_column
        self.ids = TokenIds(tokenizer, column, eos_token_id, vocab_size, self.source.columns)

    @property
    def tokenizer(self) -> str | None:
        """Name of the tokenizer; None of ids, and of one that has none."""
        return getattr(self.ids.tokenizer, "name_or_path", None) or None

    @cached_property
    def vocabulary(self) -> str | None:
        """Hash of the tokenizer's; None of ids."""
        return None if self.ids.tokenizer is None else vocabulary_hash(self.ids.tokenizer)

    @property
    def columns(self) -> tuple[str, ...]:
        """Of a row."""
        return ("input_ids", "labels", "shift_labels", *(("position_ids",) if self.documents != "cross" else ()))

    def open_lane(self, lane: int, state: Mapping[str, Any]) -> LaneRows:
        """See `LaneStream`."""
        turns = self.source.shards * parts_of(self.source.shards, self.lanes) * (self.epochs or 1)
        first, end = self.epoch * turns, None if self.epochs is None else (self.epoch + 1) * turns
        choice = (self.lanes, self.seed, self.shuffle, self.shuffle_buffer)
        order = LaneOrder(self.source, lane, *choice, first, end)
        if self.documents == "pack":
            return PackLane(order, self.ids, self.sequence_length, state)
        return CutLane(order, self.ids, self.sequence_length, self.documents == "mask", state)

    def identity(self) -> dict[str, Any]:
        """See `LaneStream`."""
        names = ("lanes", "sequence_length", "documents", "seed", "shuffle", "shuffle_buffer", "epochs")
        found = {name: getattr(self, name) for name in names}
        return {**found, "shards": self.source.shards, "eos_token_id": self.ids.eos_token_id}

    def first_documents(self) -> Iterator[Any]:
        """See `LaneStream`: two of the first shard, and two of the last."""
        for shard in sorted({0, self.source.shards - 1}):
            reader = self.source.open(shard)
            for example in islice(iter(reader.__next__, None), 2):
                yield {self.ids.column: self.ids.content(example)}


_INSTEAD = {"shuffle_buffer": "; shuffle=False reads documents in their order"}
