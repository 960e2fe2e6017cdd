"""Read a training state (`state_file`) into any other layout: the blocks that a rank's slices touch, each verified."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch

from ..files.disk import CHUNK_BYTES, StrPath, check_length, read_at
from ..files.readers import Readers
from ..files.safetensors_file import DTYPES
from ..files.schema import EARLIER
from .file import INDEX
from .index import StateIndex
from .pieces import Piece, slice_of
from .slices import Box, Slice

OPEN_FILES = 64  # the system's limit may be as low as 256

Target = tuple[Slice, str, torch.Tensor]  # what `fill` takes


class StoredState:
    """A training state on disk.

    Opening reads the index alone, if it is not given, and checks that the state is complete: that every tensor is
    covered and, if `checks_files`, that every file is there with its length, which one rank of a job does for all.
    `fill` reads.

    Attributes:
        values: what was given to `commit`.
        bytes_read: bytes of tensors read so far.

    Raises:
        ValueError: if the state is missing, incomplete or damaged, naming the file.
    """

    def __init__(self, directory: StrPath, checks_files: bool = True, index: StateIndex | None = None) -> None:
        self.directory = Path(directory)
        self.bytes_read = 0
        self._index = index = StateIndex.read(self.directory) if index is None else index
        self._block_bytes = index.block_bytes
        self.values = index.values
        for name, entry in index.files.items() if checks_files else ():
            check_length(index.place(name), entry["bytes"], f"{INDEX} names it", EARLIER)
        self._pieces: dict[str, list[tuple[Slice, Piece]]] = {}
        for piece in (piece for pieces in index.pieces_of.values() for piece in pieces):
            self._pieces.setdefault(piece["name"], []).append((slice_of(piece), piece))
        self._open: dict[str, int] = {}
        self._verified: set[str] = set()

    # ---- what is there ----

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Hub name -> shape of the whole tensor."""
        return {name: pieces[0][0].global_shape for name, pieces in self._pieces.items()}

    def kinds(self, name: str) -> dict[str, torch.dtype]:
        """Kind -> dtype of what is stored for a tensor; nothing for an unknown name."""
        tensors = self._pieces[name][0][1]["tensors"] if name in self._pieces else {}
        return {kind: DTYPES[entry[0]] for kind, entry in tensors.items()}

    def scalars(self, name: str) -> dict[str, Any]:
        """What the optimizer keeps for the whole of a tensor, such as `step`."""
        return copy.deepcopy(self._index.scalars.get(name, {}))

    def check(self, wanted: Slice, kind: str) -> None:
        """Refuse what `fill` could not read. Reads nothing."""
        where = self.directory / INDEX
        if wanted.name not in self._pieces:
            raise ValueError(
                f"{where} has no tensor {wanted.name!r}, which this run trains: it was frozen in the run that wrote "
                "it, or the model is another. Resume with the same model and the same weights frozen, or start from "
                "its weights with from_pretrained."
            )
        shape = self._pieces[wanted.name][0][0].global_shape
        if shape != wanted.global_shape:
            raise ValueError(
                f"{wanted.name!r} in {where} has shape {shape}, but in the model {wanted.global_shape}; resume with "
                "the config of the checkpoint."
            )
        if kind not in self.kinds(wanted.name):
            raise ValueError(
                f"{where} has no {kind!r} for {wanted.name!r}, only {', '.join(self.kinds(wanted.name))}; resume with "
                "the optimizer that wrote it."
            )

    # ---- reading ----

    def fill(self, wanted: Slice, kind: str, out: torch.Tensor) -> None:
        """Read one kind of a slice into `out`, 1-D with `wanted.numel` elements on any device, in its dtype."""
        self.fill_all([(wanted, kind, out)])

    def fill_all(self, targets: Sequence[Target]) -> None:
        """`fill` for each of several targets, some of their parts at a time. Where it fails, some may be filled."""
        for wanted, kind, out in targets:
            self._check_target(wanted, kind, out)
        total = sum(wanted.numel * out.element_size() for wanted, _, out in targets)
        on_gpu = any(out.is_cuda for _, _, out in targets)
        with Readers(total, max(CHUNK_BYTES, self._block_bytes), on_gpu) as readers:
            for wanted, kind, out in targets:
                self._give(readers, wanted, kind, out.detach())

    def _check_target(self, wanted: Slice, kind: str, out: torch.Tensor) -> None:
        if wanted.numel == 0:
            return
        self.check(wanted, kind)
        if out.shape != (wanted.numel,):
            raise ValueError(f"{wanted.name!r}: {wanted.numel} elements do not fit shape {tuple(out.shape)}.")

    def _give(self, readers: Readers, wanted: Slice, kind: str, out: torch.Tensor) -> None:
        filled = 0
        for stored, piece in self._pieces[wanted.name] if wanted.numel else ():
            if not stored.is_near(wanted):
                continue
            dtype = DTYPES[piece["tensors"][kind][0]]
            block = self._block_bytes // dtype.itemsize
            for first, last in self._runs(stored, wanted, block):
                run = stored.part(first * block, min(last * block, stored.numel))
                pairs = list(run.common(wanted))
                size = run.numel * dtype.itemsize
                handle = self._handle(piece["file"], readers)
                readers.give(partial(self._fill_run, piece, kind, handle, first, size, dtype, pairs, out))
                self.bytes_read += size
                filled += sum(prod(source.shape) for source, _ in pairs)
        if filled != wanted.numel:
            raise ValueError(
                f"{self.directory / INDEX} holds {filled} of the {wanted.numel} values of {kind} of {wanted.name!r}, "
                f"{wanted}; use an earlier checkpoint."
            )

    def _fill_run(
        self,
        piece: Piece,
        kind: str,
        handle: int,
        block: int,
        size: int,
        dtype: torch.dtype,
        pairs: Sequence[tuple[Box, Box]],
        out: torch.Tensor,
        buffer: memoryview,
    ) -> None:
        """Read and verify `size` bytes from the start of a block of a stored tensor; copy what `out` has of them."""
        file, (_, begin, checksums) = piece["file"], piece["tensors"][kind]
        data = buffer[:size]
        self._read_into(file, self._index.files[file]["header"][0] + begin + block * self._block_bytes, data, handle)
        path, what = self.directory / file, f"{kind} of {piece['name']!r}"
        for number, start in enumerate(range(0, size, self._block_bytes), block):
            self._index.check_block(path, what, number, data[start : start + self._block_bytes], checksums)
        values = torch.frombuffer(data, dtype=dtype)
        for source, target in pairs:
            target.view(out).copy_(source.view(values))

    def _runs(self, stored: Slice, wanted: Slice, block: int) -> Iterator[tuple[int, int]]:
        """Half-open ranges of the blocks of `stored` that hold something of `wanted`, of at most one chunk each."""
        spans = (span for source, _ in stored.common(wanted) for span in source.spans(block))
        needed: list[list[int]] = []
        for first, last in sorted((start // block, -(-stop // block)) for start, stop in spans):
            if needed and first <= needed[-1][1]:
                needed[-1][1] = max(needed[-1][1], last)
            else:
                needed.append([first, last])
        most = max(CHUNK_BYTES // self._block_bytes, 1)
        for first, last in needed:
            for start in range(first, last, most):
                yield start, min(start + most, last)

    def _read_into(self, file: str, offset: int, data: memoryview, handle: int) -> None:
        if read_at(handle, offset, data) < len(data):
            raise ValueError(f"{self.directory / file} ends early: it was cut off; use an earlier checkpoint.")

    def _handle(self, file: str, readers: Readers) -> int:
        """A descriptor of a file, whose header is verified when it is first opened."""
        if file not in self._open:
            if len(self._open) == OPEN_FILES:
                readers.wait()
                self.close()
            self._open[file] = os.open(self.directory / file, os.O_RDONLY)
        if file not in self._verified:
            header = bytearray(self._index.files[file]["header"][0])
            self._read_into(file, 0, memoryview(header), self._open[file])
            self._index.check_header(file, header)
            self._verified.add(file)
        return self._open[file]

    def close(self) -> None:
        """Close the files. They open again when they are read."""
        for handle in self._open.values():
            os.close(handle)
        self._open.clear()

    def __enter__(self) -> StoredState:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
