"""Which checkpoint `resume_from_checkpoint` names."""

from __future__ import annotations

import os
from pathlib import Path

AUTO = "auto"  # as `resume_from_checkpoint`; `auto:PATH` for a run that begins at a checkpoint of another one


def named_beginning(named: str | bool | None, output_dir: str | os.PathLike[str]) -> str | None:
    """The checkpoint at which a run begins that goes on from its own ones later: of `auto:PATH`, or a path alone.

    Raises:
        ValueError: for one in the folder of the run: what comes after it there is of another run, or of this one.
    """
    if not isinstance(named, str | os.PathLike) or (text := os.fspath(named)) in (AUTO, ""):
        return None
    begins_at = text.removeprefix(f"{AUTO}:")
    if text != begins_at and not begins_at:
        raise ValueError("resume_from_checkpoint='auto:' needs a path after the colon, or 'auto' alone.")
    if text != begins_at and os.path.realpath(Path(begins_at).parent) == os.path.realpath(output_dir):
        raise ValueError(
            f"resume_from_checkpoint={text!r}: the checkpoint is in output_dir={os.fspath(output_dir)!r} itself, so "
            "later ones there would be taken in its place; give the run that begins at it an output_dir of its own."
        )
    return begins_at


def is_auto(named: str | bool | None) -> bool:
    """Whether a run goes on from its own newest checkpoint if it has one."""
    return named == AUTO or str(named).startswith(f"{AUTO}:")
