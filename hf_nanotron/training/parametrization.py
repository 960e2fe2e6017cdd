"""That model, training arguments, optimizer and checkpoint speak of the same parametrization."""

from __future__ import annotations

from typing import Any

import torch

from ..checkpoint.state.index import StateIndex
from ..checkpoint.state.training_state import saved_run_values
from ..models.base import ParallelModel
from ..models.spectral.sizes import Spectral
from ..optim.build import UpdateRule
from ..training_args import NanotronTrainingArguments

PARAMETRIZATION = "parametrization"  # its key in the `extra` of a training state

# Names of optimizers whose update of an element does not grow with its gradient.
FIXED_UPDATES = ("AdamW", "Lion", "Muon")


def check_parametrization(model: ParallelModel, args: NanotronTrainingArguments, has_optimizer: bool) -> None:
    """Refuse a model whose weights were drawn by another rule than the one by which the arguments train it."""
    have = None if model.spectral is None else model.spectral.sizes
    if args.spectral != have:
        raise ValueError(
            f"the model has {_words(have)}, but the training arguments say {_words(args.spectral)}. Fresh weights "
            "follow from it: make the model with AutoModelForCausalLM.from_config(config, parallel=args.parallel, "
            "parametrization=args.spectral), of hf_nanotron. Pretrained weights are trained with "
            "parametrization='standard'."
        )
    if have is not None and has_optimizer:
        raise ValueError(
            "optimizers=(...) with parametrization='spectral': the learning rate of each weight follows from the base "
            "model; leave the optimizer to the trainer, or pass `optimizer_cls_and_kwargs`."
        )


def update_rules(model: ParallelModel, optimizer_class: type[torch.optim.Optimizer]) -> dict[str, UpdateRule] | None:
    """How each weight's learning rate and epsilon differ; None where they do not."""
    if model.spectral is None:
        return None
    names = {base.__name__ for base in optimizer_class.__mro__}
    if not names.intersection(FIXED_UPDATES):
        raise ValueError(
            f"parametrization='spectral' with {optimizer_class.__name__}: its rule of learning rates is for updates "
            f"whose size does not depend on the gradient's; use one of {', '.join(FIXED_UPDATES)}."
        )
    scales = model.spectral.scales
    if "Muon" in names:
        kinds = ("matrix", "experts")
        if folded := [n for n, scale in scales.items() if scale.multiplier != 1 and model.roles[n].kind in kinds]:
            raise ValueError(
                f"optim='muon' with parametrization='spectral': {folded[0]!r} has a multiplier, because the size of "
                "heads is not the base's; keep head_dim, or use optim='adamw_torch_fused'."
            )
    return {name: scales[name].rule for name in model.hub_shapes if name in scales}


def parametrization_state(model: ParallelModel) -> dict[str, Any]:
    """For a checkpoint; nothing for the standard one."""
    return {} if model.spectral is None else {PARAMETRIZATION: model.spectral.sizes.to_dict()}


def check_resumed(checkpoint: str, index: StateIndex | None, model: ParallelModel) -> None:
    """Refuse a training state, of this `index`, that another parametrization, or one with another base, has written."""
    if index is None:
        return
    values = saved_run_values(index)
    saved = values["extra"].get(PARAMETRIZATION)
    have = None if model.spectral is None else model.spectral.sizes.to_dict()
    if saved != have and values["optimizer"] is not None:
        raise ValueError(
            f"{checkpoint} was trained with {_words(saved)}, but this run has {_words(have)}: learning rates would be "
            "others. Resume with the same `parametrization`, `base_hidden_size` and `base_sizes`."
        )


def _words(sizes: Spectral | dict[str, Any] | None) -> str:
    fields = sizes.to_dict() if isinstance(sizes, Spectral) else sizes
    if not isinstance(fields, dict):
        return "parametrization='standard'"
    others = f" and base_sizes={fields['base_sizes']}" if fields.get("base_sizes") else ""
    return f"parametrization='spectral' of base_hidden_size={fields.get('base_hidden_size')}{others}"
