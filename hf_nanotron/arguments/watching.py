"""What the training arguments say about watching a run: which steps are profiled on which ranks, which details."""

from __future__ import annotations

import re
from typing import Any, Protocol

DETAILS = ("weights", "gradients", "activations")
DETAIL_STEPS = 100  # unless metrics_detail_steps says another number
ALL = "all"


class WatchingArguments(Protocol):
    """What is read of the training arguments here."""

    max_steps: int
    metrics_detail: Any
    metrics_detail_steps: int | None
    profile_ranks: Any
    profile_steps: Any


def check_watching(args: WatchingArguments, world_size: int) -> None:
    """
    Raises:
        ValueError: for steps or ranks that no run has, an unknown detail, or an argument without its other.
    """
    ranges = profiled_steps(args.profile_steps)
    profiled_ranks(args.profile_ranks, world_size)
    if args.profile_ranks is not None and ranges is None:
        raise ValueError(f"profile_ranks={args.profile_ranks!r} needs profile_steps, such as profile_steps='10-12'.")
    if ranges is not None and args.max_steps > 0 and ranges[-1][1] > args.max_steps:
        raise ValueError(
            f"profile_steps={args.profile_steps!r} has step {ranges[-1][1]}, but training ends at max_steps="
            f"{args.max_steps}; choose steps from 1 to {args.max_steps}."
        )
    details = detail_names(args.metrics_detail)
    if unknown := [name for name in details if name not in DETAILS]:
        raise ValueError(
            f"metrics_detail={args.metrics_detail!r}: {unknown[0]!r} is not one of {', '.join(map(repr, DETAILS))}."
        )
    if args.metrics_detail_steps is not None and not details:
        raise ValueError(
            f"metrics_detail_steps={args.metrics_detail_steps} needs metrics_detail, such as "
            "metrics_detail=['weights', 'gradients']."
        )


def profiled_steps(value: Any) -> list[tuple[int, int]] | None:
    """The ranges of `profile_steps`, both ends included, in order: "3,10-12" is [(3, 3), (10, 12)]. None for none.

    Raises:
        ValueError: for what is no step or range, and for ranges that overlap.
    """
    if value is None:
        return None
    ranges = []
    parts = [part for part in re.split(r"[,\s]+", str(value).strip("[]() ")) if part]
    for part in parts:
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        if not 1 <= first <= last:
            raise ValueError(
                f"profile_steps={value!r}: {part!r} is neither an optimizer step, counted from 1, nor a range such as "
                "10-12."
            )
        ranges.append((first, last))
    if not ranges:
        raise ValueError(f"profile_steps={value!r} names no step; write one or more, such as '10-12' or '3,10-12'.")
    ranges.sort()
    for (_, end), (start, _) in zip(ranges, ranges[1:], strict=False):
        if start <= end:
            raise ValueError(f"profile_steps={value!r} has step {start} in two ranges; name each step once.")
    return ranges


def profiled_ranks(value: Any, world_size: int) -> list[int]:
    """The ranks that `profile_ranks` names: a number, a list, text like "0,3", or "all"; rank 0 for None.

    Raises:
        ValueError: for what is no rank of this job.
    """
    if value is None:
        return [0]
    text = (
        value if isinstance(value, str) else ",".join(map(str, value if isinstance(value, list | tuple) else [value]))
    )
    text = text.strip("[]() ")
    if text.lower() == ALL:
        return list(range(world_size))
    parts = [part for part in re.split(r"[,\s]+", text) if part]
    for part in parts:
        if not part.isdecimal() or int(part) >= world_size:
            raise ValueError(
                f"profile_ranks={value!r}: {part!r} is no rank of this job, whose ranks are 0 to {world_size - 1}; "
                "name ranks such as '0,3', or 'all'."
            )
    if not parts:
        raise ValueError(f"profile_ranks={value!r} names no rank; name ranks such as '0,3', or 'all'.")
    return sorted({int(part) for part in parts})


def detail_names(value: Any) -> list[str]:
    """`metrics_detail` from a list, or from text like "weights,gradients"; empty for none."""
    if not value:
        return []
    text = value if isinstance(value, str) else ",".join(map(str, value))
    return list(dict.fromkeys(part for part in re.split(r"[,\s]+", text.strip("[]() ")) if part))
