"""How long the documents of token files are: from where they end alone, of all of them or of a sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .tokens.documents import Documents, scan
from .tokens.packing import WINDOW, row_count
from .tokens.token_file import TokenFile

MOST_DOCUMENTS = 2**24  # whose ends are read, of all files: 128 MiB
MOST_TOKENS = 2**28  # that are read where nothing says where documents end


@dataclass
class Lengths:
    """Lengths of documents, in windows of consecutive ones.

    Attributes:
        windows: int64, of the documents that were looked at; those of one window follow each other in one file.
        documents: in all files; an estimate if `scanned` tokens are not all, None if nothing says where they end.
        looked_at: documents in `windows`.
        tokens: in all files.
    """

    windows: list[np.ndarray]
    documents: int | None
    tokens: int

    @property
    def looked_at(self) -> int:
        return sum(map(len, self.windows))

    @property
    def is_sample(self) -> bool:
        return self.documents is not None and self.looked_at < self.documents

    @property
    def all(self) -> np.ndarray:
        return np.concatenate(self.windows) if self.windows else np.empty(0, np.int64)

    def packing(self, sequence_length: int) -> tuple[int, float]:
        """Rows that `documents="pack"` makes of all documents, and the share of them that stays empty."""
        rows = sum(row_count(window, sequence_length) for window in self.windows)
        held = sum(int(window.sum()) for window in self.windows)
        if not rows:
            return 0, 0.0
        waste = 1 - held / (rows * sequence_length)
        return (rows if not self.is_sample else round(rows * self.tokens / held)), waste


def read_lengths(files: Sequence[TokenFile], eos_token_id: int | None = None) -> Lengths:
    """Lengths of the documents of these files.

    At most `MOST_DOCUMENTS` are looked at, in windows that are spread evenly over all of them. Of files that do not
    say where their documents end, at most `MOST_TOKENS` tokens are read, if `eos_token_id` says what ends them.
    """
    tokens = sum(file.tokens for file in files)
    if any(file.documents is None for file in files):
        return _scanned(files, eos_token_id, tokens)
    sets = [file.documents for file in files if file.documents is not None]
    count = sum(documents.count for documents in sets)
    return Lengths(list(_windows(sets, count)), count, tokens)


def _windows(sets: Sequence[Documents], count: int) -> Iterator[np.ndarray]:
    spans = [(d, first, min(first + WINDOW, d.count)) for d in sets for first in range(0, d.count, WINDOW)]
    chosen = range(len(spans))
    if count > MOST_DOCUMENTS:
        number = max(1, MOST_DOCUMENTS // WINDOW)
        chosen = sorted({int((k + 0.5) * len(spans) / number) for k in range(number)})  # type: ignore[assignment]
    for place in chosen:
        documents, first, stop = spans[place]
        yield np.diff(documents.edges(first, stop))


def _scanned(files: Sequence[TokenFile], eos_token_id: int | None, tokens: int) -> Lengths:
    if eos_token_id is None:
        return Lengths([], None, tokens)
    windows, read = [], 0
    for file in files:
        stop = min(file.tokens, MOST_TOKENS - read)
        chunks = (file.read(start, min(start + 2**22, stop)) for start in range(0, stop, 2**22))
        lengths = np.diff(scan(chunks, eos_token_id).edges(0, file.tokens))
        read += stop
        if stop < file.tokens:
            lengths = lengths[:-1]  # the last one goes on
        windows += [lengths[first : first + WINDOW] for first in range(0, len(lengths), WINDOW)]
        if read >= MOST_TOKENS:
            break
    seen = sum(map(len, windows))
    return Lengths(windows, seen if read == tokens else max(round(seen * tokens / read), seen + 1), tokens)
