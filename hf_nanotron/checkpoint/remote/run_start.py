"""What is asked and noted when a run begins to write checkpoints into a folder. All ranks together."""

from __future__ import annotations

import os
from pathlib import Path

from transformers.utils import logging

from ...parallel.mesh import ParallelMesh
from ...parallel.together import refuse_together, together
from ..directory.retention import from_rank_0, marked_runs, step_of
from ..directory.run_lock import RunLock
from ..directory.runs import Run, begin_run, marked_run, read_record
from ..directory.verify import read_marker
from ..files.disk import StrPath
from .runs import StoredRuns
from .store import RemoteStore

logger = logging.get_logger(__name__)
LISTED = 5  # checkpoints in a message


def lock_together(mesh: ParallelMesh, lock: RunLock, output_dir: StrPath) -> None:
    """Take the lock on rank 0. ValueError on every rank, if another process has it, naming it and its start."""
    what = f"locking {os.fspath(output_dir)}"
    holder = together(mesh, what, lambda: lock.acquire(output_dir) if mesh.rank == 0 else None)
    refuse_together(
        mesh,
        holder
        and f"output_dir={os.fspath(output_dir)!r} is in use: {holder}. Use another output_dir, or wait until that run "
        "has ended.",
    )


def start_run(
    mesh: ParallelMesh,
    output_dir: StrPath,
    source: str | None,
    overwrite: bool | None,
    store: RemoteStore | None = None,
    is_noted: bool = True,
    is_own: bool = False,
) -> Run:
    """The run that begins, or goes on, with this `train()`. The same on every rank. Writes nothing.

    `is_noted`: whether the run saves by itself, and so has to agree with what is in the folder. `is_own`: whether the
    source is of the run in `output_dir`, though it is somewhere else. ValueError on every
    rank, if there are checkpoints of other runs and `overwrite` says no.
    """
    found: list[Run] = []

    def begin() -> str | None:
        marked = marked_runs(output_dir)
        stored = StoredRuns(store) if store is not None and is_noted else None
        there = {} if stored is None else stored.store.patiently("looking for runs", stored.committed)
        records = [read_record(output_dir), _stored_record(stored), *there.values()]
        known = [*marked.values(), *(run for run in records if run is not None)]
        before = None if source is None else marked_run(source) or Run()
        step = 0 if source is None else read_marker(source)["step"]
        run = begin_run(known, before, step)
        found.append(run)
        others = {path.name: of for path, of in marked.items() if not run.has(of, step_of(path.name))}
        if not is_noted:
            return None
        places: dict[str, list[str]] = {}
        if source is not None and (is_own or _is_in(source, output_dir)):
            _tell_of_later(output_dir, run, others, step)
        else:
            places[f"output_dir={os.fspath(output_dir)!r}"] = list(others)
        if stored is not None:
            names = _of_others(there, run) if source is not None else list(there)
            places[f"remote_checkpoints={stored.store.url!r}"] = names
        for place, names in places.items():
            if names and (refusal := _judge(place, names, source is None, overwrite)):
                return refusal
        return None

    what = f"looking for other runs in {os.fspath(output_dir)}"
    refuse_together(mesh, together(mesh, what, lambda: begin() if mesh.rank == 0 else None))
    return Run.from_dict(from_rank_0(mesh, found[0].to_dict() if found else None))


def _stored_record(stored: StoredRuns | None) -> Run | None:
    return None if stored is None else stored.store.patiently("looking for runs", stored.record)[0]


def _of_others(there: dict[str, Run | None], run: Run) -> list[str]:
    """The checkpoints in the store that are of another run than the one that goes on. One without an id may be what
    this run has left behind where it went back."""
    found = ((name, of) for name, of in there.items() if of is not None)
    return [name for name, of in found if of.id not in (run.id, "") and not run.has(of, step_of(name))]


def _judge(place: str, names: list[str], is_fresh: bool, overwrite: bool | None) -> str | None:
    """Warn of checkpoints of other runs, or return why the run is refused."""
    has = f"{place} contains checkpoints of another run ({_listed(names)}), and this run "
    has += "starts from scratch" if is_fresh else "resumes from a checkpoint that is not there"
    if overwrite is False:
        return (
            f"{has}, which overwrite_output_dir=False refuses. Use another folder, resume with "
            "resume_from_checkpoint=True, or set overwrite_output_dir=True."
        )
    if overwrite is None:
        logger.warning(
            f"{has}. resume_from_checkpoint=True does not resume them, and save_total_limit neither counts nor deletes "
            "them; saving the same step overwrites one. Set overwrite_output_dir=False to refuse this, True to silence "
            "this warning."
        )
    return None


def _tell_of_later(output_dir: StrPath, run: Run, others: dict[str, Run], step: int) -> None:
    """Of checkpoints that the run leaves behind where it goes back."""
    names = [name for name, of in others.items() if of.id == run.id or not of.id]
    if names:
        logger.warning(
            f"The run resumes from step {step}: {_listed(names)} in {os.fspath(output_dir)} no longer belong to it. "
            "resume_from_checkpoint=True does not resume them, and save_total_limit neither counts nor deletes them; "
            "saving the same step overwrites one."
        )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")


def _is_in(source: str, output_dir: StrPath) -> bool:
    parent = Path(os.path.abspath(source)).parent
    return os.path.realpath(parent) == os.path.realpath(output_dir)
