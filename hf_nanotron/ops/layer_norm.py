"""A layer norm that takes an input of another dtype than its weight."""

from __future__ import annotations

import torch
from torch import nn


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` that rounds its input to the dtype of its weight, as `ops.linear.Linear` does.

    In a model of 16 bits, buffers that stay in fp32 (sinusoidal positions) are added to its hidden states.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`[..., features]`, in the dtype of the weight; without one, in that of the input."""
        return super().forward(input if self.weight is None else input.to(self.weight.dtype))
