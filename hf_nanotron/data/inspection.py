"""What is in files of tokens: numbers, lengths of documents, what packing would waste, and some documents as text."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..redaction import printable
from .lengths import Lengths, read_lengths
from .tokens.token_file import TokenFile, open_token_files

SHOWN_TOKENS = 256  # of a document that is decoded
PERCENTILES = (25, 50, 75, 95, 99)


@dataclass(frozen=True)
class Sample:
    """A document.

    Attributes:
        file, number: which one.
        length: in tokens.
        ids: its first tokens.
        text: they, decoded; None if there is no tokenizer.
        trained: share of its tokens that is trained on; None if the file has no `.loss`.
    """

    file: str
    number: int
    length: int
    ids: list[int]
    text: str | None
    trained: float | None


@dataclass(frozen=True)
class Packing:
    """What rows of `sequence_length` tokens would be.

    Attributes:
        rows: of packed documents.
        waste: share of these rows that stays empty.
        longer: share of the documents that is longer than a row.
        cut_rows: of the plain stream, cut every `sequence_length` tokens.
    """

    sequence_length: int
    rows: int
    waste: float
    longer: float
    cut_rows: int


@dataclass(frozen=True)
class Inspection:
    """What `inspect_tokens` has found.

    Attributes:
        files, tokens: how many.
        bytes: of the ids.
        token_sizes: of the files, in bytes.
        tokenizer: that the files name.
        documents: None if nothing says where they end.
        looked_at: documents whose lengths were read; fewer than `documents` if they are a sample.
        losses: files with a `.loss`.
        shortest, longest, mean: in tokens, of those looked at.
        percentiles: lengths, by percent; 50 is the median.
        histogram: documents by length: (from, to exclusive, how many), in powers of two.
        packing: at the sequence length that was asked for.
        samples: documents, as text.
        notes: what could not be found out, and why.
    """

    files: int
    tokens: int
    bytes: int
    token_sizes: list[int]
    tokenizer: str | None
    documents: int | None
    looked_at: int
    losses: int
    shortest: int | None
    longest: int | None
    mean: float | None
    percentiles: dict[int, float]
    histogram: list[tuple[int, int, int]]
    packing: Packing | None
    samples: list[Sample]
    notes: list[str]

    @property
    def is_sample(self) -> bool:
        return self.documents is not None and self.looked_at < self.documents

    def to_dict(self) -> dict[str, Any]:
        """In JSON's types."""
        return {**asdict(self), "is_sample": self.is_sample}


