"""The shape of a batch, which holds token ids or their embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

IDS, EMBEDDINGS = "input_ids", "inputs_embeds"
DOMAIN = "domain"  # int64 `[B]` or `[B, S]`: which part of the data a row, or what a token predicts, comes from


def batch_shape(batch: Mapping[str, Any]) -> torch.Size:
    """`[B, S]` of a batch with `input_ids` `[B, S]`, or `inputs_embeds` `[B, S, H]` in their place."""
    ids, embeddings = batch.get(IDS), batch.get(EMBEDDINGS)
    if ids is not None:
        return ids.shape
    if embeddings is not None:
        return embeddings.shape[:2]
    raise ValueError(
        f"the batches have neither {IDS} nor {EMBEDDINGS} (they have {sorted(batch)}); tokenize the dataset, or "
        "build batches with a `data_collator`."
    )


def ones_like_tokens(batch: Mapping[str, Any]) -> torch.Tensor:
    """`[B, S]` ones, on the device of the batch."""
    shape, given = batch_shape(batch), batch.get(IDS)
    return torch.ones(shape, dtype=torch.int64, device=(batch[EMBEDDINGS] if given is None else given).device)
