"""Whether saved hyper-parameters and states could be those of the run at hand, asked before they replace its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..files.schema import EARLIER, show

NUMBERS = (int, float)
MOST_WHOLE = 1 << 53
# The optimizers that count the steps of each parameter: torch's, and our AdamW.
COUNTING = {"ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop"}
NEVER_NEGATIVE = ("lr", "initial_lr", "eps", "weight_decay")  # of a parameter group, where they are numbers
RATE = "initial_lr"  # of a parameter group with a scheduler: its rate before that
COUNTS = ("last_epoch", "_step_count")  # of a scheduler
BY_GROUP = ("base_lrs", "_last_lr")  # of a scheduler: one number for each parameter group


def check_like(saved: Any, own: Any, where: str) -> None:
    """Refuse a value of another type than the run's own. Nothing is asked of what is None there, or not there at all.

    Numbers may be whole or not, lists of any length.
    """
    if own is None:
        return
    if isinstance(own, Mapping):
        if isinstance(saved, Mapping):
            for key in own.keys() & saved.keys():
                check_like(saved[key], own[key], f"{where}[{key!r}]")
            return
    elif isinstance(own, list | tuple):
        if isinstance(saved, list | tuple) and (isinstance(own, list) or len(saved) == len(own)):
            for index, item in enumerate(saved):
                check_like(item, own[min(index, len(own) - 1)] if own else None, f"{where}[{index}]")
            return
    elif isinstance(own, bool):
        if isinstance(saved, bool):
            return
    elif isinstance(own, (*NUMBERS, torch.Tensor)):  # a learning rate may be a tensor of one element
        if _is_finite(own) and not _is_finite(saved):
            raise ValueError(f"{where} is {show(saved)}, which is not finite; {EARLIER}.")
        if is_number(saved) and (not isinstance(own, torch.Tensor) or own.numel() == 1):
            return
        if isinstance(own, torch.Tensor) and isinstance(saved, torch.Tensor) and saved.shape == own.shape:
            return
    elif isinstance(saved, type(own)):
        return
    raise ValueError(f"{where} is {show(saved)}, but {type(own).__name__} in this run; {EARLIER}.")


def _is_finite(value: Any) -> bool:
    """Of anything that is no number: True."""
    return bool(torch.as_tensor(value).isfinite().all()) if isinstance(value, float | torch.Tensor) else True


def is_number(value: Any) -> bool:
    """Also a tensor of one element. Whole numbers are those that a float holds exactly."""
    if isinstance(value, torch.Tensor):
        return value.numel() == 1 and not value.is_complex()
    return isinstance(value, float) or (type(value) is int and abs(value) <= MOST_WHOLE)


def check_scalars(saved: dict[str, Any], optimizer: Any, is_stepped: bool, where: str) -> None:
    """Refuse what an optimizer could not have kept for a parameter: above all its number of steps.

    `is_stepped`: whether it keeps tensors for the parameter.
    """
    if is_stepped and "step" not in saved and COUNTING & {base.__name__ for base in type(optimizer).__mro__}:
        raise ValueError(f"{where} has no 'step', which {type(optimizer).__name__} keeps; {EARLIER}.")
    if "step" in saved and not (is_number(saved["step"]) and 0 <= saved["step"] <= MOST_WHOLE):
        raise ValueError(f"{where}['step'] is {show(saved['step'])}, not a number of steps; {EARLIER}.")


def check_groups(saved: list[dict[str, Any]], groups: list[dict[str, Any]], kinds: set[str], where: str) -> None:
    """Refuse parameter groups of an optimizer that its steps could not use."""
    for index, (one, own) in enumerate(zip(saved, groups, strict=True)):
        if "params" in one:
            raise ValueError(f"{where}[{index}] lists parameters, which no training state does; {EARLIER}.")
        check_like(one, own, f"{where}[{index}]")
        if one.get("amsgrad") and "exp_avg_sq" in kinds and "max_exp_avg_sq" not in kinds:
            raise ValueError(f"{where}[{index}] has amsgrad, but the state holds no max_exp_avg_sq; {EARLIER}.")
        if negative := [key for key in NEVER_NEGATIVE if is_number(one.get(key)) and bool(one[key] < 0)]:
            key = negative[0]
            raise ValueError(f"{where}[{index}][{key!r}] is {show(one[key])}, which is negative; {EARLIER}.")
        if not all(0 <= beta < 1 for beta in one.get("betas", ())):
            raise ValueError(f"{where}[{index}]['betas'] is {show(one['betas'])}, not from 0 to below 1; {EARLIER}.")


def changed_settings(saved: list[dict[str, Any]], groups: list[dict[str, Any]], where: str) -> list[str]:
    """Which settings of the parameter groups of a run are not the saved ones, which replace them: with both values.

    Of learning rates, which a schedule multiplies: those that have changed otherwise than the first group's, whose
    rate is the run's own and is told of with its schedule.

    Raises:
        ValueError: where the value is a word, which names another rule of updates.
    """
    found: dict[str, str] = {}
    first = [one.get(RATE) for one in (saved[0], groups[0])] if saved else []
    for one, own in zip(saved, groups, strict=True):
        for key in own.keys() & one.keys() - {"lr", "params"}:
            before, now = (list(value) if isinstance(value, tuple) else value for value in (one[key], own[key]))
            if _is_same(before, now) or (key == RATE and _in_proportion((before, now), first)):
                continue
            if isinstance(now, str):
                raise ValueError(
                    f"{where} was written with {key}={before!r} of the optimizer, and this run has {now!r}: resume "
                    f"with {before!r}, or start from the weights with from_pretrained."
                )
            found.setdefault(key, f"{'learning rate' if key == RATE else key}={show(before)}, not {show(now)}")
    return [found[key] for key in sorted(found)]


def _is_same(one: Any, other: Any) -> bool:
    """Also of one number, kept as a tensor or as a list of numbers."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_is_same, one, other))
    if is_number(one) and is_number(other):
        return math.isclose(float(one), float(other), rel_tol=1e-6)
    return isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor) or bool(one == other)


