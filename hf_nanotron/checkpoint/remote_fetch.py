"""Resume from a store: the newest committed remote checkpoint comes into the output directory.

Everything after that is a resume from a local checkpoint, with all its checks. A download that was interrupted has no
marker, so it is not taken for a checkpoint, and the next one fetches only what is missing.
"""

from __future__ import annotations

import os
import shutil
import uuid
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers.utils import logging

from ..parallel.mesh import ParallelMesh
from .long_action import together_for_long
from .manager import newest
from .remote import RemoteStore, in_parallel, parse_marker, step_of
from .remote_errors import StoreError
from .state_file import read_checked
from .training_state import together
from .verify import MARKER, STATE_INDEX, WRITTEN, StrPath, check, check_blocks, checksum_of, is_torn

logger = logging.get_logger(__name__)
WORKERS = 4  # files at a time


def newest_remote(store: RemoteStore) -> str | None:
    """The name of the newest committed checkpoint in the store, None if there is none. Damaged ones are passed over.

    Raises:
        ValueError: if the store cannot be listed, naming it and the reason.
    """
    for name, files in store.patiently("listing", store.checkpoints).items():
        data = store.patiently("reading a marker", partial(store.marker, name))
        if data is None:
            continue
        try:
            marker = parse_marker(data)
            _check_remote_sizes(store, name, marker, files)
        except StoreError:
            raise  # an outage is no reason to begin at an earlier one
        except ValueError as error:
            logger.warning(f"{store.url}/{name} is passed over, and an earlier checkpoint is looked for: {error}")
        else:
            return name
    return None


def _check_remote_sizes(store: RemoteStore, name: str, marker: dict[str, Any], files: dict[str, int]) -> None:
    """Asks for the files themselves where the listing has none, or others: it may lag behind."""
    for file, entry in marker["files"].items():
        if files.get(file) == entry["bytes"]:
            continue
        size = store.patiently("looking for a file", partial(store.size, f"{name}/{file}"))
        if size != entry["bytes"]:
            found = "no" if size is None else size
            raise ValueError(f"{store.url}/{name}/{file} has {found} bytes, not {entry['bytes']}.")


def fetch(store: RemoteStore, name: str, output_dir: StrPath, workers: int = WORKERS) -> Path:
    """Download a committed checkpoint, but for the files that are here already. By one process for each directory.

    Returns:
        the local checkpoint, committed.

    Raises:
        ValueError: if the remote one is not complete, or another program's directory is in its place.
        RuntimeError: if a file cannot be fetched, naming its URL and the reason.
    """
    data = store.patiently("reading a marker", partial(store.marker, name))
    there = store.patiently("listing", store.checkpoints).get(name, {})
    if data is None:
        raise ValueError(f"{store.url}/{name} is not committed.")
    files = parse_marker(data)["files"]
    _check_remote_sizes(store, name, {"files": files}, there)
    directory = Path(output_dir, name)
    if directory.exists() and not (directory / MARKER).exists() and not is_torn(directory):
        raise ValueError(f"{directory} is not a checkpoint of this program; move it away to fetch {store.url}/{name}.")
    parts = directory / WRITTEN
    if parts.exists() or not _is_marked(directory, data):
        # In this order: at no time is a directory without marker taken for one of another program.
        parts.mkdir(parents=True, exist_ok=True)
        (directory / MARKER).unlink(missing_ok=True)
    if STATE_INDEX in files and not _is_here(directory, STATE_INDEX, files[STATE_INDEX]):
        # First, because it has the checksums of other files.
        parts.mkdir(exist_ok=True)
        (directory / MARKER).unlink(missing_ok=True)
        _get(store, name, STATE_INDEX, directory, files[STATE_INDEX]["bytes"])
    wanted = [file for file in files if not _is_here(directory, file, files[file])]
    if wanted:
        parts.mkdir(exist_ok=True)
        (directory / MARKER).unlink(missing_ok=True)
    wanted += [file for file in there if file not in (*files, MARKER) and not (directory / file).exists()]
    sizes = {**there, **{file: entry["bytes"] for file, entry in files.items()}}
    wanted.sort(key=lambda file: -sizes[file])
    gets = [partial(_get, store, name, file, directory, sizes[file]) for file in wanted]
    in_parallel(gets, min(workers, store.transfers or workers))
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
    path = directory / file

    def download() -> Path:
        part = directory / WRITTEN / uuid.uuid4().hex  # another one each time: an attempt may go on after it timed out
        store.get(f"{name}/{file}", part)
        if (came := part.stat().st_size) != size:
            part.unlink()
            raise OSError(f"{came} of {size} bytes came")
        return part

    try:
        part = store.patiently(f"downloading {name}/{file}", download)
    except StoreError as error:
        raise RuntimeError(str(error)) from error
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
    name = newest_remote(store)
    if name is None:
        return None
    for path in newest(output_dir):
        if step_of(path.name) < step_of(name):
            break
        try:
            check(path, deep=False)
        except ValueError:
            continue
        return None
    return fetch(store, name, output_dir)


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
    together_for_long(mesh, what, partial(fetch_newest, store, output_dir) if fetches else lambda: None)
