"""Names from listings, markers, indices and metadata: each stays inside the folder it is for."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath

from .disk import StrPath

CACHED = ("models--", "datasets--", "spaces--")  # what the Hub's cache calls the folders of repositories
LONGEST_NAME = 255  # bytes of one part of a path, on all usual file systems
LONGEST_SHOWN = 300  # characters of a name in a message
LONGEST_PATH = 3072  # bytes of a name with its folders; with what comes before, a path may have 4096


def inside(folder: StrPath, name: object, source: str) -> Path:
    """The path of `name` in `folder`, for a name that was read somewhere and may have been forged.

    Makes and opens nothing. Symbolic links are followed as far as they exist: one that leads out of the folder is
    refused, but for those of the Hub's cache, where `snapshots/<revision>/` links into the `blobs/` of its repository.

    Args:
        name: relative, its parts separated by `/`.
        source: what names it, for the message.

    Raises:
        ValueError: naming `source`, the name and the reason.
    """
    fault = find_fault(name)
    if fault is None:
        path = Path(folder, str(name))
        if is_inside(folder, path):
            return path
        fault = f"is a symbolic link out of {folder}, to {os.path.realpath(path)}"
    said = repr(name) if len(repr(name)) <= LONGEST_SHOWN else f"{repr(name)[:LONGEST_SHOWN]}..."
    raise ValueError(f"{source} names {said}, which {fault}; only files inside {folder} are read or written.")


def is_inside(folder: StrPath, path: StrPath) -> bool:
    """Whether a path below `folder` stays there, or in the Hub's cache, when its symbolic links are followed."""
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    return real.is_relative_to(home) or any(real.is_relative_to(blobs) for blobs in _blobs(home))


def refuse_links(folder: StrPath) -> None:
    """Refuse a folder of which something is a symbolic link out of it, or neither file nor folder, such as a pipe."""
    for path in sorted(Path(folder).rglob("*")):
        inside(folder, path.relative_to(folder).as_posix(), str(folder))
        if not path.is_file() and not path.is_dir():
            raise ValueError(f"{path} is neither a file nor a folder; remove it.")


def find_fault(name: object) -> str | None:
    """What is wrong with a relative name, None for a good one. Looks at no file."""
    if not isinstance(name, str):
        return "is not a file name"
    if len(name) > LONGEST_PATH:  # before it is looked at character by character
        return "is too long"
    parts = name.split("/")
    faults = {
        "is empty": not name,
        "has a character that file names cannot have": any(ord(c) < 32 or 0xD800 <= ord(c) < 0xE000 for c in name),
        "is an absolute path": PurePosixPath(name).is_absolute() or bool(PureWindowsPath(name).drive),
        "has a backslash": "\\" in name,
        "leads out of the folder": ".." in parts,
        "is not a plain path": "" in parts or "." in parts,
    }
    if (fault := next((fault for fault, found in faults.items() if found), None)) is not None:
        return fault
    too_long = len(name.encode()) > LONGEST_PATH or max(len(part.encode()) for part in parts) > LONGEST_NAME
    return "is too long" if too_long else None


def find_clash(names: Iterable[str]) -> str | None:
    """The first of some good names that is also a folder of another one, None if there is none."""
    found = set(names)
    folders = {str(parent) for name in found for parent in PurePosixPath(name).parents}
    return min(found & folders, default=None)


def _blobs(home: Path) -> list[Path]:
    """Where the files of a Hub cache's snapshot lie: `models--owner--name/blobs`, if `home` is in such a snapshot.

    A folder itself: a link of this name could lead anywhere.
    """
    return [
        folder.parent / "blobs"
        for folder in (home, *home.parents)
        if folder.name == "snapshots" and folder.parent.name.startswith(CACHED)
    ]
