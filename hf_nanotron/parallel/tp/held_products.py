"""Weight gradients that are delayed to overlap with communication.

In a backward nothing depends on a weight's gradient, but everything waits for tokens that are sent between
tensor-parallel ranks. So the matmuls of weight gradients are held back, and run while tokens are sent.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Protocol

import torch

# Of matrix products while one byte arrives: 700 TFLOP/s against 256 GB/s, of an H100 or H200 with NVLink.
FLOPS_PER_BYTE = 2700
# Products that stay held after a communication, for the next one: each keeps its two operands in memory.
HELD_AFTER = 2
# Products held inside of a block. The linears of an attention or MLP module are fewer.
MOST_HELD = 8


class HeldGradient(Protocol):
    """A gradient that knows how many of its products are still to come."""

    def hold(self) -> None:
        """A product will come, by `add_held_product`, before the end of this backward."""

    def add_held_product(self, grad_output: torch.Tensor, input: torch.Tensor) -> None:
        """Add `grad_output.T @ input`, of `[tokens, out]` and `[tokens, in]`."""


class ProductQueue:
    """Products of the running backward, oldest first; empty at its end.

    Operands that are held must not be overwritten: autograd does not, because it sees our reference; compiled code must
    be told (`prepare/compile.py`).
    """

    def __init__(self) -> None:
        self._held: deque[tuple[HeldGradient, torch.Tensor, torch.Tensor]] = deque()
        self._backward = -1  # number of the backward at whose end `flush` is called

    def __len__(self) -> int:
        return len(self._held)

    def add(self, total: HeldGradient, grad_output: torch.Tensor, input: torch.Tensor) -> None:
        """Hold a product back."""
        backward = torch._C._current_graph_task_id()
        if backward != self._backward:
            self._held.clear()  # of a backward that was broken off
            self._backward = backward
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(self.flush)
        total.hold()
        self._held.append((total, grad_output, input))
        if len(self._held) > MOST_HELD:
            self._run()

    def cover(self, arriving: int) -> None:
        """Run as many products as hide the arrival of so many bytes, and those that have waited long enough."""
        if torch._C._current_graph_task_id() != self._backward:
            self._held.clear()  # of a backward that was broken off
            return
        flops = 0
        while self._held and (flops < arriving * FLOPS_PER_BYTE or len(self._held) > HELD_AFTER):
            flops += self._run()

    def flush(self) -> None:
        """Run what is left."""
        while self._held:
            self._run()
        self._backward = -1

    def _run(self) -> int:
        total, grad_output, input = self._held.popleft()
        total.add_held_product(grad_output, input)
        return 2 * input.shape[0] * input.shape[1] * grad_output.shape[1]
