"""Whether the weights of a model are finite, before they are saved: one pass over them on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor

from ..optim.norm import first_of
from ..parallel.segment import ShardedWeights
from .hub import held_buffers

if TYPE_CHECKING:
    from ..models.base import ParallelModel


class NonFiniteWeightsError(ArithmeticError):
    """A weight of the model is infinite or not a number, and was to be saved."""


def first_nonfinite_weight(model: ParallelModel, weights: ShardedWeights) -> tuple[str, int] | None:
    """The first weight or persistent buffer, in model order, with an element that is not finite in the compute dtype.

    All ranks together, the same on each. The host waits for the device once.

    Args:
        weights: masters of what is trained; the rest is read from `model`.

    Returns:
        its name in the Hub's files and the lowest rank that holds such an element; None if all are finite.
    """
    largest = torch.finfo(weights.compute_dtype).max  # above, a master is rounded to infinity
    named = [(segment.spec.name, segment.master.detach(), largest) for segment in weights.segments]
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            own = parameter.detach()
            named.append((model.shard_specs[name].name, own.to_local() if isinstance(own, DTensor) else own, largest))
    for name, buffer in held_buffers(model).items():
        if buffer.is_floating_point():
            named.append((name, buffer, torch.finfo(buffer.dtype).max))
    named = [entry for entry in named if entry[1].numel()]
    bad: list[str] = []
    if named:
        norms = torch._foreach_norm([tensor for _, tensor, _ in named], float("inf"))
        fits = torch.stack([norm.double() <= limit for norm, (*_, limit) in zip(norms, named, strict=True)])
        bad = [name for (name, *_), fit in zip(named, fits.tolist(), strict=True) if not fit]
    order = list(dict.fromkeys([*model.hub_shapes, *sorted(model.hub_layout.buffers)]))
    return first_of(bad, order, model.mesh)
