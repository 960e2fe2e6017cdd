"""`copy.deepcopy` of a parallel model: averages of weights and reference models are made so."""

from __future__ import annotations

import contextlib
import copy
from typing import Any, TypeVar

from .parts import ModelParts

Model = TypeVar("Model", bound=ModelParts)


def copy_model(model: Model, memo: dict[int, Any]) -> Model:
    """What `copy.deepcopy` makes of `model`: untrained by anyone, eager, without FP8, with the weights that it has now.

    It shares the mesh, so all ranks that run it copy it. In bf16 its weights are the rounded ones: the fp32 masters are
    the trainer's.
    """
    memo[id(model.hub_layout)] = model.hub_layout  # never changes
    with contextlib.nullcontext() if model.weights is None else model.weights.copying(memo):
        twin: Model = type(model).__new__(type(model))
        memo[id(model)] = twin
        state = {name: value for name, value in vars(model).items() if name != "weights"}
        twin.__dict__.update(copy.deepcopy(state, memo))
    twin.decorations.remove_all(twin)
    return twin
