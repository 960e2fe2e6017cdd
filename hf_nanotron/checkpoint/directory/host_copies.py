"""Copies on the host of what training goes on with: made while the next step computes, and done before it writes."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

import torch

from ...ops.host_region import HostRegion

MOST_WAITING = 1 << 30  # bytes of tensors on the device that are there only to be copied


class Source(Enum):
    """What becomes of a tensor after it was given to be copied."""

    KEPT = "written after the next `hold`"
    CHANGES = "written at any time (a buffer): copied at once, in the order of what the device is told"
    OWN = "nobody else uses it: it was made for this copy"


@dataclass
class Batch:
    """Copies from the device that are started together: to, from, and what becomes of it; bytes of those of its own."""

    copies: list[tuple[torch.Tensor, torch.Tensor, Source]] = field(default_factory=list)
    own: int = 0


class HostCopies:
    """Copies of the tensors of one save at a time, in memory that is used again.

    A tensor on the device is copied by a stream of its own, after all that the device has been told when `of` returns;
    one on the host by the thread that calls `complete`. Until then nobody may write to it: whoever is about to write
    calls `hold` first.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._region: HostRegion | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._on_host: deque[tuple[torch.Tensor, torch.Tensor]] = deque()  # to, from
        self._copies = threading.Lock()  # held by who copies from host to host
        self._sources: list[torch.Tensor] = []  # on the device; kept until they are copied
        self._passing: deque[tuple[torch.cuda.Event, list[torch.Tensor], int]] = deque()  # copied, what, bytes
        self._passing_bytes = 0
        self._is_open = False
        self._marked: torch.cuda.Event | None = None

    def reserve(self, size: int) -> None:
        """Have so many bytes ready for `of`. A thread gets them; what goes beyond is got when it is needed."""
        if self._region is None or self._region.size < size:
            self.release()
            self._region = HostRegion(size, self.device)

    def release(self) -> None:
        """Give the memory back. No copy is used any more."""
        if self._region is not None:
            self._region.close()
        self._region = None

    @property
    def reserved(self) -> int:
        """Bytes of `reserve`."""
        return 0 if self._region is None else self._region.size

    @property
    def awaited(self) -> int:
        """Bytes of `reserve` that the host has not given yet."""
        return 0 if self._region is None else self._region.awaited

    @property
    def unpinned(self) -> str | None:
        """Why the host has not pinned what was reserved; None if it has."""
        return None if self._region is None else self._region.unpinned

    # ---- by the thread that trains ----

    def begin(self) -> None:
        """A new save: copies of the one before are not used any more."""
        self.complete()  # of one that was broken off
        self._is_open = True
        if self._region is not None:
            self._region.begin()

    def of(self, tensors: Iterable[tuple[torch.Tensor, Source]]) -> list[torch.Tensor]:
        """A copy of each of `tensors`, whose content is there after `complete`.

        From a device they are copied batch by batch: what a batch has in common is done once for it. A batch ends with
        the last tensor, or when much memory is there only to be copied.
        """
        copies: list[torch.Tensor] = []
        batch = Batch()
        for tensor, source in tensors:
            tensor = tensor.detach()
            if tensor.device.type == "cpu":
                copies.append(self._of_host(tensor, source))
                continue
            flat = tensor.contiguous()
            if source is Source.OWN or flat.data_ptr() != tensor.data_ptr():
                source, batch.own = Source.OWN, batch.own + flat.nbytes
            copies.append(self._empty(flat))
            batch.copies.append((copies[-1], flat, source))
            if batch.own >= MOST_WAITING // 4:
                self._send(batch)
                batch = Batch()
        self._send(batch)
        return copies

    def mark(self) -> None:
        """What was given to `of` so far can be held without the rest."""
        if self._stream is not None:
            self._marked = torch.cuda.Event()
            self._marked.record(self._stream)

    def hold(self, marked: bool = False) -> None:
        """What was given to `of` (before the last `mark`, if `marked`) is about to be written: first it is copied.

        The current stream waits for copies from the device, the host for those from host to host.
        """
        if not self._is_open:
            return
        if self._stream is not None:
            current = torch.cuda.current_stream(self.device)
            if not marked:
                current.wait_stream(self._stream)
            elif self._marked is not None:
                current.wait_event(self._marked)
        self._copy_on_host()

    # ---- by the thread that writes ----

    def complete(self) -> None:
        """Wait until all copies are made."""
        self._copy_on_host()
        if self._stream is not None:
            self._stream.synchronize()
        self._is_open, self._marked = False, None
        self._sources.clear()
        self._passing.clear()
        self._passing_bytes = 0

    # ---- parts ----

    def _of_host(self, tensor: torch.Tensor, source: Source) -> torch.Tensor:
        if source is Source.OWN:
            return tensor
        copy = self._empty(tensor)
        if source is Source.CHANGES:
            copy.copy_(tensor)
        else:
            self._on_host.append((copy, tensor))
        return copy

    def _empty(self, tensor: torch.Tensor) -> torch.Tensor:
        taken = None if self._region is None else self._region.take(tensor.shape, tensor.dtype)
        return torch.empty(tensor.shape, dtype=tensor.dtype) if taken is None else taken

    def _send(self, batch: Batch) -> None:
        """Start the copies of a batch: what changes in the current stream, the rest in our own, which waits for it."""
        if not batch.copies:
            return
        assert self._stream is not None
        current = torch.cuda.current_stream(self.device)
        for copy, source, kind in batch.copies:
            if kind is Source.CHANGES:
                self._copy(copy, source)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for copy, source, kind in batch.copies:
                if kind is not Source.CHANGES:
                    self._copy(copy, source)
        self._sources += [source for _, source, kind in batch.copies if kind is Source.KEPT]
        if batch.own:
            self._bound([source for _, source, kind in batch.copies if kind is Source.OWN], batch.own)

    def _copy(self, copy: torch.Tensor, source: torch.Tensor) -> None:
        if self._region is not None and self._region.holds(copy):
            self._region.copy(copy, source)
        else:
            copy.copy_(source, non_blocking=True)

    def _bound(self, sources: list[torch.Tensor], size: int) -> None:
        """Keep `sources` until they are copied, and wait for older ones if they are many."""
        copied = torch.cuda.Event()
        copied.record(self._stream)
        self._passing.append((copied, sources, size))
        self._passing_bytes += size
        while self._passing_bytes > MOST_WAITING and len(self._passing) > 1:
            event, gone, size = self._passing.popleft()
            event.synchronize()
            self._passing_bytes -= size
            gone.clear()

    def _copy_on_host(self) -> None:
        """What is left to copy from host to host, by whoever comes to it: nothing is left when this returns."""
        while True:
            with self._copies:
                if not self._on_host:
                    return
                target, source = self._on_host.popleft()
                target.copy_(source)


def addresses(tensors: Iterable[torch.Tensor]) -> set[int]:
    """Where the memory is that these tensors lie in."""
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}
