"""The norm of the whole model's gradient, from the parts on each rank, and what to say when it is not finite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from ..parallel.collectives import all_gather, all_reduce
from ..parallel.mesh import ParallelMesh
from ..parallel.segment import Segment
from ..parallel.spec import ShardSpec


class NonFiniteGradientError(ArithmeticError):
    """The gradient of a step is infinite or not a number."""


def is_counted(spec: ShardSpec, mesh: ParallelMesh) -> bool:
    """Whether this rank's copy of a parameter enters the norm: each value of the model exactly once."""
    is_tied_copy = spec.tied and mesh.pp_size > 1 and mesh.is_last_stage
    return spec.is_first_replica and not is_tied_copy


def global_norm(segments: Sequence[Segment], mesh: ParallelMesh) -> torch.Tensor:
    """L2 norm over all parameters of the model, a scalar in fp32, the same on every rank."""
    counted = [segment.gradient for segment in segments if is_counted(segment.spec, mesh)]
    norms = torch._foreach_norm(counted) if counted else [torch.zeros((), device=mesh.device)]
    norm = all_reduce(torch.stack(norms).square().sum(), mesh.state).sqrt()
    if mesh.state.size == mesh.world_size:
        return norm
    # Each copy of the state has summed for itself, perhaps in another order; they must not part by a rounding.
    return all_reduce(norm.nan_to_num(nan=torch.inf, posinf=torch.inf), mesh.world, dist.ReduceOp.MAX)


def describe_nonfinite(
    segments: Sequence[Segment], order: Sequence[str], loss: torch.Tensor, norm: torch.Tensor, mesh: ParallelMesh
) -> str:
    """What is wrong with the gradients of this step: the same sentence on every rank, which all call together.

    Args:
        order: names of the Hub's tensors in model order.
        loss: this rank's part of the loss (zero where it computes none).
    """
    position = {name: index for index, name in enumerate(order)}
    bad = [position[s.spec.name] for s in segments if not bool(s.gradient.isfinite().all())]
    nowhere = len(order) * mesh.world_size
    code = min(bad) * mesh.world_size + mesh.rank if bad else nowhere
    first = all_reduce(torch.tensor(code, device=mesh.device), mesh.world, dist.ReduceOp.MIN).item()
    broken = all_gather((~loss.isfinite()).to(torch.int32).view(1), mesh.world, 0).nonzero().flatten().tolist()
    if first == nowhere:
        where = "every gradient is finite, but their squares overflow"
    else:
        index, rank = divmod(int(first), mesh.world_size)
        where = f"the first parameter with a non-finite gradient is {order[index]!r}, on rank {rank}"
    ranks = f"on rank {', '.join(map(str, broken))}" if broken else "on no rank"
    return f"the gradient norm is {norm.item()}: {where}. The loss was non-finite {ranks}."
