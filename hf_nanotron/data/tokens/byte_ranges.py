"""Ranges of bytes of files: local ones through a memory map, any other by ranged requests and a bounded block cache."""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import fsspec
import numpy as np
from transformers.utils import logging

from ...redaction import credentials_in, printable, printable_url, secrets_of
from .file_map import map_file

logger = logging.get_logger(__name__)

PAUSES = (0.5, 2.0, 8.0)  # seconds before a range of a remote file is asked for again
BLOCK_BYTES = 64 * 2**10  # a row of 4,096 ids of two bytes takes two blocks at most
CACHE_BYTES = 64 * 2**20
# What brings the file systems of URLs, among the extras of this package.
EXTRAS = {"s3": "remote", "s3a": "remote", "gs": "gcs", "gcs": "gcs"}
# Under these names file systems tell when a file was written, or which version it is.
_VERSIONS = ("mtime", "LastModified", "last_modified", "updated", "etag", "ETag", "created")


class Stat(NamedTuple):
    """A file as its folder lists it.

    Attributes:
        path: local path or URL.
        size: bytes.
        version: changes when the file is written again; an empty text where the file system does not tell.
    """

    path: str
    size: int
    version: str


def is_remote(path: str) -> bool:
    return "://" in path and not path.startswith(("file://", "local://"))


def local_path(path: str) -> str:
    """The path of a local file or of a `file://` URL; `~` is the home folder."""
    return os.path.expanduser(path.split("://", 1)[1] if "://" in path else path)


def short_name(path: str | os.PathLike[str]) -> str:
    """Of a path or URL its last part, without what follows a dot, and without the query and credentials of a URL."""
    return os.path.basename(printable_url(os.fspath(path)).partition("?")[0].rstrip("/")).split(".")[0]


@contextlib.contextmanager
def described(url: str, options: dict[str, Any] | None = None, what: str = "read") -> Iterator[None]:
    """Turn what the package of a remote file system raises into an OSError that names `url`, without credentials.

    That a file is not there, and errors of local files, which name them, pass. An error that holds credentials is not
    chained: a traceback would print it.
    """
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise
    except Exception as error:
        if not is_remote(url):
            raise
        known = [*credentials_in(url), *secrets_of(options or {})]
        text = printable(" ".join(str(error).split()), known) or type(error).__name__
        cause = error if text == " ".join(str(error).split()) else None
        raise OSError(f"{printable_url(url)} cannot be {what} ({text})") from cause


def file_system(url: str, options: dict[str, Any] | None = None) -> tuple[Any, str]:
    """File system of a URL and the path in it. fsspec caches it by process, so that a forked worker gets its own."""
    try:
        return fsspec.core.url_to_fs(url, **(options or {}))
    except ImportError as error:
        extra = EXTRAS.get(url.partition("://")[0])
        how = f" (pip install 'hf-nanotron[{extra}]')" if extra else ""
        raise ValueError(f"{printable_url(url)}: {printable(str(error))}{how}") from error
    except ValueError as error:
        raise ValueError(f"{printable_url(url)}: {printable(str(error))}") from error


@dataclass
class LocalFile:
    """A file of this machine. The map is made at the first read, and again in each process that gets a pickled copy."""

    path: str
    size: int
    _map: np.ndarray | None = field(default=None, repr=False, compare=False)

    is_local = True

    def array(self, dtype: np.dtype, offset: int, count: int) -> np.ndarray:
        """`[count]` numbers that begin at byte `offset`: a view into the map."""
        if self._map is None:
            self._map = map_file(self.path, self.size)
        return self._map[offset : offset + count * dtype.itemsize].view(dtype)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_map": None}


