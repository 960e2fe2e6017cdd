"""Where documents begin and end in a file of token ids."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ...redaction import printable_url
from .sorted_ints import SortedInts

SCAN_TOKENS = 2**22  # ids in memory at a time, while the ends of documents are looked for


class Documents(Protocol):
    """The documents of one file, in its order. They have no gaps between them."""

    @property
    def count(self) -> int:
        """How many; some may be empty."""

    def edges(self, first: int, stop: int) -> np.ndarray:
        """`[stop - first + 1]` int64: where each of these documents begins, and where the last one ends, in tokens."""

    def within(self, start: int, stop: int) -> np.ndarray:
        """int64, ascending: tokens in [start, stop] at which a document begins. The file's first is left out at times,
        and one that would begin behind its last token may be there."""


@dataclass
class EndsInFile:
    """The documents of datatrove's `.index`: uint64 ends, exclusive, of which the last is the number of tokens."""

    ends: SortedInts
    tokens: int

    @property
    def count(self) -> int:
        return self.ends.length

    def edges(self, first: int, stop: int) -> np.ndarray:
        found = self.ends.slice(max(first - 1, 0), stop)
        before = [0] if first == 0 else []
        return _checked(np.concatenate([before, found]).astype(np.int64), 0, self.tokens, self.ends.file.path)

    def within(self, start: int, stop: int) -> np.ndarray:
        return _following(self.ends, start, stop)[1]


@dataclass
class SequencesInFile:
    """The documents of Megatron's `.idx`, each of one sequence or more.

    Attributes:
        starts: of the sequences, in tokens.
        first_sequences: of the documents; the last entry is the number of sequences.
    """

    starts: SortedInts
    first_sequences: SortedInts
    tokens: int

    @property
    def count(self) -> int:
        return max(self.first_sequences.length - 1, 0)

    def edges(self, first: int, stop: int) -> np.ndarray:
        sequences = self.first_sequences.slice(first, stop + 1)
        low, high = int(sequences[0]), int(sequences[-1])
        found = self.starts.slice(low, min(high + 1, self.starts.length))
        if high >= self.starts.length:
            found = np.append(found, self.tokens)
        return _checked(found[sequences - low], 0, self.tokens, self.starts.file.path)

    def within(self, start: int, stop: int) -> np.ndarray:
        low, found = _following(self.starts, start, stop)
        numbers = np.arange(low, low + len(found))
        firsts = self.first_sequences
        if firsts.length == self.starts.length + 1 and np.array_equal(firsts.slice(low, low + len(found)), numbers):
            return found  # as many documents as sequences
        places = firsts.search(numbers)
        begins = [
            p < firsts.length and int(firsts.slice(p, p + 1)[0]) == n for p, n in zip(places, numbers, strict=True)
        ]
        return found[np.array(begins, bool)]


@dataclass
class EndsInMemory:
    """Documents whose edges `[count + 1]` were found by reading the whole file."""

    all_edges: np.ndarray

    @property
    def count(self) -> int:
        return len(self.all_edges) - 1

    def edges(self, first: int, stop: int) -> np.ndarray:
        return self.all_edges[first : stop + 1]

    def within(self, start: int, stop: int) -> np.ndarray:
        low, high = np.searchsorted(self.all_edges, start), np.searchsorted(self.all_edges, stop, "right")
        return self.all_edges[low:high]


def scan(chunks: Iterator[np.ndarray], eos_token_id: int) -> EndsInMemory:
    """Documents that end with `eos_token_id`, which belongs to them. Ids behind the last one are a document, too."""
    found, position = [np.zeros(1, np.int64)], 0
    for chunk in chunks:
        found.append(np.flatnonzero(chunk == eos_token_id) + (position + 1))
        position += len(chunk)
    edges = np.concatenate(found)
    return EndsInMemory(edges if edges[-1] == position else np.append(edges, position))


def _following(numbers: SortedInts, start: int, stop: int) -> tuple[int, np.ndarray]:
    """Numbers in [start, stop], and how many come before them. One search; what follows is read on."""
    low = int(numbers.search(np.array([start]))[0])
    size = 64
    while True:
        high = min(low + size, numbers.length)
        found = numbers.slice(low, high)
        if high == numbers.length or found[-1] > stop:
            break
        size *= 8
    found = found[: int(np.searchsorted(found, stop, "right"))]
    return low, _checked(found, start, stop, numbers.file.path)


def _checked(edges: np.ndarray, low: int, high: int, path: str) -> np.ndarray:
    if len(edges) and (edges[0] < low or edges[-1] > high or (edges[1:] < edges[:-1]).any()):
        raise ValueError(
            f"{printable_url(path)}: the ends of documents do not ascend, or lie beyond the {high} tokens they belong "
            "to."
        )
    return edges
