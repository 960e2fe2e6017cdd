"""Autograd collectives over one group, each named by what its forward does.

The pairs are conjugate (Shoeybi et al. 2019, arXiv:1909.08053; Korthikanti et al. 2022, arXiv:2205.05198):

| function          | forward        | backward       |
|-------------------|----------------|----------------|
| `copy_to`         | nothing        | all-reduce     |
| `reduce_from`     | all-reduce     | nothing        |
| `gather_sequence` | all-gather     | reduce-scatter |
| `scatter_sum`     | reduce-scatter | all-gather     |
| `split_sequence`  | take own part  | all-gather     |
| `join_sequence`   | all-gather     | take own part  |

Sequence functions cut dimension 1 of `[batch, sequence, ...]`. A group of one returns its input.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from .mesh import Group

# torch 2.13 renames both; 2.11 has the old names alone.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather(x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
    """Join the `x` of all ranks along `dim`. No gradient."""
    if group.size == 1:
        return x
    x = x.contiguous()
    parts = x.new_empty((group.size * x.shape[0], *x.shape[1:]))
    _all_gather(parts, x, group=group.handle)
    if dim == 0:
        return parts
    return parts.view(group.size, *x.shape).movedim(0, dim).flatten(dim, dim + 1)


def reduce_scatter(x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
    """Sum the `x` of all ranks and keep our part along `dim`. No gradient."""
    if group.size == 1:
        return x
    parts = x.unflatten(dim, (group.size, -1)).movedim(dim, 0).contiguous()
    out = parts.new_empty(parts.shape[1:])
    _reduce_scatter(out, parts.flatten(0, 1), group=group.handle)
    return out


def all_reduce(x: torch.Tensor, group: Group, op: Any = dist.ReduceOp.SUM) -> torch.Tensor:
    """Sum (or `op`) of the `x` of all ranks, in a new tensor. No gradient."""
    if group.size == 1:
        return x
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, op=op, group=group.handle)
    return x


def own_part(x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
    return x.chunk(group.size, dim)[group.rank].contiguous()


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return all_reduce(grad, ctx.group), None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return all_gather(x, group, 1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return reduce_scatter(grad, ctx.group, 1), None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return reduce_scatter(x, group, 1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return all_gather(grad, ctx.group, 1), None


class _SplitSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return own_part(x, group, 1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return all_gather(grad, ctx.group, 1), None


class _JoinSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return all_gather(x, group, 1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return own_part(grad, ctx.group, 1), None


def copy_to(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Hand a replicated `x` to sharded layers: their partial input gradients are summed in the backward."""
    return x if group.size == 1 else _CopyTo.apply(x, group)


def reduce_from(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Sum partial outputs of sharded layers; the result is replicated."""
    return x if group.size == 1 else _ReduceFrom.apply(x, group)


def gather_sequence(x: torch.Tensor, group: Group) -> torch.Tensor:
    """`[B, S/n, ...] -> [B, S, ...]` for sharded layers, whose partial input gradients are summed and split."""
    return x if group.size == 1 else _GatherSequence.apply(x, group)


def scatter_sum(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Sum partial outputs `[B, S, ...]` of sharded layers and keep our `[B, S/n, ...]`."""
    return x if group.size == 1 else _ScatterSum.apply(x, group)


def split_sequence(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Keep our `[B, S/n, ...]` of a replicated `[B, S, ...]`."""
    return x if group.size == 1 else _SplitSequence.apply(x, group)


def join_sequence(x: torch.Tensor, group: Group) -> torch.Tensor:
    """`[B, S/n, ...] -> [B, S, ...]` for replicated layers, where every rank computes the whole gradient."""
    return x if group.size == 1 else _JoinSequence.apply(x, group)
