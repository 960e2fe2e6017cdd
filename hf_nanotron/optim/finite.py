"""Whether a step's gradient was finite, without making the host wait for the GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class FiniteCheck:
    """The norm of a step whose verdict is not read yet.

    The optimizer decides on the GPU (`found_inf`); the host reads the verdict when it begins the next step, while the
    GPU still updates weights, and before anything overwrites the gradients that would say what is wrong.

    Args:
        step: number of the optimizer step, from 1.
        norm: 0-dim, on the device.
        loss: of this rank.
    """

    step: int
    norm: torch.Tensor
    loss: torch.Tensor

    def __post_init__(self) -> None:
        self._verdict, self._arrived = self.norm.isfinite(), None
        if self.norm.is_cuda:
            self._verdict = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(self._verdict, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def is_finite(self) -> bool:
        """The verdict. Waits for the norm alone, not for what was launched after it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return bool(self._verdict)
