"""One optimizer step's worth of micro-batches: forward, backward, reduced gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F
from transformers.utils import logging

from ..data.padding import KNOWN, pad_sequence
from ..models.base import ParallelModel
from ..models.logits import MicroBatch
from ..models.stage import LOSS_WEIGHT, Stage
from ..parallel.batch import batch_shape, ones_like_tokens
from ..parallel.collectives import all_reduce
from ..parallel.mesh import ParallelMesh
from ..parallel.pipeline.schedule import Action, Tick, build_table, compute_order
from ..parallel.zero.segment import ShardedWeights
from ..prepare.attention import Documents, document_inputs, documents_of
from .step_loss import BatchStage, StepLoss

logger = logging.get_logger(__name__)

ROUTER_MASK = "router_mask"  # of a micro-batch: `[B, S]`, 0 for tokens that no loss over routers counts
DOCUMENTS = "documents"  # of a micro-batch: what `documents_of` found on the host
OURS = (ROUTER_MASK, DOCUMENTS)  # what the model is not called with


class TrainStep:
    """Runs a window of micro-batches through the stages of this rank, by the schedule of the run.

    Args:
        model: this rank's part.
        weights: where its gradients are accumulated and reduced.
    """

    def __init__(self, model: ParallelModel, weights: ShardedWeights) -> None:
        self.model, self.weights = model, weights
        self._tables: dict[int, tuple[Tick, ...]] = {}

    def run(self, micro_batches: list[dict[str, Any]], step: int, own_loss: StepLoss | None = None) -> torch.Tensor:
        """Accumulate and reduce the gradients of one step.

        Args:
            micro_batches: this data-parallel rank's, each with `input_ids` `[B, S]` (or `inputs_embeds` `[B, S, H]`)
                and `labels` `[B, S]` on the device, and `num_items_in_batch`, the predicted tokens over all
                micro-batches and data-parallel ranks; perhaps `LOSS_WEIGHT`.
            step: optimizer step, for the dropout streams.
            own_loss: where the loss comes from; of a model that makes no logits, None.

        Returns:
            This data-parallel rank's share of the mean loss on ranks of the last stage, zero on others.
        """
        model, mesh = self.model, self.model.mesh
        model.train()
        self.weights.begin()
        multiple = mesh.tp_size if mesh.parallel.sequence_parallel else 1
        masks = [router_mask(batch, multiple) for batch in micro_batches]
        tokens = [] if model.mixture is None else model.mixture.agree_on_tokens(micro_batches)
        attention, documents = self._attention(micro_batches, multiple, own_loss)
        own = model.own_columns
        if own_loss is not None and own_loss.of_batch is not None:  # who calls the model takes out what is for the loss
            own |= {name for batch in micro_batches for name in batch} - KNOWN
        inputs = [
            {name: value for name, value in pad_sequence(batch, multiple, (*OURS, *own)).items() if name not in OURS}
            for batch in micro_batches
        ]
        handed: list[MicroBatch | None] = [None] * len(inputs)
        stages: Sequence[Stage | BatchStage] = model.stages
        if own_loss is not None:
            given = [
                {name: batch[name] for name in filled} for batch, filled in zip(micro_batches, inputs, strict=True)
            ]
            counts = [ROUTER_MASK not in batch for batch in micro_batches]
            inputs, handed = map(list, zip(*map(own_loss.hand_over, given, inputs, counts), strict=True))
            if own_loss.of_batch is not None:
                stages = [BatchStage(model, stage, own_loss.of_batch) for stage in model.stages]
        inputs = [one | {"use_cache": False} | told for one, told in zip(inputs, documents, strict=True)]
        table = self._table(len(inputs))
        splits = model.parallel.splits_backward
        ends = "W" if splits else "B"  # what computes the weight gradients of a micro-batch
        last = {t.action.stage: t.action for t in table if t.action is not None and t.action.kind == ends}

        def on_forward(action: Action) -> None:
            model.micro_batch = handed[action.micro_batch]
            place = action.micro_batch * mesh.dp_size + mesh.dp_rank  # among all micro-batches of the step
            if model.noise is not None:
                model.noise.begin(step, place, batch_shape(micro_batches[action.micro_batch])[1])
            if model.streams is not None:
                model.streams.begin(step, place)
            if model.mixture is not None:
                model.mixture.before_forward(masks[action.micro_batch], tokens[action.micro_batch])

        def before_backward(action: Action) -> None:
            if splits:
                self.weights.start_deferring(action.stage, action.micro_batch)
            else:
                self.weights.before_backward(action.stage, action == last[action.stage])

        def after_backward(action: Action) -> None:
            if splits:
                self.weights.stop_deferring()
            else:
                self.weights.after_backward(action.stage, action == last[action.stage])

        def weight_gradients(action: Action) -> None:
            self.weights.run_deferred(action.stage, action.micro_batch, action == last[action.stage])

        reports: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if model.mixture is not None and own_loss is not None and own_loss.of_outputs is not None:
            reports = model.mixture.reporting()
        if model.fp8 is not None:
            model.fp8.begin()
        try:
            with attention, reports:
                losses = model.executor.run(
                    table, stages, inputs, on_forward, before_backward, after_backward, weight_gradients
                )
        finally:  # what a step says of itself must not outlive it, also one that fails
            model.micro_batch = None
            if model.noise is not None:
                model.noise.end()
            if model.streams is not None:
                model.streams.end()
            if model.mixture is not None:
                model.mixture.before_forward(None, None)
            if model.fp8 is not None:
                model.fp8.end()
        self.weights.finish()
        return torch.stack(list(losses.values())).sum() if losses else torch.zeros((), device=mesh.device)

    def _attention(
        self, micro_batches: list[dict[str, Any]], multiple: int, own_loss: StepLoss | None
    ) -> tuple[contextlib.AbstractContextManager[None], list[dict[str, torch.Tensor]]]:
        """Under which attention to run the window, and what each micro-batch tells it.

        It is one for the whole window: a checkpointed layer is computed again in the backward.
        """
        model, found = self.model, list[Documents]()
        nothing: list[dict[str, torch.Tensor]] = [{} for _ in micro_batches]
        stock = contextlib.nullcontext(), nothing
        if model.attention is None:
            return stock
        if not model.plain_forward or (own_loss is not None and own_loss.of_batch is not None):
            return stock  # the user's code may call the model with another mask than the batch has
        for batch in micro_batches:
            plain = {name: value for name, value in batch.items() if name not in (*OURS, LOSS_WEIGHT)}
            documents = batch[DOCUMENTS] if DOCUMENTS in batch else documents_of(plain, multiple)
            if documents is None:
                logger.warning_once(
                    f"A batch of {sorted(plain)} needs an attention mask: its step runs the model's own attention. "
                    "Padding on the right would need none, nor documents by position_ids."
                )
                return stock
            found.append(documents)
        packed = any(documents.packed for documents in found)
        if packed and not model.attention.takes_documents:
            return stock
        told = [document_inputs(documents, model.mesh.device) if packed else {} for documents in found]
        return model.attention.training(model.config, packed), told

    def _table(self, num_micro_batches: int) -> tuple[Tick, ...]:
        if num_micro_batches not in self._tables:
            mesh, parallel = self.model.mesh, self.model.parallel
            order = compute_order(parallel.pp_schedule, mesh.pp_size, parallel.pp_virtual_stages, num_micro_batches)
            self._tables[num_micro_batches] = build_table(order, parallel.num_stages)[mesh.pp_rank]
        return self._tables[num_micro_batches]


def weigh(micro_batches: list[dict[str, Any]], fillers: list[bool], mesh: ParallelMesh) -> list[dict[str, Any]]:
    """`micro_batches` of a step of a model that returns the mean over each: they weigh equally, as in Trainer.

    All data-parallel ranks together.

    Args:
        fillers: which of them only keep this rank in step.
    """
    own = torch.full((), float(len(fillers) - sum(fillers)), device=mesh.device)
    weight = 1 / all_reduce(own, mesh.dp)
    inputs = [{k: v for k, v in batch.items() if k != "num_items_in_batch"} for batch in micro_batches]
    return [{**batch, LOSS_WEIGHT: weight} for batch in inputs]


def router_mask(batch: dict[str, Any], multiple: int) -> torch.Tensor | None:
    """Which tokens of `batch`, filled up to a multiple of `multiple`, count in losses over routers; None if all do."""
    mask: torch.Tensor | None = batch.get(ROUTER_MASK)
    missing = -batch_shape(batch)[1] % multiple
    if mask is None and missing:
        mask = batch.get("attention_mask")
        mask = ones_like_tokens(batch) if mask is None or mask.dim() != 2 else mask
    return mask if mask is None or not missing else F.pad(mask, (0, missing))
