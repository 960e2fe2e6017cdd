"""The optimizer of a trainer, whoever has made it, over this rank's segments of the weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..models.base import ParallelModel
from ..monitor.memory import state_tensors
from ..optim.build import adopt_optimizer, check_steps_by_parts
from ..optim.ema import WeightAverage
from ..optim.matrix_optimizer import MATRIX, MatrixOptimizer
from ..optim.offload import StateOnHost
from ..optim.optimizer_link import OptimizerLink
from ..parallel.collectives import all_reduce
from ..parallel.together import refuse_together, together
from ..parallel.zero.matrix_plan import MatrixLayout
from ..parallel.zero.segment import ShardedWeights
from ..training_args import NanotronTrainingArguments


def link_optimizer(
    link: OptimizerLink | None,
    optimizer: Any,
    model: ParallelModel,
    weights: ShardedWeights,
    host: StateOnHost | None,
    compares: bool,
) -> OptimizerLink:
    """Let the optimizer update this rank's segments, whoever has made it. A link that still fits is kept."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(f"create_optimizer must set self.optimizer; it is {type(optimizer).__name__}.")
    masters = {segment.master for segment in weights.segments}
    if any(parameter not in masters for group in optimizer.param_groups for parameter in group["params"]):
        names = {parameter: name for name, parameter in model.named_parameters()}
        adopt_optimizer(optimizer, names, weights.segments, list(model.hub_shapes))
    if link is None or link.optimizer is not optimizer or link.weights is not weights:
        if host is not None:
            check_steps_by_parts(type(optimizer))
            tensors, dtype = state_tensors(optimizer)
            together(model.mesh, "taking the host's memory", lambda: host.reserve(tensors, dtype))
        if isinstance(optimizer, MatrixOptimizer):
            attach_matrices(optimizer, model, weights)
        link = OptimizerLink(optimizer, weights, host)
    link.compares, link.overlap = compares, not compares
    return link


def make_average(
    args: NanotronTrainingArguments, weights: ShardedWeights, device: torch.device
) -> WeightAverage | None:
    """The moving average of the weights, if the arguments ask for one."""
    if args.ema_decay is None:
        return None
    return WeightAverage(weights, args.ema_decay, args.ema_start_step, device)


def matrix_layouts(model: ParallelModel) -> dict[str, MatrixLayout]:
    """The weights of the whole model that a `MatrixOptimizer` takes as matrices, by their names in the Hub's files."""
    return {
        name: MatrixLayout(role.out_dim - len(model.hub_shapes[name]), role.parts or ())
        for name, role in model.roles.items()
        if role.kind in ("matrix", "experts")
    }


def attach_matrices(optimizer: MatrixOptimizer, model: ParallelModel, weights: ShardedWeights) -> None:
    """Let an optimizer over our segments of weights have whole matrices. All ranks together."""
    mesh, layouts = model.mesh, matrix_layouts(model)
    pieces = {segment.master: (segment.spec, segment.start, segment.stop) for segment in weights.segments}
    held = [p for group in optimizer.param_groups if group["kind"] == MATRIX for p in group["params"]]
    others = [pieces[p][0].name for p in held if pieces[p][0].name not in layouts]
    what = f"{type(optimizer).__name__}: {others[0]} is no matrix of a linear layer or of an expert" if others else None
    refuse_together(mesh, what and f"{what}; put it into a group with kind='adamw'.")
    # Each stage has weights of its own.
    found = optimizer.attach(pieces, layouts, mesh.group("stage", lambda c: c.pp), mesh.device)
    if not all_reduce(torch.tensor(float(found), device=mesh.device), mesh.world):
        raise ValueError(
            f"{type(optimizer).__name__} updates matrices of linear layers and of experts, and none of "
            f"{type(model).__name__} is trained; use optim='adamw_torch_fused', or unfreeze some."
        )


def group_of(
    param: str | nn.Parameter, optimizer: torch.optim.Optimizer | None, model: ParallelModel, weights: ShardedWeights
) -> dict[str, Any]:
    """See `NanotronTrainer.get_optimizer_group`."""
    if optimizer is None:
        raise ValueError("there is no optimizer yet: call create_optimizer() or train() first.")
    named = dict(model.named_parameters())
    names = [name for name, parameter in named.items() if param is parameter or param == name]
    masters = {segment.master for segment in weights.segments if segment.name in names}
    for group in optimizer.param_groups:
        if masters & set(group["params"]):
            return group
    name = param if isinstance(param, str) else "".join(names)
    if not names and name not in model.hub_shapes:
        raise ValueError(f"{name or 'the tensor'} is no parameter of the model.")
    raise ValueError(f"{name} is updated by other ranks, or frozen: no group has a part of it on this rank.")
