"""Which checkpoints of a run there are, which one a resume takes, and which ones are deleted.

`checkpoints`, `newest`, `choose` and `rotate` look at files only, so any thread or process may call them. What is named
`..._together` is for all ranks of a job, which read each byte of a checkpoint once between them.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path

import torch.distributed as dist
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..parallel.mesh import ParallelMesh
from .commit import REMOVED, remove
from .training_state import together
from .verify import WRITTEN, StrPath, check, is_committed, is_torn

logger = logging.get_logger(__name__)


def checkpoints(output_dir: StrPath) -> list[Path]:
    """All `checkpoint-N/`, committed or not, the highest step first."""
    found = {}
    for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        match = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)
        if match is not None and path.is_dir():
            found[path] = int(match[1])
    return sorted(found, key=lambda path: -found[path])


def newest(output_dir: StrPath) -> list[Path]:
    """The committed ones of `checkpoints`."""
    return [path for path in checkpoints(output_dir) if is_committed(path)]


# ---- resume ----


def choose(output_dir: StrPath, verify: Callable[[Path], None] = check) -> Path | None:
    """The newest checkpoint that `verify` accepts, None if there is none. Warns of each one passed over, and why.

    For `resume_from_checkpoint=True`. A directory that the user has named is `check`ed, and its error is theirs.

    Args:
        verify: raises ValueError for a checkpoint that cannot be used, as `check` does.
    """
    return _first(checkpoints(output_dir), verify, warn=True)


def _first(candidates: Iterable[Path], verify: Callable[[Path], None], warn: bool) -> Path | None:
    for path in candidates:
        try:
            verify(path)
        except ValueError as error:
            if warn:
                logger.warning(f"{path.name} is passed over, and an earlier checkpoint is looked for: {error}")
        else:
            return path
    return None


def choose_together(mesh: ParallelMesh, output_dir: StrPath, deep: bool = True) -> Path | None:
    """`choose`, by all ranks together, the same on each. What rank 0 sees is what counts, and rank 0 warns.

    Raises:
        RuntimeError: if looking failed on another rank for a reason other than the checkpoints.
    """
    listed = together(mesh, "looking for checkpoints", lambda: checkpoints(output_dir) if mesh.rank == 0 else [])
    names = [[path.name for path in listed]]
    if mesh.world.handle is not None:
        dist.broadcast_object_list(names, src=mesh.world.ranks[0], group=mesh.world.handle)
    candidates = [Path(output_dir, name) for name in names[0]]
    return _first(candidates, lambda path: check_together(mesh, path, deep), warn=mesh.rank == 0)


def check_together(mesh: ParallelMesh, directory: StrPath, deep: bool = True) -> None:
    """`check`, each rank its share of the files.

    Raises:
        ValueError: on every rank the same, if any rank has found a fault.
        RuntimeError: if checking failed on another rank for another reason.
    """

    def find_fault() -> str | None:
        try:
            check(directory, deep, (mesh.world.rank, mesh.world.size))
        except ValueError as error:
            return str(error)
        return None

    faults = [together(mesh, f"checking {directory}", find_fault)]
    if mesh.world.handle is not None:
        mine, faults = faults[0], [None] * mesh.world.size
        dist.all_gather_object(faults, mine, group=mesh.world.handle)
    if fault := next(filter(None, faults), None):
        raise ValueError(fault)


# ---- deletion ----


def rotate(output_dir: StrPath, limit: int | None, keep: Iterable[StrPath] = ()) -> list[Path]:
    """Delete surplus checkpoints, and what interrupted saves and deletions have left. By rank 0, after a commit.

    What is kept, as by Trainer: the last `limit` committed ones, where the newest and those in `keep` count among them
    and are kept in any case. Also kept is the newest that has all its files, should a newer one have lost some.
    Torn directories older than the newest committed one go; newer ones may be about to be written. Checkpoints of
    other programs do not count and are left alone.

    Args:
        limit: `save_total_limit`; None or 0: no committed checkpoint is deleted.
        keep: the best checkpoint, the one just written, any being uploaded.

    Returns:
        the checkpoints that are gone.
    """
    for path in Path(output_dir).glob(f"{REMOVED}{PREFIX_CHECKPOINT_DIR}-*"):
        shutil.rmtree(path, ignore_errors=True)
    found = checkpoints(output_dir)
    committed = [path for path in found if is_committed(path)]
    if not committed:
        return []
    for path in committed:  # a kill between the marker and the end of `commit`
        shutil.rmtree(path / WRITTEN, ignore_errors=True)
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
        logger.warning(f"{path} could not be deleted: {error}")
        return False
    return True


def _has_all_files(path: Path) -> bool:
    try:
        check(path, deep=False)
    except ValueError:
        return False
    return True
