"""The optimizer of a trainer, whoever has made it, over this rank's segments of the weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..models.base import ParallelModel
from ..optim.build import adopt_optimizer, check_steps_by_parts
from ..optim.ema import WeightAverage
from ..optim.offload import StateOnHost
from ..optim.optimizer_link import OptimizerLink
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
