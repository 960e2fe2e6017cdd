"""Hand the weights of a parallel model over to the ZeRO stage that its sizes ask for."""

from __future__ import annotations

from collections.abc import Collection

import torch

from ..models.base import ParallelModel
from ..parallel.collectives import all_reduce
from ..parallel.zero.bucketed import BucketedWeights
from ..parallel.zero.fully_sharded import FullyShardedWeights
from ..parallel.zero.segment import ShardedWeights
from .gather_units import gather_units


def refuse_frozen(model: ParallelModel, trainable: Collection[str]) -> None:
    """Refuse a model of which no rank trains anything. All ranks together.

    Args:
        trainable: names of the parameters of this rank that require a gradient.

    Raises:
        ValueError: with the way out.
    """
    count = all_reduce(torch.tensor(float(len(trainable)), device=model.mesh.device), model.mesh.world)
    if not count:
        raise ValueError(
            f"no parameter of {model.stock_class.__name__} requires a gradient, so there is nothing to train; set "
            "model.requires_grad_(True), or that of the parameters to be trained, before the trainer is made (PEFT's "
            "merge_and_unload() leaves all of them frozen)."
        )


def shard_weights(model: ParallelModel, compute_dtype: torch.dtype, bucket_bytes: int) -> ShardedWeights:
    """Make the object that owns the weights and gradients of `model` while it trains.

    Args:
        model: with whole parameters, or sharded by an earlier trainer, whose hooks are taken away.
        compute_dtype: what the model computes in; masters and gradients are fp32.
        bucket_bytes: of fp32 gradients in a bucket (stages 0 to 2).
    """
    if model.weights is not None:
        model.weights.close()
    model.executor.forget_layouts()
    mesh, units = model.mesh, gather_units(model)
    if mesh.parallel.zero_stage == 3 and mesh.shard_size > 1:
        weights: ShardedWeights = FullyShardedWeights(
            model, units, model.shard_specs, model.stage_of, mesh, compute_dtype
        )
    else:
        weights = BucketedWeights(model, units, model.shard_specs, model.stage_of, mesh, compute_dtype, bucket_bytes)
    model.weights = weights
    return weights
