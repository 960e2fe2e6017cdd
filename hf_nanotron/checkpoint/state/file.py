"""The files of a training state: fp32 masters and optimizer state by Hub name and slice. Written here.

`training_state/` holds a safetensors file for each rank that writes and, written last, `index.json`: what every tensor
is (Hub name, shape, slice, kind, dtype), where it lies, checksums, and all values that are not tensors. No file depends
on the number of ranks that read, and there is no pickle.

Tensors are 1-D, `<hub name>|<kind>|<start>` in the file's own header, so any safetensors tool reads them. The header
also has a digest of where in their Hub tensors they lie, and is compared with the index. Checksums are
crc32 of blocks of 1 MiB: a reader that wants a part of a tensor verifies exactly the bytes it has read.
"""

from __future__ import annotations

import json
import os
import stat
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ...parallel.shard_spec import ShardSpec
from ..files.safetensors_file import DTYPE_NAMES, DTYPES
from ..files.schema import EARLIER, MOST_BLOCK_BYTES, RANK, load_json, require
from .pieces import Piece, check_complete, digest, find_fault
from .slices import Slice
from .values import encode

FORMAT = "hf_nanotron training state"
VERSION = 1
INDEX = "index.json"
DIGEST = "pieces"  # in a file's own metadata: of where in their tensors its pieces are
LARGEST = 4 << 30  # bytes of a JSON file that is read
BLOCK_BYTES = 1 << 20  # of one checksum
CHUNK_BYTES = 16 << 20  # of one transfer to or from the host's memory
MASTER = "master"


@dataclass
class StatePiece:
    """What a rank writes of one parameter.

    Args:
        spec: which part of the Hub's tensor the rank holds.
        start, stop: the elements `[start, stop)` of that part, flattened, that it writes.
        tensors: kind (`"master"`, `"exp_avg"`, ...) -> 1-D tensor of `stop - start` elements.
        scalars: what the optimizer keeps for the whole parameter, such as `step`; numbers or 0-dim tensors.
    """

    spec: ShardSpec
    start: int
    stop: int
    tensors: dict[str, torch.Tensor]
    scalars: dict[str, Any] = field(default_factory=dict)


