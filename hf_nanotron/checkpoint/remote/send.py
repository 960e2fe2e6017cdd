"""Send one committed checkpoint to a store: its files, several at a time, and last its marker."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ..directory.own_files import FREE
from ..directory.verify import MARKER, read_marker
from ..files.disk import size_of
from ..files.inside import is_inside
from .store import RemoteStore, in_parallel

T = TypeVar("T")


class Stopped(Exception):
    """The program ends."""


class Changed(Exception):
    """The local checkpoint is no longer the one whose upload began, or no longer waits."""


class Attempt(Protocol):
    """Does `action`, named `what`, again until it succeeds, for as long as the checkpoint at `path` waits.

    Raises `Changed` when it no longer does, or is gone, and `Stopped` when the program ends.
    """

    def __call__(self, path: Path, what: str, action: Callable[[], T]) -> T: ...


class Sender:
    """
    Args:
        attempt: does whatever asks the store.

    Attributes:
        sent: bytes by file, of the checkpoint on its way.
    """

    def __init__(self, store: RemoteStore, workers: int, attempt: Attempt) -> None:
        self.store, self.workers, self.attempt = store, workers, attempt
        self.sent: dict[str, int] = {}

    def fault(self, path: Path) -> str | None:
        """What of a checkpoint is not as its marker lists it. It is to take the place of no other in the store."""
        marker = _marker_of(path)
        for name, entry in _listed(path).items():
            size = size_of(path / name) if is_inside(path, path / name) else None
            if size == entry["bytes"]:
                continue
            if _marker_of(path) != marker:
                raise Changed
            return f"{name} {'is missing or links out of it' if size is None else 'has a different length'}"
        return None

    def send(self, path: Path) -> list[int]:
        """Bytes of the files that were sent: none if the store has this checkpoint."""
        name, store = path.name, self.store
        marker = _marker_of(path)
        there = self.attempt(path, f"reading the marker of {name}", lambda: store.marker(name))
        if there == marker:  # with all checksums, so it is exactly this checkpoint
            return []
        # README.md goes along for people; other files that no marker lists are somebody's notes.
        free = {file: size_of(path / file) for file in FREE if is_inside(path, path / file)}
        sizes = {file: size for file, size in free.items() if size is not None}
        sizes |= {file: entry["bytes"] for file, entry in _listed(path).items()}
        if _marker_of(path) != marker:
            raise Changed
        if there is not None:  # another checkpoint of this step, from before the run went back
            self.attempt(path, f"deleting the old {name}/{MARKER}", lambda: store.remove_file(f"{name}/{MARKER}"))
        self.sent.clear()
        # Large files first, so that none is left alone at the end.
        files = sorted(sizes, key=lambda file: -sizes[file])
        in_parallel([partial(self._put, path, file, sizes[file]) for file in files], self.workers)
        listed = self.attempt(path, f"listing {name}", lambda: store.checkpoints().get(name, {}))
        for file in files:
            # The listing may lag behind; or another run has taken this for what an interrupted upload has left.
            if listed.get(file) != sizes[file]:
                look = partial(store.size, f"{name}/{file}")
                if self.attempt(path, f"looking for {name}/{file}", look) != sizes[file]:
                    self._put(path, file, sizes[file])
        for file in listed.keys() - sizes.keys() - {MARKER}:
            self.attempt(path, f"deleting the old {name}/{file}", partial(store.remove_file, f"{name}/{file}"))
        if _marker_of(path) != marker:
            raise Changed
        self._put(path, MARKER, len(marker))
        return [*sizes.values(), len(marker)]

    def _put(self, path: Path, file: str, size: int) -> None:
        remote = f"{path.name}/{file}"

        def send() -> None:
            if not (path / file).exists():
                raise Changed
            self.store.put(path / file, remote, partial(self.sent.__setitem__, file))
            if (arrived := self.store.size(remote)) != size:
                raise OSError(f"{arrived or 0} of {size} bytes arrived")

        self.attempt(path, f"uploading {remote}", send)
        self.sent[file] = size


def _listed(path: Path) -> dict[str, dict[str, Any]]:
    """The files that the marker of a local checkpoint lists."""
    try:
        return read_marker(path)["files"]
    except ValueError:
        raise Changed from None


def _marker_of(path: Path) -> bytes:
    try:
        return (path / MARKER).read_bytes()
    except OSError:
        raise Changed from None
