"""Padding where sequence parallelism needs longer sequences: tokens that no real token sees.

Tokens are added on the right, where a causal model ignores them, and predict nothing. Among packed documents they are a
document of their own, which also keeps recurrent layers and positions of real tokens unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional as F

from ..ops.cross_entropy import IGNORE_INDEX
from ..parallel.batch import EMBEDDINGS, batch_shape

# `[B, S]`, by name: what a token gets that only fills a sequence up.
PADDING = {"input_ids": 0, "labels": IGNORE_INDEX, "shift_labels": IGNORE_INDEX, "attention_mask": 0, "position_ids": 0}
MASKS = ("token_type_ids", "mm_token_type_ids", "completion_mask", "assistant_masks", "assistant_mask", "loss_mask")
FILLS = PADDING | dict.fromkeys(MASKS, 0)
# The bounds of documents in packed rows, for kernels that read nothing else, and the length of the longest.
BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seq_lens", "cu_seqlens_q", "cu_seqlens_k", "cu_seqlens")
LONGEST = ("max_length_q", "max_length_k", "max_seqlen_q", "max_seqlen_k", "max_seqlen")
KNOWN = frozenset((*FILLS, *BOUNDS, *LONGEST, EMBEDDINGS, "cache_position", "seq_idx"))


def pad_sequence(batch: dict[str, Any], multiple: int, ours: tuple[str, ...] = ()) -> dict[str, Any]:
    """Pad sequences on the right to a multiple of `multiple` tokens, without changing the loss.

    Entries named in `ours` are not for the model, and stay as they are.
    """
    rows, length = batch_shape(batch)
    missing = -length % multiple
    if not missing:
        return batch
    padded = dict(batch)
    for name, value in batch.items():
        if name not in ours:
            padded[name] = _filled(name, value, rows, length, missing, multiple)
    return padded


def _filled(name: str, value: Any, rows: int, length: int, missing: int, multiple: int) -> Any:
    if name in LONGEST and value is not None:
        return value.clamp(min=missing) if isinstance(value, torch.Tensor) else max(value, missing)
    if isinstance(value, Mapping):  # masks of hybrid models, by kind of layer
        return {kind: _filled(name, part, rows, length, missing, multiple) for kind, part in value.items()}
    if not isinstance(value, torch.Tensor) or value.dim() == 0:
        return value
    if name in BOUNDS:
        return _filled_bounds(value, rows, length, missing)
    if name == "attention_mask" and _is_square(value, length):
        return _filled_square(value, missing)
    if name == EMBEDDINGS and value.shape[:2] == (rows, length):
        return F.pad(value, (0, 0, 0, missing))
    over_tokens = value.dim() >= 2 or value.shape == (length,) != (rows,)
    if name == "position_ids" and value.shape[-1] == length:
        restart = torch.arange(missing, dtype=value.dtype, device=value.device)
        return torch.cat([value, restart.expand(*value.shape[:-1], missing)], dim=-1)
    if name == "cache_position" and value.shape == (length,):
        following = torch.arange(1, missing + 1, dtype=value.dtype, device=value.device)
        return torch.cat([value, value[-1:] + following])
    if name == "seq_idx" and value.shape[-1] == length:
        return torch.cat([value, (value[..., -1:] + 1).expand(*value.shape[:-1], missing)], dim=-1)
    if value.dim() == 2 and value.shape[1] == length and name in FILLS:
        return F.pad(value, (0, missing), value=FILLS[name])
    if not over_tokens:
        return value
    raise ValueError(
        f"sequence_parallel needs sequences of a multiple of {multiple} tokens; this batch has {length}, and its "
        f"{name!r} of shape {tuple(value.shape)} ({value.dtype}) cannot be padded. Pad in the collator "
        f"(pad_to_multiple_of={multiple}) or use sequence_parallel=False."
    )


def _filled_bounds(bounds: torch.Tensor, rows: int, length: int, missing: int) -> torch.Tensor:
    """One more document at the end of each row. Reads no value, so that a GPU is not waited for.

    `bounds` are `[documents + 1]`, counted over the tokens of all rows (which begin with a document), or `[rows,
    documents + 1]`, counted in each row.
    """
    if bounds.dim() > 1 or rows == 1:
        return F.pad(bounds, (0, 1), value=length + missing)
    moved = bounds + bounds.div(length, rounding_mode="floor") * missing
    row = torch.arange(rows, dtype=bounds.dtype, device=bounds.device)
    return torch.cat([moved, (row + 1) * length + row * missing]).sort().values


def _is_square(mask: torch.Tensor, length: int) -> bool:
    fits = mask.dim() == 4 and mask.shape[2:] == (length, length)
    return fits and (mask.is_floating_point() or mask.dtype is torch.bool)


def _filled_square(mask: torch.Tensor, missing: int) -> torch.Tensor:
    """`[B, heads, S, S]`, additive or of bool: an added token sees itself alone (a softmax over nothing is NaN)."""
    hidden, seen = (False, True) if mask.dtype is torch.bool else (torch.finfo(mask.dtype).min, 0.0)
    filled = F.pad(mask, (0, missing, 0, missing), value=hidden)
    filled.diagonal(dim1=-2, dim2=-1)[..., -missing:] = seen
    return filled
