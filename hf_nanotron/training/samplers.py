"""The order in which samples are read, by the training arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import IterableDataset, Sampler, SequentialSampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from ..data.ordered import brings_order
from ..training_args import NanotronTrainingArguments
from .loaders import data_seed


def train_sampler(
    args: NanotronTrainingArguments,
    dataset: Any,
    of_run: Sampler[int] | None,
    group: Callable[[], int],
    tokenizer: Any = None,
) -> Sampler[int] | None:
    """For training; None for a stream.

    Args:
        of_run: what reads `dataset`, where its samples are those of a run.
        group: samples that are sorted by length together.
        tokenizer: knows which column has the lengths.

    Raises:
        ValueError: for `group_by_length` with a dataset that brings its order.
    """
    if isinstance(dataset, IterableDataset):
        return None
    by_length = args.train_sampling_strategy == "group_by_length"
    if brings_order(dataset) and by_length:
        raise ValueError(
            f"train_sampling_strategy='group_by_length' with a {type(dataset).__name__}: it brings its order, in "
            "which it is read. Leave train_sampling_strategy out."
        )
    if of_run is not None:
        return of_run
    if brings_order(dataset) or args.train_sampling_strategy == "sequential":
        return SequentialSampler(dataset)
    if by_length:
        return _length_sampler(args, dataset, group(), tokenizer)
    return SeedableRandomSampler(dataset, data_seed=data_seed(args))


def eval_sampler(args: NanotronTrainingArguments, dataset: Any, tokenizer: Any = None) -> Sampler[int] | None:
    """For evaluation; None for a stream."""
    if isinstance(dataset, IterableDataset):
        return None
    if args.train_sampling_strategy == "group_by_length" and not brings_order(dataset):
        return _length_sampler(args, dataset, args.eval_batch_size, tokenizer)
    return SequentialSampler(dataset)


def _length_sampler(args: NanotronTrainingArguments, dataset: Any, group: int, tokenizer: Any) -> LengthGroupedSampler:
    column = args.length_column_name
    return LengthGroupedSampler(
        group,
        dataset=dataset,
        lengths=list(dataset[column]) if column in getattr(dataset, "column_names", ()) else None,
        model_input_name=getattr(tokenizer, "model_input_names", [None])[0],
        generator=torch.Generator().manual_seed(data_seed(args)),
    )
