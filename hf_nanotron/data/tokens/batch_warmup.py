"""A global batch that grows with the tokens of a run, as stages of the same data."""

from __future__ import annotations

from typing import Any

from .mixture import Mixture
from .stage import Stage
from .stages import Stages
from .token_dataset import TokenDataset


def warm_up_batch_size(data: Any, start: int, full: int, tokens: int, increment: int) -> Stages:
    """Stages over `data` whose global batch rises from `start` to `full` samples, linearly over the first `tokens`.

    The batch has `start + i * increment` samples until the run has read `(i + 1) / n` of the tokens, where n is the
    number of sizes below `full`. A size whose share of the tokens is less than a step before it is left out. The
    samples and their order are those of `data` without stages.

    Raises:
        ValueError: for data without rows of one known length, or sizes that do not rise.
    """
    if not isinstance(data, TokenDataset | Mixture) or data.sequence_length is None:
        what = "in Stages" if isinstance(data, Stages) else f"with a {type(data).__name__}"
        raise ValueError(
            f"batch_size_warmup_tokens={tokens} {what}: it needs a TokenDataset or a Mixture of them, whose order and "
            "tokens of a row are known; of Stages give each its global_batch_size."
        )
    if not 0 < start < full:
        raise ValueError(
            f"batch_size_warmup_start={start} must be at least 1 and below the samples of a step that the batch grows "
            f"to, {full} (per_device_train_batch_size x data-parallel ranks x gradient_accumulation_steps)."
        )
    sizes = range(start, full, increment)
    stages: list[Stage] = []
    read = 0
    for number, size in enumerate([*sizes, full]):
        begins, ends = (tokens * share // len(sizes) for share in (number, number + 1))
        steps = -(-(ends - read) // (size * data.sequence_length))
        if steps > 0 or size == full:
            stages.append(Stage(data, start_tokens=begins if stages else None, global_batch_size=size))
            read += max(steps, 0) * size * data.sequence_length
    return Stages(stages)
