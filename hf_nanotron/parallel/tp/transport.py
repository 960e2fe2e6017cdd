"""Chunks that are exchanged between the ranks of a group while they compute.

An `Exchange` sends one chunk to each other rank and receives one from each: in step `s` to the rank `s` places after,
from the rank `s` places before. Two transports: copy engines write into memory that GPUs of a host share, which takes
no multiprocessor from matmuls; and messages through the process group, which work everywhere.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
import torch.distributed as dist

from ..mesh import Group
from ..p2p import start_together

TURNS = 2  # sets of buffers, so that an exchange may begin while the one before is still read
GRANULE = 2**21  # bytes
MOST_SLOTS = 256  # views that are kept


class Exchange(Protocol):
    """Every step from 1 to the group's size - 1 is swapped once, piece by piece, in one order on all ranks; then
    `close`."""

    def swap(self, step: int, piece: int, chunk: torch.Tensor, into: torch.Tensor | None = None) -> None:
        """Start a piece of step `step`, one of `cut`. `chunk` must not change until `close`.

        The received piece is put `into` a tensor of its shape, or else in memory of the transport.
        """

    def place(self, chunk: torch.Tensor, into: torch.Tensor) -> None:
        """Copy `chunk` to `into` during the computation, until `close`. To be called before the first swap."""

    def wait(self, step: int, piece: int) -> torch.Tensor:
        """The piece received in step `step`, valid until `close`: what is computed from now on may read it."""

    def close(self) -> None:
        """Wait for everything, and give the transport its memory back."""


class Transport(Protocol):
    def open(self, shape: torch.Size, dtype: torch.dtype, pieces: int) -> Exchange:
        """An exchange of chunks of one shape. All ranks of the group open theirs in the same order."""

    def close(self) -> None:
        """Free all memory."""


def cut(chunk: torch.Tensor, pieces: int) -> tuple[torch.Tensor, ...]:
    """Pieces of a chunk `[B, S', ...]`: of its samples, or of the tokens of a single one; fewer if it has fewer."""
    dim = 0 if chunk.shape[0] > 1 else 1
    return chunk.tensor_split(min(pieces, chunk.shape[dim]), dim)


def make_transport(group: Group, device: torch.device) -> Transport:
    """The fastest transport that works between the ranks of `group`, the same on all of them. A collective call."""
    if device.type != "cuda" or group.size == 1:
        return Messages(group)
    transport = SymmetricMemory(group, device)
    try:
        transport.reserve(GRANULE)
        works = 1
    except RuntimeError:  # no peer access, another host, no backend
        works = 0
    agreed = torch.tensor(works, device=device)
    dist.all_reduce(agreed, op=dist.ReduceOp.MIN, group=group.handle)
    if int(agreed):
        return transport
    transport.close()
    return Messages(group)


class Messages:
    """Point-to-point messages of the process group (NCCL, gloo)."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def open(self, shape: torch.Size, dtype: torch.dtype, pieces: int) -> Exchange:
        return _MessageExchange(self.group)

    def close(self) -> None:
        pass


class _MessageExchange:
    def __init__(self, group: Group) -> None:
        self._group = group
        self._under_way: dict[tuple[int, int], tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor | None]] = {}

    def swap(self, step: int, piece: int, chunk: torch.Tensor, into: torch.Tensor | None = None) -> None:
        group, chunk = self._group, chunk.detach().contiguous()
        received = torch.empty_like(chunk)
        target, source = group.ranks[(group.rank + step) % group.size], group.ranks[(group.rank - step) % group.size]
        operations = [
            dist.P2POp(dist.isend, chunk, target, group.handle),
            dist.P2POp(dist.irecv, received, source, group.handle),
        ]
        self._under_way[step, piece] = (start_together(operations), chunk, received, into)

    def place(self, chunk: torch.Tensor, into: torch.Tensor) -> None:
        into.copy_(chunk)

    def wait(self, step: int, piece: int) -> torch.Tensor:
        works, chunk, received, into = self._under_way[step, piece]
        for work in works:
            work.wait()
        if works and into is not None:
            received = into.copy_(received)
        self._under_way[step, piece] = ([], chunk, received, into)
        return received

    def close(self) -> None:
        for step, piece in self._under_way:
            self.wait(step, piece)
        self._under_way.clear()


