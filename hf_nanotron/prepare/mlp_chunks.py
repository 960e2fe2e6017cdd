"""Gated MLPs that compute one block of tokens after the other while they train (`mlp_chunk_tokens`).

Between attention and the next layer an MLP sees each token alone, so blocks change no value (Jacobs et al. 2025,
arXiv:2506.13996, call it tiling). The modules are those whose forward is Llama's, whatever their class; experts that
are routed are not touched.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP

from ..models.base import ParallelModel
from ..models.stock.hooks import users_hooks
from ..ops.gated_mlp import gated_mlp
from ..ops.linear import Linear
from ..parallel.collectives import all_reduce

NAME = "MLPs over blocks of tokens"  # among the decorations of a model
PARTS = ("gate_proj", "up_proj", "down_proj")

# Classes of activations -> names in `ops.gated_mlp.ACTIVATIONS`.
ACTIVATIONS = {
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "ReLU": "relu",
}


class ChunkedMLP(nn.Module):
    """A gated MLP over blocks of `chunk_tokens` tokens; over all at once where nothing is trained."""

    chunk_tokens: int
    activation: str
    stock: type[nn.Module]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        layers: list[Linear] = [getattr(self, name) for name in PARTS]
        if not (self.training and torch.is_grad_enabled() and hidden_states.requires_grad):
            return super().forward(hidden_states)
        gate, up, down = layers
        return gated_mlp(
            hidden_states,
            (gate.weight, up.weight, down.weight),
            (gate.key, up.key, down.key),
            self.chunk_tokens,
            self.activation,
        )


@functools.cache
def chunked_class(stock: type[nn.Module]) -> type[ChunkedMLP]:
    """`ChunkedMLP` over a class of MLPs with Llama's forward."""
    return type(f"Chunked{stock.__name__}", (ChunkedMLP, stock), {"stock": stock})


def chunk_mlps(model: ParallelModel, tokens: int) -> None:
    """Let the gated MLPs of the decoder layers compute over blocks of `tokens` tokens. Call it before `compile_layers`.
    All ranks together.

    Raises:
        ValueError: no layer of this model has an MLP that can be computed so, and why.
    """
    found: list[Any] = []
    reason = "it has none with the forward of LlamaMLP"
    for _, layer in model.anatomy.numbered_layers():
        for name, module in layer.named_modules():
            if not is_gated(module):
                continue
            if (why := _why_not(module)) is not None:
                reason = f"{name} {why}"
            else:
                found.append(module)
    most = all_reduce(torch.tensor(len(found), device=model.mesh.device), model.mesh.pp, dist.ReduceOp.MAX)
    if not most:  # on no stage
        raise ValueError(
            f"mlp_chunk_tokens={tokens}: no MLP of {type(model).__name__} can be computed over blocks of tokens: "
            f"{reason}. Omit mlp_chunk_tokens; activation_checkpointing saves its memory otherwise."
        )
    for module in found:
        stock: Any = type(module)
        module.__class__ = chunked_class(stock)
        module.chunk_tokens, module.activation = tokens, ACTIVATIONS[type(module.act_fn).__name__]
    model.decorations.add(NAME, restore_mlps)


def refuse_hooks(model: ParallelModel) -> None:
    """A run begins, before which somebody may have put hooks inside of an MLP.

    Raises:
        ValueError: such a hook would not be called.
    """
    for name, module in model.named_modules():
        if isinstance(module, ChunkedMLP) and (hook := _hook_inside(module)) is not None:
            raise ValueError(
                f"mlp_chunk_tokens={module.chunk_tokens}: {name} has {hook}, which would not be called; hook the MLP "
                "as a whole, or omit mlp_chunk_tokens."
            )


def restore_mlps(model: ParallelModel) -> None:
    """Take back what `chunk_mlps` has done."""
    modules: list[Any] = [module for module in model.modules() if isinstance(module, ChunkedMLP)]
    for module in modules:
        module.__class__ = module.stock
        del module.chunk_tokens, module.activation


def is_gated(module: nn.Module) -> bool:
    """Whether a module computes what `LlamaMLP` does: it has the same code, over linear layers of the same names."""
    theirs, ours = getattr(type(module).forward, "__code__", None), LlamaMLP.forward.__code__
    same = theirs is not None and (theirs.co_code, theirs.co_names) == (ours.co_code, ours.co_names)
    return same and all(isinstance(getattr(module, name, None), Linear) for name in PARTS)


def _hook_inside(module: nn.Module) -> str | None:
    parts = ((name, hook) for name in (*PARTS, "act_fn") for hook in users_hooks(getattr(module, name)))
    return next((f"a hook on {name} ({hook})" for name, hook in parts), None)


def _why_not(module: nn.Module) -> str | None:
    layers: list[Linear] = [getattr(module, name) for name in PARTS]
    activation = type(module.act_fn).__name__
    if activation not in ACTIVATIONS:
        return f"has the activation {activation}; those known are {', '.join(ACTIVATIONS)}"
    if any(layer.bias is not None for layer in layers):
        return "has biases"
    if any(layer.products is not None for layer in layers):
        return "overlaps its products with communication; use tp_overlap=False"
    return None
