"""Resume from a store: the newest committed remote checkpoint comes into the output directory.

An interrupted download has no marker, so it is not taken for a checkpoint; the next one fetches only what is missing.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ...parallel.mesh import ParallelMesh
from ...parallel.node import rank_on_node
from ...parallel.together import together, together_for_long
from ..directory.retention import newest, run_at_hand, step_of
from ..directory.runs import Run, latest, run_of, write_record
from ..directory.verify import (
    MARKER,
    STATE_INDEX,
    WRITTEN,
    check,
    check_blocks,
    check_sum,
    is_marked,
    is_torn,
    parse_marker,
    read_state_index,
)
from ..files.disk import StrPath, durable_file, size_of, sync
from ..files.inside import find_clash, find_fault, inside
from ..state.index import StateIndex
from ..state.progress import check_progress
from .errors import StoreError
from .runs import StoredRuns, make_room
from .store import Listing, RemoteStore, in_parallel

logger = logging.get_logger(__name__)
WORKERS = 4  # files at a time


@dataclass(frozen=True)
class _Stored:
    """A committed checkpoint in the store, of which all files are there."""

    name: str
    url: str  # for messages
    data: bytes  # the bytes of its marker
    step: int  # optimizer steps
    files: dict[str, dict[str, Any]]  # name -> `bytes` and `crc32`
    run: Run  # whose it is

    def is_of(self, run: Run | None) -> bool:
        """Whether it is a part of `run`; of any if that is None."""
        return run is None or run.has(self.run, step_of(self.name))


def newest_remote(store: RemoteStore, run: Run | None = None) -> str | None:
    """The name of the newest committed checkpoint in the store, None if there is none. Damaged ones are skipped.

    Of `run`; None for the run that was started last, of those in the store.
    """
    at_hand, listed = store.patiently("looking for runs", StoredRuns(store).at_hand)
    found = next(_committed(store, listed, run or at_hand), None)
    return None if found is None else found.name


def _committed(store: RemoteStore, listed: Listing, run: Run | None) -> Iterator[_Stored]:
    """The committed checkpoints of a run (None: of any), the newest first; damaged ones are skipped."""
    for name, files in listed.items():
        try:
            found = _find(store, name, files)
        except StoreError:
            raise  # an outage is no reason to begin at an earlier one
        except ValueError as error:
            _warn_skipped(store, name, error)
        else:
            if found is not None and found.is_of(run):
                yield found


def _warn_skipped(store: RemoteStore, name: str, error: ValueError) -> None:
    logger.warning(f"skipping {store.url}/{name}, trying an earlier checkpoint: {error}")


def _find(store: RemoteStore, name: str, there: dict[str, int]) -> _Stored | None:
    """A checkpoint by its marker, None if it has none.

    A file that the listing lacks, or has with another length, is asked for itself: a listing may lag behind.
    """
    where = f"{store.url}/{name}"
    for file in there:
        if (fault := find_fault(file)) is not None:
            raise ValueError(f"{where} contains an object {file!r}, whose name {fault}; delete it there.")
    if (clash := find_clash(there)) is not None:
        raise ValueError(f"{where} contains {clash!r} as a file and as a folder; delete the wrong one.")
    data = store.patiently("reading a marker", partial(store.marker, name))
    if data is None:
        return None
    marker = parse_marker(data, f"{where}/{MARKER}")
    for file, entry in marker["files"].items():
        if there.get(file) == entry["bytes"]:
            continue
        size = store.patiently("looking for a file", partial(store.size, f"{name}/{file}"))
        if size != entry["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes"
            raise ValueError(f"{where}/{file} {found}; its marker lists {entry['bytes']} bytes.")
    return _Stored(name, where, data, marker["step"], marker["files"], run_of(marker))


def fetch(store: RemoteStore, name: str, output_dir: StrPath, workers: int = WORKERS) -> Path:
    """Download a committed checkpoint: what its marker lists, but for the files that are here already, and no more.

    By one process for each directory. Every file is compared with its checksum before it gets its name.
    """
    there = store.patiently("listing", store.checkpoints).get(name, {})
    found, directory = _find(store, name, there), Path(output_dir, name)
    if found is None:
        raise ValueError(f"{store.url}/{name} is not committed.")
    _clear_place(found, directory)
    return _download(store, found, directory, workers)


def _download(store: RemoteStore, found: _Stored, directory: Path, workers: int = WORKERS) -> Path:
    """As `fetch`, to where `_clear_place` has nothing against it."""
    files = found.files
    if (directory / MARKER).is_dir():
        raise ValueError(f"{directory / MARKER} is a directory; remove it.")
    parts = directory / WRITTEN
    if parts.exists() or not is_marked(directory, found.data):
        # In this order: at no time is a directory without marker taken for one of another program.
        parts.mkdir(parents=True, exist_ok=True)
        (parts / MARKER).unlink(missing_ok=True)  # a link would be written through
        (parts / MARKER).write_bytes(found.data)  # so that what of it is here is known as the checkpoint's own
        (directory / MARKER).unlink(missing_ok=True)
    # First what is checked as a whole: the progress of the run, and the index, which has the checksums of other files.
    early = [file for file in (TRAINER_STATE_NAME, STATE_INDEX) if file in files]
    _complete(store, found, directory, early, None, workers)
    if TRAINER_STATE_NAME in files:
        check_progress(directory, found.step)
    index = read_state_index(directory, files) if STATE_INDEX in files else None
    _complete(store, found, directory, list(files), index, workers)
    if not is_marked(directory, found.data):
        sync(directory)
        parts.mkdir(exist_ok=True)
        with durable_file(parts / MARKER) as file:
            file.write(found.data)
        os.replace(parts / MARKER, directory / MARKER)
        sync(directory)
    shutil.rmtree(parts, ignore_errors=True)
    return directory


def _clear_place(found: _Stored, directory: Path) -> None:
    """Move away what has the checkpoint's name here and is of another run; of a link, the link goes."""
    make_room(directory, found.run)
    if directory.exists() and not (directory / MARKER).exists() and not is_torn(directory):
        raise ValueError(f"{directory} is not a checkpoint of this program; move it away to fetch {found.url}.")
    for file in (*found.files, f"{WRITTEN}/part"):
        path = inside(directory, file, found.url)
        for folder in path.relative_to(directory).parents:
            if (directory / folder).is_symlink():
                raise ValueError(f"{directory / folder} is a symbolic link; remove it to fetch {found.url}.")


