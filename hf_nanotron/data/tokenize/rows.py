"""The rows of a piece of a source, one by one, and where each of them stands."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ...redaction import printable
from ..tokens.byte_ranges import file_system
from .source import Piece, Source, hub_stream, split_compression

BUFFER = 2**20  # bytes of a file
BATCH = 1000  # rows that are decoded together, of formats that have batches


@dataclass(frozen=True)
class Unreadable:
    """A row that cannot be read, and why."""

    why: str


Row = tuple[int, dict[str, Any] | Unreadable]  # its number, from 0, or its first byte


@dataclass
class RowReader:
    """Reads the pieces of a source.

    Attributes:
        columns: that each row has.
        optional: columns that are read where a row has them, and are None else.
        sample_by: what a document of a text file is: the whole file, a line or a paragraph.
    """

    source: Source
    columns: tuple[str, ...]
    optional: tuple[str, ...] = ()
    sample_by: str = "document"

    def read(self, piece: Piece) -> Iterator[Row]:
        """Rows of a piece. A file of which nothing more can be read raises a ValueError that names it."""
        try:
            yield from READERS[piece.format](self, piece)
        except (OSError, EOFError, zlib.error, lzma.LZMAError, UnicodeDecodeError) as error:
            raise ValueError(f"{piece.shown} cannot be read: {_why(error)}") from error

    def describe(self, piece: Piece, number: int) -> str:
        """Where a row stands, for a message."""
        if piece.format in ("json", "text") and not self._has_numbers(piece):
            return f"{piece.shown}, line {self._lines_before(piece, number) + 1}"
        if piece.format == "hub":
            return f"{piece.shown}, row {number} of part {piece.start + 1} of {piece.stop}"
        return f"{piece.shown}, row {number}" if piece.format != "text" else piece.shown

    def chosen(self, record: Any) -> dict[str, Any] | Unreadable:
        """What is asked of a row of any format."""
        if not isinstance(record, dict):
            return Unreadable(f"it holds {_kind(record)} instead of columns")
        for name in self.columns:
            if name not in record and name not in self.optional:
                return Unreadable(f"it has no column {name!r}; it has {', '.join(map(str, record)) or 'none'}")
        return {name: record.get(name) for name in (*self.columns, *self.optional)}

    def open(self, path: str) -> io.BufferedReader:
        """The bytes of a file, decompressed."""
        fs, inner = file_system(path, self.source.storage_options)
        file = fs.open(inner, "rb")
        end = split_compression(path)[1]
        return io.BufferedReader(_DECOMPRESSED[end](file) if end else file, BUFFER)

    @cached_property
    def stream(self) -> Any:
        return hub_stream(self.source.hub)

    def _has_numbers(self, piece: Piece) -> bool:
        """Whether rows are told by number, not by where they begin."""
        if piece.format == "text":
            return self.sample_by != "line"
        with self.open(piece.path) as file:
            return _is_array(file)

    def _lines_before(self, piece: Piece, offset: int) -> int:
        with self.open(piece.path) as file:
            lines = 0
            while offset > 0 and (data := file.read(min(offset, 2**20))):
                lines += data.count(b"\n")
                offset -= len(data)
            return lines

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "stream"}


def _lines(reader: RowReader, piece: Piece) -> Iterator[tuple[int, bytes]]:
    """Lines that begin in the piece, each with the place of its first byte."""
    with reader.open(piece.path) as file:
        at = piece.start
        if at:
            file.seek(at - 1)
            at += len(file.readline()) - 1  # a line that began before belongs to the piece before
        stop = piece.stop
        while (stop < 0 or at < stop) and (line := file.readline()):
            yield at, line.removeprefix(b"\xef\xbb\xbf") if at == 0 else line
            at += len(line)


def _json(reader: RowReader, piece: Piece) -> Iterator[Row]:
    with reader.open(piece.path) as file:
        if piece.start == 0 and _is_array(file):
            try:
                records = json.loads(file.read())
            except ValueError as error:
                raise ValueError(f"{piece.shown} is no JSON that can be read: {error}.") from error
            yield from ((number, reader.chosen(record)) for number, record in enumerate(records))
            return
    for at, line in _lines(reader, piece):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            yield at, Unreadable(_why(error))
        except (ValueError, RecursionError) as error:
            yield at, Unreadable(f"it is no JSON ({error})")
        else:
            yield at, reader.chosen(record)


def _is_array(file: io.BufferedReader) -> bool:
    """Whether JSON is one array, instead of a line for each row."""
    return file.peek(1).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def _text(reader: RowReader, piece: Piece) -> Iterator[Row]:
    column = reader.columns[0]
    if reader.sample_by == "line":
        for at, line in _lines(reader, piece):
            yield at, _decoded(column, line.rstrip(b"\r\n"))
        return
    with reader.open(piece.path) as file:
        data = file.read().removeprefix(b"\xef\xbb\xbf")
    parts = [data] if reader.sample_by == "document" else re.split(rb"\r?\n[ \t]*\r?\n\s*", data)
    yield from ((number, _decoded(column, part)) for number, part in enumerate(parts))


def _decoded(column: str, data: bytes) -> dict[str, Any] | Unreadable:
    try:
        return {column: data.decode("utf-8")}
    except UnicodeDecodeError as error:
        return Unreadable(_why(error))


def _csv(reader: RowReader, piece: Piece) -> Iterator[Row]:
    import pandas

    separator = "\t" if split_compression(piece.path)[0].lower().endswith(".tsv") else ","
    number = 0
    try:
        with reader.open(piece.path) as file:
            options = {"sep": separator, "dtype": str, "keep_default_na": False, "encoding": "utf-8-sig"}
            for frame in pandas.read_csv(file, chunksize=BATCH, **options):
                if not isinstance(frame.index, pandas.RangeIndex):  # what pandas makes of the fields before
                    raise ValueError(
                        f"{piece.shown}: its rows have more fields than its first line has names; put texts with a "
                        f"{'tab' if separator == chr(9) else 'comma'} in quotes."
                    )
                for record in frame.to_dict("records"):
                    yield number, reader.chosen(record)
                    number += 1
    except pandas.errors.EmptyDataError:
        return
    except pandas.errors.ParserError as error:
        raise ValueError(f"{piece.shown} is no CSV that can be read, after row {number}: {error}.") from error


def _parquet(reader: RowReader, piece: Piece) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    fs, inner = file_system(piece.path, reader.source.storage_options)
    try:
        with fs.open(inner, "rb") as opened:
            file = pyarrow.parquet.ParquetFile(opened)
            names = [name for name in (*reader.columns, *reader.optional) if name in file.schema_arrow.names]
            stop = file.num_row_groups if piece.stop < 0 else piece.stop
            number = sum(file.metadata.row_group(group).num_rows for group in range(piece.start))
            if missing := [name for name in reader.columns if name not in names]:
                raise ValueError(
                    f"{piece.shown} has no column {missing[0]!r}; it has {', '.join(file.schema_arrow.names)}."
                )
            for batch in file.iter_batches(BATCH, list(range(piece.start, stop)), names):
                for record in batch.to_pylist():
                    yield number, reader.chosen(without_fill(record))
                    number += 1
    except pyarrow.ArrowException as error:
        raise ValueError(f"{piece.shown} is no parquet file that can be read ({error}).") from error


def _rows(reader: RowReader, piece: Piece) -> Iterator[Row]:
    dataset = reader.source.dataset
    _refuse_missing(reader, piece, dataset.column_names)
    names = [name for name in (*reader.columns, *reader.optional) if name in dataset.column_names]
    part = dataset.select_columns(names).with_format(None).select(range(piece.start, piece.stop))
    yield from _batched(reader, part.iter(BATCH), piece.start)


def _hub(reader: RowReader, piece: Piece) -> Iterator[Row]:
    stream = reader.stream.shard(piece.stop, piece.start)
    if stream.column_names is not None:
        _refuse_missing(reader, piece, stream.column_names)
        stream = stream.select_columns([n for n in (*reader.columns, *reader.optional) if n in stream.column_names])
    try:
        yield from _batched(reader, stream.iter(BATCH), 0)
    except Exception as error:  # of any library that reads one of its formats
        raise ValueError(
            f"{piece.shown} cannot be read, part {piece.start + 1} of {piece.stop}: "
            f"{printable(' '.join(str(error).split()))[:300]}"
        ) from error


def _batched(reader: RowReader, batches: Iterator[dict[str, list[Any]]], number: int) -> Iterator[Row]:
    for batch in batches:
        for values in zip(*batch.values(), strict=True):
            yield number, reader.chosen(without_fill(dict(zip(batch, values, strict=True))))
            number += 1


def without_fill(record: dict[str, Any]) -> dict[str, Any]:
    """A row of Arrow without the nulls that it puts where one struct of a column lacks a field of another.

    Chat templates ask whether a message has `tool_calls`. The `content` of a message stays: it may be null.
    """
    return {name: _without_fill(value) for name, value in record.items()}


def _without_fill(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_fill(v) for k, v in value.items() if v is not None or k == "content"}
    return [_without_fill(part) for part in value] if isinstance(value, list) else value


def _refuse_missing(reader: RowReader, piece: Piece, names: Sequence[str]) -> None:
    if missing := [name for name in reader.columns if name not in names]:
        raise ValueError(f"{piece.shown} has no column {missing[0]!r}; it has {', '.join(names)}.")


def _zstd(file: Any) -> Any:
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd")


def _why(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 ({error.reason} at its byte {error.start})"
    return printable(str(error) or type(error).__name__)


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


_DECOMPRESSED: dict[str, Callable[[Any], Any]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _zstd,
}

READERS: dict[str, Callable[[RowReader, Piece], Iterator[Row]]] = {
    "json": _json,
    "text": _text,
    "csv": _csv,
    "parquet": _parquet,
    "rows": _rows,
    "hub": _hub,
}
