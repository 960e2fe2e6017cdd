"""Losses, gradients and weights that are not finite: skipped within a limit, logged as what they are, never saved.

Losses and gradients are watched without waiting for the device, weights before they are saved.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

import torch
from transformers.utils import logging

from ..checkpoint.state.finite_weights import NonFiniteWeightsError, first_nonfinite
from ..models.base import ParallelModel
from ..ops.host_copy import HostCopy
from ..optim.finite import FiniteCheck
from ..optim.norm import NonFiniteGradientError, describe_nonfinite
from ..optim.optimizer_link import OptimizerLink
from ..parallel.together import together
from ..parallel.zero.segment import ShardedWeights
from ..training_args import NanotronTrainingArguments

logger = logging.get_logger(__name__)


class Advice(Protocol):
    """`Checkpointer.where_to_resume`."""

    def __call__(self, besides: str | None = None) -> str: ...


class NonFiniteGuard:
    """Has steps whose gradient is not finite left out and reported, once, before anything could overwrite it.

    Such a step ends the run, or is one of at most `max_skipped_steps` in a row. Weights that are not finite are not
    saved. A loss that is not finite is no part of a logged mean; where there is no other, the mean is NaN.

    Args:
        model, weights: those that are trained.
        advice: what to resume from, for messages.
    """

    def __init__(
        self, args: NanotronTrainingArguments, model: ParallelModel, weights: ShardedWeights, advice: Advice
    ) -> None:
        self.args, self.model, self.weights, self._advice = args, model, weights, advice
        self.begin_run()

    def begin_run(self) -> None:
        """Forget a run that was broken off."""
        self._unchecked: FiniteCheck | None = None
        self._skipped = 0  # steps in a row
        self._filters = False
        self._losses = FiniteLosses(self.args.device)

    # ---- losses ----

    @property
    def asked_to_filter(self) -> bool:
        """`logging_nan_inf_filter` as the user has set it."""
        return self.args.logging_nan_inf_filter or self._filters

    @property
    def filters(self) -> bool:
        """Whether a loss that is not finite is left out of what is logged now."""
        return self._filters

    @contextlib.contextmanager
    def filtering(self) -> Iterator[None]:
        """Switch off Trainer's own test of the loss, for which the host waits in each micro-batch."""
        self._filters, self.args.logging_nan_inf_filter = self.args.logging_nan_inf_filter, False
        try:
            yield
        finally:
            self.args.logging_nan_inf_filter, self._filters = self._filters, False

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Switch it on again: Trainer reads it for the losses of evaluation batches, too."""
        asked = self.args.logging_nan_inf_filter
        self.args.logging_nan_inf_filter = self.asked_to_filter
        try:
            yield
        finally:
            self.args.logging_nan_inf_filter = asked

    def filtered(self, loss: torch.Tensor, logged: torch.Tensor) -> torch.Tensor:
        """What to add to `logged`, Trainer's sum of losses, for a step's `loss`."""
        return self._losses.add(loss, logged) if self._filters else loss

    def filter_logs(self, logs: dict[str, float]) -> None:
        """A mean over no finite loss is NaN."""
        if "loss" in logs and self._filters and not self._losses.close():
            logs["loss"] = float("nan")

    def missing(self, total: float, steps: int) -> float:
        """What Trainer's sum `total` over the run's `steps` lacks for those that had no finite loss."""
        if not self.args.logging_nan_inf_filter:
            return 0.0
        self._losses.close()
        return self._losses.missing(total, steps)

    # ---- gradients ----

    @property
    def arriving(self) -> HostCopy | None:
        """The verdict on the last step that `check` will wait for."""
        return None if self._unchecked is None else self._unchecked.verdict

    def judge(
        self, step: int, norm: torch.Tensor, loss: torch.Tensor, link: OptimizerLink, predicts: bool = True
    ) -> bool:
        """Have the step left out if `norm` is not finite, or nothing is predicted. False if the host knows that it is.

        Raises:
            ValueError: if too many steps in a row were left out, and this one predicts nothing.
        """
        if not predicts:
            self._leave_out_empty(step)
            link.skips_next = True
            return False
        self._unchecked = FiniteCheck(step, norm, loss)
        # Biases of routers are moved by the host.
        if link.skips_on_device and not self.args.moe_bias_update_rate:
            link.skip_unless_finite(norm)
            return True
        link.skips_next = not self.check()
        return not link.skips_next

    def check(self) -> bool:
        """Whether the last step's gradient was finite. Reports one that was not, once; the step is left out."""
        check, self._unchecked = self._unchecked, None
        if check is None:
            return True
        if check.is_finite():
            self._skipped = 0
            return True
        self._skipped += 1
        args, order = self.args, list(self.model.hub_shapes)
        what = describe_nonfinite(self.weights.segments, order, check.loss, check.norm, self.model.mesh)
        what = f"step {check.step}: {what}"
        if args.skip_nonfinite_steps and self._skipped <= args.max_skipped_steps:
            logger.warning(f"{what} Skipping this step (skip_nonfinite_steps=True).")
            return False
        choice = "; or skip such steps with skip_nonfinite_steps=True."
        if args.skip_nonfinite_steps:
            what += (
                f" {self._skipped} steps in a row had such a gradient, more than max_skipped_steps="
                f"{args.max_skipped_steps}."
            )
            choice = "; max_skipped_steps sets how many steps in a row may be skipped."
        bad = first_nonfinite(self.model, self.weights)
        state = f"The weights are those of step {check.step - self._skipped}"
        if bad is not None:
            raise NonFiniteGradientError(
                f"{what} {state}, and not finite themselves: the first is {bad[0]}, on rank {bad[1]}. "
                f"{self._advice()} and lower the learning rate."
            )
        raise NonFiniteGradientError(
            f"{what} {state}, and no checkpoint was touched. {self._advice()} and lower the learning rate, or look at "
            f"this step's data{choice}"
        )

    def _leave_out_empty(self, step: int) -> None:
        """A step without a label: momentum and weight decay would change the weights by no data."""
        self._skipped += 1
        what = f"step {step}: its batches have no label, all are -100"
        if self._skipped <= self.args.max_skipped_steps:
            logger.warning(f"{what}. This step is left out.")
            return
        raise ValueError(
            f"{what}, and {self._skipped} steps in a row were left out, more than max_skipped_steps="
            f"{self.args.max_skipped_steps}. Look at how labels are made (a prompt or template that masks all, rows "
            "that end before the answer), or use larger batches."
        )

    # ---- weights ----

    def refuse_to_save(self, what: str, step: int, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Not finite on any rank: then nothing is written. `optimizer` is one whose state is to be saved, too."""
        if self.model.weights is self.weights:  # what callbacks have written into the weights is what is saved
            together(self.model.mesh, f"saving {what}", lambda: self.weights.take_written(compare=True))
        bad = first_nonfinite(self.model, self.weights, optimizer)
        if bad is not None:
            raise NonFiniteWeightsError(
                f"{what} is not saved: {bad[0]} is not finite, on rank {bad[1]}, after step {step}. {self._advice()} "
                "and lower the learning rate; model.save_pretrained(directory) writes the weights as they are."
            )

    def refuse_to_resume(self, checkpoint: str, optimizer: torch.optim.Optimizer | None) -> None:
        """Another program, or an earlier version, may have written a checkpoint with such weights."""
        bad = first_nonfinite(self.model, self.weights, optimizer)
        if bad is not None:
            raise NonFiniteWeightsError(
                f"cannot resume from {checkpoint}: {bad[0]} is not finite there, on rank {bad[1]}. "
                f"{self._advice(besides=checkpoint)}."
            )


class FiniteLosses:
    """Sum and number of the losses since the last log line that are finite, on the device.

    Trainer adds up losses in a sum of its own, and divides it by the number of steps when it logs.
    """

    def __init__(self, device: torch.device) -> None:
        self._sum = torch.zeros((), device=device)
        self._number = torch.zeros((), device=device)
        self._steps = 0
        self._without = 0

    def add(self, loss: torch.Tensor, logged: torch.Tensor) -> torch.Tensor:
        """What to add to `logged`, Trainer's sum, so that it is the mean of the finite losses times the steps."""
        self._steps += 1
        finite = loss.isfinite()
        self._sum += torch.where(finite, loss, 0.0)
        self._number += finite
        filled = self._sum / self._number.clamp(min=1) * self._steps - logged
        return torch.where(self._number == self._steps, loss, filled)  # as in Trainer to the last bit

    def close(self) -> bool:
        """Begin anew. Whether any loss was finite, or there was none at all. The host waits for the device."""
        known = not self._steps or bool(self._number)
        self._without += 0 if known else self._steps
        self._sum.zero_()
        self._number.zero_()
        self._steps = 0
        return known

    def missing(self, total: float, steps: int) -> float:
        """What `total` over `steps` lacks for those of log lines that had no finite loss; NaN if that was all."""
        known = steps - self._without
        return total * self._without / known if known > 0 else float("nan") if steps else 0.0
