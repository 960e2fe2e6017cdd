"""One rank's part of a snapshot, written, sent to another host and received from one, each in a thread."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from ..directory.runs import Run
from ..directory.save import Save
from ..files.checked import write_checked
from ..state.file import write_rank
from ..state.training_state import DIRECTORY
from ..state.values import encode
from .folder import MemoryFolder, part_name, read_part, write_part
from .resume import VALUES
from .transfer import Wire, receive_files, send_files

END_SECONDS = 5.0  # that the end of a failed run waits for copies on their way between hosts


class SnapshotThreads:
    """Writes a rank's part of one snapshot, sends it to another host and takes in copies, each in a thread."""

    def __init__(self, name: str, rank: int, folder: MemoryFolder) -> None:
        self.name, self._rank, self._folder = name, rank, folder
        self._threads: list[threading.Thread] = []
        self._failures: list[BaseException] = []

    @contextlib.contextmanager
    def noting_failure(self, kind: type[Exception] = Exception) -> Iterator[None]:
        """What fails in here makes the snapshot fail, not the run."""
        try:
            yield
        except kind as error:
            self._failures.append(error)

    def start(self, write: Callable[[], None], targets: list[Wire], sources: list[Wire]) -> None:
        """`write` the part, then send it to `targets`; receive those of `sources` meanwhile."""
        directory, marker = self._folder.snapshot(self.name), part_name(self._rank)

        def write_and_send() -> None:
            names: list[str] = []
            with self.noting_failure():
                if not self._failures:
                    write()
                    names = [*read_part(directory / marker).files, marker]  # the marker last
            for wire in targets:  # also after a failure, or the other side would wait
                self._begin(partial(send_files, wire, directory, names, bool(names)), is_own=False)

        def receive(wire: Wire) -> None:
            is_whole, _ = receive_files(wire, directory)
            if not is_whole:
                raise RuntimeError(f"rank {wire.other} has not written its part, so this host has no copy of it.")

        self._begin(write_and_send, is_own=True)
        for wire in sources:
            self._begin(partial(receive, wire), is_own=False)

    def _begin(self, action: Callable[[], Any], is_own: bool) -> None:
        def run() -> None:
            with self.noting_failure():
                action()

        # The interpreter waits for this rank's own part, not for what another host may never send or take.
        thread = threading.Thread(target=run, name=f"memory snapshot {self.name}", daemon=not is_own)
        self._threads.append(thread)
        thread.start()

    def wait_for_own(self) -> None:
        """Until this rank's part is written, or has failed."""
        for thread in [thread for thread in self._threads if not thread.daemon]:
            thread.join()

    def wait(self) -> BaseException | None:
        """Until all threads have ended: what failed first."""
        self.wait_for_own()  # which begins those that send
        for thread in self._threads:
            thread.join()
        return self._failures[0] if self._failures else None

    def leave(self) -> None:
        """At the end of a process whose run has failed: copies that are on their way may still arrive.

        A thread that comes back from torch in the midst of Python's end aborts the process; torch has no way to break
        off what it waits for, so it gets some time.
        """
        self.wait_for_own()
        until = time.monotonic() + END_SECONDS
        for thread in self._threads:
            thread.join(max(until - time.monotonic(), 0.0))


def write_snapshot(save: Save, part: tuple[Run, int, int, int]) -> None:
    """What is left of a rank's part of a snapshot, and its marker. Communicates with nobody.

    Args:
        part: run, step, rank and number of ranks.
    """
    directory, rank = save.directory, part[2]
    if save.copies is not None:
        save.copies.complete()
    write_rank(directory / DIRECTORY, rank, save.pieces)
    own = [f"{DIRECTORY}/rank-{rank:05d}.{kind}" for kind in ("json", "safetensors")]
    own = [name for name in own if (directory / name).is_file()]
    names = [*own, *(path.name for path in save.files)]
    if rank == 0:
        write_checked(directory / VALUES, {"values": encode(save.values, "training state")}, durable=False)
        own, names = [*own, VALUES], [*names, VALUES]
    write_part(directory, part, names, own)