@dataclass
class BlockCache:
    """The blocks of remote files that were read last, at most `limit` bytes of them. Not part of a pickle."""

    block: int = BLOCK_BYTES
    limit: int = CACHE_BYTES
    options: dict[str, Any] = field(default_factory=dict, repr=False)  # may hold keys
    blocks: OrderedDict[tuple[str, int], bytes] = field(default_factory=OrderedDict, repr=False, compare=False)

    def fetch(self, wanted: Iterable[tuple[RemoteFile, int, int]]) -> None:
        """Have the blocks of these ranges (file, first byte, end) in the cache: what is missing in one call."""
        runs: list[tuple[RemoteFile, int, int]] = []  # of neighbouring blocks: file, first, end
        seen: set[tuple[str, int]] = set()
        for file, start, stop in wanted:
            for number in range(start // self.block, -(-stop // self.block)):
                key = (file.path, number)
                if key in self.blocks:
                    self.blocks.move_to_end(key)
                    continue
                if key in seen:
                    continue
                seen.add(key)
                if runs and runs[-1][0] is file and runs[-1][2] == number:
                    runs[-1] = (file, runs[-1][1], number + 1)
                else:
                    runs.append((file, number, number + 1))
        if not runs:
            return
        spans = [(f.path, first * self.block, min(end * self.block, f.size)) for f, first, end in runs]
        for (file, first, end), data in zip(runs, read_ranges(spans, self.options), strict=True):
            for number in range(first, end):
                at = (number - first) * self.block
                self.blocks[file.path, number] = data[at : at + self.block]

    def shrink(self) -> None:
        """Drop the blocks that were not read for longest, down to the limit."""
        while len(self.blocks) * self.block > self.limit and len(self.blocks) > 1:
            self.blocks.popitem(last=False)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"blocks": OrderedDict()}


