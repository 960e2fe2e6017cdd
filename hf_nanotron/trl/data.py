"""Which data sets `trl.SFTTrainer` can prepare; what it would ignore, or fail on without a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import Dataset, IterableDataset

from ..arguments.rules import as_mapping
from .config import NanotronSFTConfig


def check_train_data(dataset: Any, args: NanotronSFTConfig, is_formatted: bool) -> None:
    """Refuse what cannot be trained on, before the model is loaded. `is_formatted`: by a function of the user's.

    Raises:
        ValueError: naming the column or the type, and what to use instead.
    """
    sample = _first(dataset, "train_dataset")
    known = {args.dataset_text_field, "messages", "conversations", "prompt", "input_ids"}
    if not is_formatted and not as_mapping(args.dataset_kwargs).get("skip_prepare_dataset") and not known & set(sample):
        raise ValueError(
            f"train_dataset has none of the columns {', '.join(sorted(known))} (its columns are "
            f"{', '.join(sorted(sample))}); name the column of text with dataset_text_field, or give a formatting_func."
        )
    if args.completion_only_loss and not {"completion", "completion_mask", "labels"} & set(sample):
        raise ValueError(
            "completion_only_loss=True is refused: train_dataset has no completions (its columns are "
            f"{', '.join(sorted(sample))}), so that TRL would train on all tokens; use columns prompt and completion, "
            "assistant_only_loss=True for messages, or completion_only_loss=None."
        )


def check_eval_data(datasets: Any) -> None:
    """The same of one data set to evaluate on, of several by name, or of None."""
    named = datasets if isinstance(datasets, Mapping) else {None: datasets}
    for name, dataset in named.items():
        if dataset is not None:
            _first(dataset, "eval_dataset" if name is None else f"eval_dataset[{name!r}]")


def _first(dataset: Any, name: str) -> Mapping[str, Any]:
    """The first sample."""
    if not isinstance(dataset, Dataset | IterableDataset):
        raise ValueError(
            f"{name}={type(dataset).__name__} is not a Dataset or IterableDataset of `datasets`, which TRL prepares; "
            "train tokenized corpora, mixtures and streams of tokens with NanotronTrainer."
        )
    sample: Any = next(iter(dataset), None)
    if sample is None:
        raise ValueError(f"{name} is empty.")
    if images := sorted({"image", "images"} & set(sample)):
        raise ValueError(
            f"{name} has a column {images[0]!r}: images are not supported, causal LMs are trained on text; drop the "
            "column, or use TRL's own SFTTrainer."
        )
    return sample
