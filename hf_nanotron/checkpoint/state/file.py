"""The files of a training state: fp32 masters and optimizer state by Hub name and slice. Written here.

`training_state/` holds a safetensors file for each rank that writes and, written last, `index.json`. Tensors are 1-D,
`<hub name>|<kind>|<start>`. Checksums are crc32 of blocks of 1 MiB, so a reader verifies exactly the bytes that it
reads, on any number of ranks. The header of a file has a digest of where in their Hub tensors its pieces lie.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

from ...parallel.shard_spec import ShardSpec
from ..files.checked import read_checked, write_checked
from ..files.disk import CHUNK_BYTES, StrPath, crc32, durable_file
from ..files.safetensors_file import DTYPE_NAMES, DTYPES, Entry, bytes_of_tensor, header_of
from ..files.schema import MOST_BLOCK_BYTES, RANK, require
from .pieces import check_complete, digest, find_fault, place_of
from .slices import Slice
from .values import encode

FORMAT = "hf_nanotron training state"
VERSION = 1
INDEX = "index.json"
DIGEST = "pieces"  # in a file's own metadata: of where in their tensors its pieces are
BLOCK_BYTES = 1 << 20  # of one checksum
MASTER = "master"
AVERAGE = "ema"
BUFFER = "buffer"


@dataclass
class StatePiece:
    """What a rank writes of one parameter."""

    spec: ShardSpec  # which part of the Hub's tensor the rank holds
    start: int  # the elements `[start, stop)` of that part, flattened, that it writes
    stop: int
    tensors: dict[str, torch.Tensor]  # kind (`"master"`, `"exp_avg"`, ...) -> 1-D tensor of `stop - start` elements
    # what the optimizer keeps for the whole parameter, such as `step`; numbers or 0-dim tensors
    scalars: dict[str, Any] = field(default_factory=dict)


def clear(directory: StrPath) -> None:
    """Make `directory` ready to be written by `write_rank`. A state that is there is gone: its index goes first."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / INDEX).unlink(missing_ok=True)
    for old in directory.glob("rank-*"):
        old.unlink(missing_ok=True)


def write_rank(directory: StrPath, rank: int, pieces: Iterable[StatePiece], block_bytes: int = BLOCK_BYTES) -> None:
    """Write the pieces of one rank: `rank-00003.safetensors`, and `rank-00003.json` for `commit`.

    Communicates with nobody. Holds no more host memory than one chunk of 16 MiB, also for tensors on a GPU. A rank
    without pieces writes the JSON alone. `block_bytes`, under one checksum, is a multiple of 8 up to 64 MiB.
    """
    if not 8 <= block_bytes <= MOST_BLOCK_BYTES or block_bytes % 8:
        raise ValueError(f"block_bytes={block_bytes} is not a multiple of 8 up to {MOST_BLOCK_BYTES}.")
    stem = Path(directory) / f"rank-{rank:05d}"
    path = stem.with_suffix(".safetensors")
    listed = [piece for piece in pieces if piece.stop > piece.start]
    slices = [Slice(piece.spec, piece.start, piece.stop) for piece in listed]
    found = [(i, kind, tensor) for i, piece in enumerate(listed) for kind, tensor in piece.tensors.items()]
    # Wide elements first, as safetensors has it: every tensor then starts at a multiple of its element size.
    found.sort(key=lambda item: -item[2].element_size())
    placed = [place_of(each) for each in slices]
    header: dict[str, Entry] = {}
    places: list[dict[str, list[Any]]] = [{} for _ in listed]
    offset = 0
    for i, kind, tensor in found:
        name = f"{slices[i].name}|{kind}|{slices[i].start}"
        _check_tensor(name, tensor, slices[i].numel)
        if name in header:
            raise ValueError(f"rank {rank} was given {name!r} twice; each value of the model is written once.")
        header[name] = Entry(name, tensor.dtype, (tensor.numel(),))
        places[i][kind] = [DTYPE_NAMES[tensor.dtype], offset]
        offset += tensor.nbytes

    body: dict[str, Any] = {"block_bytes": block_bytes, "files": {}, "pieces": [], "scalars": {}}
    if found:
        raw = header_of(header.values(), {DIGEST: digest(placed)})
        with durable_file(path) as file:
            file.write(raw)
            for i, kind, tensor in found:
                places[i][kind].append(_write_tensor(file, tensor, block_bytes))
        body["files"][path.name] = {"bytes": len(raw) + offset, "header": [len(raw), zlib.crc32(raw)]}
    for piece, place, entry in zip(listed, placed, places, strict=True):
        name = place["name"]
        body["pieces"].append({**place, "file": path.name, "tensors": entry})
        scalars = encode(piece.scalars, f"optimizer state of {name!r}")
        if body["scalars"].setdefault(name, scalars) != scalars:
            raise ValueError(_scalars_differ(name, body["scalars"][name], scalars))
    write_checked(stem.with_suffix(".json"), body, durable=False)  # `commit` reads it at once


