"""Host memory that a device copies to and from while it computes: pinned, used again, and bounded."""

from __future__ import annotations

import mmap
import os
from typing import Any

import torch

from .host_memory import make_pages

REMEDY = "offload fewer layers (activation_offload=0.5), shorten the sequence, or shard it over more ranks"


class HostBuffer:
    """`size` bytes of host memory, pinned for copies of `device` if that is a GPU; unpinned when nobody holds it.

    Attributes:
        bytes: `[size]`, uint8.
        copied: the last copy from or to it, None before the first and on the CPU.

    Raises:
        MemoryError: the host has no such memory, or does not pin it.
    """

    # torch's own pinned memory is rounded up to a power of two, so this pins pages of its own.

    def __init__(self, size: int, device: torch.device) -> None:
        self.size, self.copied = size, None
        self._pinned, self._process = False, os.getpid()
        try:
            pages = max(1, -(-size // mmap.PAGESIZE)) * mmap.PAGESIZE
            memory = mmap.mmap(-1, pages, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self.bytes = make_pages(memory)[:size]
            if device.type == "cuda":
                if hasattr(mmap, "MADV_DONTFORK"):  # a device would go on with pages that a fork has replaced
                    memory.madvise(mmap.MADV_DONTFORK)
                runtime: Any = torch.cuda.cudart()
                code = runtime.cudaHostRegister(self.bytes.data_ptr(), pages, 0)
                if int(code) != 0:
                    raise RuntimeError(f"cudaHostRegister returned {int(code)}")
                self._pinned = True
        except (MemoryError, OSError, RuntimeError) as error:
            raise MemoryError(f"{str(error).splitlines()[0]}") from error

    copied: torch.cuda.Event | None

    def __del__(self) -> None:
        if getattr(self, "_pinned", False) and os.getpid() == self._process:  # not in a worker of a data loader
            if self.copied is not None:
                self.copied.synchronize()
            runtime: Any = torch.cuda.cudart()
            runtime.cudaHostUnregister(self.bytes.data_ptr())


class HostBuffers:
    """Buffers that are used again, never more than were in use at one time.

    A free buffer that is too small is dropped before a larger one is made, so that batches of many lengths do not fill
    the host.

    Attributes:
        held: bytes of all buffers, in use or free.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.held = device, 0
        self._keeps = True  # what is given back, for the next `take`
        self._free: list[HostBuffer] = []

    def take(self, size: int) -> HostBuffer:
        """A buffer of at least `size` bytes. `HostBuffer.copied` may still be under way.

        Raises:
            MemoryError: the host does not give that much pinned memory.
        """
        self._keeps = True
        fitting = [buffer for buffer in self._free if buffer.size >= size]
        if fitting:
            chosen = min(fitting, key=lambda buffer: buffer.size)
            self._free.remove(chosen)
            return chosen
        if self._free:
            dropped = max(self._free, key=lambda buffer: buffer.size)
            self._free.remove(dropped)
            self.held -= dropped.size
            del dropped  # or both would be there at once
        try:
            made = HostBuffer(size, self.device)
        except MemoryError as error:
            raise MemoryError(
                f"activation_offload: {size / 2**30:.2f} GiB of host memory could not be pinned beside the "
                f"{self.held / 2**30:.2f} GiB that this process holds for offloaded activations ({error}); {REMEDY}."
            ) from error
        self.held += size
        return made

    def give(self, buffer: HostBuffer) -> None:
        """Nobody reads or writes `buffer` any more, but for `buffer.copied`."""
        if self._keeps:
            self._free.append(buffer)
        else:
            self.held -= buffer.size

    def release(self) -> None:
        """Give what is free back to the host, and until the next `take` also what becomes free: an error holds what the
        step that it broke off has saved.
        """
        self._keeps = False
        self.held -= sum(buffer.size for buffer in self._free)
        self._free.clear()

    @property
    def in_use(self) -> int:
        """Bytes of the buffers that have been taken and not given back."""
        return self.held - sum(buffer.size for buffer in self._free)
