"""Whether the columns of a batch go together, found out before they reach the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

OF_TOKENS = ("attention_mask", "position_ids")  # where they have two dimensions


def check_columns(batch: Mapping[str, Any]) -> None:
    """Refuse ids that are no integers, and a mask or positions of other rows than the ids.

    Args:
        batch: `input_ids` `[B, S]`, `attention_mask` and `position_ids` `[B, S]` or `[1, S]`, as far as they are there.

    Raises:
        ValueError: naming the column, its type or its shape.
    """
    ids = batch.get("input_ids")
    if not isinstance(ids, torch.Tensor):
        return
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"input_ids of a batch are {ids.dtype}: ids are integers.")
    for name in OF_TOKENS:
        column = batch.get(name)
        if not isinstance(column, torch.Tensor) or column.dim() != 2 or ids.dim() != 2:
            continue
        if column.shape[1] != ids.shape[1] or column.shape[0] not in (1, ids.shape[0]):
            raise ValueError(
                f"{name} of a batch has the shape {list(column.shape)}, and input_ids {list(ids.shape)}: each token "
                "needs one."
            )
