"""The samples of Megatron's GPT dataset and of nanotron's nanosets, in the order in which they would read them.

Both hold their orders in memory, as they do there: numbers for each document and sample of the whole run.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import numpy as np

from .blend import UNLIMITED, greedy, greedy_by_arrays
from .documents import SequencesInFile
from .row_reader import CutRows, Rows, read_pieces
from .token_file import TokenFile

MEGATRON_LAST_EPOCH = 0.80  # of its samples: an epoch of which fewer are read is shuffled apart
FEW_FOLDERS = 16
DATATROVE_SEED = 42  # of the order of a folder's files, whatever a run's seed is


class MegatronSamples:
    """`GPTDataset` of Megatron-Core 0.16 over one `.bin`, with an extra token and without a last, partial sample.

    All sequences, once for each epoch, are shuffled by `RandomState(seed)` and put one behind the other; sample k
    begins at token k * S. Samples are shuffled by the same generator. An epoch that is read to less than 80 % is
    shuffled apart from those before it, both times.

    Args:
        samples: of the run, which says how many epochs there are; one epoch if None.
        split: which part of the sequences is read, from 0 to 1, as Megatron's `split` gives it to training.
    """

    def __init__(
        self,
        files: Sequence[TokenFile],
        length: int,
        masked: bool,
        seed: int,
        samples: int | None,
        split: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        (self.file,) = files
        documents = self.file.documents
        assert isinstance(documents, SequencesInFile)
        self.length, self.masked = length, masked
        count = documents.starts.length
        self.starts = documents.starts.slice(0, count)
        lengths = np.diff(self.starts, append=self.file.tokens)
        used = np.arange(int(round(split[0] * count)), int(round(split[1] * count)), dtype=np.int32)
        per_epoch = int(lengths[used].sum())
        if per_epoch <= length:
            raise ValueError(
                f"{self.file.shown}: {per_epoch} tokens are no sample of {length} and the token behind it."
            )
        epochs = 1 if samples is None else max(-(-(samples * length + 1) // per_epoch), 1)
        before_last = ((epochs - 1) * per_epoch - 1) // length
        in_epoch = (per_epoch - 1) // length
        apart = samples is not None and epochs > 1 and samples - before_last < int(MEGATRON_LAST_EPOCH * in_epoch)
        generator = np.random.RandomState(seed)
        total = (epochs * per_epoch - 1) // length
        if apart:
            parts = [np.tile(used, epochs - 1), used.copy()]
            ranges = [np.arange(before_last, dtype=np.uint32), np.arange(before_last, total, dtype=np.uint32)]
        else:
            parts, ranges = [np.tile(used, epochs)], [np.arange(total, dtype=np.uint32)]
        for part in (*parts, *ranges):
            generator.shuffle(part)
        self.sequences, self.shuffle = np.concatenate(parts), np.concatenate(ranges)
        self.ends = np.cumsum(lengths[self.sequences])
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.shuffle)

    def reading(self, files: Mapping[int, TokenFile]) -> MegatronSamples:
        other = copy.copy(self)
        other.file = files[id(self.file)]
        return other

    def order(self, places: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        return self.shuffle[places].astype(np.int64)

    def read(self, numbers: np.ndarray, epoch: int = 0) -> Rows:
        pieces = [(self.file, self._pieces(number * self.length)) for number in numbers.tolist()]
        rows = read_pieces(pieces, self.length, use_loss=False, masked=self.masked)
        if not self.masked:
            self._join(rows, numbers)
        return rows

    def _pieces(self, first: int) -> list[tuple[int, int, bool]]:
        """Where in the file a sample's tokens are. The last piece may go on; no other one does."""
        found: list[tuple[int, int, bool]] = []
        place, missing = int(np.searchsorted(self.ends, first, "right")), self.length
        while missing:
            sequence = self.sequences[place]
            rest = int(self.ends[place]) - first  # of the sequence
            size = min(rest, missing)
            if size:
                start = int(self.starts[sequence] + self.lengths[sequence]) - rest
                found.append((start, size, size < rest))
            first, missing, place = first + size, missing - size, place + 1
        return found

    def _join(self, rows: Rows, numbers: np.ndarray) -> None:
        """Labels across the sequences of a row, and from its last token to what comes behind it."""
        ids, shifted = rows["input_ids"], rows["shift_labels"]
        shifted[:, :-1] = ids[:, 1:]
        for row, number in enumerate(numbers.tolist()):
            behind = (number + 1) * self.length
            place = int(np.searchsorted(self.ends, behind, "right"))
            sequence = self.sequences[place]
            at = int(self.starts[sequence] + self.lengths[sequence] - (self.ends[place] - behind))
            shifted[row, -1] = self.file.read(at, at + 1)[0]


