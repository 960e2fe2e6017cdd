"""Rows of a fixed number of tokens, read from files: consecutive ones, or pieces of documents."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from transformers.utils import logging

from ...ops.cross_entropy import IGNORE_INDEX
from .byte_ranges import BlockCache, RemoteFile
from .documents import Documents, scan
from .packing import WINDOW, PackedRows, pack, row_count
from .permutation import Permutation
from .token_file import TokenFile

logger = logging.get_logger(__name__)

Rows = dict[str, np.ndarray]  # `[B, S]` int64, by column
FILL = 0  # the id of what fills up a packed row
GROUP = 8  # windows whose packed rows are shuffled together
KEPT_WINDOWS = 2 * GROUP
WITHOUT_END = 2**18  # tokens that are read before a warning says that no document has ended in them


class RowReader(Protocol):
    """Rows by their number, and the order of an epoch."""

    def __len__(self) -> int: ...

    def order(self, places: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """`[n]` numbers of the rows at these places of a shuffled epoch."""

    def read(self, numbers: np.ndarray, epoch: int = 0) -> Rows:
        """Rows of an epoch by number."""

    def reading(self, files: Mapping[int, TokenFile]) -> RowReader:
        """The same rows, of these files instead, by the `id` of those that it reads now."""


class FirstToken(NamedTuple):
    """Where rows of another length began in one epoch: `row` of `file` begins at its `token`."""

    epoch: int
    file: int
    row: int
    token: int


class CutRows:
    """Each file cut into rows, every `length` tokens; what is left at its end is not read.

    Args:
        masked: documents are kept apart.
        eos_token_id: ends documents of files that do not say where they end.
        use_loss: labels follow `.loss`.
        stride: tokens from a row to the next; `length` if None.
    """

    def __init__(
        self,
        files: Sequence[TokenFile],
        length: int,
        masked: bool,
        eos_token_id: int | None,
        use_loss: bool,
        stride: int | None = None,
    ) -> None:
        self.files, self.length, self.masked, self.use_loss = files, length, masked, use_loss
        self.eos_token_id, self.stride = eos_token_id, stride or length
        self.ends = np.cumsum([file.tokens // self.stride for file in files], dtype=np.int64)
        self.shift: FirstToken | None = None
        self._permutation = Permutation(len(self))
        self._unended: int | None = 0  # tokens read so far, in which no id ended a document; None once one has
        if masked and eos_token_id is None:
            refuse_without_documents(files)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def reading(self, files: Mapping[int, TokenFile]) -> CutRows:
        other = copy.copy(self)
        other.files = [files[id(file)] for file in self.files]
        return other

    def order(self, places: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        if (self._permutation.seed, self._permutation.epoch) != (seed, epoch):
            self._permutation = Permutation(len(self), seed, epoch)
        return self._permutation(places)

    def first_row(self, file: int) -> int:
        """The number of a file's first row."""
        return int(self.ends[file - 1]) if file else 0

    def place_of(self, number: int, epoch: int) -> tuple[int, int]:
        """The file and token with which a row begins."""
        file = int(np.searchsorted(self.ends, number, "right"))
        row, shift = number - self.first_row(file), self.shift
        if shift is not None and (shift.epoch, shift.file) == (epoch, file) and row >= shift.row:
            return file, shift.token + (row - shift.row) * self.stride
        return file, row * self.stride

    def begin_at(self, epoch: int, file: int, token: int) -> int:
        """Cut this file anew from a token on, in this epoch: the number of the row that then begins there.

        It is of the next file if what is left of this one is no row.
        """
        rows = self.files[file].tokens // self.stride
        row = rows - (self.files[file].tokens - token) // self.stride
        self.shift = FirstToken(epoch, file, row, token) if token % self.stride else None
        return self.first_row(file) + row

    def read(self, numbers: np.ndarray, epoch: int = 0) -> Rows:
        length, shift = self.length, self.shift
        chosen = np.searchsorted(self.ends, numbers, "right")
        starts = (numbers - np.where(chosen > 0, self.ends[chosen - 1], 0)) * self.stride
        if shift is not None and shift.epoch == epoch:
            moved = (chosen == shift.file) & (starts >= shift.row * self.stride)
            starts[moved] += shift.token - shift.row * self.stride
        spans = [(self.files[f], s, s + length) for f, s in zip(chosen.tolist(), starts.tolist(), strict=True)]
        prefetch([(file, start, stop + 1) for file, start, stop in spans])
        rows = empty_rows(len(numbers), length)
        for row, (file, start, stop) in enumerate(spans):
            read_span(rows, row, 0, file, start, stop, self.use_loss)
        if self.masked:
            begins = [self._begins(*span) - span[1] for span in spans]
            separate(rows, np.repeat(np.arange(len(spans)), [len(b) for b in begins]), np.concatenate(begins))
        return rows

    def _begins(self, file: TokenFile, start: int, stop: int) -> np.ndarray:
        """Where documents begin, from the row's first token to the one behind its last."""
        if file.documents is not None:
            return file.documents.within(start, stop)
        before = max(start - 1, 0)
        found = np.flatnonzero(file.read(before, stop) == self.eos_token_id) + (before + 1)
        self._look_for_ends(file, stop - start, len(found))
        return found

    def _look_for_ends(self, file: TokenFile, tokens: int, ends: int) -> None:
        """Warn, once, of an `eos_token_id` that nothing ends with: all documents would be one."""
        if self._unended is None:
            return
        self._unended = None if ends else self._unended + tokens
        if self._unended is not None and self._unended >= WITHOUT_END:
            logger.warning(
                f"eos_token_id={self.eos_token_id} ends no document in the first {self._unended} tokens that were read "
                f"({file.shown}, which does not say where documents end), so that documents='mask' keeps none apart: "
                "pass the id that the files were written with."
            )
            self._unended = None


