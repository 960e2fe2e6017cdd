"""One shard: its pieces are read, encoded and written, and it gets its name when it is complete."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from ...redaction import printable_url
from ..tokens.byte_ranges import stat_files
from .encoders import Encoded, Encoder, Result
from .output import OutputFolder
from .plan import Counts, record_name, shard_name
from .rows import RowReader, Unreadable
from .source import Piece
from .writer import ShardWriter, file_name

BATCH_ROWS = 1000
BATCH_CHARACTERS = 4 * 2**20
TOO_LONG = ("truncate", "split", "drop")

Tell = Callable[[Counts], None]


@dataclass
class Job:
    """What a worker needs to know; it is pickled for other processes.

    Attributes:
        plan: as in the output's `plan.json`.
        pieces: of each shard.
        skip_unreadable: leave out rows that cannot be read, and count them, instead of ending.
    """

    plan: dict[str, Any]
    pieces: list[list[Piece]]
    reader: RowReader
    encoder: Encoder
    out: OutputFolder
    skip_unreadable: bool = False

    def run(self, number: int, tell: Tell = lambda _: None) -> Counts:
        """Write shard `number`.

        Args:
            tell: is told what was added by each batch.

        Raises:
            ValueError: for a row that cannot be read or encoded, naming file and row; for a file that is not the one
                of the plan any more.
        """
        options = self.plan["options"]
        total = Counts()
        with self.out.workplace(number) as folder:
            name = file_name(options["name"], number, shuffled=False)
            size, tokenizer = options["token_size"], self.plan["tokenizer"]["name"]
            writer = ShardWriter(folder, name, size, tokenizer, self.encoder.masked)
            try:
                for batch in self._batches(number):
                    added = self._write(writer, batch)
                    total += added
                    tell(added)
                self._refuse_changed(number)
                with self.out.written():
                    names = writer.close(options["shuffle"], shard_name(self.plan, number))
                    if total.documents:
                        self.out.publish(folder, names)
            except BaseException:
                writer.abandon()
                raise
        files = names if total.documents else []
        self.out.write(record_name(number), {"counts": vars(total), "files": files})
        return total

    def _refuse_changed(self, number: int) -> None:
        """Files that were written while they were read: nobody could say which documents the shard has."""
        planned, options = self.plan["source"].get("files", {}), self.reader.source.storage_options
        for path in dict.fromkeys(piece.path for piece in self.pieces[number] if planned):
            now, shown = stat_files([path], options).get(path), printable_url(path)
            if now is None or [now.size, now.version] != list(planned[shown]):
                raise ValueError(
                    f"{shown} was written again, or is gone, since the command has looked at it ({planned[shown][0]} "
                    f"bytes then{f', {now.size} now' if now else ''}): run it with overwrite when its files stay as "
                    "they are."
                )

    def _batches(self, number: int) -> Iterator[list[tuple[Piece, int, Any]]]:
        """Rows of a shard, with where they stand."""
        limit = _share(self.plan["options"]["max_documents"], number, len(self.pieces))
        rows = ((piece, at, row) for piece in self.pieces[number] for at, row in self.reader.read(piece))
        batch: list[tuple[Piece, int, Any]] = []
        characters = 0
        for piece, at, row in islice(rows, limit):
            batch.append((piece, at, row))
            characters += _length(row)
            if len(batch) >= BATCH_ROWS or characters >= BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
        if batch:
            yield batch

    def _write(self, writer: ShardWriter, batch: Sequence[tuple[Piece, int, Any]]) -> Counts:
        readable = [row for _, _, row in batch if not isinstance(row, Unreadable)]
        encoded = iter(self.encoder.encode(readable))
        counts = Counts()
        for piece, at, row in batch:
            result: Result = row if isinstance(row, Unreadable) else next(encoded)
            if isinstance(result, Unreadable):
                if not self.skip_unreadable:
                    raise ValueError(
                        f"{self.reader.describe(piece, at)}: {result.why}. Mend it, or leave out such rows "
                        "with skip_unreadable."
                    )
                counts = replace(counts, unreadable=counts.unreadable + 1)
            elif result is None:
                counts = replace(counts, empty=counts.empty + 1)
            else:
                counts += self._document(writer, result)
        return counts

    def _document(self, writer: ShardWriter, document: Encoded) -> Counts:
        ids, trained = document
        longest, way = self.plan["options"]["max_length"], self.plan["options"]["too_long"]
        truncated = 0
        if longest is not None and len(ids) > longest and way != "split":
            if way == "drop":
                return Counts(dropped=1)
            ids, trained = ids[:longest], None if trained is None else trained[:longest]
            truncated = 1
        if trained is not None and not any(trained):
            return Counts(untrained=1, truncated=truncated)
        with self.out.written():
            writer.write(ids, trained)
        return Counts(documents=1, tokens=len(ids), truncated=truncated)


def _share(documents: int | None, number: int, shards: int) -> int | None:
    """Of the documents that are wanted, those of one shard."""
    return None if documents is None else documents // shards + (number < documents % shards)


def _length(row: Any) -> int:
    """Characters of a row, about."""
    if isinstance(row, str):
        return len(row)
    if isinstance(row, dict):
        return sum(map(_length, row.values()))
    return sum(map(_length, row)) if isinstance(row, list) else 0
