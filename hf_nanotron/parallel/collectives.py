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

Sequence functions cut dimension `dim`, which is 1 in `[batch, sequence, ...]`. A group of one returns its input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from .mesh import Group

Collective = Callable[[torch.Tensor, Group, int], torch.Tensor]

# torch 2.13 renames both; 2.11 has the old names alone.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather(x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
    """Join the `x` of all ranks along `dim`. No gradient."""
    if group.size == 1:
        return x
    x = x.detach().contiguous()
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


def reduce_scatter_in_place(whole: torch.Tensor, group: Group) -> dist.Work:
    """Start summing `whole` (1-D, the group's size divides it) over all ranks, of which we keep our part, in place."""
    work = _reduce_scatter(whole.chunk(group.size)[group.rank], whole, group=group.handle, async_op=True)
    assert work is not None
    return work


def all_gather_in_place(whole: torch.Tensor, group: Group) -> dist.Work:
    """Start filling `whole` (1-D, the group's size divides it) with the parts that the ranks hold, ours in place."""
    work = _all_gather(whole, whole.chunk(group.size)[group.rank], group=group.handle, async_op=True)
    assert work is not None
    return work


class _Conjugate(torch.autograd.Function):
    """One collective in the forward, its conjugate in the backward."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, group: Group, dim: int, forward: Collective, backward: Collective
    ) -> torch.Tensor:
        ctx.group, ctx.dim, ctx.conjugate = group, dim, backward
        return forward(x, group, dim)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        return ctx.conjugate(grad, ctx.group, ctx.dim), None, None, None, None


def _conjugate(x: torch.Tensor, group: Group, dim: int, forward: Collective, backward: Collective) -> torch.Tensor:
    return x if group.size == 1 else _Conjugate.apply(x, group, dim, forward, backward)


def _nothing(x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
    return x.view_as(x)


def _sum(x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
    return all_reduce(x, group)


def own_part(x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
    """Our part of a replicated `x` along `dim`. No gradient."""
    return x.chunk(group.size, dim)[group.rank].contiguous()


def copy_to(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Hand a replicated `x` to sharded layers: their partial input gradients are summed in the backward."""
    return _conjugate(x, group, 0, _nothing, _sum)


def reduce_from(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Sum partial outputs of sharded layers; the result is replicated."""
    return _conjugate(x, group, 0, _sum, _nothing)


def gather_sequence(x: torch.Tensor, group: Group, dim: int = 1) -> torch.Tensor:
    """`[B, S/n, ...] -> [B, S, ...]` for sharded layers, whose partial input gradients are summed and split."""
    return _conjugate(x, group, dim, all_gather, reduce_scatter)


def scatter_sum(x: torch.Tensor, group: Group, dim: int = 1) -> torch.Tensor:
    """Sum partial outputs `[B, S, ...]` of sharded layers and keep our `[B, S/n, ...]`."""
    return _conjugate(x, group, dim, reduce_scatter, all_gather)


def split_sequence(x: torch.Tensor, group: Group, dim: int = 1) -> torch.Tensor:
    """Keep our `[B, S/n, ...]` of a replicated `[B, S, ...]`."""
    return _conjugate(x, group, dim, own_part, all_gather)


def join_sequence(x: torch.Tensor, group: Group, dim: int = 1) -> torch.Tensor:
    """`[B, S/n, ...] -> [B, S, ...]` for replicated layers, where every rank computes the whole gradient."""
    return _conjugate(x, group, dim, all_gather, own_part)
