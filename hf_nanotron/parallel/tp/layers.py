"""The layers that hold a shard: what each computes, and nothing about who calls them.

Column and row layers do not communicate themselves. Stock attention modules reshape by the sequence length they see,
so the gather and the reduction sit at the border of the whole attention or MLP module (`regions.py`). A stock module
becomes one of these by a change of its class; what it holds besides its weights stays.
"""

from __future__ import annotations

import functools

import torch
from torch import nn

from ...ops.embedding import Embedding
from ...ops.linear import Linear
from ..collectives import copy_to, reduce_from
from ..mesh import Group


class ColumnParallelLinear(Linear):
    """A slice of the output features: `y[..., part] = x @ weight[part].T + bias[part]`."""


class RowParallelLinear(Linear):
    """A slice of the input features; the caller sums the outputs of all ranks.

    Only the first rank of the group adds the bias. Its gradient is whole on that rank and zero on the others.
    """

    adds_bias: bool

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        bias = self.bias if self.adds_bias or self.bias is None else self.bias * 0
        return self.linear(input, bias)


class VocabParallelEmbedding(nn.Embedding):
    """A slice of the vocabulary, `length` ids from `start` on: zeros for other ids, summed over the group."""

    start: int
    length: int
    group: Group

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        local = input - self.start
        absent = (local < 0) | (local >= self.length)
        # Any row does for an absent id. Many different ones: gradients of one row are added one after the other.
        rows = super().forward(torch.where(absent, input.remainder(self.length), local))
        return reduce_from(rows.masked_fill(absent.unsqueeze(-1), 0), self.group)


@functools.cache
def vocab_parallel_class(stock: type[nn.Embedding]) -> type[VocabParallelEmbedding]:
    """`VocabParallelEmbedding` over what a stock class makes of the rows (some scale them)."""
    base = Embedding if stock is nn.Embedding else stock
    return type(f"Parallel{stock.__name__}", (VocabParallelEmbedding, base), {})


class SplitNorm(nn.Module):
    """An RMS norm over features that are sharded over the ranks (Zhang and Sennrich 2019, arXiv:1910.07467).

    The stock forward divides by the root mean square of this rank's features; the result is corrected by its ratio to
    the root mean square of all. With `to_unit`, the stock norm divides by the root of the sum of squares, not of their
    mean.
    """

    group: Group
    to_unit: bool

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        epsilon: float = self.variance_epsilon if hasattr(self, "variance_epsilon") else self.eps  # type: ignore[assignment]
        squares = hidden_states.float().square()
        own = squares.sum(-1, keepdim=True) if self.to_unit else squares.mean(-1, keepdim=True)
        # Every rank uses what is summed over the ranks, and the gradients of all these uses are summed.
        whole = copy_to(reduce_from(own, self.group), self.group)
        if not self.to_unit:
            whole = whole / self.group.size
        scale = torch.sqrt((own + epsilon) / (whole + epsilon))
        normed = super().forward(hidden_states)
        return (normed * scale).to(normed.dtype)


@functools.cache
def split_norm_class(stock: type[nn.Module], to_unit: bool) -> type[SplitNorm]:
    """`SplitNorm` over a stock RMS norm, or over one that makes vectors of length one (`to_unit`)."""
    return type(f"Split{stock.__name__}", (SplitNorm, stock), {"to_unit": to_unit})
