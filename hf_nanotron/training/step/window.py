"""The micro-batches of one optimizer step, made ready for the stages of this rank."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn import functional as F
from transformers.utils import logging

from ...data.padding import KNOWN, pad_sequence
from ...models.base import ParallelModel
from ...models.calling import CONTEXT
from ...models.stage import LOSS_WEIGHT, Stage
from ...models.training_loss import MicroBatch
from ...parallel.batch import DOMAIN, batch_shape, ones_like_tokens
from ...parallel.cp.plan import ContextPlan
from ...prepare.attention import Attention, Documents, document_inputs, documents_of
from .context import COUNTED
from .loss import BatchStage, StepLoss

logger = logging.get_logger(__name__)

ROUTER_MASK = "router_mask"  # of a micro-batch: `[B, S]`, 0 for tokens that no loss over routers counts
DOCUMENTS = "documents"  # of a micro-batch: what `documents_of` found on the host
OURS = (ROUTER_MASK, DOCUMENTS, COUNTED, DOMAIN)  # what the model is not called with, unless its forward names it

Batch = dict[str, Any]


class PreparedModel(Protocol):
    """What a window has to know of a model, which is trained or frozen."""

    @property
    def model(self) -> ParallelModel: ...

    @property
    def attention(self) -> Attention | None: ...


@dataclass(frozen=True)
class StepWindow:
    """One entry for each micro-batch of this data-parallel rank, and how all of them run.

    Attributes:
        inputs: what the stages are called with.
        handed: what the last stage knows besides the inputs, where whole logits are made.
        lengths: tokens of a whole row, before it was filled up.
        router_masks, router_tokens: for `Mixture.before_forward`.
        stages: those of the model, or the one that calls the user's `compute_loss`.
        contexts: what is in force while the window runs.
    """

    inputs: list[Batch]
    handed: list[MicroBatch | None]
    lengths: list[int]
    router_masks: list[torch.Tensor | None]
    router_tokens: list[int | None]
    stages: Sequence[Stage | BatchStage]
    contexts: tuple[AbstractContextManager[None], ...]


def make_window(state: PreparedModel, micro_batches: list[Batch], own_loss: StepLoss | None) -> StepWindow:
    """All data-parallel ranks together, where experts have a capacity."""
    model, mixture = state.model, state.model.mixture
    multiple = model.mesh.tp_size if model.parallel.sequence_parallel else 1
    masks = [router_mask(batch, multiple) for batch in micro_batches]
    tokens: list[int | None] = [None] * len(masks)
    if mixture is not None:
        tokens = mixture.agree_on_tokens(micro_batches)
    attention, documents = _attention(state, micro_batches, multiple, own_loss)
    calls_model = own_loss is not None and own_loss.of_batch is not None
    own = model.own_columns
    if calls_model:  # who calls the model takes out what is for the loss
        own |= {name for batch in micro_batches for name in batch} - KNOWN
    left_out = {ROUTER_MASK, DOCUMENTS, COUNTED} | ({DOMAIN} - own)
    inputs = [
        {name: value for name, value in pad_sequence(batch, multiple, (*OURS, *own)).items() if name not in left_out}
        for batch in micro_batches
    ]
    handed: list[MicroBatch | None] = [None] * len(inputs)
    stages: Sequence[Stage | BatchStage] = model.stages
    contexts = [attention]
    if mixture is not None and model.mesh.cp_size > 1:
        contexts.append(mixture.dealing())
    if own_loss is not None:
        given = [{name: batch[name] for name in filled} for batch, filled in zip(micro_batches, inputs, strict=True)]
        counts = [ROUTER_MASK not in batch for batch in micro_batches]
        inputs, handed = map(list, zip(*map(own_loss.hand_over, given, inputs, counts), strict=True))
        if own_loss.of_batch is not None:
            stages = [BatchStage(model, stage, own_loss.of_batch) for stage in model.stages]
        if mixture is not None and own_loss.of_outputs is not None:
            contexts.append(mixture.reporting())
    inputs = [one | {"use_cache": False} | told for one, told in zip(inputs, documents, strict=True)]
    return StepWindow(inputs, handed, list(map(_row_length, micro_batches)), masks, tokens, stages, tuple(contexts))


def _row_length(batch: Batch) -> int:
    plan: ContextPlan | None = batch.get(CONTEXT)
    return batch_shape(batch)[1] if plan is None else plan.length


def _attention(
    state: PreparedModel, micro_batches: list[Batch], multiple: int, own_loss: StepLoss | None
) -> tuple[AbstractContextManager[None], list[dict[str, torch.Tensor]]]:
    """Under which attention to run the window, and what each micro-batch tells it.

    It is one for the whole window: a checkpointed layer is computed again in the backward.
    """
    model, attention, found = state.model, state.attention, list[Documents]()
    if model.mesh.cp_size > 1:  # what each micro-batch tells it was added when it was dealt
        assert attention is not None and all(CONTEXT in batch for batch in micro_batches)
        return attention.training(model.config, False), [{} for _ in micro_batches]
    stock = contextlib.nullcontext(), [dict[str, torch.Tensor]() for _ in micro_batches]
    if attention is None or model.names_attention:
        return stock
    if not model.plain_forward or (own_loss is not None and own_loss.of_batch is not None):
        return stock  # the user's code may call the model with another mask than the batch has
    for batch in micro_batches:
        plain = {name: value for name, value in batch.items() if name not in (*OURS, LOSS_WEIGHT)}
        documents = batch[DOCUMENTS] if DOCUMENTS in batch else documents_of(plain, multiple)
        if documents is None:
            logger.warning_once(
                f"A batch with {', '.join(sorted(plain))} needs an attention mask, so its step uses the model's own "
                "attention, which is slower. Right padding, and documents marked by position_ids, need no mask."
            )
            return stock
        found.append(documents)
    packed = any(documents.packed for documents in found)
    if packed and not attention.takes_documents:
        return stock
    told = [document_inputs(documents, model.mesh.device) if packed else {} for documents in found]
    return attention.training(model.config, packed), told


def router_mask(batch: Batch, multiple: int) -> torch.Tensor | None:
    """Which tokens of `batch`, filled up to a multiple of `multiple`, count in losses over routers; None if all do."""
    mask: torch.Tensor | None = batch.get(ROUTER_MASK, batch.get(COUNTED))
    missing = -batch_shape(batch)[1] % multiple
    if mask is None and missing:
        mask = batch.get("attention_mask")
        mask = ones_like_tokens(batch) if mask is None or mask.dim() != 2 else mask
    return mask if mask is None or not missing else F.pad(mask, (0, missing))
