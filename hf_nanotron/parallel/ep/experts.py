"""Experts over a group of ranks: each token goes to the ranks that own its experts, and their outputs come back.

`exchange.py` sends the tokens, `ops/grouped_mm.py` multiplies sorted rows. Stock router and stock block are unchanged.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from ...ops.gated import silu_and_multiply
from ...ops.grouped_mm import GroupedWeightGradient, add_expert_bias, grouped_linear
from ..mesh import Group
from .exchange import dispatch

ALONE = Group((0,), 0, None)


def capacity_of(capacity_factor: float, num_pairs: int, num_experts: int) -> int:
    """Rows for each pair of a source rank and an expert."""
    return math.ceil(capacity_factor * num_pairs / num_experts)


class ParallelExperts(nn.Module):
    """The base that `experts_class` adds to a stock class of experts.

    The parameters hold the experts of this rank (dim 0), and may hold a slice of each expert's features (of the packed
    gate and up projection, a slice of both): the output is then a partial sum.

    Attributes:
        group: ranks that share the experts.
        capacity_factor: rows for each expert while training, as a multiple of an even load; None drops nothing. With
            more than one rank it needs the same `capacity_tokens` on each.
        capacity_tokens: tokens from which the capacity is computed; this rank's own if None.
        adds_bias: whether this rank adds the bias of the down projection: one of those whose outputs are summed.
        weight_gradients: where the gradients of weights are accumulated, by the parameter's name.
        dropped: pairs dropped by the latest forward (0-dim, on the device); None without a capacity.
        pairs: pairs of the latest forward.
    """

    group: Group = ALONE
    capacity_factor: float | None = None
    adds_bias: bool = True
    weight_gradients: Mapping[str, GroupedWeightGradient] = MappingProxyType({})
    dropped: torch.Tensor | None = None
    pairs: int = 0
    capacity_tokens: int | None = None

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
        rows, way = dispatch(x, index, weights, self.num_experts, self.group, capacity)
        out = way.combine(self.compute(rows, way.offsets))
        counts = way.counts
        self.dropped = None if capacity is None or counts is None else (counts - capacity).clamp_(min=0).sum()
        self.pairs = index.numel()
        if out.shape != hidden_states.shape:  # no view without need: stock blocks add to what they get in place
            out = out.view(hidden_states.shape)
        return out.to(hidden_states.dtype)

    def compute(self, rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """What our experts make of rows that are sorted by expert."""
        up = self._linear("gate_up_proj" if self.has_gate else "up_proj", rows, offsets, self.has_bias)
        if not self.has_gate:
            inner = self.act_fn(up)
        elif _is_swiglu(self):
            inner = silu_and_multiply(up)
        else:
            inner = self._apply_gate(up)
        out = self._linear("down_proj", inner, offsets, self.has_bias, adds_bias=self.adds_bias)
        if not self.has_post_expert_norm:
            return out
        if inner.shape[1] != self.intermediate_dim:
            raise ValueError(
                f"{type(self).__name__} normalizes the output of each expert, so experts cannot be sharded by "
                f"tensor parallelism (this rank has {inner.shape[1]} of {self.intermediate_dim} features); use ep_size "
                "instead."
            )
        return self.post_expert_norm(out)

    def _linear(
        self, name: str, rows: torch.Tensor, offsets: torch.Tensor, has_bias: bool, adds_bias: bool = True
    ) -> torch.Tensor:
        sink = self.weight_gradients.get(name)
        out = grouped_linear(rows, getattr(self, name), offsets, self.is_transposed, sink)
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
    """The subclass of a stock class of experts that computes them over a group, for `experts.__class__ = ...`."""
    if not hasattr(stock_class, "_apply_gate"):
        raise ValueError(
            f"{stock_class.__name__} is not one of the experts classes of transformers with the interface of "
            "use_experts_implementation, so its experts cannot be computed in parallel; use ep_size=1 and tp_size=1."
        )
    return type(f"Parallel{stock_class.__name__}", (ParallelExperts, stock_class), {"__doc__": ParallelExperts.__doc__})
