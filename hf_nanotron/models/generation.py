"""Forward and generation of a model whose stages live on several ranks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from transformers import Cache, DynamicCache
from transformers.cache_utils import StaticLayer
from transformers.modeling_outputs import CausalLMOutputWithPast, MoeCausalLMOutputWithPast

from ..parallel.mesh import Group, ParallelMesh
from ..parallel.pipeline.executor import StepHooks
from ..parallel.pipeline.schedule import Action, build_table, forward_order
from .parts import ModelParts
from .stage import Stage
from .stock.releases import OUTPUT_NAME, argument_name, cache_in, without_cache


def pipelined_forward(model: ModelParts, stages: Sequence[Stage], inputs: dict[str, Any], gather_logits: bool) -> Any:
    """One batch through all stages, without gradients; loss and logits on every rank.

    The key-value cache of a layer stays on the rank that holds the layer. Without `gather_logits` there is neither a
    cache nor `logits`.
    """
    mesh, parallel = model.mesh, model.parallel
    for name in ("output_hidden_states", "output_attentions"):
        if inputs.get(name):
            raise ValueError(f"{name}=True is not available with pp_size={mesh.pp_size}; use pp_size=1.")
    cache, cache_argument = cache_in(inputs), argument_name(model.stock_class.forward)
    use_cache = inputs.get("use_cache")
    if cache is None and gather_logits and (model.config.use_cache if use_cache is None else use_cache):
        # Made here rather than by the backbones, whose outputs only the last stage hands on.
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    inputs = {**without_cache(inputs), "use_cache": cache is not None}
    hooks = StepHooks() if cache is None else _OwnCaches(inputs, cache_argument, _stage_caches(model, stages, cache))
    table = build_table(forward_order(mesh.pp_size, parallel.pp_virtual_stages, 1), parallel.num_stages)
    with torch.no_grad():
        outputs = model.executor.run(table[mesh.pp_rank], stages, [inputs], hooks)
    output = outputs.get(0)
    loss, logits = (output.loss, output.logits) if output is not None else (None, None)
    last = mesh.pp.ranks[-1]
    if inputs.get("labels") is not None:
        loss = loss if loss is not None else torch.zeros((), device=mesh.device)
        dist.broadcast(loss, last, group=mesh.pp.handle)
    aux_loss = None
    if model.mixture is not None and model.mixture.reports_loss:
        aux_loss = torch.zeros((), device=mesh.device) if output is None else output.aux_loss
        dist.broadcast(aux_loss, last, group=mesh.pp.handle)
    if not gather_logits:
        logits = None
    else:
        if logits is not None and not model.makes_logits:
            logits = model.whole_logits(logits)
        logits = _broadcast(logits, mesh.pp, last, mesh.device, model.dtype)
    if aux_loss is not None:
        return MoeCausalLMOutputWithPast(loss=loss, aux_loss=aux_loss, logits=logits, **{OUTPUT_NAME: cache})
    return CausalLMOutputWithPast(loss=loss, logits=logits, **{OUTPUT_NAME: cache})


class _OwnCaches(StepHooks):
    """Hands each stage the cache that is its own."""

    def __init__(self, inputs: dict[str, Any], argument: str, caches: dict[int, Cache]) -> None:
        self.inputs, self.argument, self.caches = inputs, argument, caches

    def on_forward(self, action: Action) -> None:
        self.inputs[self.argument] = self.caches[action.stage]


def _stage_caches(model: ModelParts, stages: Sequence[Stage], cache: Cache) -> dict[int, Cache]:
    """What each stage of this rank gets for `cache`: its own layers, and the lengths of all before the pass.

    Backbones derive masks and positions from the cache. A later stage of this rank must not see layers that an earlier
    one has lengthened in the same pass, so it gets throw-away copies of the layers that are not its own.
    """
    first, *later = stages
    if later and any(isinstance(layer, StaticLayer) for layer in cache.layers):
        raise ValueError(
            "a static key-value cache is not supported with an interleaved pipeline (pp_virtual_stages > 1); use the "
            "dynamic cache (the default)."
        )
    while cache.layer_class_to_replicate is not None and len(cache) < model.config.get_text_config().num_hidden_layers:
        cache.layers.append(cache.layer_class_to_replicate())
    views = {first.index: cache}
    for stage in later:
        views[stage.index] = view = copy.copy(cache)
        view.layers = [layer if index in stage.layers else copy.copy(layer) for index, layer in enumerate(cache.layers)]
    return views


def _broadcast(
    tensor: torch.Tensor | None, group: Group, source: int, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Send a 3-D tensor whose shape only `source` knows to all of `group`."""
    shape = torch.tensor(tensor.shape if tensor is not None else (0, 0, 0), device=device)
    dist.broadcast(shape, source, group=group.handle)
    if tensor is None:
        tensor = torch.empty(tuple(shape.tolist()), dtype=dtype, device=device)
    tensor = tensor.contiguous()
    dist.broadcast(tensor, source, group=group.handle)
    return tensor


def share_generators(mesh: ParallelMesh) -> None:
    """The random generators of all ranks of a model continue from those of its first: sampling chooses alike."""
    if mesh.model.size == 1:
        return
    generators: list[Any] = [torch]
    if mesh.device.type == "cuda":
        generators.append(torch.cuda)
    for generator in generators:
        state = generator.get_rng_state().to(mesh.device)
        dist.broadcast(state, mesh.model.ranks[0], group=mesh.model.handle)
        generator.set_rng_state(state.cpu())
