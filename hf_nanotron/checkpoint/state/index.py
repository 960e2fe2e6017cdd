"""The index of a training state, read and checked as one whole: geometry, places in the files, the files' own headers.

An index with valid checksums may still be forged, or joined from two. So its pieces must lie in the files one after the
other without gaps, and each file's own header, which is under the index's checksum, must say the same of every tensor.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files.checked import read_checked
from ..files.disk import StrPath, crc32
from ..files.inside import inside
from ..files.safetensors_file import DTYPES
from ..files.schema import EARLIER, INDEX as INDEX_KEYS, RANK, VERSIONED, load_json, require, show
from .file import DIGEST, FORMAT, INDEX, VERSION
from .pieces import Piece, check_complete, digest, find_fault, tensor_name
from .values import decode


@dataclass(frozen=True)
class StateIndex:
    """What `index.json` says."""

    path: Path  # of the index
    block_bytes: int  # bytes under one checksum
    files: dict[str, Any]  # name -> `bytes` and `header` (its length and crc32)
    pieces_of: dict[str, list[Piece]]  # file -> its pieces, each with the keys of `schema.RANK`
    scalars: dict[str, dict[str, Any]]  # tensor -> what the optimizer keeps for the whole of it, decoded
    values: dict[str, Any]  # what was given to `state_file.commit`

    @classmethod
    def read(cls, directory: StrPath) -> StateIndex:
        """The index of a `training_state/`. Reads no other file."""
        path = inside(directory, INDEX, str(directory))
        if not path.is_file():
            raise ValueError(
                f"{directory} holds no {INDEX}: saving was not finished, or it is not a training state; use an earlier "
                "checkpoint."
            )
        return cls.of(path, read_checked(path))

    @classmethod
    def of(cls, path: Path, body: Any) -> StateIndex:
        """What `path` held."""
        require(VERSIONED, body, path)
        if body["version"] != VERSION or body["format"] != FORMAT:
            raise ValueError(
                f"{path} has format {show(body['format'])}, version {body['version']}; this program reads {FORMAT!r}, "
                f"version {VERSION}."
            )
        require(INDEX_KEYS, require(RANK, body, path), path)
        require(find_fault, body, path)
        check_complete(path, body["pieces"])
        pieces_of: dict[str, list[Piece]] = {name: [] for name in body["files"]}
        for piece in body["pieces"]:
            pieces_of[piece["file"]].append(piece)
        scalars = {name: decode(value, f"{path}: scalars[{name!r}]") for name, value in body["scalars"].items()}
        for name, value in scalars.items():
            if not isinstance(value, dict):
                raise ValueError(f"{path} is damaged or forged: scalars[{name!r}] is no object; {EARLIER}.")
        values = decode(body["values"], f"{path}: values")
        return cls(path, body["block_bytes"], body["files"], pieces_of, scalars, values)

    def place(self, file: str) -> Path:
        return inside(self.path.parent, file, str(self.path))

    def check_header(self, file: str, header: bytes | bytearray) -> None:
        """Compare a file's header, as it was read, with its checksum and with what the index says of its tensors."""
        path, (length, checksum) = self.path.parent / file, self.files[file]["header"]
        if len(header) != length or zlib.crc32(header) != checksum:
            raise ValueError(f"{path} is damaged: the checksum of its header differs; {EARLIER}.")
        found = load_json(bytes(header[8:]), f"the header of {path}")
        expected = dict(self._tensors(file))
        if isinstance(found, dict) and int.from_bytes(header[:8], "little") == length - 8:
            metadata = found.pop("__metadata__", None)
            own = metadata.get(DIGEST) if isinstance(metadata, dict) else None
            names = sorted(found.keys() | expected.keys())
            wrong = next((name for name in names if found.get(name) != expected.get(name)), None)
            if wrong is None and own in (None, digest(self.pieces_of[file])):  # older files have none
                return
            if wrong is None:
                says = "is of pieces elsewhere in their tensors"
            else:
                says = f"has {show(found.get(wrong))} for {wrong!r}, where {INDEX} has {show(expected.get(wrong))}"
        else:
            says = "is not that of a safetensors file"
        raise ValueError(f"{path} is not the file of this index: its header {says}; {EARLIER}.")

    def _tensors(self, file: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Of the header of a safetensors file: a tensor and its entry."""
        for piece in self.pieces_of[file]:
            numel = piece["stop"] - piece["start"]
            for kind, (dtype, offset, _) in piece["tensors"].items():
                end = offset + numel * DTYPES[dtype].itemsize
                yield tensor_name(piece, kind), {"dtype": dtype, "shape": [numel], "data_offsets": [offset, end]}

    def check_block(self, path: Path, what: str, number: int, data: bytes | memoryview, checksums: str) -> None:
        """Refuse a block of a tensor, as it was read from `path`, whose checksum differs."""
        if crc32(data) != checksums[number * 8 : number * 8 + 8]:
            raise ValueError(f"{path} is damaged: the checksum of {what}, block {number}, differs; {EARLIER}.")

    def blocks(self, file: str) -> Iterator[tuple[str, int, int, str]]:
        """The tensors of a file in the order of their bytes: what, first byte in the file, bytes, checksums."""
        length = self.files[file]["header"][0]
        tensors = [
            (length + offset, (piece["stop"] - piece["start"]) * DTYPES[dtype].itemsize, piece["name"], kind, checksums)
            for piece in self.pieces_of[file]
            for kind, (dtype, offset, checksums) in piece["tensors"].items()
        ]
        for offset, size, name, kind, checksums in sorted(tensors):
            yield f"{kind} of {name!r}", offset, size, checksums
