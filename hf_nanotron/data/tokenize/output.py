"""The folder that files of tokens are written to: a local one, or any that fsspec knows.

What the command itself needs to know is in `.tokenize/` there. A file gets its name when it is complete.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ...redaction import printable, printable_url
from ..tokens.byte_ranges import described, file_system, is_remote, list_folder, local_path
from ..tokens.same_tokenizer import OWN


class OutputFolder:
    """Where a corpus is written.

    Args:
        path: folder, or URL of one.
        storage_options: for fsspec.

    Attributes:
        shown: its name for messages.
    """

    def __init__(self, path: str | os.PathLike[str], storage_options: dict[str, Any] | None = None) -> None:
        text = os.fspath(path)
        self.is_remote = is_remote(text)
        self.path = text.rstrip("/") if self.is_remote else os.path.abspath(local_path(text))
        self.options = dict(storage_options or {})
        self.shown = printable_url(text)
        if not self.is_remote and os.path.exists(self.path) and not os.path.isdir(self.path):
            raise ValueError(f"{self.shown} is a file; give a folder to write to.")

    @contextlib.contextmanager
    def written(self) -> Iterator[None]:
        """Say of an error of writing which folder it is about: that of a full disk names no file."""
        try:
            yield
        except OSError as error:
            if self.shown in str(error):
                raise
            raise OSError(f"{self.shown} cannot be written to ({error}); what is complete is kept.") from error

    def sizes(self, below: str = "") -> dict[str, int]:
        """Bytes of the files in it, or in a folder below, by name; without those of its subfolders."""
        path = f"{self.path}/{below}" if below else self.path
        return {name: stat.size for name, stat in (list_folder(path, self.options) or {}).items()}

    def read(self, name: str) -> dict[str, Any] | None:
        """A JSON file; None if there is none, or it is not what was written there."""
        try:
            if self.is_remote:
                fs, inner = file_system(self.path, self.options)
                with described(self.path, self.options):
                    data = fs.cat_file(f"{inner}/{name}")
            else:
                data = Path(self.path, name).read_bytes()
            found = json.loads(data)
        except (FileNotFoundError, ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None

    def write(self, name: str, content: Any) -> None:
        """A JSON file, at once."""
        with self.written():
            self._write(name, json.dumps(content, indent=1).encode())

    def _write(self, name: str, data: bytes) -> None:
        if self.is_remote:
            fs, inner = file_system(self.path, self.options)
            with described(self.path, self.options, "written to"):
                fs.makedirs(f"{inner}/{name}".rpartition("/")[0], exist_ok=True)
                fs.pipe_file(f"{inner}/{name}", data)
            return
        path = Path(self.path, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}")
        with open(unfinished, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)

    def publish(self, folder: Path, names: Sequence[str]) -> None:
        """Give complete files of a `workplace` their place in the folder, in this order."""
        if self.is_remote:
            fs, inner = file_system(self.path, self.options)
            with described(self.path, self.options, "written to"):
                fs.makedirs(inner, exist_ok=True)
                for name in names:
                    fs.put_file(str(folder / name), f"{inner}/{name}")
                    (folder / name).unlink()
            return
        for name in names:
            os.replace(folder / name, Path(self.path, name))
        with _opened(self.path) as handle:  # the names, too, are on the disk
            os.fsync(handle)

    def remove(self, names: Sequence[str]) -> None:
        """Files of the folder, and all of `.tokenize/`."""
        if self.is_remote:
            fs, inner = file_system(self.path, self.options)
            paths = [f"{inner}/{name}" for name in names]
            with described(self.path, self.options, "written to"):
                with contextlib.suppress(FileNotFoundError):
                    paths += fs.find(f"{inner}/{OWN}")
                for path in paths:
                    with contextlib.suppress(FileNotFoundError):
                        fs.rm_file(path)
            return
        for name in names:
            Path(self.path, name).unlink(missing_ok=True)
        for own in sorted(Path(self.path, OWN).rglob("*"), reverse=True):
            if own.is_dir() and not own.is_symlink():
                own.rmdir()
            elif own.name != "lock":
                own.unlink(missing_ok=True)

    @contextlib.contextmanager
    def workplace(self, rank: int) -> Iterator[Path]:
        """A local folder for files that are not complete, empty, of one shard. It is on the disk of the output."""
        parent = None
        if not self.is_remote:
            parent = Path(self.path, OWN, "unfinished")
            parent.mkdir(parents=True, exist_ok=True)
            for left in parent.glob(f"{rank:05d}-*"):  # by a process that was killed
                _delete(left)
        with tempfile.TemporaryDirectory(dir=parent, prefix=f"{rank:05d}-", ignore_cleanup_errors=True) as folder:
            yield Path(folder)

    @contextlib.contextmanager
    def lock(self, wait: bool) -> Iterator[None]:
        """Keep other processes of this machine from writing to a local folder. A remote one is not locked.

        Raises:
            RuntimeError: if another process writes to it, unless this one is to wait.
        """
        if self.is_remote:
            yield
            return
        path = Path(self.path, OWN, "lock")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{self.shown} cannot be written to: {printable(str(error))}.") from error
        with open(path, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise RuntimeError(f"another process is writing to {self.shown}; wait until it has ended.") from None
            yield


@contextlib.contextmanager
def _opened(folder: str) -> Iterator[int]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)


def _delete(folder: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        for path in folder.iterdir():
            path.unlink(missing_ok=True)
        folder.rmdir()
