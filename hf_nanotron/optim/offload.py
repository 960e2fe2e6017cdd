"""The optimizer's state in host memory between steps; within one, on the device part by part (`optim_offload`).

The device updates every part with the same optimizer, so no value changes; the next part arrives and the one before
leaves meanwhile. (Ren et al. 2021, arXiv:2101.06840, for the idea; there the host updates.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import torch

from ..ops.host_buffers import HostBuffer
from ..parallel.zero.segment import Segment

PART_ELEMENTS = {"cuda": 2**25, "cpu": 2**11}  # of a part, which ends with a whole segment
ALIGNMENT = 128  # in elements, of a tensor in its buffer

Copies = list[tuple[torch.Tensor, torch.Tensor]]  # to, from


@dataclass
class Part:
    """Segments that are on the device together.

    Attributes:
        homes: (kind, dtype) -> the host's memory for each segment, `[elements]`; masters are the kind "".
    """

    segments: list[Segment]
    homes: dict[tuple[str, torch.dtype], list[torch.Tensor]] = field(default_factory=dict)

    @property
    def elements(self) -> int:
        return sum(segment.master.numel() for segment in self.segments)


@dataclass
class Arriving:
    """Copies on the device of what a part has on the host, for each segment: its master if it moves, its state."""

    masters: list[torch.Tensor | None]
    states: list[dict[str, torch.Tensor]]
    arrived: torch.cuda.Event | None = None


class StateOnHost:
    """Owns where the masters and the optimizer's state of `segments` are: at rest in pinned host memory.

    Masters that are the model's own weights (fp32, ZeRO stage 3) stay on the device, and their state moves. The host
    waits for the copies at the end of a step, so that whoever reads the state then reads the new one.

    Args:
        segments: of this rank. Their masters move now.
        device: where they are updated.
        fraction: of their elements, rounded up to whole segments; the others stay on the device.

    Attributes:
        held: bytes of the host's memory.

    Raises:
        MemoryError: the host does not give that much pinned memory.
    """

    def __init__(
        self, segments: Sequence[Segment], device: torch.device, fraction: float, part_elements: int | None = None
    ) -> None:
        self.device, self.held = device, 0
        self._buffers: list[HostBuffer] = []  # which unpin what is dropped
        self._reserved: list[HostBuffer] = []
        away, self._staying = _split(segments, fraction)
        self._parts = list(_parts(away, part_elements or PART_ELEMENTS[device.type]))
        on_gpu = device.type == "cuda"
        self._in = torch.cuda.Stream(device) if on_gpu else None
        self._out = torch.cuda.Stream(device) if on_gpu else None
        self._leaving: list[tuple[torch.cuda.Event | None, Copies]] = []
        for part in self._parts:
            for index, segment in enumerate(part.segments):
                segment.state_device = torch.device("cpu")
                if segment.weight is not None:
                    home = self._home(part, "", segment.master.dtype, index)
                    home.copy_(segment.master.data)
                    segment.master.data = home

    @property
    def elements(self) -> int:
        """Elements whose state is on the host."""
        return sum(part.elements for part in self._parts)

    @property
    def master_bytes(self) -> int:
        """Bytes of the masters on the host."""
        away = (segment for part in self._parts for segment in part.segments if segment.weight is not None)
        return sum(segment.master.numel() * segment.master.element_size() for segment in away)

    def reserve(self, tensors: int, dtype: torch.dtype) -> None:
        """Take the memory of so many tensors of state for each segment now, before there is any: a host that lacks it
        says so at the start, and the first step does not wait for it.

        Raises:
            MemoryError: as when one is made.
        """
        for part in self._parts:
            for _ in range(tensors):
                self._reserved.append(self._pin(_memory_of(part) * dtype.itemsize))

    def on_device(self, optimizer: torch.optim.Optimizer) -> Iterator[list[Segment]]:
        """All segments, part by part, each with its master and state on the device until the next is asked for."""
        try:
            coming = self._fetch(self._parts[0], optimizer) if self._parts else None
            if self._staying:
                yield self._staying
            for part, following in zip_longest(self._parts, self._parts[1:]):
                assert coming is not None
                here = coming
                self._settle()  # two parts are there at the most
                coming = None if following is None else self._fetch(following, optimizer)
                self._install(part, here, optimizer)
                del here
                try:
                    yield part.segments
                finally:
                    self._send(part, optimizer)
        finally:
            self._settle()
            if self._in is not None and self._out is not None:
                torch.cuda.current_stream(self.device).wait_stream(self._in)
                self._out.synchronize()

    def _fetch(self, part: Part, optimizer: torch.optim.Optimizer) -> Arriving:
        """Start to copy a part to the device."""
        masters: list[torch.Tensor | None] = []
        states, copies = [], Copies()

        def copy_of(tensor: torch.Tensor) -> torch.Tensor:
            copies.append((torch.empty_like(tensor, device=self.device), tensor))
            return copies[-1][0]

        for segment in part.segments:
            masters.append(copy_of(segment.master.data) if segment.weight is not None else None)
            states.append({kind: copy_of(value) for kind, value in _tensors(optimizer, segment)})
        return Arriving(masters, states, self._copy(copies, self._in))

    def _install(self, part: Part, here: Arriving, optimizer: torch.optim.Optimizer) -> None:
        """Let the optimizer see what has arrived."""
        if here.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(here.arrived)
        for segment, master, tensors in zip(part.segments, here.masters, here.states, strict=True):
            if master is not None:
                segment.master.data = master
            if tensors:
                state = optimizer.state[segment.master]
                state.update(tensors)
                if _counts_on_device(optimizer):  # one that was loaded is beside the master
                    state["step"] = state["step"].to(self.device)

    def _send(self, part: Part, optimizer: torch.optim.Optimizer) -> None:
        """Start to copy a part to the host, where it is from now on."""
        copies = Copies()
        for index, segment in enumerate(part.segments):
            if segment.weight is not None:
                home = self._home(part, "", segment.master.dtype, index)
                copies.append((home, segment.master.data))
                segment.master.data = home
            for kind, value in list(_tensors(optimizer, segment)):
                home = self._home(part, kind, value.dtype, index)
                copies.append((home, value))
                optimizer.state[segment.master][kind] = home
        self._leaving.append((self._copy(copies, self._out), copies))

    def _settle(self) -> None:
        """What leaves the device has left it, so that its memory is used again."""
        while self._leaving:
            gone, _ = self._leaving.pop()
            if gone is not None:
                torch.cuda.current_stream(self.device).wait_event(gone)

    def _copy(self, copies: Copies, stream: torch.cuda.Stream | None) -> torch.cuda.Event | None:
        """Start copies after all that the device has been told so far; on the CPU they are made at once."""
        if stream is None:
            for target, source in copies:
                target.copy_(source)
            return None
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for target, source in copies:
                target.copy_(source, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        return copied

    def _home(self, part: Part, kind: str, dtype: torch.dtype, index: int) -> torch.Tensor:
        """The host's memory for one segment of a part. A kind that is new gets memory for all of them."""
        if (kind, dtype) not in part.homes:
            sizes = [_aligned(segment) for segment in part.segments]
            memory = self._take(sum(sizes) * dtype.itemsize).view(dtype)
            pieces = memory.split(sizes)
            part.homes[kind, dtype] = [
                piece[: segment.master.numel()] for piece, segment in zip(pieces, part.segments, strict=True)
            ]
        return part.homes[kind, dtype][index]

    def _take(self, size: int) -> torch.Tensor:
        reserved = next((buffer for buffer in self._reserved if buffer.size == size), None)
        if reserved is None:
            reserved = self._pin(size)
        else:
            self._reserved.remove(reserved)
        self._buffers.append(reserved)
        return reserved.bytes

    def _pin(self, size: int) -> HostBuffer:
        try:
            buffer = HostBuffer(size, self.device)
        except MemoryError as error:
            raise MemoryError(
                f"optim_offload: {size / 2**30:.2f} GiB of host memory could not be pinned beside the "
                f"{self.held / 2**30:.2f} GiB that this process holds of the optimizer's state ({error}); offload less "
                "of it (optim_offload=0.5), use optim_state_dtype='bfloat16', or shard it over more ranks."
            ) from error
        self.held += size
        return buffer


