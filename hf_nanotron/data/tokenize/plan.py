"""Which pieces of a source make which shard, and whether a folder that was begun goes on with the same."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...redaction import shown
from ..tokens.same_tokenizer import OWN, PLAN
from .output import OutputFolder
from .source import Piece
from .writer import ENDS, file_name

VERSION = 1
RECORDS = f"{OWN}/shards"
SHARD_BYTES = 256 * 2**20  # of a source, where nothing says how many shards there should be
MOST_NAMED = 3


@dataclass(frozen=True)
class Counts:
    """What became of the rows of a shard.

    Attributes:
        documents, tokens: that were written.
        empty: rows without text.
        unreadable: rows that were left out because they could not be read.
        truncated, dropped: documents longer than the limit.
        untrained: documents without a token that is trained on, which are left out.
    """

    documents: int = 0
    tokens: int = 0
    empty: int = 0
    unreadable: int = 0
    truncated: int = 0
    dropped: int = 0
    untrained: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(**{name: value + getattr(other, name) for name, value in vars(self).items()})


def deal(pieces: Sequence[Piece], shards: int | None) -> list[list[Piece]]:
    """Pieces of each shard, one after the other, so that shards in order are the source in its order.

    The number of shards depends on the source alone, not on the machine.

    Raises:
        ValueError: if there are more shards than pieces.
    """
    if shards is not None and shards < 1:
        raise ValueError(f"shards={shards} must be at least 1.")
    if shards is not None and shards > len(pieces):
        raise ValueError(
            f"shards={shards}: the source can be read in {len(pieces)} pieces only (files, parts of large plain JSON "
            "files, row groups of parquet); use as many at most."
        )
    sizes = np.array([piece.size for piece in pieces], np.float64) + 1
    count = shards or min(len(pieces), max(1, -(-int(sizes.sum()) // SHARD_BYTES)))
    ends = np.cumsum(sizes)
    middles = (ends - sizes / 2) * count / ends[-1]
    chosen = np.minimum(middles.astype(np.int64), count - 1)
    # None may be empty: shard s begins at piece s at the earliest, and leaves a piece for each that follows.
    numbers = np.arange(len(pieces))
    first = [int(np.searchsorted(chosen, shard)) for shard in range(count)]
    for shard in range(1, count):
        first[shard] = max(first[shard], first[shard - 1] + 1)
    for shard in range(count - 1, 0, -1):
        first[shard] = min(first[shard], len(pieces) - (count - shard))
    owner = np.searchsorted(np.array(first), numbers, "right") - 1
    return [[piece for piece, o in zip(pieces, owner.tolist(), strict=True) if o == shard] for shard in range(count)]


def begin(out: OutputFolder, plan: dict[str, Any], overwrite: bool) -> bool:
    """Prepare the folder for a plan; whether it goes on with one that was begun.

    Raises:
        ValueError: if it was begun with another source, tokenizer or options, naming what differs; if it holds tokens
            that were not written by such a plan.
    """
    before = read_plan(out)
    files = out.sizes()
    if overwrite and before is not None:
        shards = range(before["options"]["shards"])
        out.remove([f"{shard_name(before, number)}{end}" for number in shards for end in ENDS])
        before, files = None, out.sizes()
    if before is None:
        if found := [file for file in sorted(files) if file.endswith((".ds", ".bin", ".npy"))]:
            raise ValueError(
                f"{out.shown} holds {found[0]}, which this command has not written there: a folder is read as one set. "
                "Give another folder."
            )
        out.write(PLAN, plan)
        return False
    if differences := list(_differences(before, plan)):
        text = "; ".join(differences[:MOST_NAMED])
        more = f"; and {len(differences) - MOST_NAMED} more" if len(differences) > MOST_NAMED else ""
        raise ValueError(
            f"{out.shown} was begun with something else: {text}{more}. Give what it was begun with to go on, another "
            "folder, or overwrite to begin anew."
        )
    return True


def read_plan(out: OutputFolder) -> dict[str, Any] | None:
    """The plan that a folder was begun with; None if there is none that can be read."""
    plan = out.read(PLAN) or {}
    options = plan.get("options")
    known = isinstance(options, dict) and isinstance(options.get("shards"), int) and {"name", "shuffle"} <= set(options)
    return plan if known else None


def finished(out: OutputFolder, shards: int, token_size: int) -> dict[int, Counts]:
    """Shards that are complete: all of their files are there, and as long as they have to be."""
    sizes, records, found = out.sizes(), out.sizes(RECORDS), {}
    for number in range(shards):
        if f"{number:05d}.json" not in records:
            continue
        record = out.read(record_name(number)) or {}
        try:
            counts, files = Counts(**record["counts"]), list(record["files"])
        except (KeyError, TypeError):  # damaged: the shard is written again
            continue
        lengths = {".ds": counts.tokens * token_size, ".index": 8 * counts.documents, ".loss": counts.tokens}
        if all(name in sizes and lengths.get(os.path.splitext(name)[1], sizes[name]) == sizes[name] for name in files):
            found[number] = counts
    return found


def record_name(number: int) -> str:
    """Of the file that says that a shard is complete."""
    return f"{RECORDS}/{number:05d}.json"


def shard_name(plan: dict[str, Any], number: int) -> str:
    options = plan["options"]
    return file_name(options["name"], number, options["shuffle"] is not None)


def _differences(before: dict[str, Any], now: dict[str, Any], path: str = "") -> Iterator[str]:
    """What is not the same, as sentences."""
    if path == "source files":
        yield from _changed_files(before, now)
        return
    for key in (*before, *(key for key in now if key not in before)):
        old, new = before.get(key), now.get(key)
        if old == new or (key == "vocabulary" and None in (old, new)):  # which earlier plans do not say
            continue
        where = f"{path} {key}".strip()
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, where)
        elif key in ("sha256", "vocabulary"):
            yield f"the {path} is another one than before, though its name is the same"
        elif path == "source":
            yield f"the source has {key}={shown(key, new)}, and had {shown(key, old)}"
        else:
            yield f"{where.removeprefix('options ')} is {shown(key, new)}, and was {shown(key, old)}"


def _changed_files(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    for path in now:
        if path not in before:
            yield f"{path} was not among the source files"
    for path, (size, version) in before.items():
        if path not in now:
            yield f"{path} is not among the source files any more"
        elif now[path][0] != size:
            yield f"{path} has {now[path][0]} bytes, and had {size}"
        elif now[path][1] != version:
            yield f"{path} was written again since"
