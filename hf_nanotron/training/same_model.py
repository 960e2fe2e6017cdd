"""Whether the model of a run computes what that of the checkpoint computed, from which it goes on.

Another `rope_theta`, activation or number of heads often has weights of the same shapes: the run would go on with them,
and train another model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from ..checkpoint.state.index import StateIndex
from ..checkpoint.state.training_state import saved_extra
from ..models.base import ParallelModel

MODEL = "model"  # in a checkpoint's `extra`
# What a forward in training does not read, what chooses between kernels of one function, and what a run may regularise
# with otherwise than the one before.
MAY_CHANGE = re.compile(
    r"_.*|.*_token_id|.*drop.*|.*_coef|.*jitter.*|.*loss.*|.*cache.*|.*_implementation|architectures|"
    r"auto_map|chunk_size_feed_forward|dtype|id2label|init_device|.*initializer_.*|init_std|label2id|"
    r"max_position_embeddings|max_seq_len|model_max_length|output_.*|pretraining_tp|problem_type|return_dict|"
    r"slow_but_exact|summary_.*|task_.*|tokenizer_class|torch_dtype|transformers_version|use_associative_scan|"
    r"use_.*kernels|use_mambapy"
)


def model_state(model: ParallelModel) -> dict[str, Any]:
    """The config, for a checkpoint."""
    return {MODEL: json.loads(model.config.to_json_string(use_diff=False))}


def check_same_model(checkpoint: str, index: StateIndex | None, model: ParallelModel) -> None:
    """Refuse a training state, of this `index`, of a model with another config. Older ones do not say.

    Raises:
        ValueError: naming the fields that differ.
    """
    saved, own = saved_extra(index).get(MODEL), model_state(model)[MODEL]
    if not isinstance(saved, dict):
        return
    if other := differences(saved, own):
        more = ", ..." if len(other) > 4 else ""
        raise ValueError(
            f"{checkpoint} is of a model with {', '.join(other[:4])}{more}: it would go on as another model. Resume "
            "with the config of the checkpoint, or begin another run from its weights, by from_pretrained with what is "
            "to change and without resume_from_checkpoint."
        )


def differences(saved: dict[str, Any], own: dict[str, Any]) -> list[str]:
    """The fields in which two configs compute otherwise, with both values."""
    return list(_differences(saved, own))


def _differences(saved: dict[str, Any], own: dict[str, Any], of: str = "") -> Iterator[str]:
    """Of those that both have, as another release of transformers may have more."""
    for name in sorted(saved.keys() & own.keys()):
        if MAY_CHANGE.fullmatch(name) or saved[name] == own[name]:
            continue
        if isinstance(saved[name], dict) and isinstance(own[name], dict):
            yield from _differences(saved[name], own[name], f"{of}{name}.")
        else:
            yield f"{of}{name}={_short(saved[name])} (here {_short(own[name])})"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
