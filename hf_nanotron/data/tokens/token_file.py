"""Files of token ids: datatrove's and nanoset's `.ds`, Megatron's `.bin` with `.idx`, and `.npy`.

`NAME.ds` (datatrove 0.10, `pipeline/tokens/tokenizer.py`) holds ids alone, little-endian, of two or four bytes. Beside
it may stand

    NAME.ds.index     uint64, little-endian: for each document its end in tokens, exclusive, ascending
    NAME.ds.loss      one byte a token, 1 where it is trained on
    NAME.ds.metadata  text: `tokenizer|bytes of an id`, the number of tokens, that number in words

`.idx` is described in `megatron_index`; `.npy` is NumPy's own format, of one dimension.
"""

from __future__ import annotations

import io
import os
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ...redaction import printable_url
from .byte_ranges import (
    AnyFile,
    BlockCache,
    LocalFile,
    RemoteFile,
    Stat,
    expand,
    is_remote,
    list_folder,
    local_path,
    read_ranges,
    stat_files,
)
from .documents import SCAN_TOKENS, Documents, EndsInFile, SequencesInFile
from .megatron_index import HEADER_BYTES, MegatronIndex, parse_header
from .sorted_ints import SortedInts

KINDS = (".ds", ".bin", ".npy")
TOKEN_SIZES = {1: "u1", 2: "<u2", 4: "<u4", 8: "<u8"}
NPY_HEADER = 4096  # bytes that are read of it
UNKNOWN_TOKENIZER = "Unknown Tokenizer"  # what datatrove writes where it was given none


class Metadata(NamedTuple):
    """What a `.ds.metadata` says; None for what it leaves out."""

    tokenizer: str | None
    token_size: int | None
    tokens: int | None


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
    given = _given_dtype(token_size, dtype)
    cache = cache or BlockCache(options=dict(storage_options or {}))
    groups = [g for path in ([paths] if isinstance(paths, str) else paths) for g in _groups(str(path), cache.options)]
    if not groups:
        raise FileNotFoundError("no path was given: name files of tokens, or folders of them.")
    heads = iter(read_ranges([span for group in groups for span in _head_spans(group)], cache.options))
    found: list[dict[str, bytes]] = [{name: next(heads) for name in _heads(group)} for group in groups]
    indices = {
        number: parse_header(head[".idx"], printable_url(group[".idx"].path), group[".idx"].size)
        for number, (group, head) in enumerate(zip(groups, found, strict=True))
        if ".idx" in group
    }
    tails = iter(read_ranges([s for n, index in indices.items() for s in _tail_spans(groups[n], index)], cache.options))
    files = []
    for number, (group, head) in enumerate(zip(groups, found, strict=True)):
        if number in indices:
            ends = [int.from_bytes(next(tails), "little") for _ in range(4)] if indices[number].sequences else None
            files.append(_megatron(group, indices[number], ends, cache))
        elif ".npy" in group:
            files.append(_npy(group, head[".npy"], cache))
        else:
            files.append(_datatrove(group, head, given, cache))
    check_agreement(files)
    for file in files:
        file.vocab_size = vocab_size
    return files


def parse_metadata(text: str, path: str) -> Metadata:
    """Read a `.ds.metadata`. datatrove writes the size twice where it knows no tokenizer.

    Raises:
        ValueError: if a size or a number is none.
    """
    lines = text.splitlines() or [""]
    parts = lines[0].split("|")
    name = parts[0].strip()
    try:
        size = int(parts[-1]) if len(parts) > 1 else None
        tokens = int(lines[1]) if len(lines) > 1 and lines[1].strip() else None
    except ValueError:
        raise ValueError(f"{path} is no metadata of datatrove's: {text[:80]!r}") from None
    if size is not None and size not in TOKEN_SIZES:
        raise ValueError(f"{path}: ids of {size} bytes cannot be; they have {_sizes()}.")
    return Metadata(name if name not in ("", UNKNOWN_TOKENIZER) else None, size, tokens)


def _sizes() -> str:
    return ", ".join(map(str, TOKEN_SIZES))


def _given_dtype(token_size: int | None, dtype: Any) -> np.dtype | None:
    if token_size is not None and token_size not in TOKEN_SIZES:
        raise ValueError(f"token_size={token_size!r} cannot be; an id has {_sizes()} bytes.")
    if dtype is None:
        return None if token_size is None else np.dtype(TOKEN_SIZES[token_size])
    found = np.dtype(dtype)
    if found.kind not in "iu":
        raise ValueError(f"dtype={dtype!r} cannot be; ids are integers.")
    if token_size is not None and found.itemsize != token_size:
        raise ValueError(f"token_size={token_size} and dtype={found.name} contradict each other.")
    if found != found.newbyteorder("<"):
        raise ValueError(f"dtype={dtype!r} cannot be; the ids of a .ds file are little-endian.")
    return found


