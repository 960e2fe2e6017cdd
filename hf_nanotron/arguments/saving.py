"""Training arguments about checkpoints: which belong together."""

from __future__ import annotations

from typing import Any


def check_saving(args: Any) -> None:
    """
    Raises:
        ValueError: for arguments that contradict each other, or a number that cannot be.
    """
    if args.save_hub_weights == "last" and args.save_only_model:
        raise ValueError(
            "save_hub_weights='last' with save_only_model=True: all checkpoints but the last would be empty; use "
            "save_hub_weights='always'."
        )
    if not isinstance(args.save_on_signal, int | float) or args.save_on_signal < 0:
        raise ValueError(f"save_on_signal={args.save_on_signal!r} must be a number of seconds, at least 0.")
    if args.remote_retry_max_seconds < args.remote_retry_seconds:
        raise ValueError(
            f"remote_retry_max_seconds={args.remote_retry_max_seconds:g} is below remote_retry_seconds="
            f"{args.remote_retry_seconds:g}; the longest pause between attempts cannot be shorter than the first."
        )