def _complete(
    store: RemoteStore, found: _Stored, directory: Path, names: list[str], index: StateIndex | None, workers: int
) -> None:
    """Download those files of these `names` that are not here, large ones first."""
    files = found.files
    wanted = [file for file in names if not _is_here(directory, file, files[file], index)]
    if wanted:
        (directory / WRITTEN).mkdir(exist_ok=True)
        (directory / MARKER).unlink(missing_ok=True)
    wanted.sort(key=lambda file: -files[file]["bytes"])
    gets = [partial(_get, store, found, file, directory, index) for file in wanted]
    in_parallel(gets, min(workers, store.transfers or workers))


def _is_here(directory: Path, file: str, entry: dict[str, Any], index: StateIndex | None) -> bool:
    """Whether a local file has the length and the checksum that the remote marker names."""
    path = directory / file
    try:
        if size_of(path) != entry["bytes"]:
            return False
        _check_content(path, path.name, entry, index)
    except (ValueError, OSError):
        return False
    return True


def _check_content(path: Path, name: str, entry: dict[str, Any], index: StateIndex | None) -> None:
    """Compare a file with its checksum, or with those that the index of the training state has for `name`."""
    check_sum(path, entry["crc32"])
    if entry["crc32"] is None and index is not None:
        check_blocks(path, index, name)


