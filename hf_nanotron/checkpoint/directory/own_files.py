"""Which files in the folder of a checkpoint are its own, and their deletion: those and no others.

Its own are the files that its marker lists, and those that nothing but a save writes; of an interrupted save, all that
a save writes, but for what was there before it. A link or a mount point is never followed.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from transformers.utils import logging

from ..files.checked import read_checked
from ..files.disk import checksum_of
from ..files.repository import AVERAGE_FOLDER, TEXTS, WEIGHTS
from ..state.training_state import DIRECTORY
from .verify import MARKER, WRITTEN

logger = logging.get_logger(__name__)

FREE = ("README.md",)  # people edit them and no run reads them
KEPT = "kept.json"  # in `.written/`: what was in the folder before the save
# Pushes to the Hub leave out what begins with "_".
ASIDE = "_kept-"  # prefix of what is moved out of the way of a save
HIDDEN = "_removed-"  # prefix of a checkpoint that is being deleted
HIDDEN_BEFORE = ".removed-"  # the same, in releases before
# What nothing but a save writes, and what else one may write.
_ALWAYS = (
    rf"{re.escape(MARKER)}(\.tmp)?|trainer_state\.json|training_args\.bin|rng_state(_\d+)?\.pth"
    rf"|{DIRECTORY}/(rank-\d+\.(safetensors|json)|index\.json)(\.tmp)?"
)
_ADAPTERS = r"adapter_(config\.json|model\.safetensors)"
_ANY = rf"{_ALWAYS}|({re.escape(AVERAGE_FOLDER)}/)?({WEIGHTS}|{TEXTS})|{_ADAPTERS}"
_TORN = rf"{_ANY}|{'|'.join(map(re.escape, FREE))}"
# Beside `_ANY`, by which a checkpoint of another program is known.
_OTHERS = rf"{DIRECTORY}|adapter_.*|(optimizer|scheduler|scaler|pytorch_model.*)\.(pt|bin)|.*\.safetensors"


def files_in(directory: Path) -> Iterator[str]:
    """The files and links in `directory` and its folders, relative, with `/`. Links to folders are not entered."""
    for folder, folders, files in os.walk(directory):
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        for name in (*files, *links):
            yield Path(folder, name).relative_to(directory).as_posix()


def are_plain(directory: Path, below: str = "") -> dict[str, bool]:
    """Names as of `files_in` -> whether each is a file itself, no link. Lists folders, and looks at no file."""
    found: dict[str, bool] = {}
    with os.scandir(os.path.join(directory, below)) as entries:
        for entry in entries:
            name = f"{below}/{entry.name}" if below else entry.name
            if entry.is_dir(follow_symlinks=False):
                found |= are_plain(directory, name)
            else:
                found[name] = entry.is_file(follow_symlinks=False)
    return found


def is_from_a_save(name: str) -> bool:
    """Whether a save may write a file of this name."""
    return re.fullmatch(_ANY, name) is not None


def is_of_another_program(directory: Path) -> bool:
    """Whether a folder without marker and trace of a save has files by which it is known as a checkpoint."""
    return any(re.fullmatch(rf"{_ANY}|{_OTHERS}", name) for name in os.listdir(directory))


def own_files(directory: Path) -> set[str]:
    """The names of the checkpoint's own files, of those that are there. `.written/` is not among them."""
    marker = _read(directory / MARKER) or _read(directory / WRITTEN / MARKER)
    names = {name for name in files_in(directory) if name.partition("/")[0] != WRITTEN}
    listed = set(_mapping(marker, "files"))
    if marker:
        patterns, free = _ALWAYS, _mapping(marker, "free")
        listed |= {name for name in free if _is_unchanged(directory / name, free[name])}
    else:
        patterns = _TORN
        for path in (directory / WRITTEN).glob("rank-*.json"):
            listed |= set(_mapping(_read(path), "files"))
        names -= unchanged(directory, _mapping(_read(directory / WRITTEN / KEPT), "files"))
    # A link in place of a folder of the checkpoint stands for all that was in it.
    folders = {parent.as_posix() for name in listed for parent in PurePosixPath(name).parents} | {DIRECTORY}
    return {
        name
        for name in names
        if name in listed or re.fullmatch(patterns, name) or (name in folders and (directory / name).is_symlink())
    }


def delete_own(directory: Path) -> list[str]:
    """Delete the own files of a checkpoint that has no marker any more, and the folders that are empty then.

    Returns what is left and not its own, sorted; if nothing is, the folder is gone.
    """
    folders = {directory / DIRECTORY}
    for name in sorted(own_files(directory)):
        above = [parent for parent in (directory / name).parents if parent.is_relative_to(directory)]
        if not any(map(os.path.ismount, above[:-1])):
            (directory / name).unlink(missing_ok=True)
            folders.update(above[:-1])
    for folder in sorted(folders, key=lambda path: -len(path.parts)):
        with contextlib.suppress(OSError):  # it is not empty
            folder.rmdir()
    if left := sorted(path.name for path in directory.iterdir() if path.name != WRITTEN):
        return left
    delete_trace(directory)
    with contextlib.suppress(OSError):  # a mount point
        directory.rmdir()
    return []


def delete_trace(directory: Path) -> None:
    """Delete `.written/`; of a link, the link."""
    trace = directory / WRITTEN
    if trace.is_symlink():
        trace.unlink()
    else:
        shutil.rmtree(trace, ignore_errors=True)


def set_aside(path: Path, why: str = "is not a checkpoint of this program") -> Path:
    """Give what is in the way of a save another name, beside the checkpoint: `_kept-checkpoint-5`."""
    target = free_name(path)
    path.rename(target)
    logger.warning(f"{path} {why}; renamed it to {target.name}.")
    return target


def move_aside(directory: Path, names: Iterable[str]) -> None:
    """Move files out of a checkpoint, to `_kept-checkpoint-5/`: they would be taken for a part of the next one."""
    target, moved = free_name(directory), sorted(names)
    for name in moved:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).rename(target / name)
    if moved:
        logger.warning(f"{directory}: moved {', '.join(moved)} to {target.name}, because no run has written them.")


def free_name(path: Path) -> Path:
    """`_kept-checkpoint-5`, or if that is taken `_kept-checkpoint-5-2` and so on."""
    target, number = path.with_name(ASIDE + path.name), 1
    while os.path.lexists(target):
        number += 1
        target = path.with_name(f"{ASIDE}{path.name}-{number}")
    return target


def states_of(directory: Path, names: Iterable[str]) -> dict[str, list[int]]:
    """Size and time of the last change of files or links, by which one that is written again is known."""
    found = {}
    for name in names:
        status = os.lstat(directory / name)
        found[name] = [status.st_size, status.st_mtime_ns, status.st_ino]
    return found


def unchanged(directory: Path, states: dict[str, Any]) -> set[str]:
    """The files that are as `states_of` has found them."""
    there = [name for name in states if os.path.lexists(directory / name)]
    return {name for name, state in states_of(directory, there).items() if state == states[name]}


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_checked(path)
    except (OSError, ValueError):
        return {}


def _mapping(body: dict[str, Any], key: str) -> dict[str, Any]:
    found = body.get(key)
    return found if isinstance(found, dict) else {}


def _is_unchanged(path: Path, entry: Any) -> bool:
    try:
        return not path.is_symlink() and path.is_file() and checksum_of(path) == entry["crc32"]
    except (OSError, KeyError, TypeError):
        return False