class SymmetricMemory:
    """Memory of each rank that the others write to, over NVLink, with a semaphore for each pair of ranks.

    Writers push from the tensor straight to the reader's memory. No multicast is needed. The ranks of `group` are on
    one host, each with its own GPU.
    """

    def __init__(self, group: Group, device: torch.device) -> None:
        self.group, self.device = group, device
        # Of high priority: a flag would wait for every thread block of a product that was launched before.
        self.outward, self.inward = (torch.cuda.Stream(device, priority=-1) for _ in range(2))
        self.used = [False] * TURNS
        self._turn = 0
        self._capacity = 0  # bytes of a chunk
        self._memory: torch.Tensor | None = None
        self._slots: dict[Any, tuple[torch.Tensor, ...]] = {}  # views of it, which cost time to make
        self._handle: torch.distributed._symmetric_memory._SymmetricMemory | None = None

    def open(self, shape: torch.Size, dtype: torch.dtype, pieces: int) -> Exchange:
        self.reserve(math.prod(shape) * dtype.itemsize)
        turn, self._turn = self._turn, (self._turn + 1) % TURNS
        return _SymmetricExchange(self, turn, shape, dtype, pieces)

    def close(self) -> None:
        if self._memory is not None:
            torch.cuda.synchronize(self.device)
        self._slots.clear()
        self._memory = self._handle = None
        self._capacity = 0

    def reserve(self, size: int) -> None:
        """Have room for chunks of `size` bytes. A collective call, while no exchange is open."""
        import torch.distributed._symmetric_memory as symmetric

        if size <= self._capacity:
            return
        torch.cuda.synchronize(self.device)  # what the old memory has received has been read
        self._slots.clear()
        self._handle = self._memory = None
        capacity = -(-size // GRANULE) * GRANULE
        slots = TURNS * (self.group.size - 1)
        self._memory = symmetric.empty(slots * capacity, dtype=torch.uint8, device=self.device)
        assert self.group.handle is not None
        self._handle = symmetric.rendezvous(self._memory, self.group.handle)
        self._capacity, self._turn, self.used = capacity, 0, [False] * TURNS

    def slot(
        self, rank: int, turn: int, step: int, shape: torch.Size, dtype: torch.dtype, pieces: int
    ) -> tuple[torch.Tensor, ...]:
        """Memory on `rank` (of the group) for the pieces that it receives in a step."""
        assert self._handle is not None
        key = (rank, turn, step, shape, dtype, pieces)
        if key not in self._slots:
            if len(self._slots) > MOST_SLOTS:
                self._slots.clear()
            offset = (turn * (self.group.size - 1) + step - 1) * self._capacity
            self._slots[key] = cut(self._handle.get_buffer(rank, shape, dtype, offset // dtype.itemsize), pieces)
        return self._slots[key]

    def say(self, rank: int, channel: int) -> None:
        """In the order of the current stream, raise the flag that `rank` hears on `channel`."""
        assert self._handle is not None
        self._handle.put_signal(rank, channel)

    def hear(self, rank: int, channel: int) -> None:
        """Hold the current stream until `rank` has raised its flag on `channel`, and lower it."""
        assert self._handle is not None
        self._handle.wait_signal(rank, channel)


class _SymmetricExchange:
    """One turn of the memory. On channel `2 * turn` a writer says that a piece is there, on the next a reader that it
    has read them all."""

    def __init__(self, owner: SymmetricMemory, turn: int, shape: torch.Size, dtype: torch.dtype, pieces: int) -> None:
        self._owner, self._shape, self._dtype, self._pieces = owner, shape, dtype, pieces
        self._turn, self._there, self._read = turn, 2 * turn, 2 * turn + 1
        self._reuses = owner.used[turn]
        owner.used[turn] = True
        self._received: dict[tuple[int, int], tuple[torch.Tensor, torch.cuda.Event]] = {}
        self._sources: list[int] = []

    def swap(self, step: int, piece: int, chunk: torch.Tensor, into: torch.Tensor | None = None) -> None:
        owner, rank, size = self._owner, self._owner.group.rank, self._owner.group.size
        target, source = (rank + step) % size, (rank - step) % size
        ready = torch.cuda.current_stream(owner.device).record_event()
        with torch.cuda.stream(owner.outward):
            owner.outward.wait_event(ready)
            if self._reuses and piece == 0:
                owner.hear(target, self._read)
            _copy(chunk.detach(), self._slot(target, step, piece))
            owner.say(target, self._there)
        with torch.cuda.stream(owner.inward):
            owner.inward.wait_event(ready)
            received = self._slot(rank, step, piece)
            owner.hear(source, self._there)
            if into is not None:
                received = _copy_rows(received, into.detach())
            self._received[step, piece] = (received, owner.inward.record_event())
        if piece == 0:
            self._sources.append(source)

    def place(self, chunk: torch.Tensor, into: torch.Tensor) -> None:
        stream = self._owner.inward
        stream.wait_stream(torch.cuda.current_stream(self._owner.device))
        with torch.cuda.stream(stream):
            _copy_rows(chunk.detach(), into.detach())

    def wait(self, step: int, piece: int) -> torch.Tensor:
        received, arrived = self._received[step, piece]
        torch.cuda.current_stream(self._owner.device).wait_event(arrived)
        return received

    def close(self) -> None:
        owner = self._owner
        current = torch.cuda.current_stream(owner.device)
        current.wait_stream(owner.outward)
        current.wait_stream(owner.inward)
        owner.inward.wait_stream(current)  # what this rank has computed from what it received
        with torch.cuda.stream(owner.inward):
            for source in self._sources:
                owner.say(source, self._read)
        self._received.clear()
        self._sources.clear()

    def _slot(self, rank: int, step: int, piece: int) -> torch.Tensor:
        return self._owner.slot(rank, self._turn, step, self._shape, self._dtype, self._pieces)[piece]


def _copy_rows(chunk: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Copy on one device, sample by sample in one kernel: faster than a copy between strides by three times."""
    torch._foreach_copy_(list(target.unbind(0)), list(chunk.unbind(0)))
    return target


def _copy(chunk: torch.Tensor, target: torch.Tensor) -> None:
    """Copy to a contiguous `target` in pieces that are contiguous too: the copy engine takes no others."""
    if chunk.is_contiguous():
        target.copy_(chunk)
    else:
        for row, place in zip(chunk, target, strict=True):
            _copy(row, place)
