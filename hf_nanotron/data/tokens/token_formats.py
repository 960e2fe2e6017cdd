"""What files of token ids look like: datatrove's and nanoset's `.ds`, Megatron's `.bin` with `.idx`, and `.npy`.

`NAME.ds` (datatrove 0.10, `pipeline/tokens/tokenizer.py`) holds ids alone, little-endian, of two or four bytes. Beside
it may stand

    NAME.ds.index     uint64, little-endian: for each document its end in tokens, exclusive, ascending
    NAME.ds.loss      one byte a token, 1 where it is trained on
    NAME.ds.metadata  text: `tokenizer|bytes of an id`, the number of tokens, that number in words

`.idx` is described in `megatron_index`; `.npy` is NumPy's own format, of one dimension.
"""

from __future__ import annotations

import io
import tokenize
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from ...redaction import printable_url
from .byte_ranges import AnyFile, BlockCache, LocalFile, RemoteFile, Stat, is_remote
from .documents import Documents, EndsInFile, SequencesInFile
from .megatron_index import HEADER_BYTES, MegatronIndex
from .sorted_ints import SortedInts
from .token_paths import Group

TOKEN_SIZES = {1: "u1", 2: "<u2", 4: "<u4", 8: "<u8"}
HEAD_BYTES = 4096  # that are read of an `.npy`, or of a `.ds` with nothing beside it
SURELY = 32  # ids of which none is above 0: in no text, every second token is 0 for so long
UNKNOWN_TOKENIZER = "Unknown Tokenizer"  # what datatrove writes where it was given none


class Metadata(NamedTuple):
    """What a `.ds.metadata` says; None for what it leaves out."""

    tokenizer: str | None
    token_size: int | None
    tokens: int | None


class Layout(NamedTuple):
    """Where the ids are in a file, and what is beside them; see `TokenFile`."""

    dtype: np.dtype
    offset: int
    tokens: int
    documents: Documents | None = None
    loss: AnyFile | None = None
    tokenizer: str | None = None


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


def given_dtype(token_size: int | None, dtype: Any) -> np.dtype | None:
    """Of the ids of `.ds` files, as a user says it; None if not.

    Raises:
        ValueError: for a width or a dtype that ids cannot have, or two that contradict each other.
    """
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


def names_of_heads(group: Group) -> list[str]:
    """Whose beginning, or end, is read at once."""
    is_alone = list(group) == [".ds"]  # nothing but its ids could contradict what the user says of their width
    return [end for end in (".metadata", ".index", ".idx", ".npy") if end in group] + [".ds"] * is_alone


def head_spans(group: Group) -> Iterator[tuple[str, int, int]]:
    """Path, first byte and last of each of `names_of_heads`."""
    for end in names_of_heads(group):
        path, size, _ = group[end]
        if end == ".index":
            yield path, max(size - 8, 0), size
        else:
            yield path, 0, min(size, HEADER_BYTES if end == ".idx" else HEAD_BYTES)


def tail_spans(group: Group, index: MegatronIndex) -> Iterator[tuple[str, int, int]]:
    """The last sequence's length and offset, and the first and the last document index."""
    path, last = group[".idx"].path, index.sequences - 1
    if last >= 0:
        yield path, index.lengths_at + 4 * last, index.lengths_at + 4 * last + 4
        yield path, index.pointers_at + 8 * last, index.pointers_at + 8 * last + 8
        docs = index.documents
        yield path, index.documents_at, index.documents_at + (8 if docs else 0)
        yield path, index.documents_at + 8 * max(docs - 1, 0), index.documents_at + 8 * docs


def opened(stat: Stat, cache: BlockCache) -> AnyFile:
    """A file that is read in ranges; one of a store through the cache."""
    return RemoteFile(stat.path, stat.size, cache) if is_remote(stat.path) else LocalFile(stat.path, stat.size)


def _count(stat: Stat, dtype: np.dtype) -> int:
    if stat.size % dtype.itemsize:
        raise ValueError(
            f"{printable_url(stat.path)}: {stat.size} bytes are no whole number of ids of {dtype.itemsize} bytes; it "
            "is cut off, or its ids have another width."
        )
    return stat.size // dtype.itemsize


def _refuse_wider(shown: str, head: bytes, dtype: np.dtype) -> None:
    """Refuse ids that are wider than what they are read as: every second one would be the upper half of one, 0."""
    ids = np.frombuffer(head[: len(head) // (2 * dtype.itemsize) * 2 * dtype.itemsize], dtype)
    if len(ids) >= 2 * SURELY and not ids[1::2].any() and ids[::2].any():
        raise ValueError(
            f"{shown}: every second one of its first {len(ids)} ids is 0, read as {dtype.itemsize} bytes each; they "
            f"have {2 * dtype.itemsize}: pass token_size={2 * dtype.itemsize}."
        )


def datatrove_layout(group: Group, head: dict[str, bytes], given: np.dtype | None, cache: BlockCache) -> Layout:
    """Of a `.ds`, by what stands beside it.

    Args:
        head: the `.metadata`, the last eight bytes of the `.index`, and the first ids of a file that has neither.
        given: what the user says of its ids.

    Raises:
        ValueError: if the files contradict each other, or nothing says how wide an id is.
    """
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
    _refuse_wider(shown, head.get(".ds", b""), dtype)
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
        if last != tokens:
            raise ValueError(
                f"{shown}.index: its last document ends at token {last}, and the file has {tokens}: one of them is cut "
                "off or of another file, or the ids have another width."
            )
        documents = EndsInFile(SortedInts(opened(index, cache), 0, index.size // 8), tokens)
    loss = group.get(".loss")
    if loss is not None and loss.size != tokens:
        raise ValueError(
            f"{shown}.loss has {loss.size} bytes, and the file {tokens} tokens; it must have one for each."
        )
    return Layout(dtype, 0, tokens, documents, opened(loss, cache) if loss else None, said.tokenizer)


def megatron_layout(group: Group, index: MegatronIndex, ends: list[int] | None, cache: BlockCache) -> Layout:
    """Of a `.bin`, by its `.idx`.

    Args:
        ends: what `tail_spans` has read; None for an index without sequences.

    Raises:
        ValueError: if the two files are not of one pair.
    """
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
        file = opened(idx, cache)
        documents = SequencesInFile(
            SortedInts(file, index.pointers_at, index.sequences, index.dtype.itemsize),
            SortedInts(file, index.documents_at, index.documents),
            tokens,
        )
    return Layout(index.dtype, 0, tokens, documents)


def npy_layout(group: Group, head: bytes) -> Layout:
    """Of a `.npy`, by its header.

    Raises:
        ValueError: if it is none, is cut off, or holds anything but integers in one dimension.
    """
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
    return Layout(dtype, stream.tell(), shape[0])