class NanosetSamples:
    """`Nanoset` of huggingface/nanotron over folders of `.ds` files.

    The files of a folder are shuffled by a seed of datatrove's; windows of S + 1 tokens follow each other in a file.
    For as many samples as all folders have, folders are drawn by the greedy rule of `blend` (by their lengths without
    weights), windows in turn. That order is shuffled by `RandomState(seed)`, and repeated in every epoch.

    Args:
        folders: the files of each, by name.
        samples: of the run; one epoch if None.
        weights: of the folders.
    """

    def __init__(
        self,
        folders: Sequence[Sequence[TokenFile]],
        length: int,
        masked: bool,
        eos_token_id: int | None,
        use_loss: bool,
        seed: int,
        samples: int | None,
        weights: Sequence[float] | None = None,
    ) -> None:
        shuffled = [
            [files[n] for n in np.random.default_rng(DATATROVE_SEED).permutation(range(len(files)))]
            for files in folders
        ]
        flat = [file for files in shuffled for file in files]
        self.rows = CutRows(flat, length, masked, eos_token_id, use_loss, stride=length + 1)
        last_files = np.cumsum([len(files) for files in folders]) - 1
        self.sizes = np.diff(self.rows.ends[last_files], prepend=0)
        total = int(self.sizes.sum())
        if not (self.sizes > 0).all():
            raise ValueError(f"{folders[int(np.argmin(self.sizes))][0].shown}: its folder has no {length + 1} tokens.")
        chosen, taken = nanoset_order(self.sizes, weights)
        for array in (chosen, taken):
            np.random.RandomState(seed).shuffle(array)
        self.numbers = (self.rows.ends[last_files] - self.sizes)[chosen] + taken
        self.samples = total if samples is None else samples

    def __len__(self) -> int:
        return self.samples

    def reading(self, files: Mapping[int, TokenFile]) -> NanosetSamples:
        other = copy.copy(self)
        other.rows = self.rows.reading(files)
        return other

    def order(self, places: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        return self.numbers[places % len(self.numbers)]

    def read(self, numbers: np.ndarray, epoch: int = 0) -> Rows:
        return self.rows.read(numbers)


def nanoset_order(sizes: np.ndarray, weights: Sequence[float] | None) -> tuple[np.ndarray, np.ndarray]:
    """Of one epoch of nanosets, before it is shuffled: the set of each sample, and its place in the set."""
    count = int(sizes.sum())
    shares = np.array(sizes if weights is None else weights, np.float64)
    if len(shares) != len(sizes):
        raise ValueError(f"{len(shares)} weights do not cover {len(sizes)} folders.")
    if not (np.isfinite(shares).all() and (shares >= 0).all() and shares.sum() > 0):
        raise ValueError(f"folder_weights={shares.tolist()} cannot be: finite, not negative, and not all of them 0.")
    choose = greedy if len(sizes) <= FEW_FOLDERS else greedy_by_arrays
    zeros, never = [0] * len(sizes), [UNLIMITED] * len(sizes)
    sets = np.array(choose(shares / shares.sum(), zeros, never, 0, count), np.int64)
    places = np.empty(count, np.int64)
    for k in range(len(sizes)):
        mine = np.flatnonzero(sets == k)
        places[mine] = np.arange(len(mine)) % sizes[k]
    return sets, places
