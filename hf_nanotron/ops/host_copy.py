"""Copies of numbers between the host and the device, for which neither waits longer than necessary."""

from __future__ import annotations

import torch


class HostCopy:
    """A copy of `x` on the host, started now. What is launched after it is not waited for."""

    def __init__(self, x: torch.Tensor) -> None:
        self._copy, self._arrived = x, None
        if x.is_cuda:
            self._copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def hold(self, stream: torch.cuda.Stream) -> None:
        """Let `stream` wait until the copy has arrived."""
        if self._arrived is not None:
            stream.wait_event(self._arrived)

    def read(self) -> torch.Tensor:
        """The copy. Waits until it has arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._copy


def to_device(data: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`data` on `device`, without waiting for what the device still does: out of pinned memory."""
    if device.type == "cuda" and not data.is_cuda and not data.is_pinned():
        data = data.pin_memory()
    return data.to(device, non_blocking=True)