def inspect_tokens(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    tokenizer: Any = None,
    sequence_length: int | None = None,
    samples: int = 1,
    seed: int = 0,
    token_size: int | None = None,
    eos_token_id: int | None = None,
    storage_options: dict[str, Any] | None = None,
) -> Inspection:
    """Look at files of tokens without reading them: their sizes, where documents end, and a few documents.

    Args:
        paths: files, folders, patterns or Megatron's prefixes, local or by URL, as for `TokenDataset`.
        tokenizer: name, folder or object that decodes; the one that the files name if None.
        sequence_length: of rows whose packing is estimated.
        samples: documents to decode, drawn with `seed`.
        token_size: bytes of an id in `.ds` files without `.metadata`.
        eos_token_id: the last id of each document, where files do not say where documents end; the tokenizer's if None.
        storage_options: for fsspec.

    Raises:
        FileNotFoundError: for a path without such files.
        ValueError: for files that are not what their name says; for numbers that cannot be.
    """
    for name, value, least in (
        ("samples", samples, 0),
        ("sequence_length", sequence_length, 1),
        ("seed", seed, 0),
        ("eos_token_id", eos_token_id, 0),
    ):
        if value is not None and value < least:
            raise ValueError(f"{name}={value} must be at least {least}.")
    listed = [os.fspath(paths)] if isinstance(paths, str | os.PathLike) else [os.fspath(path) for path in paths]
    files = open_token_files(listed, token_size=token_size, storage_options=storage_options)
    named = next((file.tokenizer for file in files if file.tokenizer), None)
    notes: list[str] = []
    decoder = _decoder(tokenizer if tokenizer is not None else named, tokenizer is not None, notes)
    if eos_token_id is None and decoder is not None and any(file.documents is None for file in files):
        eos_token_id = decoder.eos_token_id
    lengths = read_lengths(files, eos_token_id)
    _note(lengths, files, notes)
    found = lengths.all
    packing = None
    if sequence_length is not None and len(found):
        rows, waste = lengths.packing(sequence_length)
        cut = sum(file.tokens // sequence_length for file in files)
        packing = Packing(sequence_length, rows, waste, float((found > sequence_length).mean()), cut)
    percentiles = {p: float(np.percentile(found, p)) for p in PERCENTILES} if len(found) else {}
    return Inspection(
        files=len(files),
        tokens=lengths.tokens,
        bytes=sum(file.tokens * file.dtype.itemsize for file in files),
        token_sizes=sorted({file.dtype.itemsize for file in files}),
        tokenizer=named,
        documents=lengths.documents,
        looked_at=len(found),
        losses=sum(file.loss is not None for file in files),
        shortest=int(found.min()) if len(found) else None,
        longest=int(found.max()) if len(found) else None,
        mean=float(found.mean()) if len(found) else None,
        percentiles=percentiles,
        histogram=histogram(found),
        packing=packing,
        samples=_samples(files, samples, seed, decoder, notes),
        notes=notes,
    )


def histogram(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    """Documents by length: from, to (exclusive), how many. Bins are 0, 1, 2 to 3, 4 to 7 and so on, without empty ones
    at the ends."""
    if not len(lengths):
        return []
    bins = np.where(lengths > 0, np.frexp(np.maximum(lengths, 1).astype(np.float64))[1], 0)
    counts = np.bincount(bins)
    edges = [0, *(2**k for k in range(len(counts)))]
    first = int(np.flatnonzero(counts)[0])
    return [(edges[k], edges[k + 1], int(counts[k])) for k in range(first, len(counts))]


def _decoder(tokenizer: Any, is_asked_for: bool, notes: list[str]) -> Any:
    """A tokenizer, or None, with a note, if the one that files name cannot be loaded."""
    if tokenizer is None:
        notes.append("the files name no tokenizer; give one to see documents as text.")
        return None
    from .tokenize.tokenizers import choose_tokenizer

    try:
        return choose_tokenizer(tokenizer).tokenizer
    except (ValueError, OSError) as error:
        if is_asked_for:
            raise
        notes.append(f"{printable(str(error))[:300].rstrip('.')}; give another one to see documents as text.")
        return None


def _note(lengths: Lengths, files: Sequence[TokenFile], notes: list[str]) -> None:
    if lengths.documents is None:
        without = next(file for file in files if file.documents is None)
        notes.append(f"{without.shown} does not say where its documents end; give eos_token_id, the id that ends them.")
    elif lengths.is_sample:
        notes.append(
            f"lengths are those of a sample: {lengths.looked_at:,} of {lengths.documents:,} documents, in runs "
            "that are spread over the files."
        )


def _samples(files: Sequence[TokenFile], count: int, seed: int, decoder: Any, notes: list[str]) -> list[Sample]:
    """Documents drawn at random; where nothing says where documents begin, tokens from random places."""
    rng = np.random.default_rng(seed)
    filled = [file for file in files if file.tokens]
    found = []
    weights = np.array([file.tokens for file in filled], np.float64)
    for _ in range(count if filled else 0):
        file = filled[int(rng.choice(len(filled), p=weights / weights.sum()))]
        if file.documents is not None and file.documents.count:
            number = int(rng.integers(file.documents.count))
            start, stop = map(int, file.documents.edges(number, number + 1))
        else:
            number, start = -1, int(rng.integers(max(file.tokens - SHOWN_TOKENS, 0) + 1))
            stop = min(start + SHOWN_TOKENS, file.tokens)
        ids = file.read(start, min(stop, start + SHOWN_TOKENS)).astype(np.int64)
        kept = file.read_loss(start, stop)
        trained = None if kept is None or not len(kept) else float((kept != 0).mean())
        found.append(
            Sample(file.shown, number, stop - start, ids.tolist(), _decoded(decoder, file, ids, notes), trained)
        )
    return found


def _decoded(decoder: Any, file: TokenFile, ids: np.ndarray, notes: list[str]) -> str | None:
    if decoder is None:
        return None
    size = max(decoder.get_vocab().values(), default=-1) + 1
    if len(ids) and int(ids.max()) >= size:
        notes.append(
            f"{file.shown} has the id {int(ids.max())}, and the tokenizer {size} ids: it was written with another one, "
            "or its ids have another width."
        )
        return None
    return str(decoder.decode(ids.tolist()))
