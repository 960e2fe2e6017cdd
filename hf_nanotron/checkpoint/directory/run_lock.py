"""One run at a time writes checkpoints into a folder."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..files.disk import StrPath

logger = logging.get_logger(__name__)
LOCK = "_run.lock"  # pushes leave out what begins with "_"


class RunLock:
    """The lock on a folder. It ends with the process, however that ends, so that a dead run blocks nobody.

    A record lock (`fcntl.lockf`), also between the hosts of a network file system. Unlike one of `flock`, a forked
    process, such as the worker of a data loader, does not keep it. The file stays, since deleting it would let two runs
    hold a lock on two files of one name. Within a process it excludes nobody, since one trainer runs after the
    other, and it ends when that process opens and closes the file by other means.
    """

    def __init__(self) -> None:
        self._handle: int | None = None
        self._path: Path | None = None

    def acquire(self, folder: StrPath) -> str | None:
        """Take the lock, or keep it.

        Returns:
            None, or who holds it: a sentence with the folder, the host, the process and its start.
        """
        path = Path(folder, LOCK)
        if self._handle is not None and self._path == path:
            return None
        self.release()
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            if not os.path.lexists(path) or not os.access(folder, os.W_OK | os.X_OK):
                raise
            _tell(path, error)  # it is of another user, say, or a symbolic link
            return None
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            text = os.pread(handle, 4096, 0)
            os.close(handle)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return f"{_holder(text)} is writing checkpoints into {os.path.abspath(folder)}"
            _tell(path, error)
            return None
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(this_process()).encode(), 0)
        self._handle, self._path = handle, path
        return None

    def release(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
        self._handle = self._path = None


def _tell(path: Path, error: OSError) -> None:
    logger.warning(f"cannot lock {path} ({error.strerror}): a second run in this folder will not be detected.")


def this_process() -> dict[str, Any]:
    """Host, process id and the time now, for people."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "start": time.strftime("%Y-%m-%d %H:%M:%S %z")}


def in_words(said: Any) -> str:
    """What `this_process` has noted, or what stands in its place, as text for people."""
    try:
        return f"a run on host {said['host']} (process {said['pid']}, started {said['start']})"
    except (KeyError, TypeError):
        return "another run"


def _holder(text: bytes) -> str:
    try:
        return in_words(json.loads(text))
    except ValueError:  # it is just being written
        return in_words(None)
