"""Token ids of one file, and how files of them are opened."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...redaction import printable_url
from .byte_ranges import AnyFile, BlockCache, read_ranges
from .documents import SCAN_TOKENS, Documents
from .megatron_index import parse_header
from .same_tokenizer import Tokenizer, noted_vocabularies, tokenizer_of
from .token_formats import (
    Layout,
    datatrove_layout,
    given_dtype,
    head_spans,
    megatron_layout,
    names_of_heads,
    npy_layout,
    opened,
    tail_spans,
)
from .token_paths import KINDS, Group, find_groups


@dataclass
class TokenFile:
    """Token ids of one file.

    Attributes:
        path: local path or URL.
        file, dtype, offset: where its ids are, and their type.
        tokens: how many.
        documents: where its documents begin; None if nothing beside it says so.
        loss: one byte a token, 0 where it is not trained on; None if there is none.
        tokenizer: that it was written with; None if unknown.
        vocab_size: ids must be smaller; None if it was not given.
        version: changes when the file is written again.
        vocabulary: hash of the tokenizer's (see `same_tokenizer`); None if unknown.
    """

    path: str
    file: AnyFile
    dtype: np.dtype
    offset: int
    tokens: int
    documents: Documents | None = None
    loss: AnyFile | None = None
    tokenizer: str | None = None
    vocab_size: int | None = None
    version: str = field(default="", compare=False)
    vocabulary: str | None = None

    @staticmethod
    def open(path: str, **options: Any) -> TokenFile:
        """One file; see `open_token_files`."""
        files = open_token_files([path], **options)
        if len(files) != 1:
            raise ValueError(f"{printable_url(path)} stands for {len(files)} files; name one.")
        return files[0]

    def __len__(self) -> int:
        return self.tokens

    def __repr__(self) -> str:
        return f"TokenFile(path={self.shown!r}, dtype={self.dtype.name}, tokens={self.tokens})"

    def read(self, start: int, stop: int) -> np.ndarray:
        """`[stop - start]` ids of the file's dtype; fewer at its end. A view, where the file is local.

        Raises:
            ValueError: if an id is negative, is not whole, or does not exist in the vocabulary.
        """
        stop = min(stop, self.tokens)
        ids = self.file.array(self.dtype, self.offset + start * self.dtype.itemsize, max(stop - start, 0))
        if self.dtype.kind == "f":
            ids = self._whole(ids, start)
        if len(ids):
            self.check(ids, start)
        return ids

    def check(self, ids: np.ndarray, start: int = 0) -> None:
        """Refuse ids that cannot be, of which the first is the file's id `start`."""
        size = self.vocab_size
        if size is not None and size <= np.iinfo(ids.dtype).max and int(ids.max()) >= size:
            place = int(np.argmax(ids >= size))
            raise ValueError(
                f"{self.shown}: token {start + place} has the id {ids[place]}, and the vocabulary has {size} (ids 0 to "
                f"{size - 1}): it was written with another tokenizer, or its ids have another width."
            )
        if ids.dtype.kind == "u" and ids.dtype.itemsize == 8 and int(ids.max()) > np.iinfo(np.int64).max:
            place = int(np.argmax(ids > np.iinfo(np.int64).max))
            raise ValueError(f"{self.shown}: token {start + place} has the id {ids[place]}; rows hold ids as int64.")
        if ids.dtype.kind == "i" and int(ids.min()) < 0:
            place = int(np.argmax(ids < 0))
            raise ValueError(f"{self.shown}: token {start + place} has the id {ids[place]}; ids are not negative.")

    def read_loss(self, start: int, stop: int) -> np.ndarray | None:
        """`[stop - start]` uint8, 0 where a token is not trained on; None if the file has no `.loss`."""
        if self.loss is None:
            return None
        return self.loss.array(np.dtype("u1"), start, max(min(stop, self.tokens) - start, 0))

    def chunks(self, size: int = SCAN_TOKENS) -> Iterator[np.ndarray]:
        """All ids, `size` at a time."""
        for start in range(0, self.tokens, size):
            yield self.read(start, start + size)

    @property
    def shown(self) -> str:
        return printable_url(self.path)

    def _whole(self, ids: np.ndarray, start: int) -> np.ndarray:
        whole = ids.astype(np.int64)
        if (whole != ids).any():
            place = int(np.argmax(whole != ids))
            raise ValueError(f"{self.shown}: token {start + place} is {ids[place]}; an id is a whole number.")
        return whole


