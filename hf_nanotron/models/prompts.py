"""What `generate` is called with: the same on every rank of a replica, and known to the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import GenerationConfig

from ..data.vocabulary import ADVICE, foreign_id
from ..data.window_check import WindowCheck
from .parts import ModelParts


def check_prompts(model: ModelParts, args: tuple[Any, ...], kwargs: Mapping[str, Any], spans_replicas: bool) -> None:
    """Compare the prompts and settings that the ranks of a replica generate from. All of them together.

    `spans_replicas`: ranks of other replicas take part, with prompts of their own.
    """
    told = {name: value for name, value in kwargs.items() if name != "streamer"}  # which one rank may have alone
    if args:
        told["inputs"] = args[0]
    if isinstance(told.get("inputs"), torch.Tensor):
        told["input_ids"] = told.pop("inputs")
    if isinstance(told.get("generation_config"), GenerationConfig):
        told["generation_config"] = told["generation_config"].to_dict()
    check = WindowCheck(model.mesh, model.vocabulary, model.mesh.world if spans_replicas else model.mesh.model)
    check.judge(check.start([told]), "generate")


def refuse_foreign_ids(model: ModelParts, inputs: Mapping[str, Any]) -> None:
    """Refuse ids outside the vocabulary, for which a sharded embedding would return zeros.

    On a GPU the check is an assertion on the device. One token a row, which generation has chosen, is not checked
    there.
    """
    ids = inputs.get("input_ids")
    if not isinstance(ids, torch.Tensor):
        return
    if ids.device.type == "cpu":
        if found := foreign_id(inputs, model.vocabulary):
            raise ValueError(f"{found}. {ADVICE}")
    elif model.mesh.tp_size > 1 and ids.shape[-1] > 1:
        torch._assert_async(
            ((ids >= 0) & (ids < model.vocabulary.inputs)).all(), "a token id is outside the vocabulary"
        )
