"""What a `forward` is called with beyond the batch, and what it returns: not every one takes or returns it all."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from .stock.releases import cache_in

BOUNDS, LONGEST = "document_bounds", "longest_document"  # on their way to the attention of a layer
CONTEXT = "context_plan"  # the same, of rows that context-parallel ranks share

# What is added to the user's batch here and in Trainer. What the batch itself holds is passed on: a `forward` that does
# not take it says so, as under stock Trainer.
ADDED = ("use_cache", "return_dict", "num_items_in_batch", "output_router_logits", BOUNDS, LONGEST, CONTEXT)


def accepted(forward: Callable[..., Any], inputs: Mapping[str, Any], added: Collection[str] = ADDED) -> dict[str, Any]:
    """`inputs` without what was `added` to the batch and `forward` does not take."""
    parameters = inspect.signature(forward).parameters
    if any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values()):
        return dict(inputs)
    return {name: value for name, value in inputs.items() if name not in added or name in parameters}


def goes_on(inputs: Mapping[str, Any], training: bool) -> bool:
    """Whether a call that does not say may want a cache: not in training, with labels, or of packed documents.

    A backbone that makes itself one, as its config says, does not look for documents in `position_ids`, and they see
    each other. What Trainer sets to False is `use_cache` of the outermost config; a text model in it has its own.
    """
    if inputs.get("use_cache") is not None or cache_in(inputs) is not None:
        return True
    if training or inputs.get("labels") is not None:
        return False
    positions = inputs.get("position_ids")
    if inputs.get("attention_mask") is not None or not isinstance(positions, torch.Tensor):
        return True
    return not bool((positions.diff(dim=-1) != 1).any())


def as_output(result: Any, has_labels: bool) -> Any:
    """What a causal LM returned, with `loss` and `logits`: a `ModelOutput`, a dict, or a tuple with the loss first."""
    if isinstance(result, tuple) and not hasattr(result, "logits"):
        loss, logits = (*result[:2], None)[:2] if has_labels else (None, result[0])
        result = CausalLMOutputWithPast(loss=loss, logits=logits)
    elif isinstance(result, dict) and type(result) is dict:
        result = CausalLMOutputWithPast(loss=result.get("loss"), logits=result.get("logits"))
    if has_labels and getattr(result, "loss", None) is None:
        raise ValueError(
            f"the model was called with labels but returned no loss, only a {type(result).__name__}: its `forward` "
            "must return (loss, logits, ...), or an output with `loss`."
        )
    return result
