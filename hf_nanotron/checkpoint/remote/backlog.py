"""Which checkpoints still wait for their upload, when the store is slower than the run saves, or does not answer."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from ..directory.own_files import files_in
from ..files.disk import size_of


@dataclass(frozen=True)
class LocalSpace:
    """What checkpoints that wait for their upload may take of the local disk."""

    limit: int | None = None  # how many may wait; None for as many as there is room for
    # bytes that stay free on the disk; None for as many as the newest checkpoint has, so that there is room for the
    # next one
    min_free: float | None = None


def beyond_retention(waiting: list[Path], kept: Collection[str], save_total_limit: int | None) -> list[Path]:
    """Those that the store would not keep: after their upload, newer ones would have them deleted at once."""
    if not waiting or not save_total_limit:
        return []
    surplus = [path for path in waiting if path.name not in (waiting[-1].name, *kept)]
    return surplus[: max(len(waiting) - save_total_limit, 0)]


def beyond_space(waiting: list[Path], kept: Collection[str], space: LocalSpace) -> list[Path]:
    """Those to give up, the oldest first, until the rest is within `space`. Never the newest one."""
    if not waiting:
        return []
    newest, count = waiting[-1], len(waiting)
    spare = [path for path in waiting if path.name not in (newest.name, *kept)]
    doomed: list[Path] = []
    free = shutil.disk_usage(newest.parent).free
    needed = bytes_of(newest) if space.min_free is None else space.min_free
    for path in spare:
        if free >= needed and (space.limit is None or count <= space.limit):
            break
        doomed.append(path)
        count, free = count - 1, free + bytes_of(path)
    return doomed


def bytes_of(directory: Path) -> int:
    """Of all files in a directory, as far as they are there: another thread may be deleting it."""
    return sum(size_of(directory / name) or 0 for name in files_in(directory))


def in_words(size: float) -> str:
    """Bytes as text for people: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
