"""Whether a checkpoint is complete: its marker, which `commit` explains, and the comparison of its files with it."""

from __future__ import annotations

from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME

from ..files.checked import parse_checked, read_checked
from ..files.disk import CHUNK_BYTES, StrPath, check_length, checksum_of, read_at
from ..files.inside import inside
from ..files.readers import Readers
from ..files.schema import MARKER as MARKER_KEYS, VALUES, VERSIONED, require, show
from ..state.file import INDEX
from ..state.generators import check_generators
from ..state.index import StateIndex
from ..state.progress import check_progress
from ..state.training_state import DIRECTORY

FORMAT = "hf_nanotron checkpoint"
VERSION = 1
MARKER = "committed.json"
WRITTEN = ".written"  # there while a checkpoint is being written
STATE_INDEX = f"{DIRECTORY}/{INDEX}"
STATE_FILES = f"{DIRECTORY}/rank-*.safetensors"
# What a resume reads as a whole; of the rest it verifies what it reads.
RNG_FILES = "rng_state*.pth"
READ_BY_RESUME = (TRAINER_STATE_NAME, RNG_FILES, STATE_INDEX)


def read_marker(directory: StrPath) -> dict[str, Any]:
    """The marker: `step`, `hub_weights` (whether the Hub's weights are in the checkpoint) and `files`."""
    directory = Path(directory)
    path = directory / MARKER
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory; resume_from_checkpoint takes a checkpoint of this run.")
    try:
        return _marker(read_checked(inside(directory, MARKER, str(directory))), path)
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


def parse_marker(data: bytes, where: object) -> dict[str, Any]:
    """As `read_marker`, of the bytes that `where` held."""
    return _marker(parse_checked(data, where), where)


def _marker(body: Any, where: object) -> dict[str, Any]:
    require(VERSIONED, body, where)
    if body["format"] != FORMAT or body["version"] != VERSION:
        raise ValueError(
            f"{where} is of format {show(body['format'])}, version {body['version']}; this program reads {FORMAT!r}, "
            f"version {VERSION}."
        )
    require(MARKER_KEYS, body, where)
    for name, entry in body["files"].items():
        if entry["crc32"] is None and not fnmatch(name, STATE_FILES):
            raise ValueError(f"{where} is damaged or forged: it has no checksum for {show(name)}.")
    if any(name.partition("/")[0] == MARKER for name in body["files"]):
        raise ValueError(f"{where} is damaged or forged: it names itself.")
    return body


def is_committed(directory: StrPath) -> bool:
    """Whether `directory` has a valid marker. Says nothing of its files; `check` does."""
    try:
        read_marker(directory)
    except ValueError:
        return False
    return True


def is_marked(directory: Path, data: bytes | None) -> bool:
    """Whether the marker of `directory` is exactly `data`, with all checksums; None is that of no checkpoint."""
    try:
        return data is not None and (directory / MARKER).read_bytes() == data
    except OSError:
        return False


def is_torn(directory: StrPath) -> bool:
    """Whether `directory` is what an interrupted `begin`, save or `remove` has left.

    False for those of other programs, and for what cannot be read: another thread may just have deleted it.
    """
    directory = Path(directory)
    try:
        return not (directory / MARKER).exists() and ((directory / WRITTEN).is_dir() or not any(directory.iterdir()))
    except OSError:
        return False


def check(directory: StrPath, deep: bool = True, part: tuple[int, int] = (0, 1)) -> None:
    """Compare a checkpoint with its marker.

    Args:
        deep: read the files and compare checksums, not only lengths.
        part: `(i, n)`: only share `i` of the files dealt to `n` ranks by size, so that together they read each once.

    Raises:
        ValueError: if there is no valid marker, or naming the file that is missing, cut off, damaged or unreadable.
    """
    directory, (first, count) = Path(directory), part
    marker = read_marker(directory)
    files: dict[str, Any] = marker["files"]
    if STATE_INDEX in files and TRAINER_STATE_NAME not in files:
        raise ValueError(f"{directory / MARKER} names no {TRAINER_STATE_NAME}, which says where the run was.")
    mine = sorted(files, key=lambda name: (-files[name]["bytes"], name))[first::count]
    for name in mine:
        path = inside(directory, name, str(directory / MARKER))
        check_length(path, files[name]["bytes"], f"{MARKER} names it")
    try:
        for name in mine:
            if deep or any(fnmatch(name, pattern) for pattern in READ_BY_RESUME):
                check_sum(directory / name, files[name]["crc32"])
        if TRAINER_STATE_NAME in mine:
            check_progress(directory, marker["step"])
        for name in mine:
            if fnmatch(name, RNG_FILES):
                check_generators(directory / name)
        if not deep:
            return
        has_blocks = [name for name in mine if files[name]["crc32"] is None]
        index = read_state_index(directory, files) if has_blocks or STATE_INDEX in mine else None
        for name in has_blocks:
            assert index is not None
            check_blocks(directory / name, index)
    except OSError as error:
        raise ValueError(f"{error.filename or directory} cannot be read ({error}).") from error


def read_state_index(directory: Path, files: dict[str, Any]) -> StateIndex:
    """The index of the training state, compared with the `files` of the marker."""
    index = StateIndex.read(directory / DIRECTORY)
    require(VALUES, index.values, f"{index.path}: values")
    listed = {name.rpartition("/")[2]: entry["bytes"] for name, entry in files.items() if fnmatch(name, STATE_FILES)}
    own = {name: entry["bytes"] for name, entry in index.files.items()}
    for name in sorted(listed.keys() | own.keys()):
        if listed.get(name) != own.get(name):
            raise ValueError(
                f"{index.path} is not the one of this checkpoint: {name} has {own.get(name, 'no')} bytes there, but "
                f"{listed.get(name, 'no')} in {MARKER}; use an earlier checkpoint."
            )
    return index


# ---- files ----


def check_sum(path: Path, expected: str | None) -> None:
    """Compare a file with its checksum, if it has one."""
    if expected is not None and (found := checksum_of(path)) != expected:
        raise ValueError(f"{path} is damaged: its crc32 is {found} instead of {expected}.")


def check_blocks(path: Path, index: StateIndex, name: str | None = None) -> None:
    """Compare a file of the training state with the checksums in its index, which cover every byte of it.

    `name`: of the file in the index, if it has another one while it is written.
    """
    name = name or path.name
    if name not in index.files:
        raise ValueError(f"{path} is not a part of the training state: {INDEX} does not name it.")
    block = index.block_bytes
    most = max(CHUNK_BYTES // block, 1) * block
    with open(path, "rb") as file, Readers(index.files[name]["bytes"], most) as readers:
        index.check_header(name, file.read(index.files[name]["header"][0]))

        def check(what: str, offset: int, size: int, first: int, checksums: str, buffer: memoryview) -> None:
            data = buffer[: read_at(file.fileno(), offset, buffer[:size])]
            for number, start in enumerate(range(0, size, block), first):
                index.check_block(path, what, number, data[start : start + block], checksums)

        for what, offset, size, checksums in index.blocks(name):
            for start in range(0, size, most):
                part = min(most, size - start)
                readers.give(partial(check, what, offset + start, part, start // block, checksums))
