"""Arguments of schedules and averages: the decay of a branch, the warm-up of the batch, the moving average."""

from __future__ import annotations

from typing import Any, Protocol

from transformers import SchedulerType


class ScheduleArguments(Protocol):
    """What is read of the training arguments here."""

    batch_size_warmup_increment: int | None
    batch_size_warmup_start: int | None
    batch_size_warmup_tokens: int | None
    ema_decay: float | None
    ema_evaluate: bool
    ema_start_step: int
    load_best_model_at_end: bool
    lr_scheduler_type: Any
    max_steps: int
    wsd_decay_steps: int | None


def check_schedules(args: ScheduleArguments) -> None:
    """
    Raises:
        ValueError: for a value out of range, or one that needs another argument.
    """
    _check_average(args)
    _check_decay(args)
    _check_batch_warmup(args)


def _check_average(args: ScheduleArguments) -> None:
    if args.ema_decay is None:
        for name, off in (("ema_start_step", 0), ("ema_evaluate", False)):
            if getattr(args, name) != off:
                raise ValueError(f"{name}={getattr(args, name)} needs ema_decay, such as ema_decay=0.999.")
        return
    if not 0 <= args.ema_decay < 1:
        raise ValueError(
            f"ema_decay={args.ema_decay!r} must be at least 0 and below 1: the share of the average that an "
            "optimizer step keeps, such as 0.999."
        )
    if args.ema_start_step < 0:
        raise ValueError(f"ema_start_step={args.ema_start_step} must be at least 0.")
    if args.ema_evaluate and args.load_best_model_at_end:
        raise ValueError(
            "ema_evaluate=True with load_best_model_at_end=True: the best checkpoint would be that of the best "
            "average, of which the weights themselves would be loaded; use load_best_model_at_end=False, and load "
            "the folder ema of the best checkpoint."
        )


def _check_decay(args: ScheduleArguments) -> None:
    steps = args.wsd_decay_steps
    if steps is None:
        return
    if steps < 1:
        raise ValueError(f"wsd_decay_steps={steps} must be at least 1, or None.")
    if SchedulerType(args.lr_scheduler_type) != SchedulerType.WARMUP_STABLE_DECAY:
        raise ValueError(
            f"wsd_decay_steps={steps} needs lr_scheduler_type='warmup_stable_decay', not "
            f"{SchedulerType(args.lr_scheduler_type).value!r}."
        )


def _check_batch_warmup(args: ScheduleArguments) -> None:
    names = ("batch_size_warmup_tokens", "batch_size_warmup_start", "batch_size_warmup_increment")
    given = [name for name in names if getattr(args, name) is not None]
    for name in given:
        if getattr(args, name) < 1:
            raise ValueError(f"{name}={getattr(args, name)} must be at least 1, or None.")
    if given and (lacking := [name for name in names[:2] if name not in given]):
        raise ValueError(
            f"{given[0]}={getattr(args, given[0])} needs {lacking[0]}: the batch grows from batch_size_warmup_start "
            "samples to the full one over batch_size_warmup_tokens tokens."
        )
    if given and args.max_steps <= 0:
        raise ValueError(
            f"{given[0]}={getattr(args, given[0])} needs max_steps: how many steps an epoch has depends on the sizes "
            "of the batch."
        )
