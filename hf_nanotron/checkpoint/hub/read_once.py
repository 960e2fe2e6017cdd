"""A repository's tensors for all ranks of a job: one rank reads each part of a file, and hands it on to its stage.

The ranks of a pipeline stage take turns at reading parts of up to `PART_BYTES`, each of which may hold rows of a large
tensor, or many small tensors. What a rank has read goes to the other tensor-parallel ranks of its copy of the weights,
and from each of these to its copies; whoever needs something of it copies that to its place. So a byte is read once for
each stage that needs it, and no rank holds more than one part beside the model.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path

import torch
import torch.distributed as dist
from transformers.utils import logging

from ...parallel.collectives import all_reduce
from ...parallel.mesh import Coordinates, Group, ParallelMesh
from ...parallel.shard_spec import ShardSpec
from ...parallel.together import all_or_none
from ..files.disk import check_length
from ..files.inside import inside
from .contents import AGAIN, Contents, StoredTensor
from .nonfinite_tensors import NonfiniteCount
from .trace import Grid

PART_BYTES = 32 << 20
ALIGNMENT = 16  # bytes, of a tensor's rows in a part


@dataclass(frozen=True)
class Rows:
    """Rows `[first, last)` of a stored tensor (of one without dimensions, the row 0), and where they are in a part."""

    name: str
    first: int
    last: int
    at: int  # byte of the part
    size: int  # bytes


@dataclass
class Target:
    """A tensor of the model that is filled: this rank's part of it.

    Attributes:
        grids: what it is made of.
        make: the memory for it, when the first of it comes: `spec.local_shape`, contiguous; takes the dtype in which it
            is stored, and may give another one.
        finish: called with that memory once it is full.
        missing: rows (of stored tensors) that have not come.
    """

    spec: ShardSpec
    grids: tuple[Grid, ...]
    make: Callable[[torch.dtype], torch.Tensor]
    finish: Callable[[torch.Tensor], None]
    missing: int = 0
    out: torch.Tensor | None = None

    def fill(self, rows: Rows, data: torch.Tensor, dtype: torch.dtype) -> None:
        """Take what is needed of these rows, whose `data` has the stored tensor's other dimensions."""
        out = self.out = self.make(dtype) if self.out is None else self.out
        origin = (rows.first, *(0,) * (data.dim() - 1))[: data.dim()]
        for grid in (grid for grid in self.grids if grid.name == rows.name):
            for part in grid.within("source", 0, rows.first, rows.last) if data.dim() else (grid,):
                for own in _own(part, self.spec):
                    own.own.view(own.sizes, out).copy_(own.source.view(own.sizes, data, origin))
        self.missing -= rows.last - rows.first
        if not self.missing:
            self.finish(out)
            self.out = None


def _own(grid: Grid, spec: ShardSpec) -> Iterator[Grid]:
    """What of a grid of the whole tensor lies in the part that `spec` gives, in the coordinates of that part."""
    if spec.dim is None:
        yield grid
        return
    offset = 0
    for start, stop in spec.ranges:
        for part in grid.within("own", spec.dim, start, stop):
            yield Grid(part.sizes, part.own.shift(spec.dim, offset - start), part.source, part.name)
        offset += stop - start


@dataclass
class Part:
    """What is read and handed on at once."""

    rows: list[Rows] = field(default_factory=list)
    size: int = 0


