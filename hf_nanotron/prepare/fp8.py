"""Which linear layers of a model compute in FP8."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from transformers.utils import logging

from ..models.base import ParallelModel
from ..models.moe.routers import find_routers
from ..models.stand_ins import AbsentLayer
from ..ops.fp8 import ALIGNMENT
from ..ops.fp8_linear import Fp8Linear, WeightCopies, fp8_class
from ..ops.linear import Linear
from ..parallel.tp.layers import ColumnParallelLinear, RowParallelLinear

logger = logging.get_logger(__name__)

CAPABILITY = (8, 9)  # of the first GPUs with FP8 tensor cores
# Modules that choose experts or tokens; they decide by small differences.
CHOOSING = ("gate", "router", "indexer")
KINDS = (Linear, ColumnParallelLinear, RowParallelLinear)


def use_fp8(model: ParallelModel, recipe: str | None, skip_layers: Sequence[int] | None = None) -> WeightCopies | None:
    """Have the linear layers of the decoder layers compute in FP8 while they train; no longer, if `recipe` is None.

    Head, embedding, routers, norms and experts stay as they are, and so do linears whose sizes (on this rank) are no
    multiples of 16. `skip_layers` are numbers in the whole model, negative ones from its end. Call it before
    `shard_weights`, and before layers are compiled.
    """
    for module in model.modules():
        if isinstance(module, Fp8Linear):
            for name in ("copies", "recipe", "fp8_weight", "_fp8_key"):
                module.__dict__.pop(name, None)
            module.__class__ = module.stock_class  # type: ignore[assignment]
    if recipe is None:
        return None
    check_device(model.mesh.device)
    chosen, odd, any_layer = [], [], False
    for name, index, module in _candidates(model):
        any_layer = True
        if index in _skipped(model, skip_layers):
            continue
        fits = all(size % ALIGNMENT == 0 for size in module._parameters["weight"].shape)  # type: ignore[union-attr]
        chosen.append(module) if fits else odd.append(name)
    if any_layer and not chosen and not _skipped(model, skip_layers):
        raise ValueError(
            f"fp8={recipe!r}: no linear layer of {type(model).__name__} has sizes that are multiples of {ALIGNMENT} on "
            f"this rank ({', '.join(odd[:4])}, ...); use fp8=None, or a smaller tp_size."
        )
    if odd:
        logger.info(
            f"fp8={recipe!r}: {len(odd)} linear layers stay in bf16, because their sizes are not multiples of "
            f"{ALIGNMENT}: " + ", ".join(odd)
        )
    copies = WeightCopies(recipe)
    for module in chosen:
        module.__class__ = fp8_class(cast(Any, type(module)))
        assert isinstance(module, Fp8Linear)
        module.copies, module.recipe = copies, recipe
    return copies


def fp8_bytes(model: ParallelModel) -> int:
    """What the FP8 copies of the weights will take on this rank."""
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, Fp8Linear))


def check_device(device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY:
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        raise ValueError(
            f"fp8: {torch.cuda.get_device_name(device)} has compute capability {capability}; FP8 matmuls need "
            f"{'.'.join(map(str, CAPABILITY))} or above (Ada, Hopper). Use fp8=None."
        )


def _candidates(model: ParallelModel) -> Iterator[tuple[str, int, Linear]]:
    """Name, decoder layer and module of the linears that train and choose nothing."""
    routers = {inner for router in find_routers(model) for inner in router.module.modules()}
    for stack, layers in model.anatomy.layer_stacks():
        for index, layer in enumerate(layers):
            if isinstance(layer, AbsentLayer):
                continue
            for name, module in layer.named_modules():
                if type(module) not in KINDS or module in routers or set(name.split(".")) & set(CHOOSING):
                    continue
                weight = module._parameters.get("weight")
                if weight is not None and weight.requires_grad:
                    yield f"{stack}.{index}.{name}", index, module


def _skipped(model: ParallelModel, skip_layers: Sequence[int] | None) -> set[int]:
    count = max((len(layers) for _, layers in model.anatomy.layer_stacks()), default=0)
    for index in skip_layers or ():
        if not -count <= index < count:
            raise ValueError(f"fp8_skip_layers: there is no layer {index}; the model has {count}.")
    return {index % count for index in skip_layers or ()}
