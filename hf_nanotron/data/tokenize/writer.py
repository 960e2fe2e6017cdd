"""One shard of tokens, in datatrove's format, byte for byte what its `DocumentTokenizer` writes (see `token_file`)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..tokens.token_formats import UNKNOWN_TOKENIZER

COPY_BYTES = 64 * 2**20
ENDS = (".loss", ".index", ".metadata", "")  # of what belongs to a shard; the tokens last, in which order it appears
_PREFIXES = " kMGTPEZYRQ"


class ShardWriter:
    """Writes documents to `folder / name`, and what stands beside it when it is closed.

    Args:
        token_size: bytes of an id, 2 or 4.
        tokenizer: name of it for the metadata.
        masked: a `.loss` is written, and each document comes with what is trained on.
    """

    def __init__(self, folder: Path, name: str, token_size: int, tokenizer: str, masked: bool = False) -> None:
        self.folder, self.name, self.tokenizer, self.masked = folder, name, tokenizer, masked
        self.dtype = np.dtype(f"<u{token_size}")
        self.tokens = 0
        self._ends: list[int] = []
        self._ids: BinaryIO = open(folder / name, "wb")  # noqa: SIM115 - closed by `close`
        self._loss: BinaryIO | None = open(folder / f"{name}.loss", "wb") if masked else None  # noqa: SIM115

    @property
    def documents(self) -> int:
        return len(self._ends)

    def write(self, ids: Sequence[int], trained: Sequence[int] | None = None) -> None:
        """Add a document.

        Args:
            trained: 1 for each id that is trained on, else 0; if `masked`.

        Raises:
            OverflowError: for an id that `token_size` bytes do not hold.
        """
        self._ids.write(np.array(ids, self.dtype).tobytes())
        if self._loss is not None:
            assert trained is not None and len(trained) == len(ids)
            self._loss.write(np.array(trained, np.uint8).tobytes())
        self.tokens += len(ids)
        self._ends.append(self.tokens)

    def close(self, shuffle: int | None = None, new_name: str | None = None) -> list[str]:
        """Finish the files, on disk, and say their names.

        Args:
            shuffle: seed of a random order of the documents, that of datatrove's; None keeps theirs.
            new_name: of the shuffled file.
        """
        _finish(self._ids)
        if self._loss is not None:
            _finish(self._loss)
        ends = np.array(self._ends, "<u8")
        if shuffle is not None:
            assert new_name is not None
            ends = self._shuffled(ends.astype(np.int64), shuffle, new_name)
            self.name = new_name
        _write(self.folder / f"{self.name}.index", ends.astype("<u8").tobytes())
        name = self.tokenizer or f"{UNKNOWN_TOKENIZER}|{self.dtype.itemsize}"  # which datatrove writes twice
        lines = (f"{name}|{self.dtype.itemsize}", str(self.tokens), in_words(self.tokens))
        _write(self.folder / f"{self.name}.metadata", "\n".join(lines).encode())
        return [f"{self.name}{end}" for end in ENDS if end != ".loss" or self.masked]

    def abandon(self) -> None:
        """Delete what was written."""
        for file in (self._ids, self._loss):
            if file is not None:
                with contextlib.suppress(OSError):  # what is left in memory may not fit on a full disk
                    file.close()
        for end in ENDS:
            (self.folder / f"{self.name}{end}").unlink(missing_ok=True)

    def _shuffled(self, ends: np.ndarray, seed: int, new_name: str) -> np.ndarray:
        order = np.random.default_rng(seed).permutation(len(ends))
        starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)[order]
        lengths = np.diff(ends, prepend=0)[order]
        for end, width in (("", self.dtype.itemsize), *((".loss", 1),) * self.masked):
            path, new = self.folder / f"{self.name}{end}", self.folder / f"{new_name}{end}"
            data = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
            with open(new, "wb") as file:
                for chunk in _gathered(data, starts * width, lengths * width):
                    file.write(chunk)
                _finish(file)
            path.unlink()
        return np.cumsum(lengths)


def file_name(name: str, rank: int, shuffled: bool) -> str:
    """Of a shard, as datatrove calls it."""
    kind = "00000_doc_shuffled" if shuffled else "unshuffled"
    return f"{name}_{rank:05d}_{kind}.ds" if name else f"{rank:05d}_{kind}.ds"


def in_words(tokens: int) -> str:
    """A number of tokens, with three digits and a prefix: the last line of the metadata (humanize's `metric`)."""
    if tokens == 0:
        return "0.00 T"
    exponent = len(str(tokens)) - 1
    value, digits = tokens / 10 ** (exponent // 3 * 3), max(0, 2 - exponent % 3)
    if round(value, digits) >= 10 ** (exponent % 3 + 1):  # 999,999 is 1.00 M
        exponent += 1
        value, digits = tokens / 10 ** (exponent // 3 * 3), max(0, 2 - exponent % 3)
    return f"{value:.{digits}f} {_PREFIXES[exponent // 3].strip()}T"


def _gathered(data: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> Iterator[bytes]:
    """Pieces of `data`, one after the other, in chunks that fit into memory."""
    parts: list[bytes] = []
    size = 0
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        for at in range(start, start + length, COPY_BYTES):
            parts.append(data[at : min(at + COPY_BYTES, start + length)].tobytes())
            size += len(parts[-1])
            if size >= COPY_BYTES:
                yield b"".join(parts)
                parts, size = [], 0
    yield b"".join(parts)


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        _finish(file)


def _finish(file: BinaryIO) -> None:
    """Close, when its bytes are on the disk: a file that is renamed before may be empty after a power cut."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
