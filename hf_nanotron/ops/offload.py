"""Saved activations in host memory between a forward and its backward, copied beside the computation.

Hooks on saved tensors (`torch.autograd.graph.saved_tensors_hooks`) hand a layer's saved tensors to a `LayerSaves`. On a
GPU a stream copies them to pinned buffers during the forward; in the backward another one fetches those of the next
layer while a layer computes. No value changes. The graph holds what was saved: when it is freed, so is the buffer.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .host_buffers import HostBuffer, HostBuffers

LEAST_BYTES = 2**20  # of a tensor for which two transfers are worth it, on a GPU
COPYING = 2  # layers whose tensors may still be on their way to the host


class Unchanged:
    """A saved tensor, which nobody may write to until it has been copied, or read."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor, self._version = tensor, tensor._version

    def read(self) -> torch.Tensor:
        """The tensor.

        Raises:
            RuntimeError: it was written to since it was saved.
        """
        if self._tensor._version != self._version:
            raise RuntimeError(
                f"a tensor of shape {list(self._tensor.shape)} that a layer saved for its backward was modified in "
                "place, and activation_offload may have copied either value; use activation_offload=0."
            )
        return self._tensor


Source = tuple[Unchanged, torch.cuda.Event]  # on its way to the host


class Transfers:
    """Copies between one device and host buffers. On the CPU they are made at once.

    Attributes:
        buffers: the host's memory.
        least: bytes of the smallest tensor that is offloaded.
    """

    def __init__(self, device: torch.device, least: int | None = None) -> None:
        self.device, self.buffers = device, HostBuffers(device)
        self.least = (LEAST_BYTES if device.type == "cuda" else 0) if least is None else least
        on_gpu = device.type == "cuda"
        self._out = torch.cuda.Stream(device) if on_gpu else None
        self._in = torch.cuda.Stream(device) if on_gpu else None
        self._sources: deque[list[Source]] = deque()

    def begin_layer(self) -> None:
        """A layer's forward begins: those before the last `COPYING` must have been copied."""
        while len(self._sources) > COPYING:
            self._settle_oldest()
        self._sources.append([])

    def settle(self) -> None:
        """A backward begins: all must have been copied."""
        while self._sources:
            self._settle_oldest()

    def release(self) -> None:
        """A run has ended, or was broken off: hold no memory for it."""
        for _, copied in (source for layer in self._sources for source in layer):
            torch.cuda.current_stream(self.device).wait_event(copied)
        self._sources.clear()
        self.buffers.release()

    def _settle_oldest(self) -> None:
        for source, copied in self._sources.popleft():
            torch.cuda.current_stream(self.device).wait_event(copied)  # before its memory is used again
            source.read()

    def send(self, tensor: torch.Tensor) -> HostBuffer:
        """Start a copy of a dense tensor. A buffer with its elements in the order of its memory."""
        size = tensor.numel() * tensor.element_size()
        buffer = self.buffers.take(size)
        target = buffer.bytes[:size].view(tensor.dtype)
        if self._out is None:
            target.copy_(_flat(tensor))
            return buffer
        made = torch.cuda.Event()
        made.record()
        self._out.wait_event(made)
        if buffer.copied is not None:
            self._out.wait_event(buffer.copied)
        with torch.cuda.stream(self._out):
            target.copy_(_flat(tensor), non_blocking=True)
            buffer.copied = torch.cuda.Event()
            buffer.copied.record()
        if not self._sources:
            self._sources.append([])
        self._sources[-1].append((Unchanged(tensor), buffer.copied))
        return buffer

    def fetch(self, buffer: HostBuffer, like: Layout) -> torch.Tensor:
        """Start to copy it back. Wait for `buffer.copied` before the result is read."""
        size, stride, dtype = like
        tensor = torch.empty_strided(size, stride, dtype=dtype, device=self.device)
        source = buffer.bytes[: tensor.numel() * tensor.element_size()].view(dtype)
        if self._in is None:
            _flat(tensor).copy_(source)
            return tensor
        made = torch.cuda.Event()  # whoever had the memory before has finished
        made.record()
        self._in.wait_event(made)
        assert buffer.copied is not None
        self._in.wait_event(buffer.copied)
        with torch.cuda.stream(self._in):
            _flat(tensor).copy_(source, non_blocking=True)
            buffer.copied = torch.cuda.Event()
            buffer.copied.record()
        return tensor


Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of a dense tensor in the order of its memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def is_whole(tensor: torch.Tensor) -> bool:
    """Whether a tensor is all of its memory, so that memory is freed with it."""
    size = tensor.numel() * tensor.element_size()
    return tensor.layout == torch.strided and tensor.untyped_storage().nbytes() == size