Group = dict[str, Stat]  # what belongs to one file, by the ends of their names


def _groups(path: str, options: dict[str, Any]) -> list[Group]:
    """The files that a path stands for, each with what stands beside it."""
    if _is_pattern(path):
        matches = [match for match in expand(path, options) if match.endswith(KINDS)]
        groups = [group for match in matches if (group := _single(match, options))]  # none of a folder
        if not groups:
            raise FileNotFoundError(f"{printable_url(path)} matches no {_kinds()} file.")
        return groups
    if path.endswith(KINDS) and (group := _single(path, options)):
        return [group]
    listed = list_folder(path, options)
    if listed is None:
        if group := _single(path + ".bin", options):
            return [group]
        if stat_files([path], options):
            raise ValueError(
                f"{printable_url(path)} is no {_kinds()} file; hf-nanotron tokenize makes .ds files of texts."
            )
        raise FileNotFoundError(f"{printable_url(path)}: there is no such file or folder.")
    names = sorted(name for name in listed if name.endswith(KINDS))
    kinds = sorted({name[name.rindex(".") :] for name in names})
    if not names:
        raise FileNotFoundError(
            f"the folder {printable_url(path)} holds no {_kinds()} file; those of its subfolders are not looked for."
        )
    if len(kinds) > 1:
        raise ValueError(
            f"the folder {printable_url(path)} holds {' and '.join(kinds)} files; name those of one kind "
            f"({printable_url(path).rstrip('/')}/*{kinds[0]})."
        )
    return [_with_siblings(name, listed) for name in names]


def _is_pattern(path: str) -> bool:
    """A local name may have the marks of a pattern in it, too."""
    exists = not is_remote(path) and any(os.path.exists(local_path(path) + end) for end in ("", ".bin"))
    return any(mark in path for mark in "*?[") and not exists


def _kinds() -> str:
    return ", ".join(KINDS[:-1]) + f" or {KINDS[-1]}"


def _single(path: str, options: dict[str, Any]) -> Group | None:
    names = {path: path, **{name: name for name in _siblings(path).values()}}
    found = stat_files(list(names), options)
    return _with_siblings(path, found) if path in found else None


def _siblings(path: str) -> dict[str, str]:
    if path.endswith(".ds"):
        return {end: path + end for end in (".index", ".loss", ".metadata")}
    return {".idx": path[: -len(".bin")] + ".idx"} if path.endswith(".bin") else {}


def _with_siblings(name: str, listed: dict[str, Stat]) -> Group:
    kind = name[name.rindex(".") :]
    group = {kind: listed[name], **{end: listed[other] for end, other in _siblings(name).items() if other in listed}}
    if kind == ".bin" and ".idx" not in group:
        raise FileNotFoundError(
            f"{printable_url(listed[name].path)} has no .idx beside it, which would say where its sequences begin and "
            "how wide its ids are. Ids alone can be read as a .ds file."
        )
    return group


def _heads(group: Group) -> list[str]:
    """Whose beginning, or end, is read at once."""
    return [end for end in (".metadata", ".index", ".idx", ".npy") if end in group]


def _head_spans(group: Group) -> Iterator[tuple[str, int, int]]:
    for end in _heads(group):
        path, size, _ = group[end]
        if end == ".index":
            yield path, max(size - 8, 0), size
        else:
            yield path, 0, min(size, HEADER_BYTES if end == ".idx" else NPY_HEADER)


def _tail_spans(group: Group, index: MegatronIndex) -> Iterator[tuple[str, int, int]]:
    """The last sequence's length and offset, and the first and the last document index."""
    path, last = group[".idx"].path, index.sequences - 1
    if last >= 0:
        yield path, index.lengths_at + 4 * last, index.lengths_at + 4 * last + 4
        yield path, index.pointers_at + 8 * last, index.pointers_at + 8 * last + 8
        docs = index.documents
        yield path, index.documents_at, index.documents_at + (8 if docs else 0)
        yield path, index.documents_at + 8 * max(docs - 1, 0), index.documents_at + 8 * docs


def _opened(stat: Stat, cache: BlockCache) -> AnyFile:
    return RemoteFile(stat.path, stat.size, cache) if is_remote(stat.path) else LocalFile(stat.path, stat.size)


def _count(stat: Stat, dtype: np.dtype) -> int:
    if stat.size % dtype.itemsize:
        raise ValueError(
            f"{printable_url(stat.path)}: {stat.size} bytes are no whole number of ids of {dtype.itemsize} bytes; it "
            "is cut off, or its ids have another width."
        )
    return stat.size // dtype.itemsize


