"""What one rank writes of a checkpoint: gathered by all ranks together, written by each alone, now or in a thread."""

from __future__ import annotations

import contextlib
import copy
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ...parallel.mesh import ParallelMesh
from ..state.file import BUFFER, StatePiece, commit as commit_state, write_rank
from ..state.training_state import DIRECTORY
from .commit import commit, describe, fail, wait_for_ranks
from .host_copies import HostCopies, Source


@dataclass
class Save:
    """One checkpoint on its way to the disk, as one rank sees it."""

    directory: Path  # the checkpoint, after `begin`
    step: int  # optimizer steps
    timeout: float  # seconds that rank 0 waits for the others
    files: list[Path] = field(default_factory=list)  # what this rank has written already (or will, by `writes`)
    writes: list[Callable[[], None]] = field(default_factory=list)  # what is left to write besides the training state
    pieces: list[StatePiece] = field(default_factory=list)  # this rank's part of the training state
    # the rest of it, equal on all ranks; None for a checkpoint without one (`save_only_model`)
    values: dict[str, Any] | None = None
    run: dict[str, Any] | None = None  # which run this is a checkpoint of, for the marker
    # called on rank 0 with the directory, in the thread that has written it
    on_committed: Callable[[Path], None] | None = None

    copies: HostCopies | None = None  # that have to be complete before anything is written

    def copy_to_host(self, copies: HostCopies) -> None:
        """Make the training state independent of the training that goes on, as soon as `copies` are complete."""
        kinds = [Source.CHANGES if BUFFER in piece.tensors else Source.KEPT for piece in self.pieces]
        given = zip(self.pieces, kinds, strict=True)
        tensors = iter(copies.of((tensor, kind) for piece, kind in given for tensor in piece.tensors.values()))
        numbers = iter(_copies_of_numbers(self.pieces, copies))
        for index, piece in enumerate(self.pieces):
            copied = {kind: next(tensors) for kind in piece.tensors}
            scalars = {k: next(numbers) if isinstance(v, torch.Tensor) else v for k, v in piece.scalars.items()}
            self.pieces[index] = replace(piece, tensors=copied, scalars=scalars)
        self.values = copy.deepcopy(self.values)
        self.copies = copies

    def finish(self, mesh: ParallelMesh) -> None:
        """Write, and on rank 0 commit when all ranks have written. Communicates through files alone.

        A rank that fails raises its own error, and rank 0 learns of it: RuntimeError or TimeoutError there.
        """
        try:
            if self.copies is not None:
                self.copies.complete()
            self._write(mesh.rank)
            if mesh.rank == 0:
                self._commit(mesh.world_size)
        except BaseException as error:
            with contextlib.suppress(OSError):  # a full disk may not take even that, and is what is to be told
                fail(self.directory, mesh.rank, error)
            raise
        if mesh.rank == 0 and self.on_committed is not None:
            self.on_committed(self.directory)

    def _write(self, rank: int) -> None:
        for write in self.writes:
            write()
        files = list(self.files)
        if self.values is not None:
            state = self.directory / DIRECTORY
            write_rank(state, rank, self.pieces)
            files += [path for path in [state / f"rank-{rank:05d}.safetensors"] if path.is_file()]
        describe(self.directory, rank, files)

    def _commit(self, world_size: int) -> None:
        if self.values is not None:
            wait_for_ranks(self.directory, world_size, self.timeout)
            commit_state(self.directory / DIRECTORY, world_size, self.values)
        commit(self.directory, world_size, self.step, self.timeout, self.run)


def _copies_of_numbers(pieces: list[StatePiece], copies: HostCopies) -> list[torch.Tensor]:
    """Of what an optimizer counts up in tensors without dimensions: one copy for all of a device and dtype."""
    numbers = [value for piece in pieces for value in piece.scalars.values() if isinstance(value, torch.Tensor)]
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for place, number in enumerate(numbers):
        alike.setdefault((number.device, number.dtype), []).append(place)
    joined = [torch.stack([numbers[place].detach() for place in places]) for places in alike.values()]
    found = dict[int, torch.Tensor]()
    for places, copied in zip(alike.values(), copies.of((each, Source.OWN) for each in joined), strict=True):
        found.update(zip(places, copied.unbind(), strict=True))
    return [found[place] for place in range(len(numbers))]


class BackgroundSaveError(RuntimeError):
    """A checkpoint could not be written in the background."""

    failed = "an asynchronous save failed on rank"  # for the other ranks


class BackgroundSave:
    """At most one save at a time, in a thread. Its failure is raised in the thread that trains."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._directory: Path | None = None
        self._began = 0.0

    def start(self, save: Save, mesh: ParallelMesh) -> None:
        """Begin writing `save`, after the one before has ended."""
        self.wait()

        def run() -> None:
            try:
                save.finish(mesh)
            except BaseException as error:
                self._error = error

        self._directory, self._began = save.directory, time.monotonic()
        # Not a daemon: the interpreter waits for a checkpoint that is being written.
        self._thread = threading.Thread(target=run, name=f"save {save.directory.name}")
        self._thread.start()

    @property
    def is_busy(self) -> bool:
        """Whether a save is being written."""
        return self._thread is not None and self._thread.is_alive()

    def __str__(self) -> str:
        name = "" if self._directory is None else self._directory.name
        return f"{name}, whose writing began {time.monotonic() - self._began:.1f} s ago"

    def poll(self) -> Path | None:
        """The directory of a save that has ended since the last call, None if there is none."""
        if self._thread is None or self._thread.is_alive():
            return None
        return self.wait()

    def wait(self) -> Path | None:
        """As `poll`, after waiting for a save that is under way."""
        if self._thread is None:
            return None
        self._thread.join()
        directory, error = self._directory, self._error
        self._thread = self._error = self._directory = None
        if error is not None:
            raise BackgroundSaveError(
                f"saving {directory} in the background failed: {type(error).__name__}: {error}. The checkpoints before "
                "it are untouched."
            ) from error
        return directory
