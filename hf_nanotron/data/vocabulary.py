"""Token ids outside the vocabulary, found in a batch before it reaches the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..ops.cross_entropy import IGNORE_INDEX


@dataclass(frozen=True)
class Vocabulary:
    """Number of ids of a model: rows of the whole token embedding, and of the whole head, which labels refer to."""

    inputs: int
    outputs: int


@dataclass(frozen=True)
class ForeignId:
    """An id outside the vocabulary (0 to `size - 1`), in a `column` such as `"labels"` and a row of the batch."""

    column: str
    value: int
    sample: int
    size: int

    def __str__(self) -> str:
        ignored = "" if self.column == "input_ids" else f", or {IGNORE_INDEX} for a token that is not predicted"
        return (
            f"sample {self.sample}: {self.column} contains the id {self.value}, but the vocabulary has {self.size} "
            f"(ids 0 to {self.size - 1}{ignored})"
        )


ADVICE = (
    "If tokens were added to the tokenizer, resize the stock model first "
    "(model.resize_token_embeddings(len(tokenizer))) and pass it to the trainer again; otherwise, tokenize with this "
    "model's own tokenizer."
)


def foreign_id(batch: Mapping[str, Any], vocabulary: Vocabulary) -> ForeignId | None:
    """The first id of a batch outside the vocabulary, or None. Waits for tensors on a device.

    Labels are those that the loss reads: `shift_labels`, or `labels` without the first of each row.
    """
    found = _outside(batch, "input_ids", vocabulary.inputs, ignored=False)
    if found is None and isinstance(batch.get("shift_labels"), torch.Tensor):
        found = _outside(batch, "shift_labels", vocabulary.outputs, ignored=True)
    elif found is None:
        found = _outside(batch, "labels", vocabulary.outputs, ignored=True)
    return found


def _outside(batch: Mapping[str, Any], column: str, size: int, ignored: bool) -> ForeignId | None:
    ids = batch.get(column)
    if not isinstance(ids, torch.Tensor) or ids.is_floating_point() or ids.dim() == 0:
        return None
    if column == "labels":
        ids = ids[..., 1:]
    if ids.numel() == 0:
        return None
    low, high = torch.stack(torch.aminmax(ids)).tolist()
    if high < size and (low >= 0 or (ignored and low == IGNORE_INDEX and not _has_other_negatives(ids))):
        return None
    wrong = (ids >= size) | (ids < 0)
    if ignored:
        wrong &= ids != IGNORE_INDEX
    place = wrong.nonzero()[0]
    return ForeignId(column, int(ids[tuple(place)]), int(place[0]) if ids.dim() > 1 else 0, size)


def _has_other_negatives(ids: torch.Tensor) -> bool:
    return bool(((ids < 0) & (ids != IGNORE_INDEX)).any())
