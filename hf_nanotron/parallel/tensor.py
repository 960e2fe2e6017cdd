"""The layers that hold a shard: what each computes, and nothing about who calls them.

Column and row layers do not communicate themselves. Stock attention modules reshape by the sequence length they see,
so the gather and the reduction sit at the border of the whole attention or MLP module (`region.py`).
"""

from __future__ import annotations

import torch
from torch import nn

from ..ops.linear import Linear
from .collectives import reduce_from
from .mesh import Group


class ColumnParallelLinear(Linear):
    """A slice of the output features: `y[..., part] = x @ weight[part].T + bias[part]`."""


class RowParallelLinear(Linear):
    """A slice of the input features; the outputs of all ranks are to be summed by the caller.

    The bias is added by the first rank of the group alone, so that the sum holds it once. Its gradient is whole on
    that rank and zero on the others.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, group: Group, **factory: object) -> None:
        super().__init__(in_features, out_features, bias=bias, **factory)
        self.adds_bias = group.rank == 0

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        bias = self.bias if self.adds_bias or self.bias is None else self.bias * 0
        return self.linear(input, bias)


class VocabParallelEmbedding(nn.Embedding):
    """A slice of the vocabulary: looks up the ids it holds, zero elsewhere, and sums over the group.

    Args:
        start: first id of our slice.
        length: ids in our slice.
        padding_idx: global id whose row gets no gradient, as in `torch.nn.Embedding`.
    """

    def __init__(
        self, start: int, length: int, embedding_dim: int, padding_idx: int | None, group: Group, **factory: object
    ) -> None:
        owned = padding_idx is not None and start <= padding_idx < start + length
        local_padding = padding_idx - start if owned and padding_idx is not None else None
        super().__init__(length, embedding_dim, local_padding, **factory)  # type: ignore[arg-type]
        self.start, self.length, self.group = start, length, group

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        local = input - self.start
        absent = (local < 0) | (local >= self.length)
        rows = super().forward(local.masked_fill(absent, 0))
        return reduce_from(rows.masked_fill(absent.unsqueeze(-1), 0), self.group)