def _get(store: RemoteStore, found: _Stored, file: str, directory: Path, index: StateIndex | None) -> None:
    """Download under another name, and give the file its own when it is complete."""
    path, entry, remote = directory / file, found.files[file], f"{found.name}/{file}"

    def download() -> Path:
        part = directory / WRITTEN / uuid.uuid4().hex  # another one each time: an attempt may go on after it timed out
        store.get(remote, part)
        if (came := size_of(part)) != entry["bytes"]:
            part.unlink(missing_ok=True)
            raise OSError(f"received {came or 0} of {entry['bytes']} bytes")
        return part

    try:
        part = store.patiently(f"downloading {remote}", download)
    except StoreError as error:
        raise RuntimeError(str(error)) from error
    try:
        _check_content(part, path.name, entry, index)
    except ValueError as error:
        raise ValueError(f"{found.url}/{file}: {str(error).replace(str(part), 'the downloaded file')}") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    sync(part)
    os.replace(part, path)


def fetch_newest(store: RemoteStore, output_dir: StrPath) -> Path | None:
    """Bring the newest remote checkpoint here, unless a complete local one is as new; and the best one so far."""
    stored, listed = store.patiently("looking for runs", StoredRuns(store).at_hand)
    run = latest(found for found in (run_at_hand(output_dir), stored) if found is not None)
    fetched = _fetch_newest_of(store, listed, output_dir, run)
    _fetch_best(store, listed, output_dir, run)
    if run is not None and run_at_hand(output_dir) != run:  # it has no checkpoint; the resume goes by what is here
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        write_record(output_dir, run, {"url": store.url})
    return fetched


def _fetch_newest_of(store: RemoteStore, listed: Listing, output_dir: StrPath, run: Run | None) -> Path | None:
    """As `fetch_newest`, for one run."""
    for found in _committed(store, listed, run):
        if _is_as_new(output_dir, step_of(found.name), run):
            return None
        directory = Path(output_dir, found.name)
        _clear_place(found, directory)
        try:
            return _download(store, found, directory)
        except ValueError as error:
            _warn_skipped(store, found.name, error)
    return None


def _fetch_best(store: RemoteStore, listed: Listing, output_dir: StrPath, run: Run | None) -> None:
    """Bring the best checkpoint, too, if the newest one here names it and the store has it: without it here, it would
    be forgotten, and deleted as surplus."""
    here = next(iter(newest(output_dir, run)), None)
    try:
        state = json.loads((here / TRAINER_STATE_NAME).read_bytes()) if here is not None else {}
        step = state["best_global_step"] if state["best_model_checkpoint"] else None
    except (OSError, ValueError, KeyError, TypeError):  # a resume says what is wrong
        return
    name = f"{PREFIX_CHECKPOINT_DIR}-{step}"
    directory = Path(output_dir, name)
    if type(step) is not int or step < 1 or directory.exists() and not is_torn(directory):
        return
    try:
        found = _find(store, name, listed.get(name, {}))
        if found is not None and found.is_of(run):
            _clear_place(found, directory)
            _download(store, found, directory)
    except StoreError:
        raise
    except ValueError as error:
        logger.warning(f"could not fetch the best checkpoint so far, {store.url}/{name}: {error}")


def _is_as_new(output_dir: StrPath, step: int, run: Run | None) -> bool:
    """Whether a complete local checkpoint is of `step` or later."""
    for path in newest(output_dir, run):
        if step_of(path.name) < step:
            break
        try:
            check(path, deep=False)
        except ValueError:
            continue
        return True
    return False


def fetch_newest_together(mesh: ParallelMesh, store: RemoteStore, output_dir: StrPath) -> None:
    """`fetch_newest`, once for each file system: by rank 0, and by the first rank of each node that does not see rank
    0's directory. All ranks together: where one fails, the others raise RuntimeError.
    """
    what, seen = f"fetching a checkpoint from {store.url}", Path(output_dir, ".rank-0-was-here")

    def leave_trace() -> None:
        if mesh.rank == 0:
            seen.parent.mkdir(parents=True, exist_ok=True)
            seen.unlink(missing_ok=True)  # a link would make a file elsewhere
            seen.touch()

    together(mesh, what, leave_trace)
    fetches = mesh.rank == 0 or (rank_on_node() == 0 and not seen.exists())
    together(mesh, what, lambda: None)
    if mesh.rank == 0:
        seen.unlink(missing_ok=True)
    together_for_long(mesh, what, partial(fetch_newest, store, output_dir) if fetches else lambda: None)
