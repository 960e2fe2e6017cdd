"""JSON with a checksum of itself in its first line."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from .disk import crc32, durable_file, sync
from .schema import EARLIER, load_json

LARGEST = 4 << 30  # bytes of a JSON file that is read


def write_checked(path: Path, body: dict[str, Any], durable: bool = True) -> None:
    """Write JSON with a checksum of itself in its first line, all at once: a reader finds the whole file or none.

    A `durable` one survives a power failure from the return on.
    """
    rest = json.dumps(body, separators=(",", ":"), allow_nan=False).removeprefix("{").encode() + b"\n"
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)  # a link would be written through
    with durable_file(temporary, "xb", durable) as file:
        file.write(_first_line(rest) + rest)
    os.replace(temporary, path)
    if durable:
        sync(path.parent)  # the names of all files


def read_checked(path: Path) -> dict[str, Any]:
    """What `write_checked` wrote."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
        raise ValueError(f"{path} is not a regular file; {EARLIER}.")
    if status.st_size > LARGEST:
        raise ValueError(f"{path} is damaged: it has {status.st_size} bytes; {EARLIER}.")
    with open(path, "rb") as file:
        first = file.readline(FIRST_LINE_BYTES)
        is_ours = first.startswith(b'{"crc32":"') and first.endswith(b"\n")
        return parse_checked(first + file.read() if is_ours else first, path)


def parse_checked(data: bytes, where: object) -> dict[str, Any]:
    """As `read_checked`, of bytes that `where` held."""
    first, newline, rest = data.partition(b"\n")
    if first + newline != _first_line(rest):
        raise ValueError(f"{where} is truncated or damaged: its checksum differs; {EARLIER}.")
    return load_json(data, where)


def _first_line(rest: bytes) -> bytes:
    return f'{{"crc32":"{crc32(rest)}",\n'.encode()


FIRST_LINE_BYTES = len(_first_line(b""))
