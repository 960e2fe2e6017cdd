"""The newest snapshot that the hosts of a job hold between them, made into a checkpoint that each host can read.

A host has its own ranks' parts, and copies of those of the host before it. What its ranks will read and it lacks comes
from the host that has it. All functions are for all ranks of the job together.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers.trainer import TRAINER_STATE_NAME

from ...parallel.collectives import all_reduce
from ...parallel.mesh import ParallelMesh
from ...parallel.together import together
from ..directory.runs import Run
from ..directory.verify import FORMAT, MARKER, STATE_INDEX, VERSION, check_blocks, check_sum
from ..files.checked import parse_checked, write_checked
from ..files.disk import checksum_of
from ..files.schema import RANK, require
from ..state.file import commit as commit_state
from ..state.index import StateIndex
from ..state.pieces import slice_of
from ..state.slices import Slice
from ..state.training_state import DIRECTORY
from ..state.values import decode
from .folder import MemoryFolder, Part, part_name, read_part
from .hosts import Hosts
from .transfer import Wire, receive_files, send_files

VALUES = "values.json"  # of rank 0: what is not a tensor, as `state_file.commit` is given it
RESUMED = "resumed"  # begins the name of a checkpoint that was made of a snapshot


@dataclass(frozen=True)
class Snapshot:
    """One that hosts hold parts of.

    Args:
        holders: rank that has written a part -> the hosts that have it, ascending.
    """

    name: str
    run: Run
    step: int
    world_size: int
    holders: dict[int, tuple[int, ...]]

    @property
    def missing(self) -> list[int]:
        """The ranks whose parts no host has."""
        return [rank for rank in range(self.world_size) if rank not in self.holders]


def find_snapshots(mesh: ParallelMesh, hosts: Hosts, folder: MemoryFolder) -> list[Snapshot]:
    """What the hosts hold, the highest step first, whole or not; the same on every rank."""
    parts = together(mesh, "looking for memory snapshots", lambda: folder.parts() if hosts.is_leader else [])
    own: dict[str, tuple[Any, ...]] = {}
    for part in parts:
        known = own.setdefault(part.snapshot, (part.run.to_dict(), part.step, part.world_size, []))
        known[3].append(part.rank)
    every: list[Any] = [own]
    if mesh.world.handle is not None:
        every = [None] * mesh.world.size
        dist.all_gather_object(every, own, group=mesh.world.handle)
    found: dict[tuple[str, int], Snapshot] = {}
    for number, ranks in enumerate(hosts.ranks):
        for name, (run, step, world_size, held) in every[ranks[0]].items():
            snapshot = found.setdefault((name, world_size), Snapshot(name, Run.from_dict(run), step, world_size, {}))
            for rank in held:
                snapshot.holders[rank] = (*snapshot.holders.get(rank, ()), number)
    return sorted(found.values(), key=lambda snapshot: (-snapshot.step, -snapshot.run.began))


def make_checkpoint(
    mesh: ParallelMesh, hosts: Hosts, folder: MemoryFolder, snapshot: Snapshot, wanted: Iterable[Slice]
) -> Path:
    """Make a checkpoint of a snapshot that is whole, in the memory of each host; its files are those of the snapshot.

    What no rank of a host reads is there in name and length alone.

    Args:
        wanted: what this rank is going to read.

    Returns:
        The checkpoint, the same on every host.

    Raises:
        ValueError: on every rank, if a part is damaged.
    """
    source, target = folder.snapshot(snapshot.name), folder.snapshot(f"{RESUMED}-{snapshot.name}")
    small = _small_files(mesh, hosts, source, snapshot)
    what = f"taking up the memory snapshot of step {snapshot.step}"

    held = [rank for rank, numbers in snapshot.holders.items() if hosts.own in numbers]

    def begin() -> None:
        if hosts.is_leader:
            _begin(folder, source, target, snapshot, held, small)

    _agree(mesh, what, begin)
    fetched: list[int] = []
    if len(hosts.ranks) > 1:
        fetched, fault = _fetch_missing(mesh, hosts, source, target, snapshot, wanted)
        _agree(mesh, what, lambda: None, fault)
    _agree(mesh, what, lambda: _verify(hosts, source, target, held, fetched))

    def commit() -> None:
        if hosts.is_leader:
            names = [STATE_INDEX, TRAINER_STATE_NAME]
            files = {n: {"bytes": (target / n).stat().st_size, "crc32": checksum_of(target / n)} for n in names}
            body = {"format": FORMAT, "version": VERSION, "step": snapshot.step, "hub_weights": False}
            write_checked(target / MARKER, {**body, "run": snapshot.run.to_dict(), "files": files}, durable=False)

    _agree(mesh, what, commit)
    return target


def _agree(mesh: ParallelMesh, what: str, action: Callable[[], None], fault: str | None = None) -> None:
    """`action` on every rank; what any finds wrong is a ValueError on all."""
    try:
        if fault is None:
            action()
    except (OSError, ValueError) as error:
        fault = str(error) or type(error).__name__
    if not all_reduce(torch.tensor(float(fault is not None), device=mesh.device), mesh.world):
        return
    faults: list[str | None] = [fault]
    if mesh.world.handle is not None:
        faults = [None] * mesh.world.size
        dist.all_gather_object(faults, fault, group=mesh.world.handle)
    raise ValueError(f"{what}: {next(each for each in faults if each is not None)}")


# ---- what every host needs ----


def _small_files(mesh: ParallelMesh, hosts: Hosts, source: Path, snapshot: Snapshot) -> dict[str, bytes]:
    """The descriptions of all parts, and rank 0's own files; on the first rank of each host."""
    found: dict[str, bytes] = {}
    for number, ranks in enumerate(hosts.ranks):
        mine = [rank for rank, numbers in snapshot.holders.items() if numbers[0] == number]
        box: list[Any] = [None]
        if mesh.rank == ranks[0]:
            box = [_read_small(source, mine)]
        if len(hosts.ranks) > 1:
            dist.broadcast_object_list(box, src=ranks[0], group=mesh.world.handle)
        if isinstance(box[0], str):
            raise ValueError(f"taking up the memory snapshot of step {snapshot.step}: {box[0]}")
        found |= box[0] or {}
    return found


