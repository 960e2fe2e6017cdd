"""What the training arguments say about snapshots in the memory of hosts."""

from __future__ import annotations

import os
from typing import Any, Protocol

SHARED_MEMORY = "/dev/shm"


class SnapshotArguments(Protocol):
    """What is read of the training arguments here."""

    memory_snapshot_dir: str
    memory_snapshot_steps: int | None
    save_strategy: Any
    save_only_model: bool


def check_snapshots(args: SnapshotArguments) -> None:
    """
    Raises:
        ValueError: for an interval that is no number of steps, or a run that has no checkpoint to fall back on.
    """
    steps = args.memory_snapshot_steps
    if steps is None:
        if os.fspath(args.memory_snapshot_dir) != SHARED_MEMORY:
            raise ValueError(
                f"memory_snapshot_dir={args.memory_snapshot_dir!r} needs memory_snapshot_steps, such as "
                "memory_snapshot_steps=20."
            )
        return
    if steps < 1:
        raise ValueError(
            f"memory_snapshot_steps={steps} must be at least 1, the optimizer steps from one snapshot to the next; "
            "leave it out for none."
        )
    if not str(args.memory_snapshot_dir):
        raise ValueError(f"memory_snapshot_dir={args.memory_snapshot_dir!r} is empty; use {SHARED_MEMORY}.")
    if str(getattr(args.save_strategy, "value", args.save_strategy)) == "no":
        raise ValueError(
            f"memory_snapshot_steps={steps} with save_strategy='no': snapshots are lost with their hosts, and a run "
            "goes on from its last checkpoint then; use save_strategy='steps', or leave memory_snapshot_steps out."
        )
    if args.save_only_model:
        raise ValueError(
            f"memory_snapshot_steps={steps} with save_only_model=True: snapshots are lost with their hosts, and a run "
            "cannot go on from such checkpoints then; leave one of the two out."
        )
