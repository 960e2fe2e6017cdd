"""Where the tensors of a repository's files are: what one rank finds out, and the others read by."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from ..files.safetensors_file import DTYPES, open_safetensors
from ..files.schema import load_json
from .trace import Sizes

AGAIN = "fetch it again"


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is: `dtype` as safetensors calls it, `offset` of its first byte in the file."""

    file: str
    dtype: str
    shape: Sizes
    offset: int

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def rows(self) -> int:
        """Of its first dimension; 1 without dimensions."""
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        return self.torch_dtype.itemsize * prod(self.shape[1:])


@dataclass(frozen=True)
class Contents:
    """What a repository holds: the bytes of each file, and its tensors by name."""

    files: dict[str, int]
    tensors: dict[str, StoredTensor]


def read_contents(directory: Path, files: dict[str, Path]) -> Contents:
    """Read the headers of `files` (name in the repository -> path), and no byte of a tensor.

    Raises:
        ValueError: naming a file that is truncated or damaged.
    """
    tensors: dict[str, StoredTensor] = {}
    for name, path in files.items():
        open_safetensors(path, AGAIN)  # compares all places with each other and with the file's length
        with open(path, "rb", buffering=0) as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = load_json(file.read(length), f"the header of {path}", AGAIN)
        for tensor, entry in header.items():
            if tensor != "__metadata__":
                place = 8 + length + entry["data_offsets"][0]
                tensors[tensor] = StoredTensor(name, entry["dtype"], tuple(entry["shape"]), place)
    return Contents({name: path.stat().st_size for name, path in files.items()}, tensors)