def plan_parts(tensors: Mapping[str, StoredTensor], names: Iterable[str], most: int) -> list[Part]:
    """The tensors `names`, in this order, in parts of at most `most` bytes, or of one row if that is larger."""
    parts: list[Part] = []
    for name in names:
        count, row = tensors[name].rows, tensors[name].row_bytes
        step = max(1, most // row) if row else max(1, count)
        for first in range(0, count, step):
            last = min(count, first + step)
            size = row * (last - first)
            if not parts or parts[-1].size + size > most:
                parts.append(Part())
            parts[-1].rows.append(Rows(name, first, last, parts[-1].size, size))
            parts[-1].size += -(-size // ALIGNMENT) * ALIGNMENT
    return parts


def turn_of(here: Coordinates, cp_size: int, copies: int) -> int:
    """When a rank of a stage reads, counted from the beginning of a round: first one of each of the `copies` of the
    weights, which may be on other hosts.
    """
    return here.dp * cp_size + here.cp + here.tp * copies


def ways(turn: int, here: Coordinates, copies: int, shard_size: int) -> list[tuple[str, int]]:
    """The groups over which a rank takes part in handing on what was read in a turn, and who has it in each of them."""
    tp, copy = divmod(turn, copies)
    replica, shard = divmod(copy, shard_size)
    found = [("tp", tp)] if (here.replica, here.shard) == (replica, shard) else []
    found += [("replica", replica)] if here.shard == shard else []
    return [*found, ("shard", shard)]


class StageReader:
    """Reads a repository with the other ranks of this rank's pipeline stage.

    Attributes:
        bytes_read: that this rank has read.
    """

    def __init__(self, directory: Path, contents: Contents, mesh: ParallelMesh) -> None:
        self.directory, self.contents, self.mesh = directory, contents, mesh
        self.bytes_read = 0
        self._file: tuple[str, int] | None = None  # the one that is open
        self._failure: Exception | None = None
        self._nonfinite = NonfiniteCount(str(directory))
        self._groups: dict[str, Group] = {"tp": mesh.tp, "replica": mesh.replica, "shard": mesh.shard}

    def fill(self, targets: Iterable[Target]) -> None:
        """Fill the `targets` of this rank. All ranks of the job together; of a stage, in the same order.

        Raises:
            ValueError: on every rank, for a file that one of them cannot read, or if ranks of a stage fill others.
        """
        of_name: dict[str, list[Target]] = {}
        for target in targets:
            for name in dict.fromkeys(grid.name for grid in target.grids):
                of_name.setdefault(name, []).append(target)
                target.missing += self.contents.tensors[name].rows
        self._compare(list(of_name))
        parts = plan_parts(self.contents.tensors, of_name, PART_BYTES)
        mesh = self.mesh
        copies = mesh.dp_size * mesh.cp_size
        mine = turn_of(mesh.coordinates, mesh.cp_size, copies)
        bar = logging.tqdm(total=len(parts), desc="Loading weights", unit="part", disable=mesh.rank != 0)
        with bar:
            for start in range(0, len(parts), copies * mesh.tp_size):
                turns = parts[start : start + copies * mesh.tp_size]
                read = self._read(turns[mine]) if mine < len(turns) else None
                for turn, part in enumerate(turns):
                    data = read if read is not None and turn == mine else self._empty(part)
                    for group, source in ways(turn, mesh.coordinates, copies, mesh.shard_size):
                        _broadcast(data, self._groups[group], source)
                    for rows in part.rows:
                        values = self._values(rows, data)
                        for target in of_name[rows.name]:
                            target.fill(rows, values, self._dtype_of(target))
                bar.update(len(turns))
        self._close()
        all_or_none(mesh, f"reading {self.directory}", self._raise)
        self._nonfinite.warn()

    def _compare(self, names: list[str]) -> None:
        """Refuse ranks of a stage that want other tensors than its first one: they would wait for each other."""
        mesh = self.mesh
        own = zlib.crc32("\n".join(names).encode())
        least = torch.full((2, mesh.pp_size), 1 << 40, dtype=torch.int64)
        least[:, mesh.pp_rank] = torch.tensor([own, -own])
        first, last = all_reduce(least.to(mesh.device), mesh.world, dist.ReduceOp.MIN).tolist()
        if first == [-value for value in last]:
            return
        of_ranks: list[tuple[int, list[str]]] = [(mesh.pp_rank, names)] * mesh.world.size
        dist.all_gather_object(of_ranks, (mesh.pp_rank, names), group=mesh.world.handle)
        for rank, (stage, wanted) in enumerate(of_ranks):
            one = next(other for other, (its, _) in enumerate(of_ranks) if its == stage)
            if wanted != of_ranks[one][1]:
                raise ValueError(f"{self.directory}: {_difference(rank, wanted, one, of_ranks[one][1])}")

    def _values(self, rows: Rows, data: torch.Tensor) -> torch.Tensor:
        """Rows as they lie in a part, in the shape and dtype of their tensor."""
        tensor = self.contents.tensors[rows.name]
        flat = data[rows.at : rows.at + rows.size].view(tensor.torch_dtype)
        return flat.view((rows.last - rows.first, *tensor.shape[1:]) if tensor.shape else ())

    def _dtype_of(self, target: Target) -> torch.dtype:
        """What the tensors of a target are stored as: the widest, if there are several dtypes."""
        names = {grid.name for grid in target.grids}
        return reduce(torch.promote_types, (self.contents.tensors[name].torch_dtype for name in sorted(names)))

    def _raise(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _empty(self, part: Part) -> torch.Tensor:
        return torch.empty(part.size, dtype=torch.uint8, device=self.mesh.device)

    # ---- files ----

    def _read(self, part: Part) -> torch.Tensor:
        """A part, on the device. What cannot be read is noted, and the others are not kept waiting."""
        host = torch.empty(part.size, dtype=torch.uint8)
        if self._failure is None:
            try:
                self._read_into(part, host)
            except OSError as error:
                self._failure = ValueError(f"{error.filename or self.directory} cannot be read ({error}).")
            except Exception as error:
                self._failure = error
        data = host.to(self.mesh.device)
        for rows in part.rows if self._failure is None else ():
            self._nonfinite.look_at(rows.name, self._values(rows, data))
        return data

    def _read_into(self, part: Part, host: torch.Tensor) -> None:
        data = memoryview(host.numpy().data)
        for rows in part.rows:
            tensor = self.contents.tensors[rows.name]
            start = tensor.offset + rows.first * tensor.row_bytes
            handle, view, done = self._handle(tensor.file), data[rows.at : rows.at + rows.size], 0
            while done < rows.size:
                count = os.preadv(handle, [view[done:]], start + done)
                if count == 0:
                    raise ValueError(f"{self.directory / tensor.file} was cut off while it was read; {AGAIN}.")
                done += count
                self.bytes_read += count

    def _handle(self, file: str) -> int:
        if self._file is None or self._file[0] != file:
            self._close()
            path = inside(self.directory, file, str(self.directory))
            check_length(path, self.contents.files[file], "the first rank of the job has found it so", AGAIN)
            self._file = file, os.open(path, os.O_RDONLY)
        return self._file[1]

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file[1])
        self._file = None


def _difference(rank: int, wanted: list[str], other: int, others: list[str]) -> str:
    names = sorted(set(wanted) ^ set(others))
    more, less = (rank, other) if names and names[0] in wanted else (other, rank)
    what = f"ranks {other} and {rank} load the same tensors in different orders"
    if names:
        what = f"rank {more} loads {names[0]!r}, and rank {less} does not"
    return (
        f"{what}, though they are of one pipeline stage, whose ranks read for each other; give them the same "
        "parameters to load (the same requires_grad, where the rest comes from a training state)."
    )


def _broadcast(data: torch.Tensor, group: Group, source: int) -> None:
    if group.size > 1:
        dist.broadcast(data, group.ranks[source], group=group.handle)
