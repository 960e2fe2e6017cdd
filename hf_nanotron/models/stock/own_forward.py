"""What a `forward` of the user's own does around its backbone, which a pipeline has to know.

Stages before the last run it up to the end of their layers. One that calls the backbone twice, or reads what layers of
other stages return, would be right on the last stage alone. It is run once over stand-ins, on every rank.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

PROBED_TOKENS = 4
OURS = ("num_items_in_batch", "shift_labels", "return_dict", "use_cache", "output_router_logits")
OF_EVERY_LAYER = ("output_hidden_states", "output_attentions")


def is_of_transformers(forward: Callable[..., Any]) -> bool:
    """Whether transformers itself has written `forward`."""
    return inspect.unwrap(forward).__module__.partition(".")[0] == "transformers"


def own_columns(model: Any, stock_class: type[PreTrainedModel]) -> frozenset[str]:
    """Columns of a batch that a `forward` of the user's takes for itself, such as the logits of a teacher: parameters
    that neither its backbone nor a forward of transformers names.
    """
    if is_of_transformers(stock_class.forward):
        return frozenset()
    known = {"self", *OURS}
    bases = [vars(base)["forward"] for base in stock_class.__mro__ if "forward" in vars(base)]
    for forward in (*filter(is_of_transformers, bases), model.get_submodule(_first(model.anatomy.backbone)).forward):
        known |= inspect.signature(forward).parameters.keys()
    named = inspect.signature(stock_class.forward).parameters.values()
    return frozenset(p.name for p in named if p.name not in known and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL))


def _first(name: str) -> str:
    return name.partition(".")[0]


def check_own_forward(model: Any, stock_class: type[PreTrainedModel]) -> None:
    """Refuse a `forward` of the user's that the stages of a pipeline cannot follow."""
    if is_of_transformers(stock_class.forward):
        return
    problem = _problem(model, stock_class)
    if problem is not None:
        raise ValueError(
            f"pp_size={model.mesh.pp_size}: the forward of {stock_class.__name__} {problem}. Pipeline stages call "
            "the backbone once for each micro-batch, and none has all layers; use pp_size=1."
        )


def _problem(model: Any, stock_class: type[PreTrainedModel]) -> str | None:
    config = model.config.get_text_config()
    ids = torch.zeros((1, PROBED_TOKENS), dtype=torch.int64)
    inputs = {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}
    backbone, head = _first(model.anatomy.backbone), _first(model.anatomy.head)
    stand_ins = {
        backbone: _Recorder(
            BaseModelOutputWithPast(last_hidden_state=torch.zeros(1, PROBED_TOKENS, config.hidden_size))
        ),
        head: _Recorder(torch.zeros(1, PROBED_TOKENS, config.vocab_size)),
    }
    trial_class = type("Trial", (stock_class,), {"loss_function": property(lambda self: _no_loss)})
    view: Any = object.__new__(trial_class)
    view.__dict__ = {
        **model.__dict__,
        "_modules": {name: stand_ins.get(name, child) for name, child in model._modules.items()},
        "training": True,
    }
    calls = stand_ins[backbone].calls
    try:
        with torch.no_grad():
            stock_class.forward(view, **inputs)
    except Exception:  # it may miss what stand-ins do not have, or a column of the batch; `selfcheck` tries it whole
        if len(calls) < 2:
            return None
    if len(calls) != 1:
        return f"calls {backbone!r} {len(calls)} times"
    asked = next((name for name in OF_EVERY_LAYER if calls[0].get(name)), None)
    return None if asked is None else f"asks {backbone!r} for {asked}"


def _no_loss(logits: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.zeros(())


class _Recorder(nn.Module):
    """Returns what it was made with, and keeps what it was called with."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output, self.calls = output, list[dict[str, Any]]()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append({**{str(index): value for index, value in enumerate(args)}, **kwargs})
        return self.output
