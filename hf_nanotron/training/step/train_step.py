"""One optimizer step's worth of micro-batches: forward, backward, reduced gradients."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch

from ...models.calling import CONTEXT
from ...models.token_figures import TokenFigures
from ...models.training_loss import DomainSums
from ...parallel.cp.plan import ContextPlan
from ...parallel.pipeline.executor import StepHooks
from ...parallel.pipeline.schedule import Action, Tick, build_table, compute_order
from ...prepare.training_state import TrainingState
from .forward_pass import ForwardPass
from .loss import StepLoss
from .window import StepWindow, make_window


class TrainStep:
    """Runs a window of micro-batches through the stages of this rank, by the schedule of the run."""

    def __init__(self, state: TrainingState) -> None:
        self.state = state
        self._tables: dict[int, tuple[Tick, ...]] = {}

    def run(
        self,
        micro_batches: list[dict[str, Any]],
        step: int,
        own_loss: StepLoss | None = None,
        domains: DomainSums | None = None,
        teacher: ForwardPass | None = None,
        figures: TokenFigures | None = None,
    ) -> torch.Tensor:
        """Accumulate and reduce the gradients of one step.

        Args:
            micro_batches: this data-parallel rank's, each with `input_ids` `[B, S]` (or `inputs_embeds` `[B, S, H]`)
                and `labels` `[B, S]` on the device, and `num_items_in_batch`, the predicted tokens over all
                micro-batches and data-parallel ranks; perhaps `LOSS_WEIGHT`.
            step: optimizer step, for the dropout streams.
            own_loss: where the loss comes from; of a model that makes no logits, None.
            domains: is given the losses of the micro-batches' tokens; of an `own_loss`, only where something is
                predicted.
            teacher: makes its logits of a micro-batch before the loss is computed.
            figures: is given what else is summed up over the micro-batches' tokens.

        Returns:
            This data-parallel rank's share of the mean loss on ranks of the last stage, zero on others.
        """
        model, weights = self.state.model, self.state.weights
        model.train()
        weights.begin()
        window = make_window(self.state, micro_batches, own_loss)
        table = self._table(len(micro_batches))
        with ExitStack() as stack:
            plain = domains if own_loss is None else None
            if teacher is not None:
                stack.enter_context(teacher.over(micro_batches))
            hooks = stack.enter_context(TrainingHooks(self.state, window, table, step, plain, teacher, figures))
            for observer in self.state.observers:
                stack.enter_context(observer.over(step, micro_batches))
            for context in window.contexts:
                stack.enter_context(context)
            losses = model.executor.run(table, window.stages, window.inputs, hooks)
        weights.finish()
        if domains is not None and own_loss is not None:
            for domains.index, micro_batch in enumerate(micro_batches):
                domains.note_labels(micro_batch)
        return torch.stack(list(losses.values())).sum() if losses else torch.zeros((), device=model.mesh.device)

    def _table(self, num_micro_batches: int) -> tuple[Tick, ...]:
        if num_micro_batches not in self._tables:
            mesh, parallel = self.state.model.mesh, self.state.model.parallel
            order = compute_order(parallel.pp_schedule, mesh.pp_size, parallel.pp_virtual_stages, num_micro_batches)
            self._tables[num_micro_batches] = build_table(order, parallel.num_stages)[mesh.pp_rank]
        return self._tables[num_micro_batches]


class TrainingHooks(StepHooks):
    """Tells weights and model which micro-batch runs. What it says ends with the block, also one that fails."""

    def __init__(
        self,
        state: TrainingState,
        window: StepWindow,
        table: Sequence[Tick],
        step: int,
        domains: DomainSums | None = None,
        teacher: ForwardPass | None = None,
        figures: TokenFigures | None = None,
    ) -> None:
        self.state, self.window, self.step, self.domains, self.teacher = state, window, step, domains, teacher
        self.figures = figures
        self.splits = state.model.parallel.splits_backward
        ends = "W" if self.splits else "B"  # what computes the weight gradients of a micro-batch
        self.last = {t.action.stage: t.action for t in table if t.action is not None and t.action.kind == ends}

    def __enter__(self) -> TrainingHooks:
        if self.state.fp8 is not None:
            self.state.fp8.begin()
        self.state.model.training_loss.domains, self.state.model.training_loss.figures = self.domains, self.figures
        return self

    def __exit__(self, *error: object) -> None:
        state, model = self.state, self.state.model
        self._end_forward()
        model.training_loss.micro_batch = model.training_loss.domains = model.training_loss.figures = None
        if model.mixture is not None:
            model.mixture.before_forward(None, None)
        for stateful in (state.noise, model.streams, state.fp8):
            if stateful is not None:
                stateful.end()

    def on_forward(self, action: Action) -> None:
        model, window, index = self.state.model, self.window, action.micro_batch
        model.training_loss.micro_batch = window.handed[index]
        if self.domains is not None:
            self.domains.index = index
        if self.figures is not None:
            self.figures.index = index
        place = index * model.mesh.dp_size + model.mesh.dp_rank  # among all micro-batches of the step
        if self.state.noise is not None:
            plan: ContextPlan | None = window.inputs[index].get(CONTEXT)
            self.state.noise.begin(self.step, place, window.lengths[index], None if plan is None else plan.parts)
        if model.streams is not None:
            model.streams.begin(self.step, place)
        if model.mixture is not None:
            model.mixture.before_forward(window.router_masks[index], window.router_tokens[index])
        if self.teacher is not None and action.stage == model.parallel.num_stages - 1:
            self.teacher.begin(index)
        for observer in self.state.observers:
            observer.begin_forward(index, window.inputs[index])

    def before_backward(self, action: Action) -> None:
        self._end_forward()
        if self.splits:
            self.state.weights.start_deferring(action.stage, action.micro_batch)
        else:
            self.state.weights.before_backward(action.stage, self._is_last(action))

    def after_backward(self, action: Action) -> None:
        if self.splits:
            self.state.weights.stop_deferring()
        else:
            self.state.weights.after_backward(action.stage, self._is_last(action))

    def weight_gradients(self, action: Action) -> None:
        self.state.weights.run_deferred(action.stage, action.micro_batch, self._is_last(action))

    def _end_forward(self) -> None:
        for observer in self.state.observers:
            observer.end_forward()

    def _is_last(self, action: Action) -> bool:
        return action == self.last[action.stage]
