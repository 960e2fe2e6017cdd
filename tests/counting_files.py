"""A file system that counts: which bytes of which file were read, and how often each call for names was made.

The calls of the standard library are wrapped for the time of a block, those through descriptors and those that open a
path, and what is not a plain read (a memory map) is refused in files that are watched. So what is counted does not
depend on what the code under test says of itself.
"""

from __future__ import annotations

import builtins
import contextlib
import io
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

NAMES = "stat lstat listdir scandir mkdir rename replace unlink rmdir fsync link symlink access".split()


class CountingFiles:
    """What happens to files below `folder`.

    Attributes:
        reads: (file, first byte, bytes) of each read.
        calls: name of a call -> how often it was made; `open` for files that were opened.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = os.path.realpath(folder)
        self.reads: list[tuple[str, int, int]] = []
        self.calls: Counter[str] = Counter()
        self._files: dict[int, str] = {}

    def _name(self, path: Any) -> str | None:
        if isinstance(path, int):
            return self._files.get(path)
        try:
            whole = os.path.join(os.getcwd(), os.fspath(path))
        except TypeError:
            return None
        if isinstance(whole, bytes) or not whole.startswith(self.folder + os.sep):
            return None if whole != self.folder else "."
        return os.path.relpath(whole, self.folder)

    @contextlib.contextmanager
    def counting(self) -> Iterator[CountingFiles]:
        """While the block runs, in this process."""
        with contextlib.ExitStack() as stack:
            for name in NAMES:
                stack.enter_context(mock.patch.object(os, name, self._counted(name, getattr(os, name))))
            real: dict[str, Any] = {name: getattr(os, name) for name in ("open", "close", "read", "pread", "preadv")}
            opened, readable = builtins.open, io.open

            def open_descriptor(path: Any, *args: Any, **kwargs: Any) -> int:
                handle: int = real["open"](path, *args, **kwargs)
                if (name := self._name(path)) is not None:
                    self._files[handle] = name
                    self.calls["open"] += 1
                return handle

            def close(handle: int) -> None:
                self._files.pop(handle, None)
                real["close"](handle)

            def read(handle: int, size: int) -> bytes:
                data: bytes = real["read"](handle, size)
                if handle in self._files:
                    self.reads.append((self._files[handle], -1, len(data)))
                return data

            def pread(handle: int, size: int, offset: int) -> bytes:
                data: bytes = real["pread"](handle, size, offset)
                if handle in self._files:
                    self.reads.append((self._files[handle], offset, len(data)))
                return data

            def preadv(handle: int, buffers: Any, offset: int, *flags: Any) -> int:
                count: int = real["preadv"](handle, buffers, offset, *flags)
                if handle in self._files:
                    self.reads.append((self._files[handle], offset, count))
                return count

            def open_file(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
                file = opened(path, mode, *args, **kwargs)
                if (name := self._name(path)) is None:
                    return file
                self.calls["open"] += 1
                return self._watched(file, name) if "r" in mode and "b" in mode else file

            for name, wrapped in {
                "open": open_descriptor, "close": close, "read": read, "pread": pread, "preadv": preadv,
            }.items():  # fmt: skip
                stack.enter_context(mock.patch.object(os, name, wrapped))
            stack.enter_context(mock.patch.object(builtins, "open", open_file))
            stack.enter_context(mock.patch.object(io, "open", open_file if readable is opened else readable))
            yield self

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if name == "fsync":  # counted alone: a real one takes as long as the disk does
                self.calls[name] += 1
                return None
            if args and self._name(args[0]) is not None:
                self.calls[name] += 1
            return call(*args, **kwargs)

        return counted

    def _watched(self, file: Any, name: str) -> Any:
        """A binary file whose reads are counted where they are."""
        reads = self.reads

        class Watched:
            def __getattr__(self, attribute: str) -> Any:
                value = getattr(file, attribute)
                if attribute not in ("read", "readline", "readinto"):
                    return value

                def counted(*args: Any) -> Any:
                    before = file.tell()
                    result = value(*args)
                    reads.append((name, before, file.tell() - before))
                    return result

                return counted

            def __enter__(self) -> Watched:
                return self

            def __exit__(self, *_: object) -> None:
                file.close()

        return Watched()


def times_read(folder: str | Path, name: str, reads: list[tuple[str, int, int]]) -> np.ndarray:
    """For each byte of a file how often it was read, by the `reads` of all ranks."""
    counts = np.zeros(os.path.getsize(os.path.join(folder, name)) + 1, dtype=np.int64)
    for file, start, size in reads:
        if file == name:
            assert start >= 0, f"{name} was read where nobody said"
            counts[start] += 1
            counts[start + size] -= 1
    return np.cumsum(counts)[:-1]