def _read_small(source: Path, ranks: list[int]) -> dict[str, bytes] | str:
    """By name; or what is wrong, in words."""
    try:
        names = [f"{DIRECTORY}/{_stem(rank)}.json" for rank in ranks]
        names += [VALUES, TRAINER_STATE_NAME] if 0 in ranks else []
        for rank in ranks:
            _check_small(source, read_part(source / part_name(rank)))
        return {name: (source / name).read_bytes() for name in names}
    except (OSError, ValueError) as error:
        return str(error)


def _check_small(source: Path, part: Part) -> None:
    for name, entry in part.files.items():
        check_sum(source / name, entry["crc32"])


def _stem(rank: int) -> str:
    return f"rank-{rank:05d}"


def _begin(
    folder: MemoryFolder, source: Path, target: Path, snapshot: Snapshot, held: list[int], small: dict[str, bytes]
) -> None:
    """The checkpoint of this host, with the parts that are `held` here."""
    others = [name for name in folder.names() if name.startswith(f"{RESUMED}-")]
    folder.keep([name for name in folder.names() if name not in others])
    (target / DIRECTORY).mkdir(parents=True, mode=0o700)
    for name, data in small.items():
        if name != VALUES:
            (target / name).write_bytes(data)
    values = decode(parse_checked(small[VALUES], source / VALUES)["values"], f"{source / VALUES}: values")
    lengths: dict[str, Any] = {}
    for rank in range(snapshot.world_size):
        name = f"{DIRECTORY}/{_stem(rank)}.json"
        lengths |= require(RANK, parse_checked(small[name], source / name), source / name)["files"]
    commit_state(target / DIRECTORY, snapshot.world_size, values)
    for rank in held:
        for name in _large(source, rank):
            os.link(source / name, target / name)
    for name, entry in lengths.items():
        path = target / DIRECTORY / name
        if not path.exists():  # no memory is behind a file that is only made long; a reader finds a wrong checksum
            path.touch(mode=0o600)
            os.truncate(path, entry["bytes"])


# ---- what one host has and another needs ----


def _fetch_missing(
    mesh: ParallelMesh, hosts: Hosts, source: Path, target: Path, snapshot: Snapshot, wanted: Iterable[Slice]
) -> tuple[list[int], str | None]:
    """Each host gets the parts that its ranks read.

    Returns:
        The ranks whose parts this host got, and what went wrong on this rank, in words.
    """
    index = StateIndex.read(target / DIRECTORY)
    writers = {f"{_stem(rank)}.safetensors": rank for rank in range(snapshot.world_size)}
    reads = {mesh.rank} if mesh.rank < snapshot.world_size else set()  # its random numbers
    near = [each for each in wanted if each.numel]
    for file, pieces in index.pieces_of.items():
        by_name: dict[str, list[Slice]] = {}
        for piece in pieces:
            by_name.setdefault(piece["name"], []).append(slice_of(piece))
        if any(stored.is_near(each) for each in near for stored in by_name.get(each.name, ())):
            reads.add(writers[file])
    table = torch.zeros(len(hosts.ranks), snapshot.world_size, device=mesh.device)
    table[hosts.own, sorted(reads)] = 1.0
    table = all_reduce(table, mesh.world, dist.ReduceOp.MAX)
    fetched: list[int] = []
    fault: str | None = None
    for number, rank in table.nonzero().tolist():  # in one order on all ranks, so none waits for a later one
        holders = snapshot.holders[rank]
        if number in holders:
            continue
        senders, receivers = hosts.ranks[holders[0]], hosts.ranks[number]
        sender, receiver = senders[rank % len(senders)], receivers[rank % len(receivers)]
        if number == hosts.own:
            fetched.append(rank)
        if mesh.rank == sender:
            send_files(Wire(receiver, mesh.world.handle, mesh.device), source, _large(source, rank))
        elif mesh.rank == receiver:
            try:
                receive_files(Wire(sender, mesh.world.handle, mesh.device), target)
            except OSError as error:
                fault = fault or str(error)
    return fetched, fault


def _large(source: Path, rank: int) -> list[str]:
    """The files of a part that a checkpoint shares with the snapshot."""
    return [name for name in read_part(source / part_name(rank)).files if name.endswith((".safetensors", ".pth"))]


def _verify(hosts: Hosts, source: Path, target: Path, held: list[int], fetched: list[int]) -> None:
    """All bytes that this host has, each rank its share."""
    index, (place, count) = StateIndex.read(target / DIRECTORY), hosts.place
    for rank in sorted({*held, *fetched})[place::count]:
        if rank in held:
            _check_small(source, read_part(source / part_name(rank)))
        if (name := f"{_stem(rank)}.safetensors") in index.files:
            check_blocks(target / DIRECTORY / name, index)
