"""What a model says of the micro-batches of a window, without gradients: a frozen one, or the one that is trained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ...models.base import ParallelModel
from ...models.training_loss import TokenLosses
from ...parallel.batch import batch_shape
from ...parallel.pipeline.executor import StageModule, StepHooks
from ...parallel.pipeline.schedule import Action, build_table, forward_order
from .window import Batch, PreparedModel, StepWindow, make_window

OF_THE_LOSS = ("labels", "shift_labels", "num_items_in_batch")


class ForwardPass:
    """Forwards in evaluation mode over the micro-batches that a window trains on, by a schedule without backwards.

    Args:
        prepared: the model.
        left_out: columns of a batch that are not for it.
    """

    def __init__(self, prepared: PreparedModel, left_out: frozenset[str] = frozenset()) -> None:
        self.prepared, self.model, self._left_out = prepared, prepared.model, left_out
        self._window: StepWindow | None = None
        self._received: dict[int, Any] = {}  # by the last stage, of micro-batches that it has not seen
        self._logits: torch.Tensor | None = None

    def losses(self, micro_batches: Sequence[Batch]) -> list[TokenLosses]:
        """Of each micro-batch, on ranks of the last stage; an empty list on others. No logits are kept."""
        with self._open(micro_batches) as window:
            return list(self._run(window, window.inputs, _Measured(self.model)).values())

    @contextlib.contextmanager
    def over(self, micro_batches: Sequence[Batch]) -> Iterator[None]:
        """Inside the block, `begin` makes the logits of a micro-batch.

        Stages before the last run at once, over the whole window. The last one runs when it is asked to, so that the
        logits of one micro-batch exist at a time.
        """
        with self._open(micro_batches) as window:
            self._window = window
            self._inputs = [{k: v for k, v in batch.items() if k not in OF_THE_LOSS} for batch in window.inputs]
            self._lengths = [batch_shape(batch)[1] for batch in micro_batches]
            try:
                self._received = self._run(window, self._inputs, _Kept(self.model))
                yield
            finally:
                self._window, self._received, self._logits = None, {}, None

    def begin(self, index: int) -> None:
        """Micro-batch `index` comes next. On ranks of the last stage, together."""
        assert self._window is not None
        self._tell_routers(self._window, index)
        with torch.no_grad():
            output = self.model.stages[-1].forward(self._inputs[index], self._received.pop(index))
            logits = output.logits if self.model.makes_logits else self.model.whole_logits(output.logits)
        self._logits = logits[:, : self._lengths[index]].float()

    def take_logits(self) -> torch.Tensor:
        """`[B, S, V]` of the micro-batch that came last, in fp32, the same on every tensor-parallel rank. Once."""
        assert self._logits is not None
        logits, self._logits = self._logits, None
        return logits

    @torch.no_grad()
    def take(self, batch: Batch) -> None:
        """Make the logits of one batch of an evaluation, on every rank of the model."""
        left_out = {*OF_THE_LOSS, *self._left_out}
        given = {name: value for name, value in batch.items() if name not in left_out}
        self._logits = self.model(**{**given, "use_cache": False}).logits.float()

    @contextlib.contextmanager
    def _open(self, micro_batches: Sequence[Batch]) -> Iterator[StepWindow]:
        model = self.model
        model.eval()
        if model.mixture is not None:
            model.mixture.refresh(model)
        given = [{k: v for k, v in batch.items() if k not in self._left_out} for batch in micro_batches]
        window = make_window(self.prepared, given, None)
        with contextlib.ExitStack() as stack:
            for context in window.contexts:
                stack.enter_context(context)
            if model.mixture is not None:
                stack.callback(model.mixture.before_forward, None, None)
            yield window

    def _run(self, window: StepWindow, inputs: list[Batch], last: StageModule) -> dict[int, Any]:
        """Outputs of the last stage, for which `last` stands, by micro-batch."""
        model, parallel = self.model, self.model.parallel
        order = forward_order(model.mesh.pp_size, parallel.pp_virtual_stages, len(inputs))
        table = build_table(order, parallel.num_stages)[model.mesh.pp_rank]
        stages = [last if stage.is_last else stage for stage in model.stages]
        with torch.no_grad():
            return model.executor.run(table, stages, inputs, _Hooks(self, window))

    def _tell_routers(self, window: StepWindow, index: int) -> None:
        if self.model.mixture is not None:
            self.model.mixture.before_forward(window.router_masks[index], None)


class _Hooks(StepHooks):
    def __init__(self, forward_pass: ForwardPass, window: StepWindow) -> None:
        self.forward_pass, self.window = forward_pass, window

    def on_forward(self, action: Action) -> None:
        self.forward_pass._tell_routers(self.window, action.micro_batch)


class _Kept:
    """Stands for the last stage, and returns what it would get."""

    def __init__(self, model: ParallelModel) -> None:
        self.stage = model.stages[-1]
        self.index, self.is_first, self.is_last = self.stage.index, self.stage.is_first, self.stage.is_last

    def forward(self, inputs: Batch, received: Any) -> Any:
        return received


class _Measured(_Kept):
    """Stands for the last stage, and returns the losses of its tokens."""

    def __init__(self, model: ParallelModel) -> None:
        super().__init__(model)
        self.training_loss = model.training_loss

    def forward(self, inputs: Batch, received: Any) -> TokenLosses:
        self.training_loss.measured = measured = TokenLosses()
        try:
            self.stage.forward(inputs, received)
        finally:
            self.training_loss.measured = None
        return measured
