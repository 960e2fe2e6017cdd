"""`copy.deepcopy` of a parallel model: averages of weights and reference models are made so."""

from __future__ import annotations

import contextlib
import copy
from typing import TYPE_CHECKING, Any

from ..ops.fp8_linear import Fp8Linear
from ..parallel.zero.bucketed import BucketedWeights
from ..parallel.zero.fully_sharded import FullyShardedWeights
from .compile import restore_layers
from .fp8 import use_fp8
from .recompute import restore_recomputed

if TYPE_CHECKING:
    from ..models.base import ParallelModel


def copy_model(model: ParallelModel, memo: dict[int, Any]) -> ParallelModel:
    """What `copy.deepcopy` makes of `model`: as it was before a trainer took it, with the weights that it has now.

    The copy lies on the same mesh, whose process groups it shares, so all ranks that run it copy it. It runs eagerly
    and without FP8, and belongs to no trainer; another one may take it. In bf16 its weights are the rounded ones: the
    fp32 masters are the trainer's.

    Args:
        memo: of `copy.deepcopy`.

    Raises:
        ValueError: for a model that ZeRO stage 3 has divided.
    """
    if isinstance(model.sharded, FullyShardedWeights):
        raise ValueError(
            f"copy.deepcopy of {type(model).__name__}: zero_stage=3 has divided its weights over "
            f"{model.mesh.shard_size} ranks by torch's fully_shard, which cannot be copied; save the model "
            "(save_pretrained) and load it again, copy it before the trainer is made, or use zero_stage 0 to 2."
        )
    memo[id(model.hub_layout)] = model.hub_layout  # never changes
    memo.update(
        (id(m.fp8_weight), m.fp8_weight) for m in model.modules() if isinstance(m, Fp8Linear)
    )  # taken off below
    with model.sharded.copying(memo) if isinstance(model.sharded, BucketedWeights) else contextlib.nullcontext():
        twin: ParallelModel = type(model).__new__(type(model))
        memo[id(model)] = twin
        state = {name: value for name, value in vars(model).items() if name != "sharded"}
        twin.__dict__.update(copy.deepcopy(state, memo))
    restore_layers(twin)
    restore_recomputed(twin)
    use_fp8(twin, None)
    if twin.switches is not None:  # made inside a training run
        twin.switches.restore(twin)
        twin.switches = None
    return twin
