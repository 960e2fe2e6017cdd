"""Resume from a store: the newest committed remote checkpoint comes into the output directory.

Everything after that is a resume from a local checkpoint, with all its checks. A download that was interrupted has no
marker, so it is not taken for a checkpoint, and the next one fetches only what is missing.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
import uuid
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from transformers.utils import logging

from ..parallel.collectives import all_reduce
from ..parallel.mesh import ParallelMesh
from .manager import newest, run_at_hand
from .remote import RemoteStore, in_parallel, parse_marker, reason, step_of
from .remote_runs import StoredRuns, make_room
from .runs import Run, latest, run_of, write_record
from .state_file import read_checked
from .training_state import together
from .verify import MARKER, STATE_INDEX, WRITTEN, StrPath, check, check_blocks, checksum_of, is_torn

logger = logging.get_logger(__name__)
WORKERS = 4  # files at a time
LOOK_SECONDS = 0.5  # between two looks whether all downloads are done


def newest_remote(store: RemoteStore, run: Run | None = None) -> str | None:
    """The name of the newest committed checkpoint in the store, None if there is none. Damaged ones are passed over.

    Args:
        run: whose; None for the run that was started last, of those in the store.

    Raises:
        ValueError: if the store cannot be listed, naming it and the reason.
    """
    run = run or StoredRuns(store).at_hand()
    for name, files in store.checkpoints().items():
        if MARKER not in files:
            continue
        try:
            marker = parse_marker(store.marker(name) or b"")
            if run is not None and not run.has(run_of(marker), step_of(name)):
                continue
            _check_remote_sizes(store, name, marker, files)
        except ValueError as error:
            logger.warning(f"{store.url}/{name} is passed over, and an earlier checkpoint is looked for: {error}")
        else:
            return name
    return None


def _check_remote_sizes(store: RemoteStore, name: str, marker: dict[str, Any], files: dict[str, int]) -> None:
    for file, entry in marker["files"].items():
        if files.get(file) != entry["bytes"]:
            raise ValueError(f"{store.url}/{name}/{file} has {files.get(file, 'no')} bytes, not {entry['bytes']}.")


def fetch(store: RemoteStore, name: str, output_dir: StrPath, workers: int = WORKERS) -> Path:
    """Download a committed checkpoint, but for the files that are here already. By one process for each directory.

    Returns:
        the local checkpoint, committed.

    Raises:
        ValueError: if the remote one is not complete, or another program's directory is in its place.
        RuntimeError: if a file cannot be fetched, naming its URL and the reason.
    """
    data, there = store.marker(name), store.checkpoints().get(name, {})
    if data is None:
        raise ValueError(f"{store.url}/{name} is not committed.")
    marker = parse_marker(data)
    files = marker["files"]
    _check_remote_sizes(store, name, marker, there)
    directory = Path(output_dir, name)
    make_room(directory, marker)
    if directory.exists() and not (directory / MARKER).exists() and not is_torn(directory):
        raise ValueError(f"{directory} is not a checkpoint of this program; move it away to fetch {store.url}/{name}.")
    parts = directory / WRITTEN
    if parts.exists() or not _is_marked(directory, data):
        # In this order: at no time is a directory without marker taken for one of another program.
        parts.mkdir(parents=True, exist_ok=True)
        (parts / MARKER).write_bytes(data)  # so that what of it is here is known as the checkpoint's own
        (directory / MARKER).unlink(missing_ok=True)
    if STATE_INDEX in files and not _is_here(directory, STATE_INDEX, files[STATE_INDEX]):
        # First, because it has the checksums of other files.
        parts.mkdir(exist_ok=True)
        (directory / MARKER).unlink(missing_ok=True)
        _get(store, name, STATE_INDEX, directory, there[STATE_INDEX])
    wanted = [file for file in files if not _is_here(directory, file, files[file])]
    if wanted:
        parts.mkdir(exist_ok=True)
        (directory / MARKER).unlink(missing_ok=True)
    wanted += [file for file in there if file not in (*files, MARKER) and not (directory / file).exists()]
    wanted.sort(key=lambda file: -there[file])
    in_parallel([partial(_get, store, name, file, directory, there[file]) for file in wanted], workers)
    if not _is_marked(directory, data):
        _sync(directory)
        _write(directory / MARKER, data, parts)
        _sync(directory)
    shutil.rmtree(parts, ignore_errors=True)
    return directory


def _is_marked(directory: Path, data: bytes) -> bool:
    path = directory / MARKER
    return path.is_file() and path.read_bytes() == data


def _is_here(directory: Path, file: str, entry: dict[str, Any]) -> bool:
    """Whether a local file has the length and the checksum that the remote marker names."""
    path = directory / file
    if not path.is_file() or path.stat().st_size != entry["bytes"]:
        return False
    if entry["crc32"] is not None:
        return checksum_of(path) == entry["crc32"]
    try:  # the checksums of the training state are in its index
        check_blocks(path, read_checked(directory / STATE_INDEX))
    except (ValueError, OSError):
        return False
    return True


def _get(store: RemoteStore, name: str, file: str, directory: Path, size: int) -> None:
    """Download under another name, and give the file its own when it is complete."""
    part, path = directory / WRITTEN / uuid.uuid4().hex, directory / file
    try:
        store.get(f"{name}/{file}", part)
    except Exception as error:  # each package has its own
        raise RuntimeError(f"fetching {store.url}/{name}/{file} failed: {reason(error)}") from error
    if part.stat().st_size != size:
        raise RuntimeError(f"fetching {store.url}/{name}/{file} failed: {part.stat().st_size} of {size} bytes came.")
    path.parent.mkdir(parents=True, exist_ok=True)
    _sync(part)
    os.replace(part, path)


def _write(path: Path, data: bytes, scratch: Path) -> None:
    scratch.mkdir(exist_ok=True)
    temporary = scratch / path.name
    temporary.write_bytes(data)
    _sync(temporary)
    os.replace(temporary, path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fetch_newest(store: RemoteStore, output_dir: StrPath) -> Path | None:
    """Bring the newest remote checkpoint here, unless a complete local one is as new.

    Returns:
        what was fetched, None if there was nothing to fetch.

    Raises:
        ValueError, RuntimeError: as `newest_remote` and `fetch`.
    """
    runs = (run_at_hand(output_dir), StoredRuns(store).at_hand())
    run = latest(found for found in runs if found is not None)
    name = newest_remote(store, run)
    is_here = name is None or _is_as_new(output_dir, step_of(name), run)
    fetched = None if is_here else fetch(store, cast(str, name), output_dir)
    if run is not None and run_at_hand(output_dir) != run:  # it has no checkpoint; the resume goes by what is here
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        write_record(output_dir, run, {"url": store.url})
    return fetched


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
    """`fetch_newest`, once for each file system: by rank 0, and by the first rank of each node that does not see
    rank 0's directory. All ranks together.

    Raises:
        ValueError, RuntimeError: as `fetch_newest`, on the rank concerned; RuntimeError on the others.
    """
    what, seen = f"fetching a checkpoint from {store.url}", Path(output_dir, ".rank-0-was-here")

    def leave_trace() -> None:
        if mesh.rank == 0:
            seen.parent.mkdir(parents=True, exist_ok=True)
            seen.touch()

    together(mesh, what, leave_trace)
    is_first = PartialState().local_process_index == 0
    fetches = mesh.rank == 0 or (is_first and not seen.exists())
    together(mesh, what, lambda: None)
    if mesh.rank == 0:
        seen.unlink(missing_ok=True)
    errors: list[Exception] = []

    def download() -> None:
        try:
            fetch_newest(store, output_dir)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=download, name="checkpoint-fetch", daemon=True)
    if fetches:
        thread.start()
    # Looks again and again, because one collective would wait no longer than the process group's timeout.
    while int(all_reduce(torch.tensor(float(thread.is_alive()), device=mesh.device), mesh.world)):
        time.sleep(LOOK_SECONDS)

    def result() -> None:
        if errors:
            raise errors[0]

    together(mesh, what, result)
