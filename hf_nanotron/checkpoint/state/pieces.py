"""The pieces that the index of a training state lists: what they are called, which slices they are, their faults."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any

from ...parallel.shard_spec import ShardSpec
from ..files.safetensors_file import DTYPES
from ..files.schema import show
from .slices import Slice, find_fault as find_gap

Piece = dict[str, Any]  # with the keys of `schema.RANK`


def tensor_name(piece: Piece, kind: str) -> str:
    """What a tensor of a piece is called in the header of its file."""
    return f"{piece['name']}|{kind}|{piece['start']}"


def digest(pieces: Iterable[Piece]) -> str:
    """SHA-256 of where in their tensors some pieces are, in any order."""
    keys = ("name", "shape", "dim", "ranges", "start", "stop")
    rows = sorted(json.dumps([piece[key] for key in keys]) for piece in pieces)
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def place_of(part: Slice) -> Piece:
    """What the index says of a slice, besides its tensors."""
    where = {"name": part.name, "shape": part.global_shape, "dim": part.spec.dim, "ranges": part.ranges}
    return {**where, "start": part.start, "stop": part.stop}


def slice_of(piece: Piece) -> Slice:
    """The slice that a piece of the index describes."""
    ranges = tuple((start, stop) for start, stop in piece["ranges"])
    spec = ShardSpec(piece["name"], tuple(piece["shape"]), piece["dim"], (ranges,))
    return Slice(spec, piece["start"], piece["stop"])


def check_complete(index: Path, pieces: list[Piece]) -> None:
    """Refuse pieces that do not hold every element of their tensors, for every kind, exactly once."""
    kinds: dict[tuple[str, str], list[Piece]] = {}
    for piece in pieces:
        for kind in piece["tensors"]:
            kinds.setdefault((piece["name"], kind), []).append(piece)
    for (name, kind), stored in kinds.items():
        fault = find_gap(slice_of(piece) for piece in stored)
        if fault is not None:
            files = sorted({piece["file"] for piece in stored})
            raise ValueError(
                f"{index}: {kind} of {name!r} is not stored exactly once: {fault} (its pieces are in "
                f"{', '.join(files[:5])}{', ...' if len(files) > 5 else ''}); use an earlier checkpoint."
            )


def find_fault(index: dict[str, Any]) -> str | None:
    """What is wrong with an index whose keys and types are right: one piece by itself, two of one tensor, or places."""
    places: dict[str, list[tuple[int, int]]] = {name: [] for name in index["files"]}
    stored: dict[str, tuple[Any, ...]] = {}
    seen: set[tuple[str, str]] = set()
    for number, piece in enumerate(index["pieces"]):
        fault = _piece_fault(piece, index, places, seen)
        like = piece["shape"], piece["dim"], {kind: entry[0] for kind, entry in piece["tensors"].items()}
        if fault is None and stored.setdefault(piece["name"], like) != like:
            fault = "has another shape, cut dimension, kinds or dtypes than the pieces before it"
        if fault is not None:
            return f"pieces[{number}] of {show(piece['name'])} {fault}"
    for file, entry in index["files"].items():
        length = entry["header"][0]
        reached, end = 0, entry["bytes"] - length
        for start, stop in [*sorted(places[file]), (end, end)]:
            if start != reached:
                return f"its tensors do not lie one after the other in {file}, at byte {length + min(start, reached)}"
            reached = stop
    if strangers := sorted(index["scalars"].keys() - stored.keys()):
        return f"scalars[{show(strangers[0])}] is of a tensor without pieces"
    return None


def _piece_fault(
    piece: Piece, index: dict[str, Any], places: dict[str, list[tuple[int, int]]], seen: set[tuple[str, str]]
) -> str | None:
    """Adds where the piece lies to `places`, and its names to `seen`."""
    shape, dim, ranges, file = list(piece["shape"]), piece["dim"], piece["ranges"], piece["file"]
    if dim is None:
        if ranges:
            return "has ranges, but no dim that is cut"
    elif dim >= len(shape):
        return f"has dim {dim}, but only {len(shape)} dimensions"
    elif not all(start <= stop <= shape[dim] for start, stop in ranges):
        return f"has ranges that are not within 0:{shape[dim]}"
    else:
        shape[dim] = sum(stop - start for start, stop in ranges)
    if not piece["start"] < piece["stop"] <= prod(shape):
        return f"has elements {piece['start']}:{piece['stop']}, where there are {show(prod(shape))}"
    if file not in places:
        return f"is in {file}, which is not among the files"
    for kind, (dtype, offset, checksums) in piece["tensors"].items():
        size = (piece["stop"] - piece["start"]) * DTYPES[dtype].itemsize
        if len(checksums) != 8 * -(-size // index["block_bytes"]):
            return f"has {len(checksums) // 8} checksums for the {size} bytes of {show(kind)}"
        name = tensor_name(piece, kind)
        if (file, name) in seen:
            return f"is in {file} twice, as {show(name)}"
        seen.add((file, name))
        places[file].append((offset, offset + size))
    return None
