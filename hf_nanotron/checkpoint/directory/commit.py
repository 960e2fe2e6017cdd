"""When a checkpoint is complete: its files, and the marker that is written last.

All ranks write `checkpoint-N/` in place, now or in a background thread, and communicate through files alone:

1. `begin`, by rank 0 before any rank writes;
2. every rank writes its files, then `describe`s the large ones while they are in its page cache (or says `fail`);
3. `commit`, by rank 0: waits for all descriptions, describes what is left, and writes `committed.json`.

The marker lists each file with its length and crc32. `training_state/rank-*.safetensors` have none there: the state's
index, which the marker covers, has one for each of their blocks. Not listed: `README.md`, hidden files, links out of
the checkpoint, what was there before the save, what appears later. `.written/` is there while a checkpoint is written.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import time
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..files.checked import read_checked, write_checked
from ..files.disk import StrPath, check_length, checksum_of, sync
from ..files.inside import inside, is_inside
from ..files.schema import DESCRIPTION, require
from .own_files import (
    FREE,
    HIDDEN,
    HIDDEN_BEFORE,
    KEPT,
    are_plain,
    delete_own,
    delete_trace,
    files_in,
    free_name,
    is_from_a_save,
    is_of_another_program,
    move_aside,
    set_aside,
    states_of,
    unchanged,
)
from .verify import FORMAT, MARKER, STATE_FILES, STATE_INDEX, VERSION, WRITTEN, is_torn

logger = logging.get_logger(__name__)
LONGEST_PAUSE = 1.0  # seconds between two looks for what other ranks have written


def begin(directory: StrPath) -> None:
    """Make `directory` ready to be written. By rank 0; no rank writes into it before this has returned.

    What a run has written there goes, marker first: of an older checkpoint with the same step nothing is left that
    could be mistaken for a part of the new one. So never begin a checkpoint that is to survive if this save does not.
    What no run has written stays, and is no part of the new checkpoint. A checkpoint of another program, a file of
    this name, and single files that would be mistaken for parts of the new one are kept under another name.
    """
    directory = Path(directory)
    if directory.is_symlink() or (directory.is_dir() and (_has_marker(directory) or is_torn(directory))):
        remove(directory)
    elif os.path.lexists(directory) and (not directory.is_dir() or is_of_another_program(directory)):
        set_aside(directory)
    there = list(files_in(directory))  # none, if there is no such folder
    move_aside(directory, [name for name in there if is_from_a_save(name)])
    there = [name for name in there if not is_from_a_save(name)]
    (directory / WRITTEN).mkdir(parents=True)
    if there:
        write_checked(directory / WRITTEN / KEPT, {"files": states_of(directory, there)})
    sync(directory)
    sync(directory.parent)


def describe(directory: StrPath, rank: int, paths: Iterable[StrPath] = ()) -> None:
    """Bring files of this rank to stable storage, and tell rank 0 their lengths and checksums.

    By every rank, once, when all that it writes is written: from here on rank 0 may commit. Small files may be left to
    rank 0; each one described here is one that it need not read.
    """
    directory = Path(directory)
    entries = {}
    for path in map(Path, paths):
        if not path.is_relative_to(directory):
            raise ValueError(f"{path} is not in {directory}; a rank describes files of the checkpoint it has written.")
        entries[path.relative_to(directory).as_posix()] = _describe(directory, path)
    write_checked(directory / WRITTEN / f"{_stem(rank)}.json", {"files": entries}, durable=False)


def fail(directory: StrPath, rank: int, error: BaseException | str) -> None:
    """Say that this rank could not write its part: `commit` raises with this text instead of waiting on."""
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    path = Path(directory) / WRITTEN / f"{_stem(rank)}.failed"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def failure(directory: StrPath) -> str | None:
    """What ranks have said with `fail` while `directory` was written, the lowest rank's; None if none has."""
    for path in sorted((Path(directory) / WRITTEN).glob("*.failed")):
        return f"{path.stem}: {path.read_text(encoding='utf-8')}"
    return None


def wait_for_ranks(directory: StrPath, world_size: int, timeout: float) -> None:
    """Return when all ranks have called `describe`; raise once one has called `fail`, or after `timeout` seconds."""
    folder = Path(directory) / WRITTEN
    deadline, pause = time.monotonic() + timeout, 0.01
    while True:
        if (text := failure(directory)) is not None:
            raise RuntimeError(f"{directory} is not committed, because a rank could not write its part: {text}")
        try:
            names = set(os.listdir(folder))
        except FileNotFoundError:
            raise ValueError(f"{folder} is missing: `begin` comes before `commit`, and each is called once.") from None
        missing = [rank for rank in range(world_size) if f"{_stem(rank)}.json" not in names]
        if not missing:
            return
        if (left := deadline - time.monotonic()) <= 0:
            listed = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
            raise TimeoutError(
                f"{directory} is not committed: {len(missing)} of {world_size} ranks had not written their files "
                f"after {timeout:g} s: {listed}."
            )
        time.sleep(min(pause, left))
        pause = min(2 * pause, LONGEST_PAUSE)