class PackedDocuments:
    """Whole documents, packed into rows: of `window` documents at a time, within a file.

    Making one reads nothing. Its length takes one pass over where documents end; that is done once, when the first row
    is asked for, and keeps a number a window. An epoch's order goes through windows in a shuffled order, and shuffles
    the rows of `GROUP` windows together, so that a window is packed once an epoch.
    """

    def __init__(
        self, files: Sequence[TokenFile], length: int, eos_token_id: int | None, use_loss: bool, window: int = WINDOW
    ) -> None:
        self.files, self.length, self.use_loss, self.window = files, length, use_loss, window
        self.eos_token_id = eos_token_id
        if eos_token_id is None:
            refuse_without_documents(files)
        self._scanned: dict[int, Documents] = {}
        self._windows: list[tuple[int, int, int]] = []  # file, first document, end
        self._ends: np.ndarray | None = None  # rows up to the end of each window
        self._packed: OrderedDict[int, PackedRows] = OrderedDict()
        self._epoch: tuple[int, int, np.ndarray, np.ndarray] | None = None  # seed, epoch, order of windows, their ends

    def documents(self, number: int) -> Documents:
        """Of a file. Where it has no index, it is read once to its end."""
        file = self.files[number]
        if file.documents is not None:
            return file.documents
        if number not in self._scanned:
            assert self.eos_token_id is not None
            found, last = scan(file.chunks(), self.eos_token_id), file.read(file.tokens - 1, file.tokens)
            if found.count == 1 and file.tokens > self.length and int(last[0]) != self.eos_token_id:
                raise ValueError(
                    f"{file.shown} would be one document of {file.tokens} tokens: it does not say where documents end, "
                    f"and eos_token_id={self.eos_token_id} is not among its ids."
                )
            self._scanned[number] = found
        return self._scanned[number]

    @property
    def ends(self) -> np.ndarray:
        """`[windows]` int64: rows up to the end of each."""
        if self._ends is None:
            counts = []
            for number in range(len(self.files)):
                documents = self.documents(number)
                for first in range(0, documents.count, self.window):
                    stop = min(first + self.window, documents.count)
                    self._windows.append((number, first, stop))
                    counts.append(row_count(np.diff(documents.edges(first, stop)), self.length))
            self._ends = np.cumsum(counts, dtype=np.int64)
        return self._ends

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def reading(self, files: Mapping[int, TokenFile]) -> PackedDocuments:
        len(self)  # found out once, for all copies
        other = copy.copy(self)
        other.files = [files[id(file)] for file in self.files]
        return other

    def order(self, places: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        windows, ends = self._order_of_windows(seed, epoch)
        group_ends = ends[np.minimum(np.arange(GROUP, len(ends) + GROUP, GROUP), len(ends)) - 1]
        groups = np.searchsorted(group_ends, places, "right")
        found = np.empty(len(places), np.int64)
        for group in np.unique(groups).tolist():
            chosen = groups == group
            before = int(group_ends[group - 1]) if group else 0
            shuffle = Permutation(int(group_ends[group]) - before, seed, epoch, group + 1)
            at = before + shuffle(places[chosen] - before)  # rows in the order of windows
            position = np.searchsorted(ends, at, "right")
            rest = at - np.where(position > 0, ends[position - 1], 0)
            window = windows[position]
            found[chosen] = rest + np.where(window > 0, self.ends[window - 1], 0)
        return found

    def _order_of_windows(self, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        if self._epoch is None or self._epoch[:2] != (seed, epoch):
            order = Permutation(len(self.ends), seed, epoch)(np.arange(len(self.ends)))
            ends = np.cumsum(np.diff(self.ends, prepend=0)[order], dtype=np.int64)
            self._epoch = (seed, epoch, order, ends)
        return self._epoch[2:]

    def read(self, numbers: np.ndarray, epoch: int = 0) -> Rows:
        windows = np.searchsorted(self.ends, numbers, "right")
        first_rows = np.where(windows > 0, self.ends[windows - 1], 0)
        pieces = [
            (self.files[self._windows[w][0]], self._window(w).row(n))
            for w, n in zip(windows.tolist(), (numbers - first_rows).tolist(), strict=True)
        ]
        return read_pieces(pieces, self.length, self.use_loss, masked=True)

    def _window(self, number: int) -> PackedRows:
        if number in self._packed:
            self._packed.move_to_end(number)
            return self._packed[number]
        file, first, stop = self._windows[number]
        self._packed[number] = pack(self.documents(file).edges(first, stop), self.length)
        if len(self._packed) > KEPT_WINDOWS:
            self._packed.popitem(last=False)
        return self._packed[number]

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_packed": OrderedDict()}


def refuse_without_documents(files: Sequence[TokenFile]) -> None:
    for file in files:
        if file.documents is None:
            raise ValueError(
                f"{file.shown} does not say where its documents end, which documents='mask' and 'pack' need: write its "
                ".index, or pass eos_token_id, the id that ends each of them."
            )


def empty_rows(count: int, length: int) -> Rows:
    return {name: np.empty((count, length), np.int64) for name in ("input_ids", "labels", "shift_labels")}


def read_span(
    rows: Rows, row: int, column: int, file: TokenFile, start: int, stop: int, use_loss: bool, ends: bool = False
) -> None:
    """Fill a row from `column` on with the ids [start, stop), each of which predicts the next.

    Args:
        ends: nothing comes after the last one.
    """
    size = stop - start
    ids = file.read(start, stop if ends else stop + 1)
    inner, labels, shifted = (
        rows[name][row, column : column + size] for name in ("input_ids", "labels", "shift_labels")
    )
    inner[:] = ids[:size]
    labels[:] = inner
    following = len(ids) - 1
    shifted[:following] = ids[1:]
    shifted[following:] = IGNORE_INDEX
    if use_loss and (kept := file.read_loss(start, start + len(ids))) is not None:
        labels[kept[:size] == 0] = IGNORE_INDEX
        shifted[:following][kept[1:] == 0] = IGNORE_INDEX


def read_pieces(
    pieces: Sequence[tuple[TokenFile, list[tuple[int, int, bool]]]], length: int, use_loss: bool, masked: bool
) -> Rows:
    """Rows of pieces of a file: start, length, and whether its last token predicts what follows it in the file."""
    prefetch([(file, start, start + size + 1) for file, row in pieces for start, size, _ in row])
    rows = empty_rows(len(pieces), length)
    begins: list[tuple[int, int]] = []
    for number, (file, row) in enumerate(pieces):
        column = 0
        for start, size, goes_on in row:
            read_span(rows, number, column, file, start, start + size, use_loss, ends=not goes_on)
            if column:
                begins.append((number, column))
            column += size
        if column < length:
            rows["input_ids"][number, column:] = FILL
            rows["labels"][number, column:] = rows["shift_labels"][number, column:] = IGNORE_INDEX
            begins.append((number, column))
    if masked:
        where = np.array(begins, np.int64).reshape(-1, 2)
        separate(rows, where[:, 0], where[:, 1])
    return rows


def separate(rows: Rows, row: np.ndarray, column: np.ndarray) -> None:
    """Keep documents apart, which begin at these places: positions restart, and nothing predicts a first token.

    Args:
        column: from 0 to S; S stands for the token behind the row.
    """
    count, length = rows["input_ids"].shape
    inside = column < length
    rows["labels"][row[inside], column[inside]] = IGNORE_INDEX
    later = column > 0
    rows["shift_labels"][row[later], column[later] - 1] = IGNORE_INDEX
    begins = np.zeros((count, length), np.int64)
    begins[row[inside], column[inside]] = column[inside]
    np.maximum.accumulate(begins, axis=1, out=begins)
    rows["position_ids"] = np.subtract(np.arange(length), begins, out=begins)


def prefetch(spans: Sequence[tuple[TokenFile, int, int]]) -> None:
    """Have the remote ones of these ids in the cache, in one call."""
    wanted: list[tuple[RemoteFile, int, int]] = []
    cache: BlockCache | None = None
    for token_file, start, stop in spans:
        if not isinstance(token_file.file, RemoteFile):
            continue
        width = token_file.dtype.itemsize
        stop = min(stop, token_file.tokens)
        wanted.append((token_file.file, token_file.offset + start * width, token_file.offset + stop * width))
        cache = token_file.file.cache
    if cache is not None:
        cache.fetch(wanted)
