"""Weights that somebody else has written: their masters, and the memory they are to lie in, follow.

A script may set weights in place after a trainer has taken the model (`weight.zero_()`, `torch.nn.init`,
`weight.data = value`). What is trained are the masters, so what was written is taken over into them, element by
element: a weight that still is its rounded master leaves that as exact as it was.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from .segment import Segment


@dataclass
class Place:
    """Where a parameter is: `view` is its memory, in its shape; `segment` what this rank's optimizer updates of it."""

    name: str
    parameter: nn.Parameter
    view: torch.Tensor
    segment: Segment | None
    version: int = field(init=False)
    address: int = field(init=False)

    def __post_init__(self) -> None:
        self.version, self.address = self.parameter._version, self.view.data_ptr()

    def take_written(self, compare: bool) -> None:
        """Take over what was written since the last time.

        Nothing waits for the device. `weight.data.copy_(...)` moves no version counter, so it is seen with `compare`
        alone, which reads the weights.
        """
        parameter = self.parameter
        has_moved = parameter.data_ptr() != self.address
        if not (compare or has_moved or parameter._version != self.version):
            return
        if has_moved:
            if parameter.shape != self.view.shape:
                raise ValueError(
                    f"the data of {self.name} was replaced by a tensor of shape {tuple(parameter.shape)}, but this "
                    f"rank's part has shape {tuple(self.view.shape)}."
                )
            self.view.copy_(parameter.data)
            parameter.data = self.view
        self.version = parameter._version
        segment = self.segment
        if segment is not None and segment.weight is not None:
            weight = segment.weight
            master = segment.master.data.to(weight.device)  # which may be on the host
            segment.master.data.copy_(torch.where(weight == master.to(weight.dtype), master, weight.float()))
