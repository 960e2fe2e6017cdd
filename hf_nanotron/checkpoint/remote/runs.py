"""Which run each checkpoint of a store is of, and which one is at hand there."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from transformers.utils import logging

from ..directory.commit import remove
from ..directory.own_files import set_aside
from ..directory.retention import step_of
from ..directory.runs import RECORD, Run, latest, marked_run, read_record, run_of, writer_of
from ..directory.verify import MARKER, parse_marker
from ..files.disk import StrPath
from .store import Listing, RemoteStore, in_parallel

logger = logging.get_logger(__name__)
WORKERS = 8  # markers at a time
LARGEST_RECORD = 16 << 20  # bytes; each branch takes about a hundred
RECORD_SECONDS = 30.0  # for the record, which the start of a run waits for; uploads write it again


class StoredRuns:
    """The runs in a store. Each marker is read once."""

    def __init__(self, store: RemoteStore) -> None:
        self.store = store
        self._known: dict[str, Run | None] = {}
        self._told = ""

    def of(self, names: Iterable[str]) -> dict[str, Run]:
        """The run of each of these committed checkpoints; without those whose marker is gone or damaged."""
        names = list(names)
        in_parallel([partial(self._read, name) for name in names if name not in self._known], WORKERS)
        return {name: run for name in names if (run := self._known[name]) is not None}

    def _read(self, name: str) -> None:
        data = self.store.marker(name)
        try:
            self._known[name] = (
                None if data is None else run_of(parse_marker(data, f"{self.store.url}/{name}/{MARKER}"))
            )
        except ValueError:
            self._known[name] = None

    def parts(self, names: Iterable[str], run: Run) -> list[str]:
        """Those of `names` that are checkpoints of `run`, in their order."""
        return [name for name, found in self.of(names).items() if run.has(found, step_of(name))]

    def forget(self, names: Iterable[str]) -> None:
        """Read these markers again when they are asked for."""
        for name in names:
            self._known.pop(name, None)

    def note(self, name: str, checkpoint: StrPath) -> None:
        """A local checkpoint has taken the place of what was stored under this name."""
        self._known[name] = marked_run(checkpoint)

    # ---- the record ----

    def write_record(self, output_dir: StrPath) -> None:
        """Say in the store, as in the folder, which run is at hand. Without it, too, all but a warning works."""
        try:
            self.store.put(Path(output_dir, RECORD), RECORD, seconds=RECORD_SECONDS)
        except Exception as error:  # each package has its own
            logger.warning(f"could not write {self.store.url}/{RECORD}: {type(error).__name__}.")

    def record(self) -> tuple[Run | None, str]:
        """The run that the store names as the one at hand, and who writes it: host, process and start, for people."""
        if (data := self.store.read(RECORD, LARGEST_RECORD)) is None:
            return None, ""
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, RECORD).write_bytes(data)
            return read_record(folder), writer_of(folder)

    def at_hand(self) -> tuple[Run | None, Listing]:
        """The run that was started last, of those that are in the store, and what the store lists."""
        record, _ = self.record()
        listed = self.store.checkpoints()
        found = self.committed(listed).values()
        return latest(run for run in (record, *found) if run is not None), listed

    def committed(self, listed: Listing | None = None) -> dict[str, Run | None]:
        """The committed checkpoints, as the store lists them, the highest step first; None for the run of one whose
        marker is damaged."""
        listed = self.store.checkpoints() if listed is None else listed
        names = [name for name, files in listed.items() if MARKER in files]
        return dict.fromkeys(names) | self.of(names)

    def look_for_others(self, run: Run | None, output_dir: StrPath) -> None:
        """Warn, once for each, of a run that writes into the same store and was started after this one. Write the
        record of this one if that could not be done before."""
        if run is None:
            return
        try:
            other, writer = self.record()
        except Exception:  # an outage is told elsewhere
            return
        if (other is None or other.began < run.began) and read_record(output_dir) == run:
            self.write_record(output_dir)
        if other is not None and other.branch not in (run.branch, self._told) and other.began > run.began:
            self._told = other.branch
            logger.warning(
                f"remote_checkpoints={self.store.url!r} is also written by {writer}, which started later: the two runs "
                "overwrite each other's checkpoints. Stop one of them, or give each its own URL."
            )


def make_room(directory: Path, stored: Run) -> None:
    """Before a stored checkpoint is fetched: what is here under its name and of another run is kept under another one,
    what the same run has left behind where it went back goes, and of a link the link.
    """
    here = marked_run(directory)
    if directory.is_symlink() or (here is not None and here.id == stored.id and here.branch != stored.branch):
        remove(directory)
    elif here is not None and here.id != stored.id:
        set_aside(directory, "belongs to another run than the checkpoint that is fetched")
