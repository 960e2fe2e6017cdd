"""nanotron's learning rate schedule -> one of transformers'.

There it is a warmup from 0 (or none), a constant rate up to `lr_decay_starting_step`, a decay over `lr_decay_steps`,
and the lowest rate from then on. Source: nanotron at commit 2411b022, `helpers.py`, `lr_scheduler_builder`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .keys import Keys

SECTION = "optimizer.learning_rate_scheduler"
STYLES = ("linear", "cosine", "1-sqrt")


@dataclass(frozen=True)
class Schedule:
    """The rate rises to step `warmup`, is constant to `decay_from`, and falls for `decay_steps`."""

    rate: float
    lowest: float
    warmup: int
    decay_from: int
    decay_steps: int
    style: str


def read_schedule(keys: Keys, train_steps: int) -> Schedule:
    """As nanotron reads it, with its defaults."""
    rate = keys.number(f"{SECTION}.learning_rate", whole=False)
    warmup = keys.number(f"{SECTION}.lr_warmup_steps", 0)
    decay_steps = keys.number(f"{SECTION}.lr_decay_steps", train_steps - warmup)
    decay_from = keys.number(f"{SECTION}.lr_decay_starting_step", warmup)
    lowest = keys.number(f"{SECTION}.min_decay_lr", rate, whole=False)
    style = keys.take(f"{SECTION}.lr_decay_style", "linear")
    warmup_style = keys.take(f"{SECTION}.lr_warmup_style", "linear")
    for key, value, known in (
        ("lr_decay_style", style, STYLES),
        ("lr_warmup_style", warmup_style, ("linear", "constant")),
    ):
        if value not in known:
            raise ValueError(f"{keys.source}: {SECTION}.{key}={value!r} is not one of {', '.join(known)}.")
    if decay_from < warmup:
        keys.note(
            f"{SECTION}.lr_decay_starting_step",
            f"the decay begins when the warmup ends, at step {warmup}; there it jumps to where it would then be",
        )
        decay_steps, decay_from = max(0, decay_from + decay_steps - warmup), warmup
    if warmup_style == "constant":
        warmup = 0
    return Schedule(rate, lowest, warmup, decay_from, decay_steps, style)


def from_step(schedule: Schedule, step: int, keys: Keys) -> Schedule:
    """What is left of a schedule after `step` steps, as far as a new run has one that is the same."""
    if 0 < step < schedule.warmup:
        keys.note(
            f"{SECTION}.lr_warmup_steps", f"the run goes on at step {step} of its warmup, and warms up from 0 again"
        )
    if step > schedule.decay_from:
        keys.note(
            f"{SECTION}.lr_decay_steps",
            f"the run goes on at step {step}, within its decay, and here decays from learning_rate on again: set "
            "learning_rate to the last rate of that run",
        )
    decayed = max(0, step - schedule.decay_from)
    return Schedule(
        schedule.rate,
        schedule.lowest,
        max(0, schedule.warmup - step),
        max(0, schedule.decay_from - step),
        max(0, schedule.decay_steps - decayed),
        schedule.style,
    )


def training_keys(schedule: Schedule, train_steps: int, keys: Keys) -> dict[str, Any]:
    """The fields of `training` with the same rate at each step; a note where there are none."""
    found: dict[str, Any] = {"learning_rate": schedule.rate}
    warmup = {"warmup_steps": schedule.warmup} if schedule.warmup else {}
    lowest, steps = schedule.lowest, schedule.decay_steps
    if lowest == schedule.rate or not steps or schedule.decay_from >= train_steps:
        if not steps and lowest != schedule.rate:
            keys.note(
                f"{SECTION}.min_decay_lr", "without decay steps the rate drops to it at once there; here it stays"
            )
        return found | {"lr_scheduler_type": "constant_with_warmup" if warmup else "constant"} | warmup
    to_the_end = (
        schedule.decay_from == schedule.warmup and schedule.decay_from + steps == train_steps and lowest < schedule.rate
    )
    if to_the_end and schedule.style == "cosine":
        kwargs = {"lr_scheduler_kwargs": {"min_lr": lowest}} if lowest else {}
        return found | {"lr_scheduler_type": "cosine_with_min_lr" if lowest else "cosine", **kwargs} | warmup
    if to_the_end and schedule.style == "linear":
        kwargs = {"lr_scheduler_kwargs": {"lr_end": lowest, "power": 1.0}} if lowest else {}
        return found | {"lr_scheduler_type": "polynomial" if lowest else "linear", **kwargs} | warmup
    if lowest and schedule.warmup:
        keys.note(
            f"{SECTION}.min_decay_lr",
            f"the warmup of {schedule.warmup} steps begins at this rate (warmup_stable_decay), and there at 0",
        )
    return found | {
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {
            "num_stable_steps": schedule.decay_from - schedule.warmup,
            "num_decay_steps": steps,
            "decay_type": schedule.style,
            "min_lr_ratio": lowest / schedule.rate,
        },
        "warmup_steps": schedule.warmup,
    }
