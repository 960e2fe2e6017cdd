"""The part of the trainer that watches for losses, gradients and weights that are not finite.

Losses and gradients are watched without waiting for the device, weights before they are saved.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from transformers import Trainer
from transformers.utils import logging

from ..checkpoint.directory.retention import newest
from ..checkpoint.state.finite_weights import NonFiniteWeightsError, first_nonfinite
from ..models.base import ParallelModel
from ..optim.finite import FiniteCheck
from ..optim.norm import NonFiniteGradientError, describe_nonfinite
from ..optim.optimizer_link import OptimizerLink
from ..parallel.mesh import ParallelMesh
from ..parallel.together import together
from ..parallel.zero.segment import ShardedWeights
from ..training_args import NanotronTrainingArguments

logger = logging.get_logger(__name__)


class FiniteTrainer(Trainer):
    """Has steps whose gradient is not finite left out and reported, once, before anything could overwrite it.

    Such a step ends the run, or is one of at most `max_skipped_steps` in a row. Weights that are not finite are not
    saved. A loss that is not finite is no part of a logged mean; where there is no other, the mean is NaN.
    """

    args: NanotronTrainingArguments
    model: ParallelModel
    mesh: ParallelMesh
    weights: ShardedWeights
    _link: OptimizerLink | None
    _unchecked: FiniteCheck | None = None
    _skipped: int = 0  # steps in a row
    _filters_losses: bool = False
    _finite_losses: FiniteLosses

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._unchecked, self._skipped = None, 0  # of a run that was broken off
        self._finite_losses = FiniteLosses(self.args.device)
        return super().train(*args, **kwargs)

    # ---- losses ----

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        # Trainer's own test of the loss makes the host wait in each micro-batch; `_filtered` does it on the device.
        self._filters_losses, self.args.logging_nan_inf_filter = self.args.logging_nan_inf_filter, False
        try:
            return super()._run_epoch(*args, **kwargs)
        finally:
            self.args.logging_nan_inf_filter, self._filters_losses = self._filters_losses, False

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        asked = self.args.logging_nan_inf_filter  # which Trainer reads for the losses of batches, too
        self.args.logging_nan_inf_filter |= self._filters_losses
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            self.args.logging_nan_inf_filter = asked

    def _filtered(self, loss: torch.Tensor) -> torch.Tensor:
        """What to add to Trainer's sum of losses for a step's `loss`."""
        if not self._filters_losses:
            return loss
        return self._finite_losses.add(loss, self._tr_loss)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._filters_losses and not self._finite_losses.close():
            logs["loss"] = float("nan")
        super().log(logs, start_time)

    # ---- gradients ----

    def _judge(self, norm: torch.Tensor, loss: torch.Tensor) -> bool:
        """Have the step left out if `norm` is not finite. False if the host knows already that it is not.

        Args:
            norm: of the step's gradient, over the whole model.
            loss: this rank's part.
        """
        assert self._link is not None
        self._unchecked = FiniteCheck(self.state.global_step + 1, norm, loss)
        # Biases of routers are moved by the host.
        if self._link.skips_on_device and not self.args.moe_bias_update_rate:
            self._link.skip_unless_finite(norm)
            return True
        self._link.skips_next = not self._check_gradient()
        return not self._link.skips_next

    def _check_gradient(self) -> bool:
        """Whether the last step's gradient was finite. Reports one that was not, once; the step is left out.

        Raises:
            NonFiniteGradientError: unless `skip_nonfinite_steps`, or after too many in a row. Weights, optimizer and
                checkpoints are untouched.
        """
        check, self._unchecked = self._unchecked, None
        if check is None:
            return True
        if check.is_finite():
            self._skipped = 0
            return True
        order = list(self.model.hub_shapes)
        what = describe_nonfinite(self.weights.segments, order, check.loss, check.norm, self.mesh)
        what = f"step {check.step}: {what}"
        self._skipped += 1
        if self.args.skip_nonfinite_steps and self._skipped <= self.args.max_skipped_steps:
            logger.warning(f"{what} The step is left out (skip_nonfinite_steps=True).")
            return False
        if self.args.skip_nonfinite_steps:
            what += (
                f" {self._skipped} steps in a row had such a gradient, more than max_skipped_steps="
                f"{self.args.max_skipped_steps}: leaving steps out does not help."
            )
        bad = first_nonfinite(self.model, self.weights)
        state = f"The weights are those of step {check.step - self._skipped}"
        if bad is not None:
            raise NonFiniteGradientError(
                f"{what} {state}, and not finite themselves: the first is {bad[0]}, on rank {bad[1]}. "
                f"{self._where_to_resume()} and lower the learning rate."
            )
        raise NonFiniteGradientError(
            f"{what} {state}, and no checkpoint was touched. {self._where_to_resume()} and lower the learning rate, or "
            "look at this step's data"
            + (
                "; max_skipped_steps sets how many steps in a row may be left out."
                if self.args.skip_nonfinite_steps
                else ", or leave such steps out with skip_nonfinite_steps=True."
            )
        )

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        control = self.control
        if control.should_log or control.should_save or control.should_evaluate or control.should_training_stop:
            self._check_gradient()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._check_gradient()
        if self.args.logging_nan_inf_filter:
            self._finite_losses.close()
            steps = self.state.global_step - self._initial_global_step
            # Trainer divides by all steps.
            self._total_loss_scalar += self._finite_losses.missing(
                self._total_loss_scalar + self._tr_loss.item(), steps
            )
        return super()._finalize_training(*args, **kwargs)

    # ---- weights ----

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._refuse_nonfinite(f"checkpoint-{self.state.global_step}", with_state=not self.args.save_only_model)
        super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        self._refuse_nonfinite(f"the model in {output_dir or self.args.output_dir}", with_state=False)
        super()._save(output_dir, state_dict)

    def _refuse_nonfinite(self, what: str, with_state: bool) -> None:
        """
        Args:
            with_state: whether the optimizer's state is to be saved, too. One that is not finite ends the next step.

        Raises:
            NonFiniteWeightsError: on every rank, if a weight is not finite on any. Nothing is written.
        """
        if self.model.weights is self.weights:  # what callbacks have written into the weights is what is saved
            together(self.mesh, f"saving {what}", lambda: self.weights.take_written(compare=True))
        bad = first_nonfinite(self.model, self.weights, self.optimizer if with_state else None)
        if bad is not None:
            raise NonFiniteWeightsError(
                f"{what} is not saved: {bad[0]} is not finite, on rank {bad[1]}, after step "
                f"{self.state.global_step}. {self._where_to_resume()} and lower the learning rate; "
                "model.save_pretrained(directory) writes the weights as they are."
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """
        Raises:
            NonFiniteWeightsError: if the checkpoint, which another program or an earlier version may have written,
                holds weights that are not finite.
        """
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and (bad := first_nonfinite(self.model, self.weights, self.optimizer)) is not None:
            raise NonFiniteWeightsError(
                f"{checkpoint} cannot be resumed: {bad[0]} is not finite there, on rank {bad[1]}. "
                f"{self._where_to_resume(besides=checkpoint)}."
            )

    def _where_to_resume(self, besides: str | None = None) -> str:
        """What to do about weights that are lost, up to an "and". All ranks together.

        Args:
            besides: a checkpoint that is no use, nor are later ones.
        """
        try:
            finish = cast(Any, self)._finish_background_save
            together(self.mesh, "the save before", finish)  # it is the one to resume from
        except Exception as error:
            logger.warning(f"{type(error).__name__}: {error}")
        kept = newest(self.args.output_dir) if self.args.output_dir else []
        if besides is not None and Path(besides).resolve() in (paths := [path.resolve() for path in kept]):
            kept = kept[paths.index(Path(besides).resolve()) + 1 :]
        return f"Resume from {kept[0]}" if kept else "There is no checkpoint before it: start anew"


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
        """What to add to `logged`, Trainer's sum, so that it is the mean of the finite losses times the steps.

        Args:
            loss: of one more step.
        """
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
