"""Whether tokens that were prepared beforehand fit the model that is to train on them."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

from transformers.trainer_utils import has_length
from transformers.utils import logging

from ..data.ordered import is_run, sets_of
from ..data.streaming.lane_stream import LaneStream
from ..data.tokens.same_tokenizer import tokenizer_of, vocabulary_hash
from ..models.base import ParallelModel

logger = logging.get_logger(__name__)


def check_evaluable(dataset: Any) -> None:
    """Refuse an evaluation dataset without an end, or one of several by name.

    Raises:
        ValueError: says what could be used instead.
    """
    for part in dataset.values() if isinstance(dataset, dict) else (dataset,):
        name = type(part).__name__
        if isinstance(part, LaneStream) and part.epochs is None:
            raise ValueError(f"this {name} has no end: make one with epochs=1 to evaluate on.")
        if is_run(part) and not has_length(part):
            raise ValueError(
                f"this {name} has no end of its own: to evaluate, use a Mixture with max_epochs=1, or the data of a "
                "stage."
            )


def fitted(dataset: Any, model: ParallelModel, tokenizer: Any, what: str) -> Any:
    """A dataset that brings its order, whose ids are checked to be in the model's vocabulary where they are read.

    Args:
        tokenizer: the trainer's `processing_class`, if there is one.
        what: the dataset's name in an error, such as `"training"`.

    Raises:
        ValueError: for rows that are longer than the positions of the model.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    name, length = _longest(dataset)
    if positions and length and length > positions:
        told = f"the {what} set{f' {name!r}' if name else ''} has rows of {length} tokens"
        if any(getattr(each, "documents", "cross") == "cross" for each in sets_of(dataset).values()):
            raise ValueError(
                f"{told}, but the model has max_position_embeddings={positions}: lower sequence_length, or give the "
                "model more positions in its config (max_position_embeddings, and rope_parameters if it needs them)."
            )
        logger.warning(
            f"{told}, but the model has max_position_embeddings={positions}: documents that are longer lie beyond."
        )
    _compare_tokenizers(dataset, tokenizer, what)
    if not hasattr(dataset, "with_vocabulary"):
        return dataset
    return dataset.with_vocabulary(min(model.vocabulary.inputs, model.vocabulary.outputs))


def _longest(dataset: Any) -> tuple[str | None, int | None]:
    """The set with the longest rows, and their length; None where nothing says it."""
    sets = sets_of(dataset)
    lengths = {name: length for name, each in sets.items() if (length := getattr(each, "sequence_length", None))}
    whole = getattr(dataset, "sequence_length", None)  # of stages, whose sets have several
    if not lengths:
        return None, whole
    name = max(lengths, key=lengths.__getitem__)
    return (None if len(sets) == 1 and sets[name] is dataset else name), max(lengths[name], whole or 0)


def _compare_tokenizers(dataset: Any, tokenizer: Any, what: str) -> None:
    """Warn if the files were written with another vocabulary, or, where that is not known, a tokenizer of another name:
    that may be the same one, elsewhere.
    """
    said, own = tokenizer_of(dataset), getattr(tokenizer, "name_or_path", None)
    written = said.name
    if said.vocabulary is not None and hasattr(tokenizer, "get_vocab"):
        if said.vocabulary != vocabulary_hash(tokenizer):
            logger.warning(
                f"the {what} set was written with the tokenizer {written!r}, and the processing_class ({own!r}) has "
                "another vocabulary. Unless that has more tokens and the same others, ids mean other tokens."
            )
    elif written and own and PurePath(written).name != PurePath(str(own)).name:
        logger.warning(
            f"the {what} set was written with the tokenizer {written!r}, and the processing_class is {own!r}. "
            "Unless they are the same, its ids mean other tokens."
        )
