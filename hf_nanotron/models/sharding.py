"""Hand the weights of a parallel model over to the ZeRO stage that its sizes ask for."""

from __future__ import annotations

import torch

from ..parallel.fully_sharded import FullyShardedWeights
from ..parallel.segment import ShardedWeights
from ..parallel.zero import BucketedWeights
from .base import ParallelModel
from .units import gather_units


def shard_weights(model: ParallelModel, compute_dtype: torch.dtype, bucket_bytes: int) -> ShardedWeights:
    """Make the object that owns the weights and gradients of `model` while it trains.

    Args:
        model: with whole parameters, or sharded by an earlier trainer, whose hooks are taken away.
        compute_dtype: what the model computes in; masters and gradients are fp32.
        bucket_bytes: of fp32 gradients in a bucket (stages 0 to 2).
    """
    if model.sharded is not None:
        model.sharded.close()
    model.executor.forget_layouts()
    mesh, units = model.mesh, gather_units(model)
    if mesh.parallel.zero_stage == 3 and mesh.shard_size > 1:
        model.sharded = FullyShardedWeights(model, units, model.shard_specs, model.stage_of, mesh, compute_dtype)
    else:
        model.sharded = BucketedWeights(
            model, units, model.shard_specs, model.stage_of, mesh, compute_dtype, bucket_bytes
        )
    return model.sharded
