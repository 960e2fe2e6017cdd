"""A small sum over ranks that the host reads before the device has done what was launched earlier."""

from __future__ import annotations

import torch
import torch.distributed as dist

from ..ops.host_copy import HostCopy
from .collectives import all_reduce
from .mesh import Group


class EarlySums:
    """Sums host numbers over a group; on a GPU on its own stream, and a communicator that nothing else waits for."""

    def __init__(self, group: Group, device: torch.device) -> None:
        self.group, self.device = group, device
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" and group.size > 1 else None

    def start(self, values: list[int], after: HostCopy | None = None) -> EarlySum:
        """Start summing `values` over the group; on a GPU not before `after` has arrived.

        A sum that starts earlier occupies a multiprocessor while it waits for slower ranks.
        """
        mine = torch.tensor(values, dtype=torch.int64)
        if self._stream is None:
            return EarlySum(all_reduce(mine, self.group))
        pinned = mine.pin_memory()
        with torch.cuda.stream(self._stream):
            if after is not None:
                after.hold(self._stream)
            total = pinned.to(self.device, non_blocking=True)
            dist.all_reduce(total, group=self.group.handle)
            return EarlySum(total, HostCopy(total), self._stream)


class EarlySum:
    """A sum under way."""

    def __init__(self, total: torch.Tensor, copy: HostCopy | None = None, stream: torch.cuda.Stream | None = None):
        self._total, self._copy, self._stream = total, copy, stream

    def read(self) -> list[int]:
        """The sum. The host waits for it alone."""
        return (self._total if self._copy is None else self._copy.read()).tolist()

    def element(self, index: int) -> torch.Tensor:
        """One number of it, 0-dim, for the current stream; on the host if the sum is made there."""
        if self._stream is not None:
            current = torch.cuda.current_stream(self._total.device)
            current.wait_stream(self._stream)
            self._total.record_stream(current)
        return self._total[index]
