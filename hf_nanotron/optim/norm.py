"""The norm of the whole model's gradient, from the parts on each rank, and what to say when it is not finite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from ..parallel.collectives import all_gather, all_reduce
from ..parallel.mesh import ParallelMesh
from ..parallel.zero.buckets import is_owner
from ..parallel.zero.segment import Segment


class NonFiniteGradientError(ArithmeticError):
    """The gradient of a step is infinite or not a number."""


def global_norm(segments: Sequence[Segment], mesh: ParallelMesh) -> torch.Tensor:
    """L2 norm over all parameters of the model, a scalar in fp32, the same on every rank."""
    counted = [segment.gradient for segment in segments if is_owner(segment.spec, mesh)]
    norms = torch._foreach_norm(counted) if counted else [torch.zeros((), device=mesh.device)]
    return all_reduce(torch.stack(norms).square().sum(), mesh.world).sqrt()


def describe_nonfinite(
    segments: Sequence[Segment], order: Sequence[str], loss: torch.Tensor, norm: torch.Tensor, mesh: ParallelMesh
) -> str:
    """What is wrong with the gradients of this step, the same sentence on every rank. All ranks together.

    `order` are names of the Hub's tensors in model order; `loss` is this rank's part (zero where it computes none).
    """
    first = first_of([s.spec.name for s in segments if not bool(s.gradient.isfinite().all())], order, mesh)
    broken = all_gather((~loss.isfinite()).to(torch.int32).view(1), mesh.world, 0).nonzero().flatten().tolist()
    where = "every gradient is finite, but their squares overflow"
    if first is not None:
        where = f"the first parameter with a non-finite gradient is {first[0]!r}, on rank {first[1]}"
    ranks = f"on rank {', '.join(map(str, broken))}" if broken else "on no rank"
    return f"the gradient norm is {norm.item()}: {where}. The loss was non-finite {ranks}."


def first_of(names: Sequence[str], order: Sequence[str], mesh: ParallelMesh) -> tuple[str, int] | None:
    """The first of all ranks' `names` in `order`, and the lowest rank that has it; None if there is none. All ranks
    together.
    """
    position = {name: index for index, name in enumerate(order)}
    nowhere = len(order) * mesh.world_size
    code = min((position[name] * mesh.world_size + mesh.rank for name in names), default=nowhere)
    first = int(all_reduce(torch.tensor(code, device=mesh.device), mesh.world, dist.ReduceOp.MIN))
    if first == nowhere:
        return None
    index, rank = divmod(first, mesh.world_size)
    return order[index], rank
