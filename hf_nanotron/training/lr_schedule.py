"""The learning-rate schedule of a run that resumes: a decay that begins at its checkpoint, and a schedule that changed.

A stable run at a full rate has checkpoints from which decays of their own branch off (warmup-stable-decay: Hu et al.
2024, arXiv:2404.06395). What transformers keeps of a schedule in a checkpoint is the step and the base rates, not the
schedule, so a checkpoint of ours says that itself.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import SchedulerType
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..checkpoint.directory.verify import read_marker
from ..checkpoint.state.index import StateIndex
from ..checkpoint.state.training_state import saved_extra
from ..parallel.mesh import ParallelMesh
from ..parallel.together import together
from ..training_args import NanotronTrainingArguments

logger = logging.get_logger(__name__)

KEY = "lr_schedule"
DECAYING = SchedulerType.WARMUP_STABLE_DECAY
CONSTANT = (SchedulerType.CONSTANT, SchedulerType.CONSTANT_WITH_WARMUP)


class RunSchedule:
    """The schedule of one call of `train`.

    Args:
        args: those of the run; changed by `branch` for the time of the call.

    Attributes:
        decay: optimizer step at which a decay branched off, and its steps; None for a run that is no branch.
    """

    def __init__(self, args: NanotronTrainingArguments) -> None:
        self.args = args
        self.decay: tuple[int, int] | None = None

    @contextlib.contextmanager
    def branch(self, mesh: ParallelMesh, checkpoint: str | None, index: StateIndex | None) -> Iterator[None]:
        """With `wsd_decay_steps`: for the time of the context the arguments are those of a decay from the checkpoint,
        which has a training state of this `index`.

        Raises:
            ValueError: on every rank, without a checkpoint, or for one whose rate is not that of a stable run.
        """
        self.decay, args = None, self.args
        own = args.max_steps, args.warmup_steps, args.lr_scheduler_kwargs
        if args.wsd_decay_steps is not None:
            steps = args.wsd_decay_steps
            first, warmup = together(mesh, "reading the schedule", lambda: decay_of(checkpoint, index, steps))
            kwargs = dict(own[2]) if isinstance(own[2], Mapping) else {}
            kwargs.pop("num_stable_steps", None)
            args.max_steps, args.warmup_steps = first + steps, warmup
            args.lr_scheduler_kwargs = {**kwargs, "num_decay_steps": steps}
            self.decay = first, steps
            logger.info(f"The learning rate decays from step {first} on, and the run ends with step {first + steps}.")
        try:
            yield
        finally:
            args.max_steps, args.warmup_steps, args.lr_scheduler_kwargs = own

    def state(self, max_steps: int) -> dict[str, Any]:
        """What a checkpoint keeps, the same on every rank."""
        args = self.args
        stable = stable_steps(args, max_steps)
        return {
            KEY: {
                "type": _name(args),
                "max_steps": max_steps,
                "learning_rate": float(args.learning_rate),
                "stable": None if stable is None else list(stable),
                "decay": None if self.decay is None else list(self.decay),
            }
        }

    def resume(self, saved: Mapping[str, Any] | None, scheduler: Any, where: str, warns: bool) -> None:
        """Go on by the schedule of this run, whose state has been loaded, and say where that is not the checkpoint's.

        Args:
            saved: the `state` of the checkpoint, under its key.
            scheduler: one that this trainer has made.
            where: the checkpoint, for messages.
            warns: whether this rank does.

        Raises:
            ValueError: for a checkpoint within a decay that this run does not go on with.
        """
        saved = saved or {}
        if saved.get("decay") is not None and self.decay is None:
            first, steps = saved["decay"]
            raise ValueError(
                f"{where} is in a decay of the learning rate that branched off at step {first}: go on with it by "
                f"wsd_decay_steps={steps}, or resume a checkpoint of the stable run."
            )
        args = self.args
        rate = saved.get("learning_rate")
        if warns and rate is not None and not math.isclose(rate, args.learning_rate, rel_tol=1e-6):
            logger.warning(
                f"learning_rate={args.learning_rate:g} has no effect: the optimizer of {where} goes on with its own, "
                f"{rate:g}. For another rate start from the checkpoint's weights (from_pretrained)."
            )
        if not isinstance(scheduler, LambdaLR):
            return
        step = scheduler.last_epoch
        bases, before = scheduler.base_lrs, scheduler._last_lr
        now = [base * function(step) for base, function in zip(bases, scheduler.lr_lambdas, strict=True)]
        if all(math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-30) for a, b in zip(before, now, strict=True)):
            return
        stable = saved.get("stable")
        # A stable run that ends has stepped its schedule beyond its end; the longer one goes on with the full rate.
        goes_on = stable is not None and stable[0] <= step <= stable[1] and now == bases
        if warns and self.decay is None and not goes_on:
            logger.warning(
                f"the learning rate changes at step {step}, from {float(before[0]):g} to {float(now[0]):g}: "
                f"lr_scheduler_type={_name(args)!r}, its options or the number of steps are not those that {where} was "
                f"written with ({saved.get('type', 'another schedule')} over {saved.get('max_steps', 'other')} steps). "
                "A stable run can be decayed from any checkpoint with wsd_decay_steps."
            )
        scheduler._last_lr = now
        for group, value in zip(scheduler.optimizer.param_groups, now, strict=True):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(value)
            else:
                group["lr"] = value


def _name(args: NanotronTrainingArguments) -> str:
    return str(SchedulerType(args.lr_scheduler_type).value)


def stable_steps(args: NanotronTrainingArguments, max_steps: int) -> tuple[int, int] | None:
    """First and last number of optimizer steps after which the rate is still the full one; None if there is no such
    part, as of a cosine.
    """
    kind, kwargs = SchedulerType(args.lr_scheduler_type), args.lr_scheduler_kwargs
    kwargs = kwargs if isinstance(kwargs, Mapping) else {}
    warmup = args.get_warmup_steps(max_steps) if kind != SchedulerType.CONSTANT else 0
    if kind in CONSTANT:
        return warmup, max_steps
    if kind != DECAYING:
        return None
    stable = kwargs.get("num_stable_steps")
    return warmup, max_steps - kwargs.get("num_decay_steps", 0) if stable is None else warmup + stable


def decay_of(checkpoint: str | None, index: StateIndex | None, steps: int) -> tuple[int, int]:
    """Where a decay of so many steps begins, and the steps of the warm-up before: at the checkpoint, or where it did.

    Raises:
        ValueError: see `RunSchedule.branch`.
    """
    asked = f"wsd_decay_steps={steps}"
    if checkpoint is None:
        raise ValueError(
            f"{asked} needs resume_from_checkpoint: the decay begins at a checkpoint of a stable run. For a decay at "
            f"the end of a run of its own use lr_scheduler_kwargs={{'num_decay_steps': {steps}}}."
        )
    step = int(read_marker(checkpoint)["step"])
    if index is None:
        raise ValueError(
            f"{asked}: {checkpoint} has no training_state/ (it was saved with save_only_model=True, or by another "
            "program), so no run goes on from it; resume a checkpoint that has one."
        )
    saved = saved_extra(index).get(KEY)
    name = Path(checkpoint).name or PREFIX_CHECKPOINT_DIR
    if saved is None:
        raise ValueError(
            f"{asked}: {checkpoint} does not say by which schedule it was trained (by one of your own, or none), so it "
            "is not known whether its rate is stable; resume a checkpoint of lr_scheduler_type='warmup_stable_decay' "
            "or 'constant_with_warmup'."
        )
    stable, decay = saved["stable"], saved["decay"]
    if decay is not None:
        if decay[1] != steps:
            raise ValueError(
                f"{asked}: {name} is in a decay of {decay[1]} steps, which branched off at step {decay[0]}; go on with "
                f"wsd_decay_steps={decay[1]}, or resume a checkpoint of the stable run."
            )
        return decay[0], stable[0]
    if stable is None or not stable[0] <= step <= stable[1]:
        where = "nowhere" if stable is None else f"from step {stable[0]} to {stable[1]}"
        raise ValueError(
            f"{asked}: a decay begins at a stable rate, but {name} is of step {step}, and its run, with "
            f"lr_scheduler_type={saved['type']!r}, was stable {where}; resume another checkpoint."
        )
    return step, stable[0]