def open_token_files(
    paths: str | Sequence[str],
    *,
    token_size: int | None = None,
    dtype: Any = None,
    vocab_size: int | None = None,
    storage_options: dict[str, Any] | None = None,
    cache: BlockCache | None = None,
) -> list[TokenFile]:
    """Open files of token ids, without reading them: a few bytes of each file and of what stands beside it.

    Args:
        paths: files, folders of them, patterns with `*`, or Megatron's prefixes; local, or URLs that fsspec knows.
            Files of a folder come in the order of their names.
        token_size: bytes of an id in `.ds` files, where no `.metadata` says so.
        dtype: the same, as a NumPy dtype.
        vocab_size: every id that is read must be smaller.
        storage_options: for fsspec.
        cache: of remote files; one of its own if None.

    Raises:
        FileNotFoundError: if there is no such file, or a folder has none.
        ValueError: if a file is not what its name says; each says which.
    """
    given = given_dtype(token_size, dtype)
    cache = cache or BlockCache(options=dict(storage_options or {}))
    names = [paths] if isinstance(paths, str) else paths
    groups = [group for path in names for group in find_groups(str(path), cache.options)]
    if not groups:
        raise FileNotFoundError("no path was given: name files of tokens, or folders of them.")
    layouts = _layouts(groups, given, cache)
    files = []
    for group, layout in zip(groups, layouts, strict=True):
        main = next(group[kind] for kind in KINDS if kind in group)
        files.append(TokenFile(main.path, opened(main, cache), *layout, vocab_size, version=main.version))
    noted = noted_vocabularies([(file.path, file.tokenizer) for file in files])
    for file, vocabulary in zip(files, noted, strict=True):
        file.vocabulary = vocabulary
    check_agreement(files)
    return files


def _layouts(groups: Sequence[Group], given: np.dtype | None, cache: BlockCache) -> list[Layout]:
    """That of each file. The beginnings of all are read at once, and then the ends of all `.idx`."""
    read = iter(read_ranges([span for group in groups for span in head_spans(group)], cache.options))
    heads: list[dict[str, bytes]] = [{name: next(read) for name in names_of_heads(group)} for group in groups]
    indices = {
        number: parse_header(head[".idx"], printable_url(group[".idx"].path), group[".idx"].size)
        for number, (group, head) in enumerate(zip(groups, heads, strict=True))
        if ".idx" in group
    }
    tails = iter(read_ranges([s for n, index in indices.items() for s in tail_spans(groups[n], index)], cache.options))
    layouts = []
    for number, (group, head) in enumerate(zip(groups, heads, strict=True)):
        if number in indices:
            ends = [int.from_bytes(next(tails), "little") for _ in range(4)] if indices[number].sequences else None
            layouts.append(megatron_layout(group, indices[number], ends, cache))
        elif ".npy" in group:
            layouts.append(npy_layout(group, head[".npy"]))
        else:
            layouts.append(datatrove_layout(group, head, given, cache))
    return layouts


def check_agreement(files: Sequence[TokenFile]) -> None:
    """Refuse files that were not written with one tokenizer, and in one width."""
    first: dict[Tokenizer, TokenFile] = {}
    for file in files:
        first.setdefault(tokenizer_of(file), file)
    for number, (tokenizer, file) in enumerate(first.items()):
        for other, before in list(first.items())[:number]:
            if tokenizer.is_other(other):
                raise ValueError(
                    f"{file.shown} was written with another tokenizer than {before.shown} "
                    f"({tokenizer.difference(other)}); one set has one tokenizer."
                )
    for file in files[1:]:
        if file.path.endswith(".ds") and files[0].path.endswith(".ds") and file.dtype != files[0].dtype:
            raise ValueError(
                f"{file.shown} has ids of {file.dtype.itemsize} bytes, and {files[0].shown} of "
                f"{files[0].dtype.itemsize}; one set has one width."
            )
