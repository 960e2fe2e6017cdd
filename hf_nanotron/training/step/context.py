"""What a context-parallel rank gets of a batch: its tokens of every row, and what its attention has to know of all."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from transformers.utils import logging

from ...data.padding import FILLS, pad_sequence
from ...models.calling import CONTEXT
from ...ops.cross_entropy import IGNORE_INDEX
from ...parallel.batch import EMBEDDINGS, IDS, batch_shape, ones_like_tokens
from ...parallel.cp.plan import make_context_plan, row_length
from ...parallel.mesh import ParallelMesh
from ...prepare.attention import BOUNDS_OF_STOCK, KNOWN_INPUTS, Attention, documents_of

logger = logging.get_logger(__name__)

COUNTED = "counted_tokens"  # of a dealt batch: `[B, S / cp]`, 0 for tokens that no loss over routers counts


def needs_mask(batch: dict[str, Any]) -> str | None:
    """Why the rows of `batch` cannot be shared by ranks; None if they can."""
    if (reason := _odd_positions(batch)) is not None:
        return reason
    if documents_of(batch) is not None:
        return None
    columns = sorted(name for name, value in batch.items() if value is not None)
    unknown = sorted(set(columns) - KNOWN_INPUTS - BOUNDS_OF_STOCK)
    if unknown:
        return f"the batches have {', '.join(unknown)}"
    return f"a batch with {', '.join(columns)} needs an attention mask"


def _odd_positions(batch: dict[str, Any]) -> str | None:
    shape, positions = tuple(batch_shape(batch)), batch.get("position_ids")
    if positions is not None and tuple(positions.shape) not in (shape, (1, *shape[1:])):
        return f"the batches have position_ids {list(positions.shape)} for tokens {list(shape)}"
    return None


def check_batch(mesh: ParallelMesh, batch: dict[str, Any]) -> None:
    """Refuse a batch whose rows cannot be shared by the context-parallel ranks of `mesh`."""
    if mesh.cp_size > 1 and (reason := needs_mask(batch)) is not None:
        raise ValueError(
            f"cp_size={mesh.cp_size}: {reason}, which attention over the tokens of several ranks has not. Pad on the "
            "right with labels of -100, mark documents by position_ids, leave other columns out, or use cp_size=1."
        )


def deal(batch: dict[str, Any], mesh: ParallelMesh, attention: Attention | None) -> dict[str, Any]:
    """The tokens of this rank, with `shift_labels`, global `position_ids`, `COUNTED` and a `ContextPlan`.

    Rows are filled up on the right to what the layout needs, with tokens that predict nothing and are a document of
    their own. What is not for each token is passed on.

    Args:
        batch: whole rows, `[B, S]` or `[B, S, H]`, on the host, or a GPU is waited for.

    Raises:
        ValueError: if the batch needs an attention mask.
    """
    rows, length = batch_shape(batch)
    filled = row_length(mesh, length)
    missing = filled - length
    documents = None if _odd_positions(batch) else documents_of(batch, filled)
    if documents is None:
        check_batch(mesh, batch)  # says why
    assert documents is not None and attention is not None
    rest = attention.other_work, attention.shape
    plan = make_context_plan(mesh, rows, length, documents.bounds, attention.windows, *rest)
    if plan.is_choice:
        logger.info_once(f"cp_mode='auto': rows of {filled} tokens attend by {' and '.join(sorted(plan.kinds))}")
    whole = {name: value for name, value in batch.items() if name not in ("attention_mask", *BOUNDS_OF_STOCK)}
    # For blocks that see whole rows. Attention has the plan.
    bounds = {name: batch[name] for name in (IDS, EMBEDDINGS, *BOUNDS_OF_STOCK) if batch.get(name) is not None}
    bounds = {name: value for name, value in pad_sequence(bounds, filled).items() if name in BOUNDS_OF_STOCK}
    counted = batch.get("attention_mask")
    if missing or counted is not None:
        whole[COUNTED] = ones_like_tokens(batch) if counted is None else counted
    positions = whole.get("position_ids")
    if positions is None:
        positions = torch.arange(length, device=whole[IDS if whole.get(IDS) is not None else EMBEDDINGS].device)
    whole["position_ids"] = positions.expand(rows, length)
    if whole.get("labels") is not None and whole.get("shift_labels") is None:
        whole["shift_labels"] = F.pad(whole["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
    own = {}
    for name, value in whole.items():
        if name == EMBEDDINGS and value is not None:
            value = plan.parts.own(F.pad(value, (0, 0, 0, missing)))
        elif isinstance(value, torch.Tensor) and value.shape[:2] == (rows, length):
            value = plan.parts.own(F.pad(value, (0, missing), value=FILLS.get(name, 0)))
        own[name] = value
    return {**own, **bounds, CONTEXT: plan}
