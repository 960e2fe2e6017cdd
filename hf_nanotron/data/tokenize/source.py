"""What a corpus is read from: files, a saved dataset, or one of the Hub, in pieces that workers read one by one."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ...redaction import printable, printable_url
from ..tokens.byte_ranges import Stat, described, expand, file_system, is_remote, local_path, refuse_twice, stat_files
from ..tokens.same_tokenizer import OWN

COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
FORMATS = {  # by the end of a file's name, before that of its compression
    ".parquet": "parquet",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
}
SAMPLE_BY = ("document", "line", "paragraph")
PIECE_BYTES = 64 * 2**20
PIECE_ROWS = 2**16  # of a dataset in memory or on disk
FEW_SHARDS = 16  # a Hub dataset of fewer is divided further, by the row groups of its files
_HUB_NAME = re.compile(r"[\w.\-]+(/[\w.\-]+)?")


@dataclass(frozen=True)
class Piece:
    """A part of a source.

    Attributes:
        path: local path or URL of a file; name of a dataset.
        format: key of `rows.READERS`.
        start, stop: bytes of text, row groups of parquet, rows of a dataset, or which of `stop` shards of a Hub
            dataset; `stop=-1` is to the end.
        size: bytes, as far as known: how much work it is.
    """

    path: str
    format: str
    start: int = 0
    stop: int = -1
    size: int = 0

    @property
    def shown(self) -> str:
        return printable_url(self.path)


@dataclass
class Source:
    """What is tokenized.

    Attributes:
        shown: its name for messages.
        pieces: in the order of the documents.
        identity: in JSON's types; another one is another source.
        dataset: that was given, or loaded from a disk.
        hub: arguments of `datasets.load_dataset`.
        storage_options: for fsspec, where files are URLs. They may hold keys, and are not part of the identity.
    """

    shown: str
    pieces: list[Piece]
    identity: dict[str, Any]
    dataset: Any = field(default=None, repr=False)
    hub: dict[str, Any] = field(default_factory=dict)
    storage_options: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def size(self) -> int:
        return sum(piece.size for piece in self.pieces)


def open_source(
    source: Any,
    *,
    name: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    format: str | None = None,
    shards: int | None = None,
    storage_options: dict[str, Any] | None = None,
) -> Source:
    """Find what a source consists of, without reading its texts.

    Args:
        source: a file, folder or pattern with `*`, local or by URL; several of them; a folder of `save_to_disk`; a
            `datasets.Dataset`; or the name of a Hub dataset.
        name, split, revision: of a Hub dataset; `split` also of a saved `DatasetDict`. The split is `"train"` if None.
        format: of files whose names do not say it: one of `FORMATS`.
        shards: that are wanted; a Hub dataset is divided further if it has fewer.
        storage_options: for fsspec.

    Raises:
        FileNotFoundError: for a path that leads to nothing.
        ValueError: for a source that cannot be read, or is empty; for arguments that belong to another kind of it.
    """
    if format is not None and format not in FORMATS.values():
        raise ValueError(f"format={format!r} is not one of {', '.join(dict.fromkeys(FORMATS.values()))}.")
    of_hub = {"name": name, "revision": revision}
    if isinstance(source, dict) or hasattr(source, "_fingerprint"):
        _refuse_given("a dataset in memory", {**of_hub, "format": format})
        return _dataset(source, "the dataset", split)
    if hasattr(source, "_ex_iterable"):
        raise ValueError(
            "a stream cannot be tokenized in shards, nor be resumed; pass the name of its dataset, or its files."
        )
    paths = [os.fspath(source)] if isinstance(source, str | os.PathLike) else [os.fspath(path) for path in source]
    if not paths:
        raise ValueError("no source was given.")
    first = paths[0]
    if len(paths) == 1 and _is_saved(first):
        _refuse_given(f"{first}, a folder of save_to_disk", {**of_hub, "format": format})
        return _saved(first, split)
    if len(paths) == 1 and _is_hub_name(first):
        _refuse_given(f"{first}, a dataset of the Hub", {"format": format})
        return _hub(first, name, split, revision, shards)
    for argument, value in (("name", name), ("split", split), ("revision", revision)):
        if value is not None:
            raise ValueError(f"{argument}={value!r} belongs to a Hub dataset, and {printable_url(first)} is none.")
    return _files(paths, format, dict(storage_options or {}))


def _refuse_given(what: str, values: dict[str, Any]) -> None:
    """Refuse arguments that a kind of source has no use for."""
    for argument, value in values.items():
        if value is not None:
            raise ValueError(f"{argument}={value!r} has no meaning for {what}.")


# ---- files ----


def _files(paths: Sequence[str], format: str | None, options: dict[str, Any]) -> Source:
    found = [stat for path in paths for stat in _listed(path, format, options)]
    shown = printable_url(paths[0]) if len(paths) == 1 else f"{printable_url(paths[0])} and {len(paths) - 1} more"
    refuse_twice(found, "its documents would be written twice")
    formats = {stat.path: format or format_of(stat.path) for stat in found}
    for stat in found:
        if formats[stat.path] is None:
            raise ValueError(
                f"{printable_url(stat.path)}: its name does not say what it holds ({', '.join(FORMATS)}, also with "
                f"{', '.join(COMPRESSIONS)}); say it with format."
            )
    kinds = {formats[stat.path]: stat.path for stat in found}
    if len(kinds) > 1:
        (a, first), (b, second), *_ = kinds.items()
        raise ValueError(
            f"{shown} holds {a} files ({printable_url(first)}) and {b} files ({printable_url(second)}); give those of "
            "one kind, with a pattern such as folder/**/*.jsonl."
        )
    found = [stat for stat in found if stat.size]
    if not found:
        raise ValueError(f"{shown} is empty: it has no file with anything in it.")
    return Source(
        shown,
        [piece for stat in found for piece in _divided(stat, formats[stat.path] or "", options)],
        {"files": {printable_url(stat.path): [stat.size, stat.version] for stat in found}},
        storage_options=options,
    )


def _listed(path: str, format: str | None, options: dict[str, Any]) -> list[Stat]:
    """Files of a path, sorted; those of a folder and its subfolders that can be read."""
    if not is_remote(path):
        path = os.path.abspath(local_path(path))
    if found := stat_files([path], options):
        return list(found.values())
    fs, inner = file_system(path, options)
    with described(path, options):
        if any(mark in path for mark in "*?[") and not fs.exists(inner):
            names = [name for name in expand(path, options) if f"/{OWN}/" not in name]  # of an output within the source
            if not names:
                raise FileNotFoundError(f"{printable_url(path)} matches no file.")
        elif fs.isdir(inner):
            names = [fs.unstrip_protocol(name) if is_remote(path) else name for name in sorted(fs.find(inner))]
            below = len(path.rstrip("/"))
            names = [n for n in names if not re.search(r"/[._]", n[below:]) and (format or format_of(n))]
            if not names:
                raise FileNotFoundError(
                    f"the folder {printable_url(path)} holds no {', '.join(FORMATS)} file, compressed or not; say with "
                    "format what others hold."
                )
        else:
            raise FileNotFoundError(f"{printable_url(path)}: there is no such file or folder.")
    stats = stat_files(names, options)
    return [stats[name] for name in names if name in stats]


def format_of(path: str) -> str | None:
    """What a file holds, by its name."""
    stem, _ = split_compression(path)
    return FORMATS.get(os.path.splitext(stem)[1].lower())


def split_compression(path: str) -> tuple[str, str]:
    """A name without the end of its compression, and that end."""
    end = next((end for end in COMPRESSIONS if path.lower().endswith(end)), "")
    return path[: len(path) - len(end)], end


def _divided(stat: Stat, format: str, options: dict[str, Any]) -> list[Piece]:
    """A file as pieces that can be read by themselves."""
    path, size = stat.path, stat.size
    if format == "parquet":
        with described(path, options):
            return _row_groups(path, size, options)
    splits = format == "json" and size > PIECE_BYTES and not split_compression(path)[1]
    if splits:
        with described(path, options):
            splits = not _is_array(path, options)
    if not splits:
        return [Piece(path, format, size=size)]
    edges = [*range(0, size - PIECE_BYTES // 2, PIECE_BYTES), size]
    return [Piece(path, format, a, b, b - a) for a, b in zip(edges, edges[1:], strict=False)]


def _is_array(path: str, options: dict[str, Any]) -> bool:
    fs, inner = file_system(path, options)
    with fs.open(inner, "rb") as file:
        return bool(file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[")


def _row_groups(path: str, size: int, options: dict[str, Any]) -> list[Piece]:
    if size <= PIECE_BYTES:  # its footer need not be read before the file is
        return [Piece(path, "parquet", size=size)]
    import pyarrow
    import pyarrow.parquet

    fs, inner = file_system(path, options)
    try:
        with fs.open(inner, "rb") as file:
            footer = pyarrow.parquet.ParquetFile(file).metadata
            sizes = [footer.row_group(number).total_byte_size for number in range(footer.num_row_groups)]
    except pyarrow.ArrowException as error:
        raise ValueError(f"{printable_url(path)} is no parquet file that can be read ({error}).") from error
    whole = sum(sizes) or 1
    pieces, first, held = [], 0, 0
    for number, group in enumerate(sizes):
        held += group * size // whole
        if held >= PIECE_BYTES or number == len(sizes) - 1:
            pieces.append(Piece(path, "parquet", first, number + 1, held))
            first, held = number + 1, 0
    return pieces


# ---- datasets ----


def _is_saved(path: str) -> bool:
    return any(os.path.isfile(os.path.join(local_path(path), end)) for end in ("dataset_dict.json", "state.json"))


def _saved(path: str, split: str | None) -> Source:
    from datasets import load_from_disk

    return _dataset(load_from_disk(local_path(path)), path, split)


def _dataset(dataset: Any, shown: str, split: str | None) -> Source:
    """A `datasets.Dataset` or `DatasetDict`."""
    if isinstance(dataset, dict):
        split = split or "train"
        if split not in dataset:
            raise ValueError(f"{shown} has no split {split!r}; it has {', '.join(map(str, dataset))}.")
        dataset = dataset[split]
    if not len(dataset):
        raise ValueError(f"{shown} is empty: it has no rows.")
    each = max(dataset.data.nbytes // len(dataset), 1)
    rows = max(min(PIECE_BYTES // each, PIECE_ROWS), 1)
    edges = [*range(0, len(dataset), rows), len(dataset)]
    pieces = [Piece(shown, "rows", a, b, (b - a) * each) for a, b in zip(edges, edges[1:], strict=False)]
    return Source(shown, pieces, {"fingerprint": dataset._fingerprint, "rows": len(dataset)}, dataset)


def _is_hub_name(path: str) -> bool:
    """Whether a path that leads to nothing here may be the name of a dataset."""
    if not _HUB_NAME.fullmatch(path) or os.path.exists(path) or path.startswith("."):
        return False
    return format_of(path) is None


def _hub(path: str, name: str | None, split: str | None, revision: str | None, shards: int | None) -> Source:
    from datasets import load_dataset_builder

    try:
        builder = load_dataset_builder(path, name, revision=revision)
    except Exception as error:  # of many libraries, with a sentence each
        raise ValueError(
            f"{path!r} is no file or folder here, and cannot be read as a dataset of the Hub: "
            f"{printable(' '.join(str(error).split()))}"
        ) from error
    found = str(builder.hash)
    commit = found if re.fullmatch("[0-9a-f]{40}", found) else revision  # workers read what was found here
    hub = {"path": path, "name": name, "split": split or "train", "revision": commit}
    stream = hub_stream(hub)
    divided = stream.num_shards < max(FEW_SHARDS, shards or 0)
    if divided:
        stream = stream.reshard()
    hub["divided"] = divided
    count = stream.num_shards
    info = (builder.info.splits or {}).get(split or "train")
    size = int(getattr(info, "num_bytes", 0) or 0)
    pieces = [Piece(path, "hub", number, count, size // count) for number in range(count)]
    return Source(path, pieces, {"dataset": {**hub, "commit": found, "shards": count}}, hub=hub)


def hub_stream(hub: dict[str, Any]) -> Any:
    """A dataset of the Hub as a stream, in as many shards as in the plan."""
    from datasets import load_dataset

    arguments = {key: value for key, value in hub.items() if key != "divided"}
    try:
        stream = load_dataset(**arguments, streaming=True)
    except Exception as error:
        raise ValueError(f"{hub['path']!r} cannot be read: {printable(' '.join(str(error).split()))}") from error
    return stream.reshard() if hub.get("divided") else stream
