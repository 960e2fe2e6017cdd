"""Deferred weight gradients: what a backward would have done with its operands, done later in the same order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch


class DeferredWork:
    """Work that backwards defer, by stage and micro-batch (zero bubble; Qi et al. 2023, arXiv:2401.10241).

    Between `start` and `stop`, work is queued. The queue keeps operands alive, and frees each when it is done.
    """

    def __init__(self) -> None:
        self._queues: dict[tuple[int, int], deque[tuple[Callable[..., None], tuple[torch.Tensor, ...], list[int]]]] = {}
        self._open: tuple[int, int] | None = None

    def start(self, stage: int, micro_batch: int) -> None:
        """From here on, work belongs to this micro-batch of this stage."""
        assert self._open is None and (stage, micro_batch) not in self._queues
        self._open = (stage, micro_batch)
        self._queues[self._open] = deque()

    def stop(self) -> None:
        """From here on, work is done at once."""
        self._open = None

    def do(self, work: Callable[..., Any], *operands: torch.Tensor) -> None:
        """Do `work(*operands)`, now or later. Nobody may write to the operands until then."""
        if self._open is None:
            work(*operands)
        else:
            # A view of its own: autograd adds in place to a gradient that nobody else holds.
            kept = tuple(operand.detach() for operand in operands)
            self._queues[self._open].append((work, kept, [operand._version for operand in kept]))

    def run(self, stage: int, micro_batch: int) -> None:
        """Do what was left, in the order in which it came."""
        queue = self._queues.pop((stage, micro_batch))
        while queue:
            work, operands, versions = queue.popleft()
            if [operand._version for operand in operands] != versions:
                raise RuntimeError(
                    f"an operand of a weight gradient of stage {stage} was modified in place after its backward, "
                    "before the gradient was computed; use pp_schedule='1f1b', which computes it in the backward."
                )
            work(*operands)

    def clear(self) -> None:
        """Forget everything, as after a step that ended with an error."""
        self._queues.clear()
        self._open = None

    def __len__(self) -> int:
        """Micro-batches of stages that wait."""
        return len(self._queues)
