"""Low-rank adapters on the linears of a model that is sharded already, each cut as its linear is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..checkpoint.hub.model import gather_whole, is_writer
from ..ops.adapted_linear import adapt
from ..ops.linear import Linear
from ..parallel.shard_spec import ShardSpec
from .base import ParallelModel
from .cut import holding_weights


@dataclass(frozen=True)
class Adapter:
    """The low-rank term of one linear, whole.

    Args:
        linear: name of the linear in the stock model.
        a: `[rank, in]`.
        b: `[out, rank]`.
        scaling: what `b @ a` is multiplied by.
    """

    linear: str
    a: torch.Tensor
    b: torch.Tensor
    scaling: float

    @property
    def names(self) -> tuple[str, str]:
        """Of its two weights in the model."""
        return weights_of(self.linear)


def weights_of(linear: str) -> tuple[str, str]:
    """Names of the two weights of its adapter."""
    return f"{linear}.lora_A.weight", f"{linear}.lora_B.weight"


def attach(model: ParallelModel, adapters: Sequence[Adapter]) -> None:
    """Have `model` train `adapters` alone. Every rank is given all of them, and keeps its parts.

    Raises:
        ValueError: for a linear that the model does not have, or computes in another way; the same on every rank.
    """
    for adapter in adapters:
        _check(model, adapter)
    model.adapters = {adapter.linear: adapter.scaling for adapter in adapters}
    model.cut.frozen = frozenset(model.weight_shapes)
    model.requires_grad_(False)
    for adapter in adapters:
        name = f"{adapter.linear}.weight"
        for of_adapter, weight in zip(adapter.names, (adapter.a, adapter.b), strict=True):
            model.hub_shapes[of_adapter] = tuple(weight.shape)
            model.hub_owners[of_adapter] = model.hub_owners[name]
        if name not in model.shard_specs:
            continue
        module, parts = model.get_submodule(adapter.linear), []
        assert isinstance(module, Linear)
        specs = _specs(model.shard_specs[name], adapter, model.mesh.tp_rank, model.mesh.tp_size)
        for of_adapter, spec, weight in zip(adapter.names, specs, (adapter.a, adapter.b), strict=True):
            model.shard_specs[of_adapter], model.stage_of[of_adapter] = spec, model.stage_of[name]
            parts.append(spec.slice(weight).clone().to(module.weight.device))
        adapt(module, parts[0], parts[1], adapter.scaling)
    model.cut.modules = holding_weights(model)


def gather(model: ParallelModel, adapters: Sequence[str]) -> dict[str, torch.Tensor]:
    """The whole weights of those names that are on this rank's pipeline stages, on the rank that writes them; nothing
    on others. All ranks together.
    """
    found = {}
    for name in adapters:
        if name in model.shard_specs:
            part = model.whole_parameter(name)
            whole = gather_whole(part, model.shard_specs[name], model.mesh.tp) if model.mesh.is_first_copy else None
            if whole is not None and is_writer(model):
                found[name] = whole.detach().cpu().contiguous()
    return found


def _check(model: ParallelModel, adapter: Adapter) -> None:
    shape, meant = model.hub_shapes.get(f"{adapter.linear}.weight"), (adapter.b.shape[0], adapter.a.shape[1])
    if shape != meant:
        raise ValueError(
            f"an adapter of {adapter.linear!r} is for a linear of shape {list(meant)}, but the model has "
            f"{'none of that name' if shape is None else list(shape)}."
        )
    if adapter.linear == model.anatomy.head:
        raise ValueError(
            f"an adapter on the head ({adapter.linear!r}) is not supported: the head and the loss are one; leave it "
            "out of target_modules."
        )
    if f"{adapter.linear}.weight" in model.shard_specs:
        module = model.get_submodule(adapter.linear)
        if not isinstance(module, Linear):
            raise ValueError(
                f"an adapter on {adapter.linear!r} is not supported: it is a {type(module).__name__}, not a linear; "
                "leave it out of target_modules."
            )


def _specs(base: ShardSpec, adapter: Adapter, tp_rank: int, tp_size: int) -> tuple[ShardSpec, ShardSpec]:
    """How the two weights are cut. The whole one beside a cut one has a partial gradient on each rank."""
    names, shapes = adapter.names, (tuple(adapter.a.shape), tuple(adapter.b.shape))
    specs = []
    for name, shape, dim in zip(names, shapes, (1, 0), strict=True):
        if base.dim == dim:
            specs.append(replace(base, name=name, global_shape=shape))
        else:
            partial = tp_size > 1 if base.dim is not None else base.partial_grad
            specs.append(ShardSpec(name, shape, rank=tp_rank, partial_grad=partial))
    return specs[0], specs[1]