class Saved:
    """One saved tensor in a host buffer, as the graph holds it."""

    def __init__(self, layer: LayerSaves, tensor: torch.Tensor) -> None:
        self.layer, self.transfers = layer, layer.transfers
        self.layout: Layout = (tensor.shape, tensor.stride(), tensor.dtype)
        self.buffer = self.transfers.send(tensor)
        self.fetched: torch.Tensor | None = None
        self._awaited = True

    def fetch(self) -> torch.Tensor:
        if self.fetched is None:
            self.fetched = self.transfers.fetch(self.buffer, self.layout)
            self._awaited = False
        return self.fetched

    def read(self) -> torch.Tensor:
        """The tensor, for what is computed next."""
        tensor = self.fetch()
        self._wait()
        return tensor

    def _wait(self) -> None:
        if self.buffer.copied is not None and not self._awaited:
            torch.cuda.current_stream(self.transfers.device).wait_event(self.buffer.copied)
        self._awaited = True

    def __del__(self) -> None:
        if hasattr(self, "_awaited"):
            self._wait()  # also where nobody has read it: its memory is used again
            self.transfers.buffers.give(self.buffer)


class Stays:
    """One saved tensor that stays on the device; reading it fetches what the next layer has offloaded."""

    def __init__(self, layer: LayerSaves, tensor: torch.Tensor) -> None:
        self.layer, self._tensor = layer, Unchanged(tensor)

    def read(self) -> torch.Tensor:
        return self._tensor.read()


class LayerSaves:
    """What one forward of one layer saves.

    Args:
        following: what is fetched while its backward runs, asked for when that begins.
        stays: keep it on the device: its backward comes first.
        shared: addresses of memory that others hold as well (weights, positions), asked for when the first tensor is
            saved.
    """

    def __init__(
        self,
        transfers: Transfers,
        following: Callable[[LayerSaves], LayerSaves | None],
        stays: bool,
        shared: Callable[[], set[int]],
    ) -> None:
        self.transfers, self.following, self.stays = transfers, following, stays
        self._shared: Callable[[], set[int]] | None = shared
        self._addresses: set[int] = set()
        self._by_place: dict[tuple[Any, ...], weakref.ref[Saved]] = {}
        self._held: list[torch.Tensor] = []  # or other tensors could get their addresses

    def pack(self, tensor: torch.Tensor) -> Any:
        """Instead of `tensor`, what the graph keeps. A tensor that several operators save is copied once."""
        # Of the devices the types alone: "cuda" is not equal to "cuda:0".
        is_ours = type(tensor) is torch.Tensor and tensor.device.type == self.transfers.device.type
        if not is_ours or not tensor.is_floating_point():
            return tensor
        size = tensor.numel() * tensor.element_size()
        # What has one byte an element is mostly a copy of a weight in FP8.
        if tensor.element_size() == 1 or size == 0 or size < self.transfers.least or not is_whole(tensor):
            return tensor
        if self._shared is not None:
            self._addresses, self._shared = self._shared(), None
        address = tensor.untyped_storage().data_ptr()
        if address in self._addresses:
            return tensor
        tensor = tensor.detach()
        if self.stays:
            return Stays(self, tensor)
        place = (address, tensor.shape, tensor.stride(), tensor.dtype, tensor._version)
        known = self._by_place.get(place)
        saved = None if known is None else known()
        if saved is None:
            saved = Saved(self, tensor)
            self._by_place[place] = weakref.ref(saved)
            self._held.append(tensor)
        return saved

    @property
    def is_needed(self) -> bool:
        """Whether the graph still holds something of it."""
        return any(known() is not None for known in self._by_place.values())

    def fetch(self) -> None:
        """Start to copy back what is still needed."""
        for known in self._by_place.values():
            saved = known()
            if saved is not None:
                saved.fetch()

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """While the layer's forward runs."""
        self.transfers.begin_layer()
        try:
            with torch.autograd.graph.saved_tensors_hooks(self.pack, unpack):
                yield
        finally:
            self._held.clear()
            self._shared = None  # it holds the arguments


def unpack(kept: Any) -> torch.Tensor:
    """The tensor that `LayerSaves.pack` was given. Fetches those of its layer, and of the next."""
    if isinstance(kept, torch.Tensor):
        return kept
    layer = kept.layer
    layer.transfers.settle()
    layer.fetch()
    tensor: torch.Tensor = kept.read()
    following = layer.following(layer)
    if following is not None:
        following.fetch()
    return tensor