def _in_proportion(rates: Sequence[Any], others: Sequence[Any]) -> bool:
    (saved, own), (first, first_own) = rates, others
    if not all(map(is_number, (saved, own, first, first_own))):
        return True
    return math.isclose(float(saved) * float(first_own), float(own) * float(first), rel_tol=1e-6)


def load_scheduler(scheduler: Any, saved: dict[str, Any], groups: int, where: str) -> None:
    """`scheduler.load_state_dict(saved)`, of a state that it could have written."""
    own = scheduler.state_dict()
    # A scheduler takes all keys as its attributes: one of them could hide a method, or its optimizer.
    if methods := [key for key in saved if key not in own and hasattr(scheduler, key)]:
        raise ValueError(
            f"{where} has {show(methods[0])}, which is no value of a {type(scheduler).__name__}; {EARLIER}."
        )
    check_like(saved, own, where)
    for key in COUNTS:
        if is_number(own.get(key)) and saved.get(key, 0) < 0 <= own[key]:
            raise ValueError(f"{where}[{key!r}] is {show(saved[key])}, not a number of steps; {EARLIER}.")
    for key in BY_GROUP:
        if any(rate < 0 for rate in saved.get(key, ())):
            raise ValueError(f"{where}[{key!r}] is {show(saved[key])}, with a negative learning rate; {EARLIER}.")
        if key in own and len(saved.get(key, own[key])) != groups:
            raise ValueError(f"{where}[{key!r}] is {show(saved[key])}, where there are {groups} groups; {EARLIER}.")
    try:
        scheduler.load_state_dict(saved)
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(
            f"{where} is not a state of {type(scheduler).__name__} ({type(error).__name__}: {error}); {EARLIER}."
        ) from error