def _aligned(segment: Segment) -> int:
    """Elements that a segment takes of a buffer."""
    return -(-segment.master.numel() // ALIGNMENT) * ALIGNMENT


def _memory_of(part: Part) -> int:
    return sum(_aligned(segment) for segment in part.segments)


def _tensors(optimizer: torch.optim.Optimizer, segment: Segment) -> Iterable[tuple[str, torch.Tensor]]:
    """The optimizer's state of the elements of a segment: not its step, and nothing before the first."""
    for kind, value in optimizer.state.get(segment.master, {}).items():
        if isinstance(value, torch.Tensor) and value.shape == segment.master.shape:
            yield kind, value


def _counts_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `step` has to be where the elements are updated."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False) or optimizer.defaults.get("capturable"))


def _split(segments: Sequence[Segment], fraction: float) -> tuple[list[Segment], list[Segment]]:
    """Those that move, and those that stay."""
    wanted = math.ceil(fraction * sum(segment.master.numel() for segment in segments))
    away: list[Segment] = []
    for segment in segments:
        if wanted <= 0:
            break
        away.append(segment)
        wanted -= segment.master.numel()
    return away, list(segments[len(away) :])


def _parts(segments: Iterable[Segment], elements: int) -> Iterator[Part]:
    """Neighbours that have so many elements together, or a little more."""
    part = Part([])
    for segment in segments:
        part.segments.append(segment)
        if part.elements >= elements:
            yield part
            part = Part([])
    if part.segments:
        yield part
