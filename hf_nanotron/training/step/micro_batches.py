"""The micro-batches of a step, made of the window that Trainer hands over batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.utils import logging

from ...data.dealing import FillerBatch
from ...models.base import ParallelModel
from ...models.stage import LOSS_WEIGHT
from ...models.stock.families import SEES_DOCUMENTS
from ...models.stock.plan import carries_state
from ...parallel.batch import ones_like_tokens
from ...parallel.collectives import all_reduce
from ...parallel.mesh import ParallelMesh
from ...prepare.attention import documents_of
from ...prepare.training_state import TrainingState
from .context import deal
from .window import DOCUMENTS, ROUTER_MASK

logger = logging.get_logger(__name__)

Window = Sequence[tuple[dict[str, Any], torch.Tensor | int | None]]


def make_micro_batches(
    window: Window,
    prepare: Callable[[dict[str, Any]], dict[str, Any]],
    state: TrainingState,
    weigh_equally: bool,
) -> list[dict[str, Any]]:
    """What `TrainStep.run` takes. All data-parallel ranks together.

    Args:
        window: batches, each with its `num_items_in_batch`. A stream may end inside a window; Trainer then carries
            micro-batches over, each with the count of its own.
        prepare: brings a batch to the device.
        weigh_equally: for a model that returns the mean over each micro-batch.
    """
    mesh = state.model.mesh
    for batch, _ in window:
        warn_of_documents(batch, state.model)
    dealt = [deal(batch, mesh, state.attention) if mesh.cp_size > 1 else batch for batch, _ in window]
    micro_batches = [
        {**prepare(batch), "num_items_in_batch": count} for batch, (_, count) in zip(dealt, window, strict=True)
    ]
    if weigh_equally:
        micro_batches = weigh(micro_batches, [isinstance(batch, FillerBatch) for batch, _ in window], mesh)
    multiple = mesh.tp_size if mesh.parallel.sequence_parallel else 1
    for micro_batch, (batch, _) in zip(micro_batches, window, strict=True):
        if state.attention is not None and mesh.cp_size == 1:
            micro_batch[DOCUMENTS] = documents_of(batch, multiple)
        if isinstance(batch, FillerBatch):
            micro_batch[ROUTER_MASK] = torch.zeros_like(ones_like_tokens(micro_batch))
    return micro_batches


def warn_of_documents(batch: dict[str, Any], model: ParallelModel) -> None:
    """Say once where documents packed into a row are not apart: of attention that sees them all, or where a recurrence
    or a convolution mixes tokens.

    Transformers' blocks of the latter kind do not read where `position_ids` begin anew (some take a `seq_idx`).
    """
    positions = batch.get("position_ids")
    if not isinstance(positions, torch.Tensor):
        return
    sees = model.config.get_text_config().model_type in SEES_DOCUMENTS
    blocks: list[str] = []
    if not sees and batch.get("seq_idx") is None:
        blocks = sorted({type(block).__name__ for _, block in model.anatomy.blocks() if carries_state(block)})
    if not (sees or blocks) or not bool((positions.diff(dim=-1) != 1).any()):
        return
    if sees:
        logger.warning_once(
            f"rows hold several documents, and the attention of {type(model).__name__} sees all of its row: "
            "transformers gives it no mask by position_ids. Use rows of one document if they should not see each other."
        )
        return
    logger.warning_once(
        f"rows hold several documents, and the {', '.join(blocks)} blocks of {type(model).__name__} carry their "
        "state from one to the next: attention alone is kept inside documents."
    )


def weigh(micro_batches: list[dict[str, Any]], fillers: list[bool], mesh: ParallelMesh) -> list[dict[str, Any]]:
    """`micro_batches` of a model that returns the mean over each: they weigh equally, `fillers` nothing, as in Trainer.

    All data-parallel ranks together.
    """
    own = torch.full((), float(len(fillers) - sum(fillers)), device=mesh.device)
    weight = 1 / all_reduce(own, mesh.dp)
    inputs = [{k: v for k, v in batch.items() if k != "num_items_in_batch"} for batch in micro_batches]
    return [{**batch, LOSS_WEIGHT: weight} for batch in inputs]
