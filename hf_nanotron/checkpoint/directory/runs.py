"""Which run a checkpoint is of, and which one is at hand in a folder or a store.

A run has an id, made by its first `train()` and kept by all that resume it. Each `train()` begins a branch. A marker
names the run, the branch, when the branch began, and the branches before it, each with the last step that counts. So
where a run went back to an earlier checkpoint, what it had written after that is no longer a part of it.

The run at hand is the branch that began last. Its start is in the markers, and in `_run.json` beside them, for a branch
that has no checkpoint yet. Checkpoints from before there were ids are one run, older than all others.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..files.checked import read_checked, write_checked
from ..files.disk import StrPath
from ..files.schema import each, finite, record, row, show, text
from .run_lock import in_words
from .verify import MARKER, read_marker

RECORD = "_run.json"  # pushes leave out what begins with "_"
KEY = "run"  # of the marker, and in the `extra` of a training state
TICK = 1e-3  # seconds between two branches, at least, whatever the clocks of their hosts say
# What a marker or the record says of its run. A float tells a `began` from the next TICK.
RUN = record({"id": text(), "branch": text(), "began": finite(1 << 40), "before": each(row(text(), finite(1 << 63)))})


@dataclass(frozen=True)
class Run:
    """A branch of a run."""

    id: str = ""  # of the run
    branch: str = ""  # of this `train()`
    began: float = 0.0  # when it did, seconds since 1970
    # the branches that it goes on from, the oldest first, each with the last step that counts
    before: tuple[tuple[str, int], ...] = ()

    def has(self, other: Run, step: int) -> bool:
        """Whether a checkpoint of `other` at `step` is a part of this branch."""
        return other.branch == self.branch or any(other.branch == name and step <= last for name, last in self.before)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "before": [list(part) for part in self.before]}

    @classmethod
    def from_dict(cls, value: Any) -> Run:
        if RUN(value) is not None:
            raise ValueError(f"{show(value)} does not name a run.")
        return cls(value["id"], value["branch"], value["began"], tuple((name, last) for name, last in value["before"]))


def run_of(marker: dict[str, Any]) -> Run:
    """The run of a marker; of one from before there were ids, the run that all those are."""
    return Run.from_dict(marker[KEY]) if KEY in marker else Run()


def begin_run(known: Iterable[Run], source: Run | None = None, step: int = 0) -> Run:
    """A new branch, which began after all that are known.

    Args:
        known: the runs in the folder and in the store.
        source: the run of the checkpoint that is resumed; None for a fresh run.
    """
    branch = secrets.token_hex(6)
    began = max([time.time(), *(run.began + TICK for run in known)])
    if source is None:
        return Run(branch, branch, began)
    before = (*(part for part in source.before if part[1] < step), (source.branch, step))
    return Run(source.id or branch, branch, max(began, source.began + TICK), before)


def latest(runs: Iterable[Run]) -> Run | None:
    """The branch that began last, None if there is none."""
    return max(runs, key=lambda run: run.began, default=None)


def marked_run(checkpoint: StrPath) -> Run | None:
    """The run of a local checkpoint, None if it has no valid marker, or one that names no run in our way."""
    try:
        status = os.stat(Path(checkpoint, MARKER))
    except OSError:
        return None
    state = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return _run_of_file(os.path.abspath(checkpoint), state)


@lru_cache(maxsize=1024)
def _run_of_file(checkpoint: str, state: tuple[int, ...]) -> Run | None:
    """Each save asks for all, and to read the marker of a thousand files takes a while."""
    try:
        return run_of(read_marker(checkpoint))
    except ValueError:
        return None


def write_record(output_dir: StrPath, run: Run, writer: dict[str, Any]) -> None:
    """Note in the folder which run is at hand, from now on."""
    write_checked(Path(output_dir, RECORD), {**run.to_dict(), "writer": writer})


def read_record(output_dir: StrPath) -> Run | None:
    """What `write_record` has noted; None without that, or if it cannot be read: markers say nearly as much."""
    try:
        return Run.from_dict(read_checked(Path(output_dir, RECORD)))
    except (OSError, ValueError):
        return None


def writer_of(output_dir: StrPath) -> str:
    """Who has written the record: a text for people."""
    try:
        return in_words(read_checked(Path(output_dir, RECORD)).get("writer"))
    except (OSError, ValueError):
        return in_words(None)