def clear(directory: str | os.PathLike[str]) -> None:
    """Make `directory` ready to be written by `write_rank`. A state that is there is gone: its index goes first."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / INDEX).unlink(missing_ok=True)
    for old in directory.glob("rank-*"):
        old.unlink(missing_ok=True)


def write_rank(
    directory: str | os.PathLike[str], rank: int, pieces: Iterable[StatePiece], block_bytes: int = BLOCK_BYTES
) -> None:
    """Write the pieces of one rank: `rank-00003.safetensors`, and `rank-00003.json` for `commit`.

    Communicates with nobody. Holds no more host memory than one chunk of 16 MiB, also for tensors on a GPU. A rank
    without pieces writes the JSON alone.

    Args:
        directory: the `training_state/` of the checkpoint, after `clear`.
        block_bytes: bytes under one checksum, a multiple of 8 up to 64 MiB.

    Raises:
        ValueError: for a tensor that is not 1-D, has another length than its piece, or a dtype that cannot be stored.
    """
    if not 8 <= block_bytes <= MOST_BLOCK_BYTES or block_bytes % 8:
        raise ValueError(f"block_bytes={block_bytes} is not a multiple of 8 up to {MOST_BLOCK_BYTES}.")
    stem = Path(directory) / f"rank-{rank:05d}"
    path = stem.with_suffix(".safetensors")
    listed = [piece for piece in pieces if piece.stop > piece.start]
    slices = [Slice.of(piece.spec, piece.start, piece.stop) for piece in listed]
    found = [(i, kind, tensor) for i, piece in enumerate(listed) for kind, tensor in piece.tensors.items()]
    # Wide elements first, as safetensors has it: every tensor then starts at a multiple of its element size.
    found.sort(key=lambda item: -item[2].element_size())
    placed: list[Piece] = [
        {"name": p.name, "shape": p.global_shape, "dim": p.dim, "ranges": p.ranges, "start": p.start, "stop": p.stop}
        for p in slices
    ]
    header: dict[str, Any] = {"__metadata__": {"format": "pt", DIGEST: digest(placed)}}
    entries: list[dict[str, list[Any]]] = [{} for _ in listed]
    offset = 0
    for i, kind, tensor in found:
        name = f"{slices[i].name}|{kind}|{slices[i].start}"
        dtype = _check_tensor(name, tensor, slices[i].numel)
        if name in header:
            raise ValueError(f"rank {rank} was given {name!r} twice; each value of the model is written once.")
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": dtype, "shape": [tensor.numel()], "data_offsets": [offset, end]}
        entries[i][kind] = [dtype, offset]
        offset = end

    body: dict[str, Any] = {"block_bytes": block_bytes, "files": {}, "pieces": [], "scalars": {}}
    if found:
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        raw = len(raw).to_bytes(8, "little") + raw
        with open(path, "wb") as file:
            file.write(raw)
            for i, kind, tensor in found:
                entries[i][kind].append(_write_tensor(file, tensor, block_bytes))
            file.flush()
            os.fsync(file.fileno())
        body["files"][path.name] = {"bytes": len(raw) + offset, "header": [len(raw), zlib.crc32(raw)]}
    for piece, place, entry in zip(listed, placed, entries, strict=True):
        name = place["name"]
        body["pieces"].append({**place, "file": path.name, "tensors": entry})
        scalars = encode(piece.scalars, f"optimizer state of {name!r}")
        if body["scalars"].setdefault(name, scalars) != scalars:
            raise ValueError(_scalars_differ(name, body["scalars"][name], scalars))
    write_checked(stem.with_suffix(".json"), body, durable=False)  # `commit` reads it at once


def _check_tensor(name: str, tensor: torch.Tensor, numel: int) -> str:
    if tensor.dtype not in DTYPE_NAMES:
        raise ValueError(f"{name!r} is {tensor.dtype}, which cannot be stored; one of {', '.join(DTYPES)} can.")
    if tensor.dim() != 1 or tensor.numel() != numel:
        raise ValueError(
            f"{name!r} has shape {tuple(tensor.shape)}, but its piece has {numel} elements; a training state holds one "
            f"value for each element of a parameter, as a tensor of shape ({numel},)."
        )
    return DTYPE_NAMES[tensor.dtype]


def _write_tensor(file: BinaryIO, tensor: torch.Tensor, block_bytes: int) -> str:
    """Append the bytes of a tensor; returns the crc32 of its blocks, eight hexadecimal digits each."""
    step = max(CHUNK_BYTES // block_bytes, 1) * block_bytes // tensor.element_size()
    sums = []
    for start in range(0, tensor.numel(), step):
        chunk = tensor.detach()[start : start + step].to("cpu").contiguous()
        data = memoryview(chunk.view(torch.uint8).numpy().data)
        sums += [zlib.crc32(data[i : i + block_bytes]) for i in range(0, len(data), block_bytes)]
        file.write(data)
    return "".join(f"{checksum:08x}" for checksum in sums)


def commit(directory: str | os.PathLike[str], ranks: int, values: dict[str, Any]) -> None:
    """Join what `ranks` ranks have written, and write `index.json`, without which there is no training state.

    By one rank, after all others have returned from `write_rank`.

    Args:
        values: all that is not a tensor per parameter, for `StoredState.values`.

    Raises:
        ValueError: if a rank has written nothing, if a parameter is not there exactly once, or if `values` holds
            something that JSON cannot (see `state_values.encode`).
    """
    directory = Path(directory)
    body: dict[str, Any] = {"format": FORMAT, "version": VERSION, "block_bytes": None}
    body |= {"values": encode(values, "training state"), "files": {}, "pieces": [], "scalars": {}}
    written = [directory / f"rank-{rank:05d}.json" for rank in range(ranks)]
    if missing := [path for path in written if not path.is_file()]:
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


def write_checked(path: Path, body: dict[str, Any], durable: bool = True) -> None:
    """Write JSON with a checksum of itself in its first line, all at once: a reader finds the whole file or none.

    Args:
        durable: do not return before the file would survive a power failure.
    """
    rest = json.dumps(body, separators=(",", ":"), allow_nan=False).removeprefix("{").encode() + b"\n"
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)  # a link would be written through
    with open(temporary, "xb") as file:
        file.write(_first_line(rest) + rest)
        file.flush()
        if durable:
            os.fsync(file.fileno())
    os.replace(temporary, path)
    if durable:
        sync(path.parent)  # the names of all files


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a directory's names, are on stable storage."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_checked(path: Path) -> dict[str, Any]:
    """What `write_checked` wrote.

    Raises:
        ValueError: if a byte is not as it was written, or what is there is no file of JSON.
        OSError: if it cannot be read.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
        raise ValueError(f"{path} is not a regular file; {EARLIER}.")
    if status.st_size > LARGEST:
        raise ValueError(f"{path} is damaged: it has {status.st_size} bytes; {EARLIER}.")
    with open(path, "rb") as file:
        first = file.readline(FIRST_LINE_BYTES)
        is_ours = first.startswith(b'{"crc32":"') and first.endswith(b"\n")
        return parse_checked(first + file.read() if is_ours else first, path)


def parse_checked(data: bytes, where: object) -> dict[str, Any]:
    """As `read_checked`, of bytes that `where` held."""
    first, newline, rest = data.partition(b"\n")
    if first + newline != _first_line(rest):
        raise ValueError(f"{where} is truncated or damaged: its checksum differs; {EARLIER}.")
    return load_json(data, where)


def _first_line(rest: bytes) -> bytes:
    return b'{"crc32":"%08x",\n' % zlib.crc32(rest)


FIRST_LINE_BYTES = len(_first_line(b""))
