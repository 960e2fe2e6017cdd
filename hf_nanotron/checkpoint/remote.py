"""A place for checkpoints outside the machine, by fsspec URL: `s3://bucket/run`, `gs://...`, `file:///...`.

Below the URL lie the same `checkpoint-N/` as in the output directory. The marker (`committed.json`) is the last object
written and the first one removed: a checkpoint that has it is complete, whatever was interrupted. What an interrupted
multipart upload leaves in a bucket is invisible here; a lifecycle rule of the bucket is what ends it.

Credentials, region and endpoint come from the usual places of the protocol's package (for S3 the environment with
`AWS_ENDPOINT_URL`, `~/.aws`, fsspec's configuration) or from `storage_options`.
"""

from __future__ import annotations

import os
import re
import tempfile
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import fsspec
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .verify import MARKER, read_marker

# The packages behind protocols that fsspec does not bring itself, and our pip extra with each.
EXTRAS = {"s3": ("s3fs", "remote"), "s3a": ("s3fs", "remote"), "gs": ("gcsfs", "gcs"), "gcs": ("gcsfs", "gcs")}
# Bytes. An s3fs upload holds up to ten parts of each file in memory, of 50 MiB if nobody says otherwise.
PART_BYTES = 8 << 20


class RemoteStore:
    """The checkpoints below a URL.

    Makes no connection before its first use, and another one in a forked process: s3fs and its like do their work in a
    thread with an event loop, which a fork does not copy.

    Args:
        url: a directory or bucket with a protocol.
        storage_options: for the protocol's fsspec class, such as `{"endpoint_url": ...}` for S3.

    Raises:
        ValueError: if `url` has no protocol, or one that fsspec does not know.
        ImportError: if the protocol's package is not installed, naming the extra that brings it.
    """

    def __init__(self, url: str, storage_options: dict[str, Any] | None = None) -> None:
        self.url = url.rstrip("/")
        self.protocol, separator, rest = url.partition("://")
        if not separator or not rest.strip("/"):
            raise ValueError(
                f"remote_checkpoints={url!r} is not a URL with a bucket or folder, such as s3://bucket/run."
            )
        try:
            self._class = fsspec.get_filesystem_class(self.protocol)
        except ImportError as error:
            package, extra = EXTRAS.get(self.protocol, (None, None))
            help_text = f"pip install 'hf-nanotron[{extra}]'" if package else f"{error}"
            raise ImportError(f"remote_checkpoints={url!r} needs {package or 'a package'}: {help_text}.") from error
        except ValueError as error:
            raise ValueError(
                f"remote_checkpoints={url!r}: fsspec knows no protocol {self.protocol!r}, but s3, gs and file, say."
            ) from error
        self._options = {"auto_mkdir": True} if self.protocol in ("file", "local") else {}
        self._options |= storage_options or {}
        self._part = {"chunksize": PART_BYTES} if self.protocol in EXTRAS else {}
        self.root: str = self._class._strip_protocol(self.url).rstrip("/")
        self._fs: Any = None
        self._pid = 0
        self._lock = threading.Lock()

    @property
    def fs(self) -> Any:
        """The fsspec file system of this process."""
        if self._pid != os.getpid():
            # A forked process is another one, also where a thread of its parent held the lock.
            self._fs, self._pid, self._lock = None, os.getpid(), threading.Lock()
        with self._lock:
            if self._fs is None:
                self._fs = self._class(**self._options, skip_instance_cache=True)
            return self._fs

    def check_writable(self) -> None:
        """Write, and delete again, an empty object: what fails here would fail after the first checkpoint.

        Raises:
            ValueError: naming the URL and the reason.
        """
        path = f"{self.root}/.probe-{uuid.uuid4().hex}"
        try:
            self.fs.pipe_file(path, b"")
            self.fs.rm_file(path)
        except Exception as error:  # each package has its own
            raise ValueError(f"remote_checkpoints={self.url!r} cannot be written: {reason(error)}") from error

    def checkpoints(self) -> dict[str, dict[str, int]]:
        """All `checkpoint-N`, committed or not, the highest step first: bytes of every file by its path within.

        Raises:
            ValueError: if the store cannot be listed, naming the URL and the reason.
        """
        found: dict[str, dict[str, int]] = {}
        try:
            self.fs.invalidate_cache()
            entries = self.fs.find(self.root, detail=True)
        except FileNotFoundError as error:
            if self.protocol in EXTRAS and not self.fs.exists(self.root.split("/")[0]):
                raise ValueError(f"remote_checkpoints={self.url!r}: {reason(error)}") from error
            entries = {}
        except Exception as error:
            raise ValueError(f"remote_checkpoints={self.url!r} cannot be listed: {reason(error)}") from error
        for path, info in entries.items():
            name, _, file = path[len(self.root) + 1 :].partition("/")
            if file and re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", name):
                found.setdefault(name, {})[file] = info["size"]
        return {name: found[name] for name in sorted(found, key=step_of, reverse=True)}

    def marker(self, name: str) -> bytes | None:
        """The bytes of a checkpoint's marker, None if it has none."""
        try:
            return self.fs.cat_file(f"{self.root}/{name}/{MARKER}")
        except FileNotFoundError:
            return None

    def read(self, file: str) -> bytes | None:
        """The bytes of a small file, None if there is none."""
        try:
            return self.fs.cat_file(f"{self.root}/{file}")
        except FileNotFoundError:
            return None

    def put(self, source: Path, file: str) -> None:
        self.fs.put_file(str(source), f"{self.root}/{file}", **self._part)

    def get(self, file: str, target: Path) -> None:
        self.fs.get_file(f"{self.root}/{file}", str(target))

    def remove_file(self, file: str) -> None:
        self.fs.rm_file(f"{self.root}/{file}")

    def remove(self, name: str) -> None:
        """Delete a checkpoint, its marker first."""
        self.fs.invalidate_cache()
        if self.marker(name) is not None:
            self.remove_file(f"{name}/{MARKER}")
        self.fs.invalidate_cache()
        if self.fs.exists(f"{self.root}/{name}"):
            self.fs.rm(f"{self.root}/{name}", recursive=True)


def step_of(name: str) -> int:
    return int(name.rpartition("-")[2])


def reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def parse_marker(data: bytes) -> dict[str, Any]:
    """What `verify.read_marker` finds in these bytes.

    Raises:
        ValueError: if they are damaged.
    """
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, MARKER).write_bytes(data)
        return read_marker(directory)


def in_parallel(actions: Iterable[Callable[[], None]], workers: int) -> None:
    """Do `actions` in threads; after one has failed, begin no more, and raise its error when all have stopped.

    The threads are daemons, unlike those of an executor: one that waits for a dead server does not hold up the end of
    the program.
    """
    waiting, errors = deque(actions), list[BaseException]()

    def work() -> None:
        while not errors:
            try:
                action = waiting.popleft()
            except IndexError:
                return
            try:
                action()
            except BaseException as error:
                errors.append(error)

    threads = [
        threading.Thread(target=work, name=f"remote-checkpoint-{i}", daemon=True)
        for i in range(min(workers, len(waiting)))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
