"""Whether a checkpoint is complete: its marker, which `commit` explains, and the comparison of its files with it."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from .safetensors_file import DTYPES
from .state_file import CHUNK_BYTES, INDEX, read_checked
from .training_state import DIRECTORY

StrPath = str | os.PathLike[str]

FORMAT = "hf_nanotron checkpoint"
VERSION = 1
MARKER = "committed.json"
WRITTEN = ".written"  # there while a checkpoint is being written
STATE_INDEX = f"{DIRECTORY}/{INDEX}"
STATE_FILES = f"{DIRECTORY}/rank-*.safetensors"


def read_marker(directory: StrPath) -> dict[str, Any]:
    """The marker: `step`, `hub_weights` (whether the Hub's weights are in the checkpoint) and `files`.

    Raises:
        ValueError: if there is none, or it is damaged, or of a later version.
    """
    directory = Path(directory)
    path = directory / MARKER
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory; resume_from_checkpoint takes a checkpoint of this run.")
    try:
        marker = read_checked(path)
    except FileNotFoundError:
        if is_torn(directory):
            raise ValueError(
                f"{directory} is not committed: saving it was interrupted; resume from an earlier checkpoint, or with "
                "resume_from_checkpoint=True from the newest committed one."
            ) from None
        raise ValueError(
            f"{directory} is not committed: it has no {MARKER}, so its saving was interrupted, or it was written with "
            "save_only_model=True or by another program; start from its weights with from_pretrained instead of "
            "resume_from_checkpoint."
        ) from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error}).") from error
    if marker.get("format") != FORMAT or marker.get("version") != VERSION:
        raise ValueError(
            f"{path} is of format {marker.get('format')!r}, version {marker.get('version')}; this program reads "
            f"{FORMAT!r}, version {VERSION}."
        )
    return marker


def is_committed(directory: StrPath) -> bool:
    """Whether `directory` has a valid marker. Says nothing of its files; `check` does."""
    try:
        read_marker(directory)
    except ValueError:
        return False
    return True


def is_torn(directory: StrPath) -> bool:
    """Whether `directory` is what an interrupted `begin`, save or `remove` has left. By other programs: False."""
    directory = Path(directory)
    return not (directory / MARKER).exists() and ((directory / WRITTEN).is_dir() or not any(directory.iterdir()))


def check(directory: StrPath, deep: bool = True, part: tuple[int, int] = (0, 1)) -> None:
    """Compare a checkpoint with its marker.

    Args:
        deep: read the files and compare checksums, not only lengths.
        part: `(i, n)`: only share `i` of the files dealt to `n` ranks by size, so that together they read each once.

    Raises:
        ValueError: if there is no valid marker, or naming the file that is missing, cut off, damaged or unreadable.
    """
    directory, (first, count) = Path(directory), part
    files: dict[str, Any] = read_marker(directory)["files"]
    mine = sorted(files, key=lambda name: (-files[name]["bytes"], name))[first::count]
    for name in mine:
        check_length(directory / name, files[name]["bytes"], f"{MARKER} names it")
    if not deep:
        return
    index = None
    for name in mine:
        path, expected = directory / name, files[name]["crc32"]
        try:
            if expected is None:
                index = index or read_checked(directory / STATE_INDEX)
                check_blocks(path, index)
            elif (found := checksum_of(path)) != expected:
                raise ValueError(f"{path} is damaged: its crc32 is {found} instead of {expected}.")
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error}).") from error


# ---- files ----


def checksum_of(path: Path) -> str:
    checksum = 0
    with open(path, "rb", buffering=0) as file:
        while data := file.read(CHUNK_BYTES):
            checksum = zlib.crc32(data, checksum)
    return f"{checksum:08x}"


def check_length(path: Path, expected: int, why: str) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise ValueError(f"{path} is missing, but {why}.") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error}).") from error
    if size != expected:
        fault = "was cut off" if size < expected else "has grown"
        raise ValueError(f"{path} {fault}: it has {size} bytes instead of {expected}.")


def check_blocks(path: Path, index: dict[str, Any]) -> None:
    """Compare a file of the training state with the checksums in its index, which cover every byte of it."""
    if path.name not in index["files"]:
        raise ValueError(f"{path} is not a part of the training state: {INDEX} does not name it.")
    with open(path, "rb") as file:
        for what, offset, size, checksums, block in _ranges(path.name, index):
            file.seek(offset)
            for number, found in enumerate(_block_sums(file, size, block)):
                if found != checksums[number * 8 : number * 8 + 8]:
                    raise ValueError(f"{path} is damaged: the checksum of {what}, block {number}, differs.")


def _ranges(name: str, index: dict[str, Any]) -> Iterator[tuple[str, int, int, str, int]]:
    """The header and tensors of a file in the order of their bytes: what, offset, size, checksums, bytes of a block."""
    length, checksum = index["files"][name]["header"]
    yield "its header", 0, length, f"{checksum:08x}", length
    tensors = [
        (offset, (piece["stop"] - piece["start"]) * DTYPES[dtype].itemsize, f"{kind} of {piece['name']!r}", checksums)
        for piece in index["pieces"]
        if piece["file"] == name
        for kind, (dtype, offset, checksums) in piece["tensors"].items()
    ]
    for offset, size, what, checksums in sorted(tensors):
        yield what, length + offset, size, checksums, index["block_bytes"]


def _block_sums(file: BinaryIO, size: int, block: int) -> Iterator[str]:
    for start in range(0, size, block):
        yield f"{zlib.crc32(file.read(min(block, size - start))):08x}"