def commit(directory: StrPath, world_size: int, step: int, timeout: float, run: dict[str, Any] | None = None) -> None:
    """Make `directory` a checkpoint, by its marker. By rank 0; when this returns, it would survive a power failure.

    Raises as `wait_for_ranks`. `run` says whose checkpoint it is, as `Run.to_dict` writes it; None for a conversion.
    """
    directory = Path(directory)
    wait_for_ranks(directory, world_size, timeout)
    files: dict[str, Any] = {}
    for rank in range(world_size):
        described = directory / WRITTEN / f"{_stem(rank)}.json"
        files |= require(DESCRIPTION, read_checked(described), described)["files"]
    there = are_plain(directory)  # of which nothing has to be asked one by one: a directory may have many thousands
    for name, entry in files.items():
        path = directory / name if there.get(name) else inside(directory, name, "a rank")
        check_length(path, entry["bytes"], "a rank has described it")
    kept = directory / WRITTEN / KEPT
    others = unchanged(directory, read_checked(kept)["files"]) if kept.exists() else set()
    for name in sorted(there.keys() - files.keys() - others):
        path = directory / name
        if _is_listed(name) and (there[name] or (path.is_file() and is_inside(directory, path))):
            files[name] = _describe(directory, path)
    free = {name: _describe(directory, directory / name) for name in FREE if _is_new(directory / name, others)}
    if STATE_INDEX not in files and any(fnmatch(name, STATE_FILES) for name in files):
        raise ValueError(f"{directory / STATE_INDEX} is missing; the training state is completed before the commit.")
    for folder in {(directory / name).parent for name in files}:
        sync(folder)
    hub_weights = any("/" not in name and fnmatch(name, "model*.safetensors") for name in files)
    body = {"format": FORMAT, "version": VERSION, "step": step, "hub_weights": hub_weights}
    body |= {"run": run} if run is not None else {}
    body |= {"free": free} if free else {}
    write_checked(directory / MARKER, {**body, "files": dict(sorted(files.items()))})
    # Last, so that at no time both the marker and the trace of a save are missing.
    delete_trace(directory)


def remove(directory: Path) -> None:
    """Delete a checkpoint: first it stops being one, then it loses its name, then its files go.

    Its own files go, those of others stay in the folder, with a warning. Of a symbolic link the link goes alone.
    """
    if directory.is_symlink():
        directory.unlink()
        return
    if not os.access(directory.parent, os.W_OK | os.X_OK):  # before anything is touched
        raise PermissionError(errno.EACCES, "its folder is read-only", str(directory.parent))
    trace, marker = directory / WRITTEN, directory / MARKER
    if trace.is_symlink():
        trace.unlink()
    trace.mkdir(exist_ok=True)  # whatever is left after a kill was ours
    if os.path.lexists(marker):
        marker.replace(trace / MARKER)  # it says which files are the checkpoint's own
    sync(directory)
    if os.path.ismount(directory):
        _delete(directory, directory)
        return
    hidden = directory.with_name(f"{HIDDEN}{directory.name}-{time.time_ns()}")
    try:
        directory.rename(hidden)
    except OSError:
        if os.path.lexists(trace / MARKER):
            (trace / MARKER).replace(marker)
            delete_trace(directory)
        raise
    with contextlib.suppress(OSError):  # `clean` tries again
        _delete(hidden, directory)


def clean(output_dir: StrPath) -> None:
    """Finish the deletions that were interrupted."""
    for prefix in (HIDDEN, HIDDEN_BEFORE):
        for path in Path(output_dir).glob(f"{prefix}{PREFIX_CHECKPOINT_DIR}-*"):
            with contextlib.suppress(OSError):  # the next one tries again
                if path.is_symlink():
                    path.unlink()
                else:
                    _delete(path, path.with_name(path.name.removeprefix(prefix).rpartition("-")[0]))


def _delete(hidden: Path, directory: Path) -> None:
    """Delete a checkpoint's own files. What is left gets the name `directory`, or another if that is taken."""
    left = delete_own(hidden)
    if not left:
        return
    if hidden != directory:
        directory = free_name(directory) if os.path.lexists(directory) else directory
        hidden.rename(directory)
    # Out of it at once: with a part of its trace it would be taken for an interrupted save.
    trace = directory.with_name(f"{HIDDEN}{PREFIX_CHECKPOINT_DIR}-{time.time_ns()}")
    trace.mkdir()
    if (directory / WRITTEN).is_dir():
        (directory / WRITTEN).rename(trace / WRITTEN)
    shutil.rmtree(trace, ignore_errors=True)
    listed = ", ".join(left[:5]) + (", ..." if len(left) > 5 else "")
    logger.warning(f"{directory}: deleted the checkpoint, kept the files that no run has written: {listed}.")


def _stem(rank: int) -> str:
    return f"rank-{rank:05d}"


def _has_marker(directory: Path) -> bool:
    """Whether there is a marker of ours, be it damaged; other programs may have files of that name."""
    try:
        body = json.loads((directory / MARKER).read_bytes())
    except FileNotFoundError:
        return False
    except (OSError, ValueError, RecursionError):
        return True
    return isinstance(body, dict) and body.get("format") == FORMAT


def _is_new(path: Path, others: set[str]) -> bool:
    return path.name not in others and path.is_file() and not path.is_symlink()


def _is_listed(name: str) -> bool:
    is_hidden = any(part.startswith(".") for part in name.split("/"))
    return not is_hidden and name not in (*FREE, MARKER, MARKER + ".tmp")


def _describe(directory: Path, path: Path) -> dict[str, Any]:
    """Length and crc32 (None where the training state's index has the checksums) of a file, which is then durable."""
    sync(path)
    has_blocks = fnmatch(path.relative_to(directory).as_posix(), STATE_FILES)
    return {"bytes": path.stat().st_size, "crc32": None if has_blocks else checksum_of(path)}
