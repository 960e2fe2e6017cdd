"""Recomputation that keeps the outputs of some operators, and which layers recompute.

`selective` keeps matmuls and attention. What lies between them (norms, rotary embeddings, gated activations, casts,
residual sums) is computed again in the backward (Korthikanti et al. 2022, arXiv:2205.05198, after Chen et al. 2016,
arXiv:1604.06174). `all_but_attention` keeps attention alone, its output and log-sum-exp: at long sequences nearly all
of the work, and as many bytes as the input of the layer. Recomputing everything is transformers' own switch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch._guards import TracingContext
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer

from ..models.base import ParallelModel
from ..models.stand_ins import AbsentLayer
from ..models.stock.releases import cache_in
from ..ops.keep import keeping_contexts
from ..parallel.ep.experts import ParallelExperts
from .compile import parts_of

# Operators whose outputs are kept, by the beginning of their names. Gradients of ours are never run in a forward.
ATTENTION = (
    *("aten::_scaled_dot_product_", "aten::_flash_attention_forward", "aten::_efficient_attention_forward"),
    *("aten::_cudnn_attention_forward", "hf_nanotron::attention", "flash_attn", "flex_attention"),
    *("_c10d_functional::", "hf_nanotron::cp_to_"),  # what is sent is never sent twice
)
KEPT = (
    *("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear"),
    *("aten::_grouped_mm", "aten::_scaled_mm", "aten::_scaled_grouped_mm"),
    *("hf_nanotron::linear", "hf_nanotron::fp8_linear", "hf_nanotron::grouped"),
    *ATTENTION,
)


def keeps(op: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], kept: tuple[str, ...] = KEPT) -> bool:
    """Whether the output of this call of an operator is kept: its name begins as one of `kept`.

    An operator that writes to its arguments must run again. So must attention with dropout: if it were left out, the
    masks after it would differ from those of the forward.
    """
    schema = getattr(op, "_schema", None)
    if not (op.name() if schema is None else schema.name).startswith(kept):
        return False
    if schema is None:
        return True
    for index, argument in enumerate(schema.arguments):
        if argument.name == "dropout_p":
            value = args[index] if index < len(args) else kwargs.get("dropout_p", argument.default_value)
            if value:
                return False
    return not schema.is_mutable


def keeps_attention(op: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """`keeps`, for attention alone."""
    return keeps(op, args, kwargs, ATTENTION)


def _selective_policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if keeps(op, args, kwargs) else CheckpointPolicy.PREFER_RECOMPUTE


def _attention_policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if keeps_attention(op, args, kwargs) else CheckpointPolicy.PREFER_RECOMPUTE


Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]


# Each is a `context_fn` of `torch.utils.checkpoint.checkpoint`, eager or inside `torch.compile`. A compiler traces
# torch's own contexts, which mark in its graph what is kept, and takes plain functions only.


def selective_contexts() -> Contexts:
    if TracingContext.try_get() is not None:
        return create_selective_checkpoint_contexts(_selective_policy)
    return keeping_contexts(keeps)


def attention_contexts() -> Contexts:
    if TracingContext.try_get() is not None:
        return create_selective_checkpoint_contexts(_attention_policy)
    return keeping_contexts(keeps_attention)


CONTEXTS: dict[str, Callable[[], Contexts]] = {"selective": selective_contexts, "all_but_attention": attention_contexts}


def chosen_layers(model: ParallelModel, layers: Collection[int] | None, every: int = 1) -> frozenset[int]:
    """Which decoder layers recompute: `layers`, or each `every`-th, counted over the whole model as the Hub does."""
    count = len(model.anatomy.numbered_layers())
    if layers is None:
        return frozenset(range(0, count, every))
    if wrong := sorted(index for index in layers if not 0 <= index < count):
        raise ValueError(
            f"activation_checkpointing_layers={sorted(layers)} names layer {wrong[0]}, but {type(model).__name__} has "
            f"{count} decoder layers: 0 to {count - 1}."
        )
    return frozenset(layers)


def recompute_wholly(model: ParallelModel, layers: Collection[int], options: Mapping[str, Any]) -> None:
    """Let exactly `layers` recompute everything, each by the switch that transformers has given it."""
    every = dict(model.anatomy.numbered_layers())
    own = {i: layer for i, layer in every.items() if isinstance(layer, GradientCheckpointingLayer)}
    odd = {type(x).__name__ for x in every.values() if not isinstance(x, GradientCheckpointingLayer | AbsentLayer)}
    if odd and len(layers) < len(every):
        raise ValueError(
            f"{odd.pop()} of {type(model).__name__} cannot be switched separately (it is not a "
            "GradientCheckpointingLayer): use activation_checkpointing_policy='selective', or all layers."
        )
    function = functools.partial(checkpoint, **with_defaults(options, model))
    for index, layer in own.items():
        layer.gradient_checkpointing = index in layers
        layer._gradient_checkpointing_func = function  # type: ignore[assignment]


def recompute_selectively(
    model: ParallelModel, layers: Collection[int], options: Mapping[str, Any], policy: str = "selective"
) -> None:
    """Let `layers` keep what `policy` (of `CONTEXTS`) says, and compute the rest again in a training step's backward.

    A layer recomputes whole where nothing happens between its blocks and it does not write to its weights; else each
    block does, inside the hooks at its border, so that nothing is sent or recorded twice. Experts recompute between
    sending tokens and returning them. Call it before `compile_layers`. `options` are those of
    `torch.utils.checkpoint.checkpoint`; by default random states are kept only if the model has dropout.
    """
    options = {**with_defaults(options, model), "context_fn": CONTEXTS[policy]}
    for index, layer in model.anatomy.numbered_layers():
        if index not in layers or isinstance(layer, AbsentLayer):
            continue
        for part in parts_of(layer, recomputes=True):
            part.forward = MethodType(_recomputing("forward", type(part), options), part)
        for module in layer.modules():
            if isinstance(module, ParallelExperts):
                compute = _recomputing("compute", type(module), options)
                module.compute = MethodType(compute, module)  # type: ignore[method-assign]
    model.decorations.add("selective recomputation", restore_recomputed)


def restore_recomputed(model: ParallelModel) -> None:
    """Take back what `recompute_selectively` has done; `restore_layers` comes before."""
    for module in model.modules():
        for name in ("forward", "compute"):
            method = module.__dict__.get(name)
            if isinstance(method, MethodType) and method.__func__.__module__ == __name__:
                del module.__dict__[name]


def with_defaults(options: Mapping[str, Any], model: ParallelModel) -> dict[str, Any]:
    return {"preserve_rng_state": model.streams is not None, **options, "use_reentrant": False}


def _recomputing(name: str, kind: type[nn.Module], options: Mapping[str, Any]) -> Callable[..., Any]:
    """A method for instances of `kind`, in the place of their class's method `name`."""

    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        stock = functools.partial(getattr(type(self), name), self, **kwargs)
        # A key-value cache would be written a second time.
        if not self.training or not torch.is_grad_enabled() or cache_in(kwargs, args) is not None:
            return stock(*args)
        first = next(iter((*args, *kwargs.values())), None)
        return checkpoint(_beside, first, stock, *args, **options)

    code = _code_for(kind, method.__code__)  # type: ignore[arg-type]  # a class is hashable
    return FunctionType(code, globals(), name, None, method.__closure__)


@functools.cache  # trainers share what is compiled
def _code_for(kind: type[nn.Module], code: CodeType) -> CodeType:
    """`code`, in an object of its own for each class.

    torch counts what it has compiled by the object of the code. Beyond `recompile_limit` graphs it runs uncompiled, and
    a model with many kinds of blocks would come to that with a code that all have in common.
    """
    return code.replace(co_name=f"{code.co_name}_{kind.__name__}")


def _beside(first: Any, stock: Callable[..., Any], *args: Any) -> Any:
    """`stock(*args)`. `checkpoint` keeps the random state of the devices of its positional tensors, and of no others:
    without `first` among them, a block that is called with keywords would draw other masks when it recomputes."""
    return stock(*args)
