"""Whether a step's gradient was finite, without making the host wait for the GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..ops.host_copy import HostCopy


@dataclass
class FiniteCheck:
    """The norm of a step whose result has not been read yet, with its `step` from 1 and this rank's `loss`.

    The optimizer decides on the GPU (`found_inf`). The host reads the result at the start of the next step, while the
    GPU still updates weights, and before anything overwrites the gradients that would explain it.
    """

    step: int
    norm: torch.Tensor
    loss: torch.Tensor

    def __post_init__(self) -> None:
        self.verdict = HostCopy(self.norm.isfinite())

    def is_finite(self) -> bool:
        """The verdict. Waits for the norm alone, not for what was launched after it."""
        return bool(self.verdict.read())