def _check_tensor(name: str, tensor: torch.Tensor, numel: int) -> None:
    if tensor.dtype not in DTYPE_NAMES:
        raise ValueError(f"{name!r} is {tensor.dtype}, which cannot be stored; one of {', '.join(DTYPES)} can.")
    if tensor.dim() != 1 or tensor.numel() != numel:
        raise ValueError(
            f"{name!r} has shape {tuple(tensor.shape)}, but its piece has {numel} elements; a training state holds one "
            f"value for each element of a parameter, as a tensor of shape ({numel},)."
        )


def _write_tensor(file: IO[bytes], tensor: torch.Tensor, block_bytes: int) -> str:
    """Append the bytes of a tensor, chunk by chunk; returns the checksums of its blocks."""
    step = max(CHUNK_BYTES // block_bytes, 1) * block_bytes // tensor.element_size()
    sums = []
    for start in range(0, tensor.numel(), step):
        data = bytes_of_tensor(tensor.detach()[start : start + step])
        sums += [crc32(data[i : i + block_bytes]) for i in range(0, len(data), block_bytes)]
        file.write(data)
    return "".join(sums)


def commit(directory: StrPath, ranks: int, values: dict[str, Any]) -> None:
    """Join what `ranks` ranks have written, and write `index.json`, without which there is no training state.

    By one rank, after all others have returned from `write_rank`. `values`: all that is not a tensor per parameter.
    """
    directory = Path(directory)
    body: dict[str, Any] = {"format": FORMAT, "version": VERSION, "block_bytes": None}
    body |= {"values": encode(values, "training state"), "files": {}, "pieces": [], "scalars": {}}
    written = [directory / f"rank-{rank:05d}.json" for rank in range(ranks)]
    there = set(os.listdir(directory))
    if missing := [path for path in written if path.name not in there]:
        raise ValueError(f"{missing[0]} is missing: that rank has not written its part of the training state.")
    for path in written:
        part = require(RANK, read_checked(path), path)
        if body["block_bytes"] not in (None, part["block_bytes"]):
            raise ValueError(f"{path} has blocks of {part['block_bytes']} bytes, others of {body['block_bytes']}.")
        body["block_bytes"] = part["block_bytes"]
        body["files"] |= part["files"]
        body["pieces"] += part["pieces"]
        for name, scalars in part["scalars"].items():
            if body["scalars"].setdefault(name, scalars) != scalars:
                raise ValueError(_scalars_differ(name, body["scalars"][name], scalars))
    require(find_fault, body, directory / INDEX)
    check_complete(directory / INDEX, body["pieces"])
    write_checked(directory / INDEX, body)
    for path in written:
        path.unlink()


def _scalars_differ(name: str, one: Any, other: Any) -> str:
    return f"the optimizer state of {name!r} differs between its pieces: {one} and {other}; they must take equal steps."
