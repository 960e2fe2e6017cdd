"""A map-style dataset of rows of tokens, over files that hold token ids, in an order of its own."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers.utils import logging

from ..identity import FileFacts, file_prints
from .byte_ranges import BLOCK_BYTES, CACHE_BYTES, BlockCache, Stat, refuse_twice, short_name
from .packing import WINDOW
from .peer_orders import MegatronSamples, NanosetSamples
from .row_reader import CutRows, PackedDocuments, RowReader, Rows
from .token_file import TokenFile, check_agreement, open_token_files

logger = logging.get_logger(__name__)

HANDLING = ("cross", "mask", "pack")


class TokenDataset(Dataset[dict[str, torch.Tensor]]):
    """Rows of `sequence_length` tokens out of files of token ids.

    `dataset[i]` is the i-th row of the epoch (`set_epoch`), whose order is a keyed permutation of all rows: the seed,
    the epoch and the place say which row it is, and no order is stored. A row is a dict of int64 tensors `[S]`:

    - `input_ids`;
    - `labels`: the same ids, unshifted as transformers' models take them, -100 where a token is not predicted;
    - `shift_labels`: what each token predicts, -100 where that does not count. The last one of a row is the first token
      of the next, so that no token is lost; a model that is given them does not shift `labels`;
    - `position_ids`, with documents kept apart: they begin anew with each document.

    Args:
        paths: files, folders, patterns with `*` or Megatron's prefixes, local or by URL (`.ds`, `.bin` with `.idx`,
            `.npy`). The files of a folder come in the order of their names, in all `paths` as they are listed.
        sequence_length: tokens of a row, S.
        token_size: bytes of an id in `.ds` files without `.metadata`.
        dtype: the same, as a NumPy dtype.
        documents: `"cross"`: each file is cut every S tokens, wherever documents end. `"mask"`: the same, and documents
            are kept apart: positions restart, and no token predicts the first of another document. `"pack"`: rows are
            packed of whole documents, and only those longer than a row are cut; what stays empty is not predicted.
        eos_token_id: the last id of every document, where a file does not say where documents end. `"mask"` looks for
            it in the row; `"pack"` reads each such file once.
        seed: of the order.
        shuffle: False for the order of the files: row i of one file begins at its token i * S.
        loss_mask: leave tokens out of the labels that a `.loss` file beside a `.ds` names.
        order: `"megatron"` or `"nanoset"`: the samples of the peer's dataset, in its order, with its `seed` (1234 by
            default there), instead of the permutation. They are those of a whole run: epochs of the peer's are part
            of it, and `set_epoch` changes nothing. Megatron's is over one `.bin`; of nanosets, each of `paths` is a
            folder.
        samples: of such a run, which Megatron's order depends on; one epoch if None.
        skip_samples: of such a run, that were trained on elsewhere: row 0 is the one behind them.
        folder_weights: of nanosets' folders; by their lengths if None.
        split: which part of its sequences Megatron's training reads, from 0 to 1.
        vocab_size: ids must be smaller; checked when they are read.
        pack_window: documents that are packed together.
        storage_options: for fsspec, where paths are URLs.
        block_bytes, cache_bytes: of remote files, what is asked for at a time, and is kept at most in a process.

    Raises:
        FileNotFoundError: for a path or folder without such files.
        ValueError: for arguments that cannot be, files that are not what they should be, a file that is given twice (by
            a link, too), files written with different tokenizers, a vocabulary that is too small, documents whose ends
            are not known. Each names the file.

    Attributes:
        files: the `TokenFile`s.
        epoch: whose order is read.
        tokenizer: name of it in the files' metadata; None if none is told.
        vocabulary: hash of the tokenizer's, where `tokenize_corpus` has written a local folder; None if unknown.
        name: of the first of `paths`, without its folder and ending.
    """

    def __init__(
        self,
        paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        sequence_length: int,
        *,
        token_size: int | None = None,
        dtype: Any = None,
        documents: Literal["cross", "mask", "pack"] = "cross",
        eos_token_id: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
        loss_mask: bool = True,
        order: Literal["megatron", "nanoset"] | None = None,
        samples: int | None = None,
        skip_samples: int = 0,
        folder_weights: Sequence[float] | None = None,
        split: tuple[float, float] = (0.0, 1.0),
        vocab_size: int | None = None,
        pack_window: int = WINDOW,
        storage_options: dict[str, Any] | None = None,
        block_bytes: int = BLOCK_BYTES,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        _check_whole("sequence_length", sequence_length, 1)
        _check_whole("pack_window", pack_window, 1)
        _check_whole("seed", seed, 0)
        if eos_token_id is not None:
            _check_whole("eos_token_id", eos_token_id, 0)
        if documents not in HANDLING:
            raise ValueError(f"documents={documents!r} is not one of {', '.join(map(repr, HANDLING))}.")
        self.sequence_length, self.documents, self.seed, self.shuffle = sequence_length, documents, seed, shuffle
        self.eos_token_id, self.loss_mask, self.epoch = eos_token_id, loss_mask, 0
        self.peer, self.skip_samples = order, skip_samples
        self._order_options: dict[str, Any] = {"pack_window": pack_window} if documents == "pack" else {}
        if order is not None:
            weights = None if folder_weights is None else [float(weight) for weight in folder_weights]
            self._order_options = {
                "samples": samples,
                "skip_samples": skip_samples,
                "folder_weights": weights,
                "split": list(split),
            }
        if order is None and (samples is not None or skip_samples or folder_weights is not None or split != (0.0, 1.0)):
            raise ValueError("samples, skip_samples, folder_weights and split belong to order='megatron' or 'nanoset'.")
        listed = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
        if not listed:
            raise FileNotFoundError("no path was given: name files of tokens, or folders of them.")
        self.name = short_name(listed[0])
        cache = BlockCache(block_bytes, cache_bytes, dict(storage_options or {}))
        opened = [
            open_token_files(os.fspath(path), token_size=token_size, dtype=dtype, vocab_size=vocab_size, cache=cache)
            for path in listed
        ]
        self.files: list[TokenFile] = [file for files in opened for file in files]
        check_agreement(self.files)
        if order is None:
            stats = [Stat(file.path, file.file.size, file.version) for file in self.files]
            refuse_twice(stats, "an epoch would read it twice, where max_epochs of a Mixture reads a set more often")
        if not self.tokens:
            raise ValueError(f"{_shown(self.files)}: there are no tokens in it.")
        self._check_eos(vocab_size)
        self.tokenizer = next((file.tokenizer for file in self.files if file.tokenizer), None)
        self.vocabulary = next((file.vocabulary for file in self.files if file.vocabulary), None)
        self._reader: RowReader
        if order is not None:
            self._reader = _peer_samples(self, order, opened, samples, folder_weights, split)
            if not 0 <= skip_samples < len(self._reader):
                raise ValueError(
                    f"skip_samples={skip_samples} leaves nothing of the {len(self._reader)} samples of "
                    f"order={order!r}; samples says how many the whole run has."
                )
        elif documents == "pack":
            self._reader = PackedDocuments(self.files, sequence_length, eos_token_id, loss_mask, pack_window)
        else:
            self._reader = CutRows(self.files, sequence_length, documents == "mask", eos_token_id, loss_mask)
            if not len(self._reader):
                raise ValueError(f"{_shown(self.files)}: no file has sequence_length={sequence_length} tokens.")
            self._tell_what_is_left_out()

    def _check_eos(self, vocab_size: int | None) -> None:
        """Refuse an end of documents that no id can be, which would leave all documents joined."""
        end = self.eos_token_id
        without = [file for file in self.files if file.documents is None]
        if end is None or self.documents == "cross" or not without:
            return
        largest = max(_largest(file.dtype) for file in without)
        if end > largest or (vocab_size is not None and end >= vocab_size):
            has = f"the vocabulary has {vocab_size} ids" if vocab_size is not None else f"ids reach to {largest}"
            raise ValueError(
                f"eos_token_id={end} ends no document of {without[0].shown}, which does not say where they end: {has}."
            )

    def _tell_what_is_left_out(self) -> None:
        """Warn where ends of files that fill no row are more than a hundredth of the tokens, or whole files."""
        length, tokens = self.sequence_length, self.tokens
        short = [file for file in self.files if 0 < file.tokens < length]
        left = sum(file.tokens % length for file in self.files)
        if short or 100 * left > tokens:
            logger.warning(
                f"{left} of {tokens} tokens ({left / tokens:.2%}) are not read: rows of sequence_length={length} do "
                "not cross files, and what is left at the end of a file fills none"
                + (f"; {len(short)} of {len(self.files)} files ({short[0].shown}, …) are shorter" if short else "")
                + '. documents="pack" reads them.'
            )

    def __len__(self) -> int:
        """Rows of an epoch. With `documents="pack"` the first call reads where all documents end."""
        return len(self._reader) - self.skip_samples

    @property
    def tokens(self) -> int:
        """Of all files."""
        return sum(file.tokens for file in self.files)

    @property
    def columns(self) -> tuple[str, ...]:
        """Of a row."""
        return ("input_ids", "labels", "shift_labels", *(("position_ids",) if self.documents != "cross" else ()))

    def set_epoch(self, epoch: int) -> None:
        """Read the order of this epoch from now on."""
        self.epoch = epoch

    def order(self, epoch: int, places: np.ndarray | None = None) -> np.ndarray:
        """`[n]` int64: numbers of the rows, in the order of the files, at these places of an epoch; at all if None."""
        places = np.arange(len(self)) if places is None else np.asarray(places, np.int64)
        if not (self.shuffle or self.peer):
            return places
        return self._reader.order(places + self.skip_samples, self.seed, epoch)

    def rows(self, places: Sequence[int] | np.ndarray, epoch: int | None = None) -> Rows:
        """Many rows at once: a dict of int64 arrays `[B, S]`.

        Args:
            places: `[B]`, of the epoch's order; negative ones count from the end.
            epoch: whose; that of `set_epoch` if None.

        Raises:
            IndexError: for a place that the epoch does not have.
            ValueError: for an id that the vocabulary does not have, or document ends that do not ascend.
        """
        wanted = np.asarray(places, np.int64)
        if not len(wanted):
            return {name: np.empty((0, self.sequence_length), np.int64) for name in self.columns}
        wanted = np.where(wanted < 0, wanted + len(self), wanted)
        if wanted.min() < 0 or wanted.max() >= len(self):
            raise IndexError(f"row {np.asarray(places).tolist()} of a dataset with {len(self)} rows")
        epoch = self.epoch if epoch is None else epoch
        return self._reader.read(self.order(epoch, wanted), epoch)

    def __getitem__(self, place: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([place])[0]

    def __getitems__(self, places: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        """What a `DataLoader` asks for: the rows of a batch."""
        columns = {name: torch.from_numpy(array) for name, array in self.rows(places).items()}
        return [{name: column[row] for name, column in columns.items()} for row in range(len(places))]

    def with_vocabulary(self, size: int) -> TokenDataset:
        """The same, whose ids are checked to be smaller where they are read."""
        self._check_eos(size)
        other = copy.copy(self)
        other.files = [replace(file, vocab_size=min(file.vocab_size or size, size)) for file in self.files]
        other._reader = self._reader.reading({id(f): n for f, n in zip(self.files, other.files, strict=True)})
        return other

    @property
    def counts_tokens(self) -> bool:
        """Whether rows come in the order of the files, so that rows of another length can go on from a token."""
        return isinstance(self._reader, CutRows) and not self.shuffle

    def token_after(self, rows: int) -> tuple[int, int, int]:
        """Behind so many rows: the epoch, the file (its place in `files`) and the token. See `counts_tokens`."""
        assert isinstance(self._reader, CutRows)
        epoch, row = divmod(rows, len(self))
        if not row:
            return epoch, 0, 0
        file, token = self._reader.place_of(row - 1, epoch)
        return epoch, file, token + self.sequence_length

    def from_token(self, epoch: int, file: int, token: int) -> tuple[TokenDataset, int]:
        """The same set, whose rows of this epoch go on from a token; and how many rows come before it.

        In this file and epoch, rows lie from there on behind each other; all others are as before.
        """
        other, reader = copy.copy(self), copy.copy(self._reader)
        assert isinstance(reader, CutRows)
        other._reader = reader
        return other, epoch * len(self) + reader.begin_at(epoch, file, token)

    def identity(self) -> dict[str, Any]:
        """What the rows and their order depend on, to be compared when a run is resumed (see `data.identity`).

        `files` changes with the name, length or time of a file, as far as its file system tells them.
        """
        facts = [
            FileFacts(os.path.basename(file.path), f"{file.file.size}|{file.dtype}", str(file.version))
            for file in self.files
        ]
        is_scanned = self.documents == "pack" and any(file.documents is None for file in self.files)
        return {
            "files": file_prints(facts),
            "tokens": self.tokens,
            "sequence_length": self.sequence_length,
            "documents": self.documents,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "order": self.peer,
            **self._order_options,
            **({"eos_token_id": self.eos_token_id} if is_scanned else {}),
            "rows": len(self),
        }


def _shown(files: Sequence[TokenFile]) -> str:
    return f"{files[0].shown}{' and others' if len(files) > 1 else ''}"


def _largest(dtype: np.dtype) -> int:
    return np.iinfo(dtype).max if dtype.kind in "iu" else 2**53


def _check_whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name}={value!r} cannot be: a whole number, at least {least}.")


def _peer_samples(
    dataset: TokenDataset,
    order: str,
    opened: list[list[TokenFile]],
    samples: int | None,
    folder_weights: Sequence[float] | None,
    split: tuple[float, float],
) -> RowReader:
    masked = dataset.documents == "mask"
    if dataset.documents == "pack" or not dataset.shuffle:
        raise ValueError(f"order={order!r} is an order of its own: use documents='cross' or 'mask' and shuffle=True.")
    if order == "nanoset":
        return NanosetSamples(
            opened,
            dataset.sequence_length,
            masked,
            dataset.eos_token_id,
            dataset.loss_mask,
            dataset.seed,
            samples,
            folder_weights,
        )
    if order != "megatron":
        raise ValueError(f"order={order!r} is not one of None, 'megatron', 'nanoset'.")
    if len(dataset.files) != 1 or not dataset.files[0].path.endswith(".bin") or dataset.files[0].documents is None:
        raise ValueError(
            f"order='megatron' is over one .bin file with documents, and {dataset.files[0].shown} is "
            f"{'none' if len(dataset.files) == 1 else f'one of {len(dataset.files)} files'}; make a Mixture of more."
        )
    return MegatronSamples(dataset.files, dataset.sequence_length, masked, dataset.seed, samples, split)
