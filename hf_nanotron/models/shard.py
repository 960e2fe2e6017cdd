"""Decide how every parameter is cut over the tensor-parallel ranks, and swap the layers that hold the cuts."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from ..ops.linear import Linear
from ..parallel.mesh import ParallelMesh
from ..parallel.spec import Ranges, ShardSpec, even_parts, head_parts
from ..parallel.tensor import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from .families import HEADS, QUERY_GROUPS
from .plan import decoder_layers, join, tensor_parallel_plan

# style -> the dimension of `weight` (and whether the bias follows) that is cut
CUT_DIM = {"colwise": 0, "colwise_gather_output": 0, "rowwise": 1}


def module_name(model: nn.Module, module: nn.Module) -> str | None:
    """Name of `module` inside `model`, or None."""
    return next((name for name, candidate in model.named_modules() if candidate is module), None)


def sharded_modules(model: PreTrainedModel) -> dict[str, str]:
    """Module name -> style, with the token embedding cut like the head (a tied pair must be)."""
    plan = {name: style for name, style in tensor_parallel_plan(model).items() if style in CUT_DIM}
    head = module_name(model, model.get_output_embeddings())
    embedding = module_name(model, model.get_input_embeddings())
    if head in plan and embedding is not None:
        plan[embedding] = "vocabulary"
    return plan


def regions(model: PreTrainedModel, plan: dict[str, str]) -> list[str]:
    """Modules at whose border tokens are gathered and partial outputs summed: the parents of the cut linears."""
    if not plan:
        return []
    layers, _ = decoder_layers(model)
    return list(dict.fromkeys(name.rpartition(".")[0] for name in plan if name.startswith(layers + ".")))


def tensor_specs(model: PreTrainedModel, mesh: ParallelMesh, plan: dict[str, str]) -> dict[str, ShardSpec]:
    """A `ShardSpec` for every parameter of the whole `model`, keyed by its Hub name. Changes nothing.

    Raises:
        ValueError: if heads, vocabulary or features cannot be cut over `tp_size` ranks.
    """
    tp_size = mesh.tp_size
    inside = tuple(name + "." for name in regions(model, plan))
    outside = (
        module_name(model, model.get_input_embeddings()),
        module_name(model, model.get_output_embeddings()),
    )
    specs = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner, _, leaf = name.rpartition(".")
        style, shape = plan.get(owner), tuple(parameter.shape)
        if style and not (style == "rowwise" and leaf == "bias"):
            dim = CUT_DIM.get(style, 0)
            parts = _parts(model, plan, owner, style, shape[dim], tp_size)
            specs[name] = ShardSpec(name, shape, dim, parts, mesh.tp_rank)
            continue
        # A replicated parameter inside a region feeds sharded heads or features. Under sequence parallelism everything
        # between the split at the first layer and the gather after the last norm sees only a part of the tokens.
        sees_part_of_tokens = mesh.parallel.sequence_parallel and owner not in outside
        partial = tp_size > 1 and (name.startswith(inside) or sees_part_of_tokens)
        specs[name] = ShardSpec(name, shape, tp_rank=mesh.tp_rank, partial_grad=partial)
    return specs


def _parts(
    model: PreTrainedModel, plan: dict[str, str], owner: str, style: str, size: int, tp_size: int
) -> tuple[Ranges, ...]:
    heads_attribute = HEADS.get(owner.rpartition(".")[2])
    if heads_attribute is not None:
        heads, kv_heads = head_counts(model)
        if not _heads_fit(heads, kv_heads, tp_size):
            raise ValueError(
                f"tp_size={tp_size} cannot cut {heads} attention heads and {kv_heads} key-value heads: it must divide "
                "the attention heads, and divide the key-value heads or be a multiple of them; "
                f"{_works(model, plan)}"
            )
        count = heads if heads_attribute == "num_attention_heads" else kv_heads
        return head_parts(count, size // count, tp_size)
    if size % tp_size:
        what = "vocabulary" if style in ("vocabulary", "colwise_gather_output") else f"features of {owner!r}"
        raise ValueError(f"tp_size={tp_size} does not divide the {size} {what}; {_works(model, plan)}")
    return even_parts(size, tp_size)


def head_counts(model: PreTrainedModel) -> tuple[int, int]:
    """Attention heads and key-value heads of the whole model."""
    heads = model.config.num_attention_heads
    return heads, getattr(model.config, "num_key_value_heads", None) or heads


def _heads_fit(heads: int, kv_heads: int, tp_size: int) -> bool:
    return heads % tp_size == 0 and (kv_heads % tp_size == 0 or tp_size % kv_heads == 0)


def _works(model: PreTrainedModel, plan: dict[str, str]) -> str:
    """The sizes that everything in the model allows, not only what was in the way."""
    heads, kv_heads = head_counts(model)
    cuts = {
        cast(torch.Tensor, model.get_submodule(name).weight).shape[CUT_DIM.get(style, 0)]
        for name, style in plan.items()
        if name.rpartition(".")[2] not in HEADS
    }
    works = [n for n in range(1, heads + 1) if _heads_fit(heads, kv_heads, n) and not any(size % n for size in cuts)]
    return f"tp_size works as one of {works}."


def swap_layers(model: PreTrainedModel, mesh: ParallelMesh, plan: dict[str, str], specs: dict[str, ShardSpec]) -> None:
    """Replace every module of `plan` that `model` still holds by one with this rank's part of its weights."""
    swapped: dict[nn.Parameter, nn.Parameter] = {}
    for name, style in plan.items():
        try:
            module = model.get_submodule(name)
        except AttributeError:
            continue
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter):
            continue  # a stand-in for a module of another stage
        new = _sharded(module, style, specs[join(name, "weight")], mesh)
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter not in swapped:
                part = specs[join(name, leaf)].slice(parameter.detach())
                swapped[parameter] = nn.Parameter(part.clone(), requires_grad=parameter.requires_grad)
            setattr(new, leaf, swapped[parameter])
        new.train(module.training)
        model.set_submodule(name, new)
    for name in regions(model, plan):
        _localise(model, name, mesh.tp_size)
    for module in model.modules():
        if type(module) is nn.Linear:  # uncut: the same layer, with our backward
            module.__class__ = Linear


def _sharded(module: nn.Module, style: str, spec: ShardSpec, mesh: ParallelMesh) -> nn.Module:
    """An empty parallel layer in the place of `module`."""
    with torch.device("meta"):
        if isinstance(module, nn.Embedding):
            ((start, stop),) = spec.ranges
            return VocabParallelEmbedding(start, stop - start, module.embedding_dim, module.padding_idx, mesh.tp)
        if isinstance(module, nn.Linear):
            out_features, in_features = spec.local_shape
            if style == "rowwise":
                return RowParallelLinear(in_features, out_features, module.bias is not None, mesh.tp)
            return ColumnParallelLinear(in_features, out_features, module.bias is not None)
    raise ValueError(f"{spec.name!r} is a {type(module).__name__}, which {style!r} cannot cut; use tp_size=1.")


def _localise(model: PreTrainedModel, region: str, tp_size: int) -> None:
    try:
        module = model.get_submodule(region)
    except AttributeError:
        return
    if hasattr(module, QUERY_GROUPS):
        heads, kv_heads = head_counts(model)
        setattr(module, QUERY_GROUPS, (heads // tp_size) // max(1, kv_heads // tp_size))
