"""Numbers on their way from the device to the host, which waits for them alone."""

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

    def read(self) -> torch.Tensor:
        """The copy. Waits until it has arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._copy
