"""Hand the weights of a parallel model over to the ZeRO stage that its sizes ask for."""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.distributed as dist

from ..models.base import ParallelModel
from ..parallel.collectives import all_reduce
from ..parallel.zero.bucketed import BucketedWeights
from ..parallel.zero.buckets import groups_of_weights
from ..parallel.zero.fully_sharded import FullyShardedWeights
from ..parallel.zero.segment import ShardedWeights
from .gather_units import gather_units


def refuse_frozen(model: ParallelModel, trainable: Collection[str]) -> None:
    """Refuse a model of which no rank trains anything, or whose ranks train different weights. All ranks together."""
    number = {name: index for index, name in enumerate(model.hub_shapes)}
    # Whether some rank has each weight frozen, and trained; last, what has no number. Of integers: a rehearsal has no
    # values of others.
    held = torch.zeros(2, len(number) + 1, dtype=torch.int32)
    for name, _ in model.named_parameters():
        held[int(name in trainable), number.get(model.shard_specs[name].name, -1)] = 1
    frozen, trained = all_reduce(held.to(model.mesh.device), model.mesh.world, dist.ReduceOp.MAX).tolist()
    for name, index in number.items():
        if frozen[index] and trained[index]:
            raise ValueError(
                f"{name} is frozen on some ranks and trained on others: requires_grad must be the same wherever a "
                "weight is. A tied embedding and head are one weight, which the last pipeline stage holds under the "
                "name of the head; set both names."
            )
    if not any(trained):
        raise ValueError(
            f"no parameter of {model.stock_class.__name__} requires a gradient, so there is nothing to train; call "
            "model.requires_grad_(True), or set it for the parameters to train, before the trainer is made (PEFT's "
            "merge_and_unload() leaves all parameters frozen)."
        )


def shard_weights(model: ParallelModel, compute_dtype: torch.dtype, bucket_bytes: int) -> ShardedWeights:
    """Make the object that owns the weights and gradients of `model` while it trains.

    The model computes in `compute_dtype`; masters and gradients are fp32, the latter in buckets of `bucket_bytes`
    (stages 0 to 2). It may be sharded by an earlier trainer, whose hooks are taken away.
    """
    if model.weights is not None:
        model.weights.close()
    model.executor.forget_layouts()
    mesh, units = model.mesh, gather_units(model)
    trained = [model.shard_specs[name] for name, parameter in model.named_parameters() if parameter.requires_grad]
    mesh.connect(*groups_of_weights(trained, mesh))  # not in the middle of a backward
    if mesh.parallel.zero_stage == 3 and mesh.shard_size > 1:
        weights: ShardedWeights = FullyShardedWeights(
            model, units, model.shard_specs, model.stage_of, mesh, compute_dtype
        )
    else:
        weights = BucketedWeights(model, units, model.shard_specs, model.stage_of, mesh, compute_dtype, bucket_bytes)
    model.weights = weights
    return weights
