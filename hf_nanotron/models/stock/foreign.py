"""Code of a model that is not transformers' own: a subclass of the user's, remote code, a patched `forward`.

What is known of transformers' classes need not hold there, so `anatomy`, `stage` and `parallelize` take less for
granted.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

CAUSAL_LM_NAMES = frozenset(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())  # GPT2LMHeadModel and its like
_LOSSES = re.compile("|".join(sorted(LOSS_MAPPING, key=len, reverse=True)))


def is_foreign(module: nn.Module) -> bool:
    """Whether a module computes by code that is neither transformers' nor torch's."""
    own = module.__dict__.get("forward")
    is_ours = type(own).__module__.startswith("hf_nanotron.")  # of a compiled or recomputing layer
    return _is_foreign(type(module).forward if own is None or is_ours else own)


def is_foreign_class(cls: type[nn.Module]) -> bool:
    """`is_foreign` of any module of a class."""
    return _is_foreign(cls.forward)


def _is_foreign(forward: Any) -> bool:
    return (getattr(forward, "__module__", None) or "").partition(".")[0] not in (
        "transformers",
        "torch",
        "hf_nanotron",
    )


def why_not_causal(model: Any) -> str | None:
    """Why `model` is no causal language model; None if it is one.

    A subclass is what its ancestor in transformers is. One that descends from none of its models is trusted, unless its
    name makes transformers compute another loss.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        return f"{name} is not a causal language model (a transformers.PreTrainedModel)"
    own = next((cls for cls in type(model).__mro__ if _is_model_of_transformers(cls)), None)
    known = own.__name__ if own is not None else name
    task = _LOSSES.search(known)
    is_causal = known in CAUSAL_LM_NAMES or "ForCausalLM" in known or (own is None and _is_causal_loss(task))
    descends = "" if own in (None, type(model)) else f" (a {known})"
    if not is_causal or model.get_output_embeddings() is None:
        return f"{name}{descends} is not a causal language model"
    if getattr(model.config, "is_encoder_decoder", False):
        return f"{name}{descends} is not a causal language model: its config says is_encoder_decoder"
    return None


def _is_model_of_transformers(cls: type) -> bool:
    """Whether `cls` is one of transformers' models for a task, not the base class of a family."""
    is_model = issubclass(cls, PreTrainedModel) and cls.__module__.startswith("transformers.models.")
    return is_model and not cls.__name__.endswith("PreTrainedModel")


def _is_causal_loss(task: re.Match[str] | None) -> bool:
    return task is None or LOSS_MAPPING[task[0]] is ForCausalLMLoss
