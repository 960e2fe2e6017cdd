"""Blocks with a state for each head (Mamba-2, delta rules), divided by heads over the context-parallel ranks.

A rank projects its own tokens; an all-to-all gives it all tokens of some heads, in the order of the rows, so that
convolutions and states pass the borders of chunks as in one process; the stock forward runs over them with the weights
of these heads; another all-to-all brings the outputs back to their tokens, which are projected there. So neither the
projections nor the recurrence is computed twice, and a rank holds 1 / ranks of what the block keeps.

The gradient of a weight on a rank is that of its tokens (projections) or of its heads (all others, zero elsewhere):
the sums over ranks that follow are exact.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from torch.func import functional_call

from .gather import name_of
from .heads import to_heads, to_tokens
from .plan import ContextPlan

# Of a block, the widths of the segments of a feature dimension, each of which is divided by heads.
Segments = Callable[[Any], tuple[int, ...]]


@dataclass(frozen=True)
class HeadCut:
    """How a class of blocks is divided by its heads.

    Attributes:
        counts: attributes that count heads, or groups of them: the ranks must divide all.
        widths: further attributes that are divided by the ranks.
        projections: of hidden states: path -> segments of its output (None: one). A path may be two, the second of
            which is applied to the output of the first.
        weights: other weights that are divided: path -> their dimension and its segments.
        output: path of the projection back to hidden states.
    """

    counts: tuple[str, ...]
    widths: tuple[str, ...]
    projections: Mapping[tuple[str, ...], Segments | None]
    weights: Mapping[str, tuple[int, Segments | None]]
    output: str = "out_proj"

    def fits(self, block: nn.Module, size: int) -> bool:
        """Whether `size` ranks can divide `block`."""
        return all(getattr(block, name) % size == 0 for name in self.counts)


def divided(x: torch.Tensor, segments: tuple[int, ...] | None, dim: int, size: int) -> torch.Tensor:
    """`x` with the feature dimension `dim` (not negative) as two: `size` ranks, and the features of each."""
    parts = x.split(segments, dim) if segments else (x,)
    return torch.cat([part.unflatten(dim, (size, -1)) for part in parts], dim + 1)


@dataclass
class _Part:
    """What the subclass knows. Not a module, and its modules are not the block's."""

    cut: HeadCut
    size: int
    argument: str
    check: Callable[[nn.Module], None]
    local: nn.Module = field(repr=False)


def divide_by_heads(
    block: nn.Module, cut: HeadCut, size: int, argument: str, check: Callable[[nn.Module], None]
) -> None:
    """Let `block` compute by heads where it is called with a `ContextPlan`, else as before.

    Args:
        size: ranks, which `cut` fits.
        argument: keyword in which the block gets a `ContextPlan`.
        check: called where it gets none.
    """
    stock = type(block)
    block.__class__ = _by_heads_class(cast(Any, stock))
    block._by_heads = _Part(cut, size, argument, check, _local(block, stock, cut, size))  # type: ignore[assignment]


def restore(block: nn.Module) -> None:
    """Undo `divide_by_heads`, if it was done."""
    if "_by_heads" in vars(block):
        del block._by_heads
        block.__class__ = type(block).__bases__[0]


@functools.cache
def _by_heads_class(stock: Any) -> type[nn.Module]:
    class ByHeads(stock):
        _by_heads: _Part

        def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            part = self._by_heads
            plan: ContextPlan | None = kwargs.pop(part.argument, None)
            if plan is None:
                part.check(self)
                return super().forward(hidden_states, *args, **kwargs)
            places, group = plan.layout.places, plan.parts.group
            found = []
            for path, segments in part.cut.projections.items():
                projected = hidden_states
                for step in path:
                    projected = self.get_submodule(step)(projected)
                found.append(divided(projected, segments and segments(self), 2, part.size))
            mine = to_heads(torch.cat(found, -1), places, name_of(group))
            weights = dict(_weights(self, part.cut, part.size, group.rank))
            output = functional_call(part.local, weights, (mine, *args), kwargs)
            own = to_tokens(output, places, name_of(group)).flatten(2)
            return self.get_submodule(part.cut.output)(own)

    ByHeads.__name__ = ByHeads.__qualname__ = stock.__name__
    return ByHeads


def _weights(block: nn.Module, cut: HeadCut, size: int, rank: int) -> list[tuple[str, torch.Tensor]]:
    """Those of the stock forward between the projections: of this rank's heads."""
    projections = [path for paths in (*cut.projections, (cut.output,)) for path in paths]
    found = list[tuple[str, torch.Tensor]]()
    for name, parameter in block.named_parameters():
        weight: torch.Tensor = parameter
        if any(name.startswith(f"{path}.") for path in projections):
            continue
        if name in cut.weights:
            dim, segments = cut.weights[name]
            weight = divided(weight, segments and segments(block), dim, size).select(dim, rank)
        found.append((name, weight))
    return found


class _Picked(nn.Module):
    """In the place of a projection whose outputs are in the hidden states already, or of one that comes later."""

    weight = bias = None  # of an output projection, for kernels that would apply it themselves

    def __init__(self, columns: slice) -> None:
        super().__init__()
        self.columns = columns

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states[..., self.columns]


def _local(block: nn.Module, stock: type[nn.Module], cut: HeadCut, size: int) -> nn.Module:
    """The block of one rank, without weights."""
    local = _bare_copy(block, stock)
    for name in (*cut.counts, *cut.widths):
        setattr(local, name, getattr(local, name) // size)
    end = 0
    for path, _ in cut.projections.items():
        width = cast(torch.Tensor, block.get_submodule(path[-1]).weight).shape[0] // size
        for step in path[:-1]:
            local.set_submodule(step, _Picked(slice(None)))
        local.set_submodule(path[-1], _Picked(slice(end, end + width)))
        end += width
    local.set_submodule(cut.output, _Picked(slice(None)))
    return local


def _bare_copy(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """With the attributes and buffers of `module`, without hooks; weights have no memory."""
    copy = kind.__new__(kind)
    nn.Module.__init__(copy)
    vars(copy).update({name: value for name, value in vars(module).items() if name not in vars(copy)})
    copy.training = module.training
    copy._buffers = dict(module._buffers)
    for name, weight in module._parameters.items():
        nothing = None if weight is None else nn.Parameter(torch.empty(0, device="meta"), requires_grad=False)
        copy.register_parameter(name, nothing)
    for name, child in module._modules.items():
        copy.register_module(name, None if child is None else _bare_copy(child, type(child)))
    return copy
