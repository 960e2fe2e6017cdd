"""Compile the blocks of a model one by one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..parallel.experts import ParallelExperts
from .anatomy import blocks
from .base import ParallelModel


def compile_blocks(model: ParallelModel, backend: str, mode: str | None) -> None:
    """Compile the forward of every attention, MLP and norm module, for training.

    Layers of one kind share one compiled graph. The hooks at the border of a block (communication, dropout streams,
    waiting for weights) stay outside of it. Evaluation and generation, whose shapes change, run the stock forward. A
    mixture of experts is not compiled itself, but its shared experts are.

    Args:
        backend, mode: as `torch.compile` takes them.
    """
    for _, block in blocks(model, model.anatomy):
        for part in _parts(block):
            if any(True for _ in part.parameters()):
                compiled = torch.compile(part.forward, backend=backend, mode=mode)
                part.forward = functools.partial(_forward, part, compiled, part.forward)


def restore_blocks(model: ParallelModel) -> None:
    """Take back what `compile_blocks` has done."""
    for _, block in blocks(model, model.anatomy):
        for part in _parts(block):
            forward = part.__dict__.get("forward")
            if isinstance(forward, functools.partial) and forward.func is _forward:
                del part.__dict__["forward"]


def _parts(block: nn.Module) -> list[nn.Module]:
    """`block`, or what lies beside the experts in it."""
    if not any(isinstance(module, ParallelExperts) for module in block.modules()):
        return [block]
    return [
        child
        for child in block.children()
        if not isinstance(child, ParallelExperts) and any(isinstance(module, nn.Linear) for module in child.children())
    ]


def _forward(module: nn.Module, compiled: Callable[..., Any], stock: Callable[..., Any], *args: Any, **kw: Any) -> Any:
    return (compiled if module.training else stock)(*args, **kw)
