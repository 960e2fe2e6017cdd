"""Compile a model part by part: whole decoder layers, or the blocks of one."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Collection
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch._dynamo import lookup_backend
from torch._inductor import list_mode_options
from transformers.utils import logging

from ..models.base import ParallelModel
from ..models.stand_ins import AbsentLayer
from ..models.stock.anatomy import blocks_of
from ..models.stock.families import WRITES_WEIGHTS
from ..parallel.ep.experts import ParallelExperts
from ..parallel.node import ranks_of_node
from .checkpointing_switches import SWITCH
from .compile_cache import has_folder, one_at_a_time, share_threads, where_files_can_be_written
from .compile_limit import bounded
from .compile_passes import Backend, rewriting
from .token_loops import modules_with_loops

logger = logging.get_logger(__name__)

# What is handed to an operator stays as it is, for as long as somebody holds it.
KEEPING = {"allow_buffer_reuse": False, "inplace_buffers": False}
WITHOUT_CODE = ("eager", "aot_eager")  # backends that run a graph's operators one by one


class CompiledForward:
    """The forward of a compiled module: compiled while it trains, and stock otherwise.

    Compiled code uses the weights of its own module, so a copy of the module gets the stock forward.
    """

    def __init__(self, module: nn.Module, compiled: Callable[..., Any], stock: Callable[..., Any]) -> None:
        self.module, self.compiled, self.stock = module, compiled, stock

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self.compiled if self.module.training else self.stock)(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.stock, memo)  # a method, of the module's copy


def compile_layers(
    model: ParallelModel, backend: str, mode: str | None, recomputed: Collection[int] = frozenset()
) -> None:
    """Compile the forward of every decoder layer, for training; `backend` and `mode` are those of `torch.compile`.

    A layer is compiled whole where nothing happens between its blocks; else its blocks are, one by one, and hooks at
    their borders (communication, records of routers) stay outside. Layers of one kind share their graphs. Evaluation
    and generation, whose shapes change, run the stock forward. Experts are not compiled, shared experts are. Neither
    is a block that loops over tokens in Python, or one whose graph is too large; the log says so.
    """
    if not has_folder():
        return
    keeps_operands = model.parallel.overlaps_tp(model.mesh.device) or model.parallel.splits_backward
    chosen = backend_of(backend, mode, keeps_operands, model.mesh.pp_rank)
    share_threads(ranks_of_node())
    parts, loops = divide(compiled_parts(model, recomputed))
    if loops and model.mesh.rank == 0:
        logger.warning(
            "torch_compile: blocks with a loop over tokens in Python stay as they are, since a compiler would unroll "
            "it: " + "; ".join(f"{name} ({where})" for name, where in sorted(loops.items()))
        )
    for part in parts:
        compiled = torch.compile(part.forward, backend=chosen)
        part.forward = CompiledForward(part, compiled, part.forward)
    model.decorations.add("compiled layers", restore_layers)


def restore_layers(model: ParallelModel) -> None:
    """Take back what `compile_layers` has done."""
    for part in model.modules():  # also those that would not be compiled now, because somebody has put hooks inside
        forward = part.__dict__.get("forward")
        is_stock = isinstance(forward, MethodType) and forward.__func__ is type(part).forward  # as copies have it
        if isinstance(forward, CompiledForward) or is_stock:
            del part.__dict__["forward"]


@functools.cache  # compiled code is kept by its backend: another object would have everything compiled anew
def backend_of(name: str, mode: str | None, keeps_operands: bool, pp_rank: int = 0) -> Backend:
    """The backend `name` of `torch.compile`, behind the changes that we make to graphs (`rewriting`).

    `keeps_operands`: an operator may keep its inputs after it returns, for a deferred weight gradient. `pp_rank`: of
    this rank; it takes turns with ranks that run the same program, see `one_at_a_time`.
    """
    backend: Any = lookup_backend(name)
    if name == "inductor":
        backend = functools.partial(backend, config_patches=inductor_options(mode, keeps_operands))
    elif keeps_operands and name not in WITHOUT_CODE:
        raise ValueError(
            f"torch_compile_backend={name!r} with pp_schedule='zb' or tp_overlap: it may overwrite the operands "
            "of deferred weight gradients; use 'inductor' or 'aot_eager', or pp_schedule='1f1b' and "
            "tp_overlap=False."
        )
    backend = rewriting(backend)
    if name == "inductor":
        backend = where_files_can_be_written(one_at_a_time(backend, f"pp{pp_rank}"))
    return bounded(backend)


def inductor_options(mode: str | None, keeps_operands: bool) -> dict[str, Any]:
    """With `keeps_operands`, inductor frees memory instead of giving it to other tensors of the graph; the caching
    allocator then gives it out again, unless somebody holds a reference.
    """
    return {**(KEEPING if keeps_operands else {}), **list_mode_options(mode or "default")}


def compiled_parts(model: ParallelModel, recomputed: Collection[int] = frozenset()) -> list[nn.Module]:
    """The modules that are compiled, of all layers; see `parts_of`."""
    return [
        part
        for index, layer in model.anatomy.numbered_layers()
        if not isinstance(layer, AbsentLayer)
        for part in parts_of(layer, index in recomputed or getattr(layer, SWITCH, False))
    ]


def divide(parts: list[nn.Module]) -> tuple[list[nn.Module], dict[str, str]]:
    """Those of `parts` without a loop over tokens, and where the others have one, by class."""
    loops = {part: modules_with_loops(part) for part in parts}
    without = [part for part in parts if not loops[part]]
    return without, {type(module).__name__: where for found in loops.values() for module, where in found.items()}


def parts_of(layer: nn.Module, recomputes: bool) -> list[nn.Module]:
    """A decoder layer without a hook, experts or a loop over tokens inside is one part, else it is several.

    One that recomputes activations and writes to its weights is several, too.
    """
    parts = [layer]
    inside = [module for module in layer.modules() if module is not layer]
    writes = recomputes and any(cls.__name__ in WRITES_WEIGHTS for module in inside for cls in type(module).__mro__)
    several = writes or any(_has_hooks(module) or isinstance(module, ParallelExperts) for module in inside)
    if several or modules_with_loops(layer):
        parts = [part for block in blocks_of(layer).values() for part in _around_experts(block)]
    return [part for part in parts if any(True for _ in part.parameters())]


def _around_experts(block: nn.Module) -> list[nn.Module]:
    """`block`, or what lies beside the experts in it."""
    if not any(isinstance(module, ParallelExperts) for module in block.modules()):
        return [block]
    return [
        child
        for child in block.children()
        if not isinstance(child, ParallelExperts) and any(isinstance(module, nn.Linear) for module in child.children())
    ]


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