@dataclass
class RemoteFile:
    """A file of any fsspec file system, read in ranges through a cache that the files of a dataset share."""

    path: str
    size: int
    cache: BlockCache

    is_local = False

    def __repr__(self) -> str:
        return f"RemoteFile(path={printable_url(self.path)!r}, size={self.size})"

    def array(self, dtype: np.dtype, offset: int, count: int) -> np.ndarray:
        """`[count]` numbers that begin at byte `offset`: a copy, read-only."""
        stop = min(offset + count * dtype.itemsize, self.size)
        if stop <= offset:
            return np.empty(0, dtype)
        cache, block = self.cache, self.cache.block
        cache.fetch([(self, offset, stop)])
        first = offset // block
        parts = [cache.blocks[self.path, number] for number in range(first, -(-stop // block))]
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        cache.shrink()
        return np.frombuffer(data, dtype, (stop - offset) // dtype.itemsize, offset - first * block)


AnyFile = LocalFile | RemoteFile


def read_ranges(spans: Sequence[tuple[str, int, int]], options: dict[str, Any] | None = None) -> list[bytes]:
    """Ranges (path, first byte, end) of local and remote files; the remote ones of a file system in one call.

    Raises:
        OSError: naming the file that cannot be read, also when asked again (`PAUSES`), or gave fewer bytes than it
            has.
    """
    found: list[bytes] = [b""] * len(spans)
    remote: dict[int, tuple[Any, list[int], list[str]]] = {}
    for number, (path, start, stop) in enumerate(spans):
        if is_remote(path):
            fs, inner = file_system(path, options)
            _, numbers, paths = remote.setdefault(id(fs), (fs, [], []))
            numbers.append(number)
            paths.append(inner)
        elif stop > start:
            with open(local_path(path), "rb", buffering=0) as file:
                found[number] = os.pread(file.fileno(), stop - start, start)
    for fs, numbers, paths in remote.values():
        starts, stops = [spans[number][1] for number in numbers], [spans[number][2] for number in numbers]
        for number, data in zip(numbers, _remote_ranges(fs, paths, starts, stops), strict=True):
            if isinstance(data, BaseException):
                text = printable(f"{type(data).__name__}: {data}")
                raise OSError(f"{printable_url(spans[number][0])} cannot be read ({text})") from data
            found[number] = bytes(data)
    for (path, start, stop), data in zip(spans, found, strict=True):
        if len(data) > max(stop - start, 0):
            raise OSError(
                f"{printable_url(path)} gave {len(data)} bytes when {stop - start} were asked for: its server ignores "
                "ranges; copy the files to this machine, or serve them from another one."
            )
        if len(data) != max(stop - start, 0):
            raise OSError(
                f"{printable_url(path)} gave {len(data)} of the bytes {start} to {stop}: it is shorter than when "
                "it was opened."
            )
    return found


def _remote_ranges(fs: Any, paths: list[str], starts: list[int], stops: list[int]) -> list[Any]:
    """Bytes of each range, or the error that it ends with, after what may pass was tried again."""
    found = list(fs.cat_ranges(paths, starts, stops, on_error="return"))
    for pause in PAUSES:
        failed = [number for number, data in enumerate(found) if _may_pass(data)]
        if not failed:
            break
        text = printable(f"{type(found[failed[0]]).__name__}: {found[failed[0]]}")
        url = printable_url(fs.unstrip_protocol(paths[failed[0]]))
        logger.warning(f"{url} could not be read ({text}); trying again in {pause:g} s.")
        time.sleep(pause)
        again = [[values[number] for number in failed] for values in (paths, starts, stops)]
        for number, data in zip(failed, fs.cat_ranges(*again, on_error="return"), strict=True):
            found[number] = data
    return found


def _may_pass(data: Any) -> bool:
    """Whether an answer is an error of a connection or a server, which another attempt may not meet."""
    status = getattr(data, "status", getattr(getattr(data, "response", None), "status_code", None))  # of HTTP
    if isinstance(status, int):
        return status >= 500 or status in (408, 429)
    lasting = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)
    is_of_a_connection = isinstance(data, OSError) or type(data).__module__.startswith("aiohttp.")
    return is_of_a_connection and not isinstance(data, lasting)


def list_folder(path: str, options: dict[str, Any] | None = None) -> dict[str, Stat] | None:
    """Files of a folder by name, in no order, without those of its subfolders; None if there is no such folder."""
    if not is_remote(path):
        folder = local_path(path)
        if not os.path.isdir(folder):
            return None
        with os.scandir(folder) as entries:
            return {e.name: _local_stat(e.path, e.stat()) for e in entries if e.is_file()}
    fs, inner = file_system(path, options)
    try:
        with described(path, options):
            entries = fs.ls(inner, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return None
    inner = inner.rstrip("/")
    files = [e for e in entries if e["type"] == "file" and e["name"].rstrip("/").lstrip("/") != inner.lstrip("/")]
    return {e["name"].rsplit("/", 1)[-1]: _remote_stat(fs, e) for e in files}


def stat_files(paths: Sequence[str], options: dict[str, Any] | None = None) -> dict[str, Stat]:
    """Those of the paths that are files."""
    found = {}
    for path in paths:
        if not is_remote(path):
            if os.path.isfile(plain := local_path(path)):
                found[path] = _local_stat(plain, os.stat(plain))
            continue
        fs, inner = file_system(path, options)
        try:
            with described(path, options):
                info = fs.info(inner)
        except FileNotFoundError:
            continue
        if info["type"] == "file":
            found[path] = _remote_stat(fs, info)
    return found


def refuse_twice(files: Sequence[Stat], effect: str) -> None:
    """Refuse one file by two names, be it by a symbolic or a hard link.

    Args:
        effect: what would come of it.

    Raises:
        ValueError: naming both.
    """
    alike = Counter((size, version) for _, size, version in files)  # two names of a file have its length and time
    seen: dict[Any, str] = {}
    for path, size, version in files:
        if is_remote(path):
            key: Any = path
        elif size and alike[size, version] > 1:
            key = os.stat(local_path(path))[1:3]  # inode and device
        else:
            continue
        if key in seen:
            same = "is given twice" if seen[key] == path else f"is {printable_url(seen[key])}, too"
            raise ValueError(f"{printable_url(path)} {same}: {effect}; name it once.")
        seen[key] = path


def expand(pattern: str, options: dict[str, Any] | None = None) -> list[str]:
    """Paths that a pattern with `*` or `?` stands for, sorted."""
    fs, inner = file_system(pattern, options)
    with described(pattern, options):
        found = sorted(fs.glob(inner))
    return [fs.unstrip_protocol(path) for path in found] if is_remote(pattern) else found


def _local_stat(path: str, found: os.stat_result) -> Stat:
    return Stat(path, found.st_size, str(found.st_mtime_ns))


def _remote_stat(fs: Any, entry: dict[str, Any]) -> Stat:
    version = next((str(entry[name]) for name in _VERSIONS if entry.get(name) is not None), "")
    return Stat(fs.unstrip_protocol(entry["name"]), int(entry["size"] or 0), version)
