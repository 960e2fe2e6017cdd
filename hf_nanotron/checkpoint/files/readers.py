"""Threads that read files and compute checksums side by side: the file system and zlib leave Python to others."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Any

import torch

from .disk import CHUNK_BYTES

THREADS = 8  # one reads and verifies about 0.7 GB/s, from memory
WORTHWHILE = 4 * CHUNK_BYTES  # bytes; less is read without threads
WAITING = 4 * THREADS  # actions that are given and not begun

Action = Callable[[memoryview], None]


def cores() -> int:
    """That this process may run on."""
    return len(os.sched_getaffinity(0))


class Readers:
    """Does actions, each with a buffer that is its own meanwhile. While entered; leaving waits for all of them.

    One thread gives the actions. The error of the first that failed, in their order, is raised by `give`, `wait` or at
    the end.

    Args:
        total: bytes that the actions read, by which the number of threads is chosen.
        buffer_bytes: the largest that an action reads.
        is_pinned: whether buffers are in pinned memory, from which a GPU copies fastest.
    """

    def __init__(self, total: int, buffer_bytes: int = CHUNK_BYTES, is_pinned: bool = False) -> None:
        count = min(THREADS, cores(), total // CHUNK_BYTES) if total >= WORTHWHILE else 1
        self._buffer_bytes, self._is_pinned = buffer_bytes, is_pinned
        self._own = threading.local()
        self._pool = ThreadPoolExecutor(count, "reader") if count > 1 else None
        self._given: list[Future[None]] = []

    def give(self, action: Action) -> None:
        if self._pool is None:
            action(self._buffer())
            return
        self._given.append(self._pool.submit(lambda: action(self._buffer())))
        while sum(not each.done() for each in self._given) >= WAITING:
            wait([each for each in self._given if not each.done()], return_when=FIRST_COMPLETED)
            self._raise_first()

    def wait(self) -> None:
        """Until all that was given is done."""
        wait(self._given)
        self._raise_first()

    def _raise_first(self) -> None:
        """Forgets what is done, up to the first action that is not."""
        while self._given and self._given[0].done():
            self._given.pop(0).result()

    def _buffer(self) -> memoryview:
        if not hasattr(self._own, "buffer"):
            tensor: Any = torch.empty(self._buffer_bytes, dtype=torch.uint8, pin_memory=self._is_pinned)
            self._own.buffer = memoryview(tensor.numpy())
        buffer: memoryview = self._own.buffer
        return buffer

    def __enter__(self) -> Readers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.wait()
        finally:
            if self._pool is not None:
                self._pool.shutdown(cancel_futures=True)
