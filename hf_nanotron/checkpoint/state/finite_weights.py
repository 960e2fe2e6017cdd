"""Whether what is to be saved is finite: weights, buffers, the optimizer's state. One pass over them on the device."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from ...optim.norm import first_of
from ...parallel.collectives import all_reduce
from ...parallel.zero.segment import ShardedWeights
from ..hub.sharded_model import ShardedModel, held_buffers


class NonFiniteWeightsError(ArithmeticError):
    """A weight of the model, or the optimizer's state of one, is infinite or not a number, and was to be saved."""


def first_nonfinite(
    model: ShardedModel, weights: ShardedWeights, optimizer: torch.optim.Optimizer | None = None
) -> tuple[str, int] | None:
    """The first weight or persistent buffer, in model order, with an element that is not finite in the compute dtype.

    All ranks together, the same on each. The host waits for the device once if all is well. `weights` has the masters
    of what is trained; the rest is read from `model`, and the optimizer's state is looked at after all weights.

    Returns what it is ("the weight 'lm_head.weight'") and the lowest rank that holds such an element, or None.
    """
    largest = torch.finfo(weights.compute_dtype).max  # above, a master is rounded to infinity
    named = [(_weight(segment.spec.name), segment.master.detach(), largest) for segment in weights.segments]
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            own = parameter.detach()
            own = own.to_local() if isinstance(own, DTensor) else own
            named.append((_weight(model.shard_specs[name].name), own, largest))
    for name, buffer in held_buffers(model).items():
        if buffer.is_floating_point():
            named.append((_weight(name), buffer, torch.finfo(buffer.dtype).max))
    for segment in weights.segments:
        state = {} if optimizer is None else optimizer.state.get(segment.master, {})
        for value in state.values():
            if isinstance(value, torch.Tensor) and value.dim() > 0 and value.is_floating_point():
                named.append((_state(segment.spec.name), value.detach(), torch.finfo(value.dtype).max))
    alike: dict[tuple[torch.dtype, float], list[tuple[str, torch.Tensor]]] = {}
    for what, tensor, limit in named:
        if tensor.numel():
            alike.setdefault((tensor.dtype, limit), []).append((what, tensor))
    device = model.mesh.device
    bad = [torch.zeros(0, dtype=torch.bool, device=device)]
    for (_, limit), entries in alike.items():
        norms = torch.stack(_largest([tensor for _, tensor in entries], device))
        bad.append(~(norms.double() <= limit))
    is_bad = torch.cat(bad)
    if not all_reduce(is_bad.any().float(), model.mesh.world, dist.ReduceOp.MAX):
        return None
    looked_at = [what for entries in alike.values() for what, _ in entries]
    here = [what for what, found in zip(looked_at, is_bad.tolist(), strict=True) if found]
    names = list(dict.fromkeys([*model.hub_shapes, *sorted(model.hub_layout.buffers)]))
    return first_of(here, [*map(_weight, names), *map(_state, names)], model.mesh)


def _largest(tensors: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """The largest absolute value of each, on `device`, to which those on the host are copied one by one."""
    own = [x for x in tensors if x.device.type == device.type]
    norms = iter(torch._foreach_norm(own, float("inf")) if own else ())
    return [
        next(norms) if x.device.type == device.type else torch.linalg.vector_norm(x.to(device), float("inf"))
        for x in tensors
    ]


def _weight(name: str) -> str:
    return f"the weight {name!r}"


def _state(name: str) -> str:
    return f"the optimizer's state of {name!r}"
