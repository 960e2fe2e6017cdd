"""A stock block that multiplies tensors of several dtypes, as autocast lets it."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

HALF = (torch.bfloat16, torch.float16)


class MixedDtypes(nn.Module):
    """A block that runs under autocast to the dtype of its weights, if that has 16 bits.

    Its products take operands of that dtype, and what is added or multiplied element by element keeps the wider one:
    what stock Trainer's mixed precision does everywhere, and what such a block needs where its weights are in 16 bits
    and its buffers are not.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        weight = next(self.parameters())
        with torch.autocast(weight.device.type, dtype=weight.dtype, enabled=weight.dtype in HALF):
            return super().forward(*args, **kwargs)


@functools.cache
def mixed_class(stock: type[nn.Module]) -> type[MixedDtypes]:
    """`MixedDtypes` over a stock class, whose forward stays."""
    return type(f"Mixed{stock.__name__}", (MixedDtypes, stock), {})
