"""Read the parallel plans that a transformers model declares.

Only declarations are used (`config.base_model_tp_plan`, `config.base_model_pp_plan` and the `_tp_plan` and `_pp_plan`
of the class), never the code in transformers that acts on them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

SUPPORTED_STYLES = ("colwise", "rowwise", "colwise_gather_output", "replicated_with_grad_allreduce")


@dataclass(frozen=True)
class PipelinePlan:
    """Names of the modules that a pipeline cut goes between.

    Args:
        backbone: the base model inside the causal LM, `""` if it is the model itself.
        layers: the stack that is cut.
        first: modules with parameters that only the first stage holds.
        last: modules with parameters that only the last stage holds.
    """

    backbone: str
    layers: str
    first: tuple[str, ...]
    last: tuple[str, ...]


def backbone_name(model: PreTrainedModel) -> str:
    """Name of the base model inside `model`."""
    return model.base_model_prefix if hasattr(model, model.base_model_prefix) else ""


def join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def tensor_parallel_plan(model: PreTrainedModel) -> dict[str, str]:
    """Module name -> sharding style, for every module of `model` that its plan names.

    Raises:
        ValueError: if the model declares no plan, or a style this version does not know.
    """
    base = getattr(model.config, "base_model_tp_plan", None)
    if not base:
        raise ValueError(
            f"{type(model).__name__}: its config ({model.config.model_type!r}) declares no tensor-parallel plan "
            "(`base_model_tp_plan`), so its layers cannot be cut; use tp_size=1."
        )
    patterns = {join(backbone_name(model), name): style for name, style in base.items()}
    patterns.update(type(model)._tp_plan or {})
    regexes = [(re.compile(pattern.replace(".", r"\.").replace("*", r"[^.]+")), s) for pattern, s in patterns.items()]
    plan = {}
    for name, _ in model.named_modules():
        for regex, style in regexes:
            if regex.fullmatch(name):
                plan[name] = style
    for name, style in plan.items():
        if style not in SUPPORTED_STYLES:
            raise ValueError(
                f"{type(model).__name__}: the plan cuts {name!r} as {style!r}, which this version does not support "
                f"(it knows {', '.join(SUPPORTED_STYLES)}); use tp_size=1."
            )
    return plan


def pipeline_plan(model: PreTrainedModel) -> PipelinePlan:
    """The modules a pipeline cut goes between.

    Raises:
        ValueError: if the model declares no plan, or has parameters that the plan places nowhere.
    """
    base = getattr(model.config, "base_model_pp_plan", None)
    if not base or "layers" not in base:
        raise ValueError(
            f"{type(model).__name__}: its config ({model.config.model_type!r}) declares no pipeline plan "
            "(`base_model_pp_plan`), so its layers cannot be spread over stages; use pp_size=1."
        )
    backbone, names = backbone_name(model), list(base)
    cut = names.index("layers")
    plan = PipelinePlan(
        backbone=backbone,
        layers=join(backbone, "layers"),
        first=tuple(join(backbone, name) for name in names[:cut]),
        last=(*(join(backbone, name) for name in names[cut + 1 :]), *(type(model)._pp_plan or {})),
    )
    placed = (*plan.first, plan.layers, *plan.last)
    for name, _ in model.named_parameters():
        if not any(name.startswith(place + ".") for place in placed):
            raise ValueError(
                f"{type(model).__name__}: the pipeline plan does not say which stage holds {name!r} "
                f"(it places {', '.join(placed)}); use pp_size=1."
            )
    return plan


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder layers.

    Raises:
        ValueError: if the model keeps them somewhere unusual.
    """
    name = join(backbone_name(model), "layers")
    try:
        layers = model.get_submodule(name)
    except AttributeError:
        layers = None
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"{type(model).__name__} has no decoder layers at {name!r}; use tp_size=1 and pp_size=1.")
    return name, layers
