"""Which checkpoints of a run there are, which one a resume takes, and which ones are deleted.

Only checkpoints of the run at hand (`runs.py`) are resumed from, counted and deleted. What is named `..._together` is
for all ranks of a job, which read each byte of a checkpoint once between them; the rest may be called by any thread.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ...parallel.mesh import ParallelMesh
from ...parallel.together import from_rank_0, together
from ..files.disk import StrPath
from .commit import clean, remove
from .own_files import delete_trace
from .runs import Run, latest, marked_run, read_record
from .verify import check, is_torn, read_marker

logger = logging.get_logger(__name__)
T = TypeVar("T")


def checkpoints(output_dir: StrPath) -> list[Path]:
    """All `checkpoint-N/`, committed or not, the highest step first."""
    found = [
        path
        for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if is_checkpoint_name(path.name) and path.is_dir()
    ]
    return sorted(found, key=lambda path: step_of(path.name), reverse=True)


def is_checkpoint_name(name: str) -> bool:
    """Whether a folder is called `checkpoint-N`."""
    return re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", name) is not None


def step_of(name: str) -> int:
    """The N of `checkpoint-N`."""
    return int(name.rpartition("-")[2])


def newest(output_dir: StrPath, run: Run | None = None) -> list[Path]:
    """The committed ones of `checkpoints`, of all runs or of one."""
    return [path for path, found in marked_runs(output_dir).items() if run is None or _is_part(run, path, found)]


def marked_runs(output_dir: StrPath) -> dict[Path, Run]:
    """The run of each committed checkpoint, the highest step first."""
    found = ((path, marked_run(path)) for path in checkpoints(output_dir))
    return {path: run for path, run in found if run is not None}


def run_at_hand(output_dir: StrPath) -> Run | None:
    """The run that was started last in the folder, whether it has a checkpoint yet or not; None if there is none."""
    return _at_hand(output_dir, marked_runs(output_dir))


def _at_hand(output_dir: StrPath, marked: dict[Path, Run]) -> Run | None:
    return latest(run for run in (read_record(output_dir), *marked.values()) if run is not None)


def is_part(run: Run, path: Path) -> bool:
    """Whether a checkpoint is committed and of `run`."""
    found = marked_run(path)
    return found is not None and re.fullmatch(r".*-\d+", path.name) is not None and _is_part(run, path, found)


def _is_part(run: Run, path: Path, found: Run) -> bool:
    return run.has(found, step_of(path.name))


def candidates(output_dir: StrPath) -> list[Path]:
    """The checkpoints of the run at hand, the highest step first, and those that say nothing of their run."""
    marked = marked_runs(output_dir)
    run = _at_hand(output_dir, marked)
    return [
        path
        for path in checkpoints(output_dir)
        if path not in marked or run is None or _is_part(run, path, marked[path])
    ]


# ---- resume ----


def choose(output_dir: StrPath, verify: Callable[[Path], None] = check) -> Path | None:
    """The newest checkpoint of the run at hand that `verify` accepts, None if there is none. Warns of each one skipped.

    For `resume_from_checkpoint=True`. A directory that the user has named is `check`ed, and its error is theirs.
    """
    return _first(candidates(output_dir), verify, warn=True)


def _first(candidates: Iterable[Path], verify: Callable[[Path], None], warn: bool) -> Path | None:
    for path in candidates:
        try:
            verify(path)
        except ValueError as error:
            if warn:
                logger.warning(f"skipping {path.name}, trying an earlier checkpoint: {error}")
        else:
            return path
    return None


def choose_together(
    mesh: ParallelMesh, output_dir: StrPath, deep: bool = True, needs: Iterable[str] = ()
) -> Path | None:
    """`choose`, by all ranks together, the same on each. What rank 0 sees is what counts, and rank 0 warns.

    The marker has to list the files in `needs`.
    """
    listed = together(mesh, "looking for checkpoints", lambda: candidates(output_dir) if mesh.rank == 0 else [])
    names = from_rank_0(mesh, [path.name for path in listed])
    return _first(
        (Path(output_dir, name) for name in names),
        lambda path: check_together(mesh, path, deep, needs),
        warn=mesh.rank == 0,
    )


def any_together(mesh: ParallelMesh, output_dir: StrPath) -> bool:
    """Whether the run at hand has a committed checkpoint, damaged or not, as rank 0 sees it. All ranks together."""
    listed = together(
        mesh,
        "looking for checkpoints",
        lambda: [path.name for path in candidates(output_dir) if not is_torn(path)] if mesh.rank == 0 else [],
    )
    return bool(from_rank_0(mesh, listed))


def check_together(mesh: ParallelMesh, directory: StrPath, deep: bool = True, needs: Iterable[str] = ()) -> None:
    """`check`, each rank its share of the files. A fault that any rank finds is the same ValueError on every rank."""

    def find_fault() -> str | None:
        try:
            check(directory, deep, (mesh.world.rank, mesh.world.size))
            listed = read_marker(directory)["files"]
            if missing := [name for name in needs if name not in listed]:
                return f"{directory} has no {missing[0]}: it was saved with save_only_model=True, or is forged."
        except ValueError as error:
            return str(error)
        return None

    faults = [together(mesh, f"checking {directory}", find_fault)]
    if mesh.world.size > 1:
        mine, faults = faults[0], [None] * mesh.world.size
        dist.all_gather_object(faults, mine, group=mesh.world.handle)
    if fault := next(filter(None, faults), None):
        raise ValueError(fault)


# ---- deletion ----


def rotate(output_dir: StrPath, limit: int | None, keep: Iterable[StrPath] = (), run: Run | None = None) -> list[Path]:
    """Delete surplus checkpoints, and what interrupted saves and deletions have left. By rank 0, after a commit.

    What is kept, as by Trainer: the last `limit` committed ones (None or 0: all), where the newest and those in `keep`
    count among them and are kept in any case. Also kept is the newest that has all its files, should a newer one have
    lost some. Torn directories older than the newest committed one go; newer ones may be about to be written. What is
    not of `run` (None: the run at hand) does not count and is left alone. Returns the checkpoints that are gone.
    """
    clean(output_dir)
    found, marked = checkpoints(output_dir), marked_runs(output_dir)
    run = run or _at_hand(output_dir, marked)
    committed = [path for path, of_path in marked.items() if run is not None and _is_part(run, path, of_path)]
    if not committed:
        return []
    for path in committed:  # a kill between the marker and the end of `commit`
        if not path.is_symlink():
            delete_trace(path)
    kept = {Path(path).resolve() for path in (committed[0], *keep)}
    older = found[found.index(committed[0]) + 1 :]
    doomed = [path for path in older if is_torn(path) and path.resolve() not in kept]
    if limit is not None and limit > 0:
        kept.update(path.resolve() for path in islice(filter(_has_all_files, committed), 1))
        surplus = [path for path in reversed(committed) if path.resolve() not in kept]
        doomed += surplus[: max(len(committed) - limit, 0)]
    return [path for path in doomed if _removed(path)]


def _removed(path: Path) -> bool:
    try:
        remove(path)
    except OSError as error:  # no reason to end a run
        logger.warning(f"could not delete {path}: {error}")
        return False
    return True


def _has_all_files(path: Path) -> bool:
    try:
        check(path, deep=False)
    except ValueError:
        return False
    return True
