"""The part of the trainer that watches for losses and gradients that are not finite, without waiting for the device."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer
from transformers.utils import logging

from .models.base import ParallelModel
from .optim.finite import FiniteCheck
from .optim.link import OptimizerLink
from .optim.norm import NonFiniteGradientError, describe_nonfinite
from .parallel.mesh import ParallelMesh
from .parallel.segment import ShardedWeights
from .training_args import NanotronTrainingArguments

logger = logging.get_logger(__name__)


class FiniteTrainer(Trainer):
    """Has steps whose gradient is not finite left out and reported, once, before anything could overwrite it."""

    args: NanotronTrainingArguments
    model: ParallelModel
    mesh: ParallelMesh
    weights: ShardedWeights
    _link: OptimizerLink | None
    _unchecked: FiniteCheck | None = None
    _filters_losses: bool = False

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._unchecked = None  # of a run that was broken off
        return super().train(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        # Trainer's own test of the loss makes the host wait in each micro-batch; `_filtered` does it on the device.
        self._filters_losses, self.args.logging_nan_inf_filter = self.args.logging_nan_inf_filter, False
        try:
            return super()._run_epoch(*args, **kwargs)
        finally:
            self.args.logging_nan_inf_filter = self._filters_losses

    def _filtered(self, loss: torch.Tensor) -> torch.Tensor:
        """`loss`, or what Trainer puts in the place of one that is not finite: the mean of those not logged yet."""
        if not self._filters_losses:
            return loss
        steps = 1 + self.state.global_step - self._globalstep_last_logged
        return torch.where(loss.isfinite(), loss, self._tr_loss / steps)

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
            NonFiniteGradientError: unless `skip_nonfinite_steps`. Weights, optimizer and checkpoints are untouched.
        """
        check, self._unchecked = self._unchecked, None
        if check is None or check.is_finite():
            return True
        order = list(self.model.hub_shapes)
        what = describe_nonfinite(self.weights.segments, order, check.loss, check.norm, self.mesh)
        what = f"step {check.step}: {what}"
        if not self.args.skip_nonfinite_steps:
            raise NonFiniteGradientError(
                f"{what} The weights are those of the step before, and no checkpoint was touched. Lower the learning "
                "rate, look at this step's data, or leave such steps out with skip_nonfinite_steps=True."
            )
        logger.warning(f"{what} The step is left out (skip_nonfinite_steps=True).")
        return False

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        control = self.control
        if control.should_log or control.should_save or control.should_evaluate or control.should_training_stop:
            self._check_gradient()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._check_gradient()
        return super()._finalize_training(*args, **kwargs)
