"""One large region of host memory, got in the background: its pages take seconds to get and to pin, a copy does not."""

from __future__ import annotations

import mmap
import os
import threading
from typing import Any

import torch

PIECE_BYTES = 64 << 20  # pinned by one call, during which the driver may keep other threads waiting
PORTABLE = 1  # cudaHostRegisterPortable: for all devices of the process
ALIGNMENT = 256  # bytes, of a tensor in the region


class HostRegion:
    """`size` bytes of host memory from which tensors are cut one after the other, again and again.

    A thread gets the pages, and pins them for copies of `device` if that is a GPU. `take` waits for those it gives.
    What the host does not pin is used unpinned: copies are right, and slower.

    Attributes:
        unpinned: why memory is not pinned, None if all is that has been asked for so far.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.size, self.unpinned = size, None
        self._pins, self._taken, self._ready = device.type == "cuda", 0, 0
        self._device = device
        self._pinned: list[int] = []  # addresses
        self._closed = False
        self._grows = threading.Condition()
        pages = max(1, -(-size // PIECE_BYTES)) * PIECE_BYTES
        self._memory = mmap.mmap(-1, pages, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._memory.madvise(mmap.MADV_HUGEPAGE)  # fewer pages to get, and to pin
        if self._pins and hasattr(mmap, "MADV_DONTFORK"):  # a device would go on with pages that a fork has replaced
            self._memory.madvise(mmap.MADV_DONTFORK)
        self._process = os.getpid()
        self._bytes = torch.frombuffer(self._memory, dtype=torch.uint8)
        self._address = self._bytes.data_ptr()
        self._thread = threading.Thread(target=self._get_pages, name="host-memory")
        self._thread.start()

    unpinned: str | None

    def _get_pages(self) -> None:
        runtime: Any = None
        if self._pins:
            torch.cuda.set_device(self._device)  # of this thread: it would take memory of the first GPU
            runtime = torch.cuda.cudart()
        for start in range(0, len(self._bytes), PIECE_BYTES):
            if self._closed or not threading.main_thread().is_alive():
                break
            piece = self._bytes[start : start + PIECE_BYTES]
            piece.zero_()
            if self._pins and self.unpinned is None:
                code = int(runtime.cudaHostRegister(piece.data_ptr(), PIECE_BYTES, PORTABLE))
                if code == 0:
                    self._pinned.append(piece.data_ptr())
                else:
                    self.unpinned = f"cudaHostRegister returned {code} after {start / 2**30:.2f} GiB"
            with self._grows:
                self._ready = start + PIECE_BYTES
                self._grows.notify_all()
        with self._grows:
            self._ready = len(self._bytes)
            self._grows.notify_all()

    @property
    def awaited(self) -> int:
        """Bytes that the thread has still to get."""
        return max(self.size - self._ready, 0)

    def begin(self) -> None:
        """What was taken before is not used any more."""
        self._taken = 0

    def take(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor | None:
        """A tensor of the region, whose content is undefined; None if there is no room left. May wait for its pages."""
        start = self._taken
        end = start + dtype.itemsize * shape.numel()
        if end > self.size:
            return None
        self._taken = -(-end // ALIGNMENT) * ALIGNMENT
        if self._ready < end:
            with self._grows:
                self._grows.wait_for(lambda: self._ready >= end)
        return self._bytes[start:end].view(dtype).view(shape)

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` is one of `take`."""
        return 0 <= tensor.data_ptr() - self._address < len(self._bytes)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Start to copy `source` (contiguous, on the device) to a tensor of `take`.

        By pieces: a copy is to touch memory that one call has pinned.
        """
        begin = target.data_ptr() - self._address
        if begin % PIECE_BYTES + target.nbytes <= PIECE_BYTES:
            target.copy_(source, non_blocking=True)
            return
        flat, given = target.view(-1), source.reshape(-1)
        done, item = 0, target.element_size()
        while done < flat.numel():
            room = PIECE_BYTES - (begin + done * item) % PIECE_BYTES
            stop = min(flat.numel(), done + room // item)
            flat[done:stop].copy_(given[done:stop], non_blocking=True)
            done = stop

    def close(self) -> None:
        """Unpin it. Nothing is copied to it any more."""
        if os.getpid() != self._process:  # a forked worker of a data loader
            return
        self._closed = True
        if threading.current_thread() is not self._thread:  # which lets go of this last
            self._thread.join()
        runtime: Any = torch.cuda.cudart() if self._pinned else None
        while self._pinned:
            runtime.cudaHostUnregister(self._pinned.pop())

    def __del__(self) -> None:
        if hasattr(self, "_thread"):
            self.close()
