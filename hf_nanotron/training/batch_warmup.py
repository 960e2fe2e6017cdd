"""A run whose global batch grows with its tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

from ..data.tokens.batch_warmup import warm_up_batch_size
from ..training_args import NanotronTrainingArguments


def with_batch_warmup(dataset: Any, args: NanotronTrainingArguments) -> Any:
    """The data of a run; with `batch_size_warmup_tokens` in stages whose batch grows (`warm_up_batch_size`)."""
    if args.batch_size_warmup_tokens is None or dataset is None:
        return dataset
    start = cast(int, args.batch_size_warmup_start)
    full = args.per_device_train_batch_size * args.full_dp_size * args.gradient_accumulation_steps
    increment = args.batch_size_warmup_increment or start
    return warm_up_batch_size(dataset, start, full, args.batch_size_warmup_tokens, increment)


def batch_metrics(args: NanotronTrainingArguments, step_samples: int) -> dict[str, float]:
    """The samples of a step at the moment, for the log of a run whose batch grows."""
    return {} if args.batch_size_warmup_tokens is None else {"batch_size": step_samples}


@contextlib.contextmanager
def naming_sizes(args: NanotronTrainingArguments) -> Iterator[None]:
    """Errors of stages that the user has not written say whose they are."""
    try:
        yield
    except ValueError as error:
        if args.batch_size_warmup_tokens is None:
            raise
        raise ValueError(
            f"batch_size_warmup_tokens={args.batch_size_warmup_tokens}, of which each size is a stage: {error} A run "
            "resumes with the batch_size_warmup arguments and the full batch that it began with."
        ) from None
