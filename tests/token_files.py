"""Files of token ids, written byte by byte as their formats say."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from fsspec.implementations.memory import MemoryFileSystem

MEGATRON_CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "float64": 6, "float32": 7, "uint16": 8}


def documents(count: int, seed: int = 0, longest: int = 40, vocabulary: int = 100) -> list[list[int]]:
    """Random documents, some of them of one token. Ids are 1 to `vocabulary - 1`; the last of each is 0."""
    rng = np.random.default_rng(seed)
    return [[*rng.integers(1, vocabulary, rng.integers(0, longest)).tolist(), 0] for _ in range(count)]


def write_ds(
    path: Path | str,
    docs: Sequence[Sequence[int]],
    token_size: int = 2,
    index: bool = True,
    loss: Sequence[int] | None = None,
    metadata: str | None = None,
) -> np.ndarray:
    """A `.ds`, and what stands beside it. Returns its tokens."""
    tokens = np.array([token for doc in docs for token in doc], f"<u{token_size}")
    files = {"": tokens.tobytes()}
    if index:
        files[".index"] = np.cumsum([len(doc) for doc in docs]).astype("<u8").tobytes()
    if loss is not None:
        files[".loss"] = np.array(loss, np.uint8).tobytes()
    if metadata is not None:
        files[".metadata"] = metadata.encode()
    for end, data in files.items():
        with fsspec.open(f"{path}{end}", "wb") as file:
            file.write(data)
    return tokens.astype(np.int64)


def write_megatron(prefix: Path, docs: Sequence[Sequence[Sequence[int]]], dtype: Any = "uint16") -> np.ndarray:
    """A `.bin` and its `.idx`, by the table of the format: documents of sequences. Returns the tokens."""
    dtype = np.dtype(dtype)
    sequences = [sequence for doc in docs for sequence in doc]
    lengths = np.array([len(sequence) for sequence in sequences], np.int32)
    pointers = np.concatenate([[0], np.cumsum(lengths.astype(np.int64))[:-1]]) * dtype.itemsize
    indices = np.cumsum([0, *(len(doc) for doc in docs)])
    tokens = np.array([token for sequence in sequences for token in sequence], dtype)
    Path(f"{prefix}.bin").write_bytes(tokens.tobytes())
    Path(f"{prefix}.idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, MEGATRON_CODES[dtype.name], len(sequences), len(indices))
        + lengths.tobytes()
        + pointers.astype("<i8").tobytes()
        + indices.astype("<i8").tobytes()
    )
    return tokens.astype(np.int64)


def flat(docs: Sequence[Sequence[int]]) -> np.ndarray:
    return np.array([token for doc in docs for token in doc], np.int64)


class CountingFileSystem(MemoryFileSystem):
    """Keeps what was asked of it: the bytes of each range."""

    protocol = "counting"
    requests: list[tuple[str, int, int]] = []
    store: dict[str, Any] = {}
    pseudo_dirs = [""]

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return MemoryFileSystem._strip_protocol(path.replace("counting://", "memory://", 1))

    def unstrip_protocol(self, name: str) -> str:
        return "counting://" + name.lstrip("/")

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        data = super().cat_file(path, start, end, **kwargs)
        self.requests.append((path, start or 0, len(data)))
        return data


def count_requests() -> list[tuple[str, int, int]]:
    """An empty list, to which the reads of `counting://` files are added."""
    fsspec.register_implementation("counting", CountingFileSystem, clobber=True)
    CountingFileSystem.requests = []
    CountingFileSystem.store.clear()
    return CountingFileSystem.requests
