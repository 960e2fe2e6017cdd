"""Layers that recompute, with what they keep for their backward in host memory (`activation_offload`).

What a recomputed layer keeps, its input above all, is copied to pinned buffers beside the forward, and fetched while
another layer runs its backward (Rajbhandari et al. 2021, arXiv:2104.07857, for the idea). The last layer of the model
keeps it on the device: its backward comes first.
"""

from __future__ import annotations

import copy
import functools
import math
import weakref
from collections import deque
from collections.abc import Callable, Collection, Mapping
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from ..models.base import ParallelModel
from ..models.stand_ins import AbsentLayer
from ..models.stock.releases import cache_in
from ..ops.offload import LayerSaves, Transfers
from .recompute import with_defaults

NAME = "activation offload"  # among the decorations of a model


class StageSaves:
    """What the forwards of one stage have saved.

    Attributes:
        latest: of the layer that the running forward has computed last.
        waiting: of the last layer of each micro-batch whose backward has not begun, the oldest first.
    """

    def __init__(self, transfers: Transfers) -> None:
        self.transfers = transfers
        self.latest: LayerSaves | None = None
        self.waiting: deque[LayerSaves] = deque()

    def follow(self, before: LayerSaves | None, layer: LayerSaves) -> LayerSaves | None:
        """The backward of `layer` begins: what is needed next, of `before` or of the next micro-batch."""
        if layer in self.waiting:
            self.waiting.remove(layer)
        if before is not None:
            return before
        return self.waiting[0] if self.waiting else None

    def end(self, layer: LayerSaves) -> None:
        """The forward of a micro-batch has ended with `layer`."""
        self.latest = None
        self.waiting = deque(one for one in self.waiting if one.is_needed)  # some were broken off
        if layer.is_needed:
            self.waiting.append(layer)


class OffloadingForward:
    """The forward of a layer that keeps its saved tensors on the host while it trains.

    A copy of the layer gets the forward without.

    Args:
        checkpointed: how to recompute the whole layer, or None where its forward recomputes by itself.
        first, last: of those of its stage.
        stays: it keeps on the device what it saves.
    """

    def __init__(
        self,
        layer: nn.Module,
        forward: Callable[..., Any],
        stage: StageSaves,
        first: bool,
        last: bool,
        stays: bool,
        checkpointed: Callable[..., Any] | None,
    ) -> None:
        self.layer, self.forward, self.stage = weakref.ref(layer), forward, stage
        self.first, self.last, self.stays, self.checkpointed = first, last, stays, checkpointed

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        layer = self.layer()
        assert layer is not None
        # A key-value cache would be written a second time.
        if not layer.training or not torch.is_grad_enabled() or cache_in(kwargs, args) is not None:
            return self.forward(*args, **kwargs)
        stage, before = self.stage, None if self.first else self.stage.latest
        following = functools.partial(stage.follow, before)
        saves = LayerSaves(stage.transfers, following, self.stays, lambda: _shared(layer, args[1:], kwargs))
        stage.latest = saves
        with saves.hooks():
            if self.checkpointed is None:
                output = self.forward(*args, **kwargs)
            else:
                output = self.checkpointed(functools.partial(self.forward, **kwargs), *args)
        if self.last:
            stage.end(saves)
        return output

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.forward, memo)  # a method, of the layer's copy


def offload_layers(
    model: ParallelModel, layers: Collection[int], fraction: float, policy: str, options: Mapping[str, Any]
) -> Transfers:
    """Let the first `fraction` of `layers` in each stage keep on the host what they keep. Call it after
    `compile_layers`. With `policy="full"` they also recompute, in the place of transformers' switch.
    """
    transfers = Transfers(model.mesh.device)
    checkpointed = functools.partial(checkpoint, **with_defaults(options, model)) if policy == "full" else None
    for number, own in _stages(model, layers).items():
        stage, count = StageSaves(transfers), math.ceil(fraction * len(own))
        last = min(count, len(own) - 1)  # whose backward has the others fetched
        is_end = number == model.parallel.num_stages - 1
        for index, layer in enumerate(own):
            stays = index >= count or (is_end and index == len(own) - 1)
            if index <= last or checkpointed is not None:
                layer.forward = OffloadingForward(
                    layer, layer.forward, stage, index == 0, index == last, stays, checkpointed
                )
    model.decorations.add(NAME, restore_offloaded)
    return transfers


def restore_offloaded(model: ParallelModel) -> None:
    """Take back what `offload_layers` has done."""
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, OffloadingForward):
            forward = module.__dict__["forward"] = forward.forward
        if isinstance(forward, MethodType) and forward.__func__ is type(module).forward:  # also that of a copy
            del module.__dict__["forward"]


def _stages(model: ParallelModel, layers: Collection[int]) -> dict[int, list[nn.Module]]:
    """This rank's `layers`, by the stages that they belong to."""
    stage_of = {id(parameter): model.stage_of.get(name, 0) for name, parameter in model.named_parameters()}
    stages: dict[int, list[nn.Module]] = {}
    for index, layer in model.anatomy.numbered_layers():
        if index in layers and not isinstance(layer, AbsentLayer):
            stage = next((stage_of[id(parameter)] for parameter in layer.parameters()), 0)
            stages.setdefault(stage, []).append(layer)
    return stages


def _shared(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> set[int]:
    """Addresses of what a layer reads and others hold as well: weights, and arguments but the hidden states."""
    given = [x for x in tree_leaves((args, dict(kwargs))) if isinstance(x, torch.Tensor)]
    owned = [*layer.parameters(), *layer.buffers()]
    return {x.untyped_storage().data_ptr() for x in (*given, *owned) if type(x) in (torch.Tensor, nn.Parameter)}
