"""Files on stable storage, their lengths and their checksums."""

from __future__ import annotations

import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

StrPath = str | os.PathLike[str]
CHUNK_BYTES = 16 << 20  # of one transfer to or from the host's memory


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a directory's names, are on stable storage."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def durable_file(path: Path, mode: str = "wb", durable: bool = True) -> Iterator[IO[Any]]:
    """A file to write, which is on stable storage after the `with`."""
    with open(path, mode) as file:
        yield file
        file.flush()
        if durable:
            os.fsync(file.fileno())


def size_of(path: Path) -> int | None:
    """Bytes of a file; None if it is gone, or no regular file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def check_length(path: Path, expected: int, why: str, advice: str = "") -> None:
    end = f"; {advice}." if advice else "."
    try:
        status = path.stat()
    except FileNotFoundError:
        raise ValueError(f"{path} is missing, but {why}{end}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error}){end}") from error
    if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
        raise ValueError(f"{path} is not a regular file, but {why}{end}")
    if (size := status.st_size) != expected:
        fault = "was cut off" if size < expected else "has grown"
        raise ValueError(f"{path} {fault}: it has {size} bytes instead of {expected}{end}")


def read_at(handle: int, offset: int, data: memoryview) -> int:
    """Fill `data` from an open file, which other threads may read too; how many bytes there were."""
    done = 0
    while done < len(data):
        count = os.preadv(handle, [data[done:]], offset + done)
        if count == 0:
            break
        done += count
    return done


def crc32(data: bytes | bytearray | memoryview) -> str:
    """Eight hexadecimal digits, as all checksums of a checkpoint are written."""
    return f"{zlib.crc32(data):08x}"


def checksum_of(path: Path) -> str:
    """The crc32 of a file."""
    checksum = 0
    with open(path, "rb", buffering=0) as file:
        while data := file.read(CHUNK_BYTES):
            checksum = zlib.crc32(data, checksum)
    return f"{checksum:08x}"
