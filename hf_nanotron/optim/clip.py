"""The norm of the whole model's gradient, from the parts on each rank."""

from __future__ import annotations

import torch

from ..parallel.collectives import all_reduce
from ..parallel.mesh import ParallelMesh
from ..parallel.spec import ShardSpec


def is_counted(spec: ShardSpec, mesh: ParallelMesh) -> bool:
    """Whether this rank's copy of a parameter enters the norm: each value of the model exactly once."""
    is_tied_copy = spec.tied and mesh.pp_size > 1 and mesh.is_last_stage
    return spec.is_first_replica and not is_tied_copy


def global_norm(gradients: dict[str, torch.Tensor], specs: dict[str, ShardSpec], mesh: ParallelMesh) -> torch.Tensor:
    """L2 norm over all parameters of the model, a scalar in fp32, the same on every rank."""
    counted = [gradient for name, gradient in gradients.items() if is_counted(specs[name], mesh)]
    norms = torch._foreach_norm(counted) if counted else [torch.zeros((), device=mesh.device)]
    return all_reduce(torch.stack(norms).square().sum(), mesh.model).sqrt()


def clip_gradients(gradients: dict[str, torch.Tensor], norm: torch.Tensor, max_norm: float) -> None:
    """Scale in place so that the norm is at most `max_norm`, as `torch.nn.utils.clip_grad_norm_`."""
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    if gradients:  # a rank whose whole part is frozen has none
        torch._foreach_mul_(list(gradients.values()), scale)
