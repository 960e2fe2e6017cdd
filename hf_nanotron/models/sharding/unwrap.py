"""The plain model inside what other tools have wrapped around it, or a sentence that says why it cannot be had."""

from __future__ import annotations

import reprlib
from types import FunctionType, MethodType
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers import PreTrainedModel

from ..base import ParallelModel

Wrapped = (DataParallel, DistributedDataParallel)
MERGE = "merge the adapters (model = model.merge_and_unload()) and set model.requires_grad_(True)"
PLAIN = "pass the plain model, loaded in 32 or 16 bits (without quantization_config)"

# Attribute of a model or of its config -> what to do about it.
QUIRKS: dict[str, str] = {
    "peft_config": f"it has adapters; {MERGE} before you pass it",
    "hf_quantizer": f"it is quantised; {PLAIN}. If it has adapters, {MERGE}",
    "quantization_config": f"it is quantised; {PLAIN}. If it has adapters, {MERGE}",
}


def unwrap(model: Any) -> Any:
    """`model` without `torch.compile`, `DistributedDataParallel`, `DataParallel` and what accelerate has put on.

    Compiled children and `forward`s set on instances by those tools are taken off too, in place.
    """
    model = _innermost(model)
    if isinstance(model, FullyShardedDataParallel):
        raise ValueError(_divided("", type(model).__name__))
    for owner in (model, getattr(model, "config", None)):
        for quirk, advice in QUIRKS.items():
            if getattr(owner, quirk, None) is not None:
                raise ValueError(f"a model with {quirk} cannot be sharded: {advice}.")
    if isinstance(model, ParallelModel) or not isinstance(model, PreTrainedModel):
        return model
    if _has_hooks_of_accelerate(model):
        remove_hook_from_module(model, recurse=True)
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if child is not None and (inner := _innermost(child)) is not child:
                module._modules[name] = inner
    for name, module in model.named_modules():
        module._compiled_call_impl = None  # of `module.compile()`
        _restore_forward(module)
        if isinstance(module, FullyShardedDataParallel):
            raise ValueError(_divided(name, "FullyShardedDataParallel"))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(tensor, DTensor):
            raise ValueError(_divided(name, "a DTensor (of fully_shard, a device_mesh, or tp_plan='auto')"))
    return model


def refuse_meta(model: Any) -> None:
    """Refuse weights that do not exist, and what has none, as the name of a model."""
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"{reprlib.repr(model)} ({type(model).__name__}) is given as a model: load it with "
            "AutoModelForCausalLM.from_pretrained, of hf_nanotron or transformers."
        )
    empty = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    if empty:
        raise ValueError(
            f"{empty[0]!r} ({len(empty)} parameters) is on the meta device, without values: make the model with "
            "hf_nanotron.AutoModelForCausalLM.from_config or from_pretrained, or pass a model with weights."
        )


def _innermost(module: Any) -> Any:
    while True:
        if isinstance(module, torch._dynamo.OptimizedModule):
            module = module._orig_mod
        elif isinstance(module, Wrapped):
            module = _with_new_parameters(module.module)
        else:
            return module


def _with_new_parameters(model: nn.Module) -> nn.Module:
    """`model` with other parameters over the same memory: to its old ones DDP has tied the sums of its gradients."""
    new: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                own = new.setdefault(parameter, nn.Parameter(parameter.data, requires_grad=parameter.requires_grad))
                module._parameters[name] = own
    return model


def _divided(name: str, by: str) -> str:
    return f"{name or 'the model'!r} is already sharded, as {by}: pass the plain model; NanotronTrainer shards it."


def _has_hooks_of_accelerate(model: nn.Module) -> bool:
    return any(hasattr(module, "_hf_hook") for module in model.modules())


def _restore_forward(module: nn.Module) -> None:
    """Take off a `forward` that accelerate or `torch.compile` has set on this one object."""
    forward = module.__dict__.get("forward")
    original = module.__dict__.pop("_original_forward", None)
    if forward is None:
        return
    forward = original if original is not None else forward
    while (inner := getattr(forward, "_torchdynamo_orig_callable", None)) is not None:
        forward = inner
    if isinstance(forward, MethodType) and forward.__func__ is type(module).forward:
        del module.__dict__["forward"]
    else:
        module.__dict__["forward"] = forward


def class_of(model: PreTrainedModel) -> type[PreTrainedModel]:
    """The class of `model`; of one whose `forward` was replaced on the instance, a subclass that has it."""
    stock, forward = type(model), model.__dict__.pop("forward", None)
    if forward is None:
        return stock
    if not (
        isinstance(forward, MethodType) and forward.__self__ is model and isinstance(forward.__func__, FunctionType)
    ):
        raise ValueError(
            f"model.forward was replaced by {forward!r}: pipeline stages cannot call it. Define "
            f"`forward` in a subclass of {stock.__name__}, or bind it: model.forward = types.MethodType(f, model)."
        )
    namespace = {"forward": forward.__func__, "__module__": stock.__module__, "__qualname__": stock.__qualname__}
    return type(stock.__name__, (stock,), namespace)