def _datatrove(group: Group, head: dict[str, bytes], given: np.dtype | None, cache: BlockCache) -> TokenFile:
    main = group[".ds"]
    shown = printable_url(main.path)
    text = head.get(".metadata", b"").decode("utf-8", "replace")
    said = parse_metadata(text, f"{shown}.metadata") if ".metadata" in group else Metadata(None, None, None)
    if given is not None and said.token_size not in (None, given.itemsize):
        raise ValueError(
            f"{shown}.metadata says that an id has {said.token_size} bytes, and {given.itemsize} were asked for."
        )
    if given is None and said.token_size is None:
        raise ValueError(
            f"{shown} does not say how wide its ids are, and no .metadata with it does: pass token_size=2 "
            "(vocabularies up to 65,536) or token_size=4."
        )
    dtype = given if given is not None else np.dtype(TOKEN_SIZES[said.token_size or 0])
    tokens = _count(main, dtype)
    if said.tokens not in (None, tokens):
        raise ValueError(
            f"{shown} has {tokens} tokens, and its .metadata says {said.tokens}; one of them is of another file."
        )
    documents: Documents | None = None
    if ".index" in group:
        index = group[".index"]
        if index.size % 8:
            raise ValueError(f"{shown}.index: {index.size} bytes are no whole number of ends of eight bytes.")
        last = int.from_bytes(head[".index"], "little")
        if last > tokens:
            raise ValueError(f"{shown}.index: its last document ends at token {last}, and the file has {tokens}.")
        documents = EndsInFile(SortedInts(_opened(index, cache), 0, index.size // 8), tokens, last)
    loss = group.get(".loss")
    if loss is not None and loss.size != tokens:
        raise ValueError(
            f"{shown}.loss has {loss.size} bytes, and the file {tokens} tokens; it must have one for each."
        )
    return TokenFile(
        main.path,
        _opened(main, cache),
        dtype,
        0,
        tokens,
        documents,
        _opened(loss, cache) if loss else None,
        said.tokenizer,
        version=main.version,
    )


def _megatron(group: Group, index: MegatronIndex, ends: list[int] | None, cache: BlockCache) -> TokenFile:
    main, idx = group[".bin"], group[".idx"]
    shown = printable_url(idx.path)
    tokens = _count(main, index.dtype)
    length, pointer, first, last = ends or [0, 0, 0, 0]
    if pointer + length * index.dtype.itemsize != main.size:
        raise ValueError(
            f"{shown}: its last sequence ends at byte {pointer + length * index.dtype.itemsize} of "
            f"{printable_url(main.path)}, which has {main.size} bytes; they are not of one pair."
        )
    documents = None
    if index.documents > 1:
        if first != 0 or last != index.sequences:
            raise ValueError(
                f"{shown}: its documents reach from sequence {first} to {last}, instead of 0 to {index.sequences}."
            )
        file = _opened(idx, cache)
        documents = SequencesInFile(
            SortedInts(file, index.pointers_at, index.sequences, index.dtype.itemsize),
            SortedInts(file, index.documents_at, index.documents),
            tokens,
        )
    return TokenFile(main.path, _opened(main, cache), index.dtype, 0, tokens, documents, version=main.version)


def _npy(group: Group, head: bytes, cache: BlockCache) -> TokenFile:
    main = group[".npy"]
    shown = printable_url(main.path)
    stream = io.BytesIO(head)
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
    except (ValueError, SyntaxError, tokenize.TokenError) as error:
        raise ValueError(f"{shown} is no .npy file that can be read ({error}).") from None
    if len(shape) != 1 or dtype.kind not in "iu":
        raise ValueError(f"{shown} holds {dtype.name} of shape {shape}; ids are integers in one dimension.")
    if stream.tell() + shape[0] * dtype.itemsize != main.size:
        raise ValueError(
            f"{shown}: {shape[0]} ids of {dtype.itemsize} bytes and a header of {stream.tell()} are not its "
            f"{main.size} bytes; it is cut off."
        )
    return TokenFile(main.path, _opened(main, cache), dtype, stream.tell(), shape[0], version=main.version)


def check_agreement(files: Sequence[TokenFile]) -> None:
    """Refuse files that were not written with one tokenizer, and in one width."""
    known = [file for file in files if file.tokenizer]
    for file in known[1:]:
        if file.tokenizer != known[0].tokenizer:
            raise ValueError(
                f"{file.shown} was written with the tokenizer {file.tokenizer!r}, and {known[0].shown} with "
                f"{known[0].tokenizer!r}; one set has one tokenizer."
            )
    for file in files[1:]:
        if file.path.endswith(".ds") and files[0].path.endswith(".ds") and file.dtype != files[0].dtype:
            raise ValueError(
                f"{file.shown} has ids of {file.dtype.itemsize} bytes, and {files[0].shown} of "
                f"{files[0].dtype.itemsize}; one set has one width."
            )
