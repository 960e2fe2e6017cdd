"""Experts over a group of ranks: each token goes to the ranks that own its experts, and their outputs come back.

Rank r of n owns the experts `[r * E / n, (r + 1) * E / n)` (Lepikhin et al. 2020, arXiv:2006.16668). The pairs of a
token and an expert are sorted by expert at home, exchanged, regrouped by local expert, computed (`ops/grouped_mm.py`),
sent back, and summed at home with their routing weights. Nothing is dropped unless a capacity is given; how many rows
each rank gets is then the only thing that the host waits for. The stock router and the stock block around stay.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..ops.gated import silu_and_multiply
from ..ops.grouped_mm import add_expert_bias, grouped_linear
from ..ops.permute import Sorting, permute, sort_by_expert, sort_into_slots, unpermute
from .expert_parts import Beside, Exchange, HeldGroupedGradient, run_in_parts, start_all_to_all, suitable_parts
from .mesh import MULTIPROCESSORS_BESIDE_PRODUCTS, Group

ALONE = Group((0,), 0, None)
NOTHING_BESIDE = Beside(0, holds=False)


def exchange_rows(x: torch.Tensor, sent: list[int], received: list[int], group: Group) -> torch.Tensor:
    """Send the first `sent[0]` rows to the first rank of `group`, and so on. No gradient.

    Returns:
        `[sum(received), ...]`, what was received, in order of ranks.
    """
    out = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), received, sent, group=group.handle)
    return out


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, sent: list[int], received: list[int], group: Group) -> torch.Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return exchange_rows(x, sent, received, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return exchange_rows(grad, ctx.received, ctx.sent, ctx.group), None, None, None


def all_to_all(x: torch.Tensor, sent: list[int], received: list[int], group: Group) -> torch.Tensor:
    """`[sum(sent), ...] -> [sum(received), ...]`: rows go to the ranks of `group` in order; gradients go back.

    Args:
        sent: how many rows each rank gets from us; what the others have of us in their `received`. May be 0.
        received: how many we get from each.

    Raises:
        ValueError: if the numbers do not fit the rows or the group.
    """
    if len(sent) != group.size or len(received) != group.size or sum(sent) != x.shape[0]:
        raise ValueError(f"{sent} rows to and {received} from {group.size} ranks do not fit a tensor of {x.shape[0]}.")
    return x if group.size == 1 else _AllToAll.apply(x, sent, received, group)


@dataclass(frozen=True)
class Dispatched:
    """The way of the rows of one layer: out, and back.

    Args:
        home: our pairs, sorted by expert over the whole group.
        here: what we received, sorted by local expert. None: it is sorted already.
        sent, received: rows to and from each rank.
        offsets: `[local experts]`, int32: where each local expert's rows end.
        capacity: rows for each pair of a source rank and an expert, or None.
    """

    home: Sorting
    here: Sorting | None
    sent: list[int]
    received: list[int]
    offsets: torch.Tensor
    group: Group
    capacity: int | None = None


def capacity_of(capacity_factor: float, num_pairs: int, num_experts: int) -> int:
    """Rows for each pair of a source rank and an expert."""
    return math.ceil(capacity_factor * num_pairs / num_experts)


def dispatch(
    x: torch.Tensor, top_k_index: torch.Tensor, num_experts: int, group: Group, capacity: int | None = None
) -> tuple[torch.Tensor, Dispatched]:
    """Bring tokens to the ranks of their experts.

    The host waits for the device once, for the numbers of rows; with one rank, or with a capacity, it does not.

    Args:
        x: `[N, H]`. Ranks may have different N, also 0.
        top_k_index: `[N, K]`: expert of the whole group; below 0 or from `num_experts` on means none.
        capacity: send exactly so many rows to each expert, filled up with zeros; pairs beyond them are dropped. The
            same on all ranks.

    Returns:
        The rows for our experts, sorted by local expert, `[rows, H]`, and what `combine` needs.

    Raises:
        ValueError: if the group's size does not divide the number of experts.
    """
    if num_experts % group.size:
        raise ValueError(
            f"{num_experts} experts cannot be divided over {group.size} expert-parallel ranks; take a number that "
            f"divides {num_experts}."
        )
    if capacity is not None:
        return _dispatch_slots(x, top_k_index, num_experts, group, capacity)
    home = sort_by_expert(top_k_index, num_experts)
    if group.size == 1:
        return permute(x, home), Dispatched(home, None, [], [], home.offsets, group)
    local = num_experts // group.size
    ones = [1] * group.size
    with torch.no_grad():
        to_ranks = home.counts.view(group.size, local)
        from_ranks = exchange_rows(to_ranks, ones, ones, group)
        sent, received = torch.stack((to_ranks.sum(1), from_ranks.sum(1))).tolist()
        experts = torch.arange(num_experts, device=x.device) % local
        experts = experts.repeat_interleave(from_ranks.flatten().long(), output_size=sum(received))
        here = sort_by_expert(experts[:, None], local)
    home = home._replace(order=home.order[: sum(sent)])  # pairs of no expert stay at home
    rows = all_to_all(permute(x, home), sent, received, group)
    return permute(rows, here), Dispatched(home, here, sent, received, here.offsets, group)


def _dispatch_slots(
    x: torch.Tensor, top_k_index: torch.Tensor, num_experts: int, group: Group, capacity: int
) -> tuple[torch.Tensor, Dispatched]:
    home = sort_into_slots(top_k_index, num_experts, capacity)
    local = num_experts // group.size
    splits = [local * capacity] * group.size
    offsets = torch.arange(1, local + 1, device=x.device, dtype=torch.int32) * (group.size * capacity)
    rows = all_to_all(permute(x, home), splits, splits, group)
    rows = _swap(rows, group.size, local, capacity)
    return rows, Dispatched(home, None, splits, splits, offsets, group, capacity)


def _swap(rows: torch.Tensor, outer: int, inner: int, capacity: int) -> torch.Tensor:
    """Blocks of `capacity` rows in the order (outer, inner) to the order (inner, outer)."""
    return rows.unflatten(0, (outer, inner, capacity)).transpose(0, 1).flatten(0, 2)


def combine(y: torch.Tensor, way: Dispatched, weights: torch.Tensor) -> torch.Tensor:
    """Bring outputs home and sum them.

    Args:
        y: `[rows, H]`, the outputs for the rows that `dispatch` returned.
        weights: `[N, K]`, of our tokens.

    Returns:
        `[N, H]`; what was dropped or had no expert adds nothing.
    """
    if way.group.size > 1:
        if way.capacity is not None:
            y = _swap(y, len(way.offsets), way.group.size, way.capacity)
        elif way.here is not None:
            y = unpermute(y, way.here)
        y = all_to_all(y, way.received, way.sent, way.group)
    return unpermute(y, way.home, weights)


class ParallelExperts(nn.Module):
    """What `experts_class` puts in front of a stock class of experts.

    The parameters hold the experts of this rank (dim 0), and may hold a slice of each expert's features (the packed
    gate and up projection a slice of both): the output is then a partial sum.

    Attributes:
        group: ranks that share the experts.
        capacity_factor: rows for each expert while training, in multiples of what it gets if all get the same; None
            drops nothing.
            With more than one rank it needs the same `capacity_tokens` on each.
        capacity_tokens: from how many tokens the capacity follows; this rank's own if None.
        parts: into which the experts of a rank are cut, so that tokens travel beside products (`expert_parts.py`); 1
            waits for all tokens; a function goes by their bytes. The same on each rank of `group`.
        exchange: how rows are sent, with parts.
        spared: multiprocessors that products leave to it.
        adds_bias: whether this rank adds the bias of the down projection: one of those whose outputs are summed.
        weight_gradients: where the gradients of weights are accumulated, by the parameter's name.
        dropped: how many pairs the latest forward dropped (0-dim, on the device); None without a capacity.
        pairs: how many it had.
    """

    group: Group = ALONE
    capacity_factor: float | None = None
    adds_bias: bool = True
    weight_gradients: Mapping[str, HeldGroupedGradient] = MappingProxyType({})
    dropped: torch.Tensor | None = None
    pairs: int = 0
    capacity_tokens: int | None = None
    parts: int | Callable[[float, int], int] = staticmethod(suitable_parts)
    exchange: Exchange = staticmethod(start_all_to_all)
    spared: int = MULTIPROCESSORS_BESIDE_PRODUCTS

    # Of the stock class.
    num_experts: int
    intermediate_dim: int
    has_gate: bool
    has_bias: bool
    has_post_expert_norm: bool
    is_transposed: bool
    down_proj: nn.Parameter
    act_fn: Callable[[torch.Tensor], torch.Tensor]
    post_expert_norm: Callable[[torch.Tensor], torch.Tensor]
    _apply_gate: Callable[[torch.Tensor], torch.Tensor]

    def __getstate__(self) -> dict[str, Any]:
        """What copies get: their gradients are their own."""
        return {name: value for name, value in vars(self).items() if name != "weight_gradients"}

    @property
    def num_local_experts(self) -> int:
        return self.num_experts // self.group.size

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """`[N, H]` and the experts and weights of each token, `[N, K]`, to `[N, H]`."""
        x = hidden_states.flatten(0, -2).to(self.down_proj.dtype)
        index, weights = top_k_index.flatten(0, -2), top_k_weights.flatten(0, -2)
        capacity = None
        if self.capacity_factor is not None and self.training:
            tokens = self.capacity_tokens or len(index)
            capacity = capacity_of(self.capacity_factor, tokens * index.shape[1], self.num_experts)
        if self.group.size > 1 and self.parts != 1:
            way_of = (self.num_experts, self.group, capacity, self.parts, self.exchange, self.spared)
            out, route = run_in_parts(x, index, weights, self.compute, *way_of)
            counts = route.counts
        else:
            rows, way = dispatch(x, index, self.num_experts, self.group, capacity)
            out = combine(self.compute(rows, way.offsets), way, weights)
            counts = way.home.counts
        self.dropped = None if capacity is None else (counts - capacity).clamp_(min=0).sum()
        self.pairs = index.numel()
        if out.shape != hidden_states.shape:  # no view without need: stock blocks add to what they get in place
            out = out.view(hidden_states.shape)
        return out.to(hidden_states.dtype)

    def compute(self, rows: torch.Tensor, offsets: torch.Tensor, beside: Beside = NOTHING_BESIDE) -> torch.Tensor:
        """What our experts make of rows that are sorted by expert."""
        up = self._linear("gate_up_proj" if self.has_gate else "up_proj", rows, offsets, self.has_bias, beside)
        if not self.has_gate:
            inner = self.act_fn(up)
        elif _is_swiglu(self):
            inner = silu_and_multiply(up)
        else:
            inner = self._apply_gate(up)
        out = self._linear("down_proj", inner, offsets, self.has_bias, beside, adds_bias=self.adds_bias)
        if not self.has_post_expert_norm:
            return out
        if inner.shape[1] != self.intermediate_dim:
            raise ValueError(
                f"{type(self).__name__} normalizes the output of each expert, which must be whole: of its "
                f"{self.intermediate_dim} features this rank has {inner.shape[1]}; cut these experts over "
                "expert-parallel ranks, not over tensor-parallel ones."
            )
        return self.post_expert_norm(out)

    def _linear(
        self,
        name: str,
        rows: torch.Tensor,
        offsets: torch.Tensor,
        has_bias: bool,
        beside: Beside,
        adds_bias: bool = True,
    ) -> torch.Tensor:
        sink = beside.sink(self.weight_gradients.get(name))
        out = grouped_linear(rows, getattr(self, name), offsets, self.is_transposed, sink, beside.spared)
        if not has_bias:
            return out
        bias = getattr(self, f"{name}_bias")
        # A bias that another rank adds stays in the graph: gradients are to arrive in one order on all ranks.
        return add_expert_bias(out, bias if adds_bias else bias * 0, offsets)


def _is_swiglu(experts: ParallelExperts) -> bool:
    """Whether the gate is the one that transformers gives to classes without their own, and SiLU."""
    is_default = type(experts)._apply_gate.__name__ == "_default_apply_gate"
    return is_default and type(experts.act_fn).__name__ in ("SiLU", "SiLUActivation")


@functools.cache
def experts_class(stock_class: type[nn.Module]) -> type[ParallelExperts]:
    """The subclass of a stock class of experts that computes them over a group.

    Give an instance this class (`experts.__class__ = ...`), its part of the parameters, and its attributes.

    Raises:
        ValueError: if the class does not follow the interface of transformers' `use_experts_implementation`.
    """
    if not hasattr(stock_class, "_apply_gate"):
        raise ValueError(
            f"{stock_class.__name__} is not one of the experts classes of transformers that share one interface "
            "(use_experts_implementation), so its experts cannot be computed in parallel; use expert and tensor "
            "parallel sizes of 1 for its experts."
        )
    return type(f"Parallel{stock_class.__name__}", (ParallelExperts, stock_class), {"__doc__": ParallelExperts.__doc__})
