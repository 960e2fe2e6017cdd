"""`copy.deepcopy` of a parallel model: averages of weights and reference models are made so."""

from __future__ import annotations

import contextlib
import copy
from typing import Any, TypeVar

from .parts import ModelParts

Model = TypeVar("Model", bound=ModelParts)


def copy_model(model: Model, memo: dict[int, Any]) -> Model:
    """What `copy.deepcopy` makes of `model`: as it was before a trainer took it, with the weights that it has now.

    The copy lies on the same mesh, whose process groups it shares, so all ranks that run it copy it. It runs eagerly
    and without FP8, and belongs to no trainer; another one may take it. In bf16 its weights are the rounded ones: the
    fp32 masters are the trainer's.

    Args:
        memo: of `copy.deepcopy`.

    Raises:
        ValueError: for a model that ZeRO stage 3 has sharded.
    """
    memo[id(model.hub_layout)] = model.hub_layout  # never changes
    with contextlib.nullcontext() if model.weights is None else model.weights.copying(memo):
        twin: Model = type(model).__new__(type(model))
        memo[id(model)] = twin
        state = {name: value for name, value in vars(model).items() if name != "weights"}
        twin.__dict__.update(copy.deepcopy(state, memo))
    twin.decorations.remove_all(twin)
    return twin
