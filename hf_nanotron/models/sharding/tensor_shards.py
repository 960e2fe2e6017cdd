"""Which part of every parameter a rank holds, and the layers that hold it."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from ...ops.embedding import Embedding
from ...ops.layer_norm import LayerNorm
from ...ops.linear import Linear
from ...ops.mixed_dtypes import mixed_class
from ...parallel.ep.experts import ParallelExperts, experts_class
from ...parallel.mesh import ParallelMesh
from ...parallel.shard_spec import Ranges, ShardSpec, even_parts, head_parts, joined_parts
from ...parallel.tp.layers import ColumnParallelLinear, RowParallelLinear, split_norm_class, vocab_parallel_class
from ...parallel.tp.vocabulary import vocabulary_parts
from ..stock.anatomy import Anatomy, join
from ..stock.families import (
    FUSED_PARTS,
    KEY_HEADS,
    LOCAL_KEY_HEADS,
    LOCAL_QUERY_HEADS,
    MIXES_DTYPES,
    QUERY_GROUPS,
    QUERY_HEADS,
)
from ..stock.plan import Plan, is_experts

# Linears that read the hidden states for every head at once: their block is attention.
READS_HEADS = ("q_proj", "q_b_proj", "q_gate_proj", "qkv_proj", "query_key_value")

# Styles whose cuts fall between heads or experts, not anywhere.
WITHOUT_SIZE = ("experts", "qkv", "heads", "norm", "unit_norm", "identity")


def tensor_specs(anatomy: Anatomy, mesh: ParallelMesh, plan: Plan) -> dict[str, ShardSpec]:
    """A `ShardSpec` for every parameter of the whole model, keyed by its name. Changes nothing."""
    model, tp_size = anatomy.model, mesh.tp_size
    summed = tuple(name + "." for name in (*plan.regions, *plan.spread))
    whole = tuple(name + "." for name in plan.whole)
    after_sum = tuple(f"{name}." for name in plan.after_sum)
    before_split = (*anatomy.first, *anatomy.everywhere, *(anatomy.last if anatomy.is_foreign else (anatomy.head,)))
    specs = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner, _, leaf = name.rpartition(".")
        style, shape = plan.styles.get(name) or plan.styles.get(owner), tuple(parameter.shape)
        is_bare = name in plan.styles
        if style == "experts":
            specs[name] = _experts_spec(model, mesh, name, shape)
            continue
        if style and not (style == "rowwise" and leaf == "bias" and not is_bare):
            dim = _cut_dim(style, is_bare, len(shape))
            parts = _parts(model, plan, name, style, dim, shape, tp_size)
            specs[name] = ShardSpec(name, shape, dim, parts, mesh.tp_rank)
            continue
        # A replicated parameter inside a region feeds sharded heads or features. Under sequence parallelism everything
        # between the split at the first layer and the gather in front of the head sees only a part of the tokens.
        outside = anatomy.place(name) in before_split
        sees_part_of_tokens = mesh.parallel.sequence_parallel and not outside and not name.startswith(whole)
        in_sum = name.startswith(summed) and not name.startswith(after_sum)
        partial = tp_size > 1 and (in_sum or sees_part_of_tokens)
        specs[name] = ShardSpec(name, shape, rank=mesh.tp_rank, partial_grad=partial)
    return specs


def _experts_spec(model: nn.Module, mesh: ParallelMesh, name: str, shape: tuple[int, ...]) -> ShardSpec:
    experts = int(cast(Any, model.get_submodule(name.rpartition(".")[0])).num_experts)
    if experts % mesh.ep_size or shape[0] != experts:
        works = [n for n in range(1, experts + 1) if experts % n == 0]
        raise ValueError(
            f"ep_size={mesh.ep_size} does not divide the {experts} experts of {name!r} (shape {list(shape)}); "
            f"ep_size must be one of {works}."
        )
    return ShardSpec(name, shape, 0, even_parts(experts, mesh.ep_size), mesh.coordinates.ep, axis="ep")


def _cut_dim(style: str, is_bare: bool, dims: int) -> int:
    """The dimension of a parameter that is cut: of a linear's weight or bias, or of a bare (stacked) parameter."""
    if style in ("rowwise", "packed_rowwise"):
        return dims - 1
    return max(0, dims - 2) if is_bare else 0


def _parts(
    model: PreTrainedModel, plan: Plan, name: str, style: str, dim: int, shape: tuple[int, ...], tp_size: int
) -> tuple[Ranges, ...]:
    size = shape[dim]
    owner = name if name in plan.styles else name.rpartition(".")[0]
    block, leaf = _block_of(model, plan, owner), owner.rpartition(".")[2]
    heads = head_counts(model, block) if block is not None else None
    stored = fused_parts(block)
    if stored is not None and stored % tp_size:
        raise ValueError(
            f"tp_size={tp_size} does not divide the {stored} parts in which {type(block).__name__} stores queries, "
            f"keys and values; {_works(model, plan)}"
        )
    if heads is not None and (style in ("qkv", "heads", "norm") or leaf in (*QUERY_HEADS, *KEY_HEADS)):
        query, key = heads
        if not _heads_fit(query, key, tp_size, plan):
            multiple = "" if _is_fused(plan) else " or be a multiple of them"
            fused = " (queries, keys and values are one weight)" if _is_fused(plan) else ""
            raise ValueError(
                f"tp_size={tp_size} cannot shard {query} attention heads and {key} key-value heads{fused}: it must "
                f"divide the attention heads, and divide the key-value heads{multiple}; {_works(model, plan)}"
            )
        if style == "qkv":
            width = size // (query + 2 * key)
            sections = [head_parts(count, width, tp_size) for count in (query, key, key)]
            return joined_parts(sections, [query * width, key * width, key * width])
        count = key if leaf in KEY_HEADS else query
        return head_parts(count, size // count, tp_size)
    if style == "vocabulary":
        if size < tp_size:
            raise ValueError(f"tp_size={tp_size} is larger than the vocabulary of {size}; {_works(model, plan)}")
        return vocabulary_parts(size, tp_size)
    packed = 2 if style.startswith("packed") else 1
    if size % (packed * tp_size):
        raise ValueError(
            f"tp_size={tp_size} does not divide the {size // packed} features of {owner!r}; {_works(model, plan)}"
        )
    half = size // packed
    return joined_parts([even_parts(half, tp_size)] * packed, [half] * packed)


def _block_of(model: nn.Module, plan: Plan, name: str) -> nn.Module | None:
    region = next((region for region in plan.regions if name.startswith(region + ".")), None)
    return None if region is None else model.get_submodule(region)


def head_counts(model: PreTrainedModel, block: nn.Module) -> tuple[int, int] | None:
    """Query heads and key-value heads of a whole attention block; None for another block."""
    if not any(hasattr(block, name) for name in READS_HEADS):
        return None
    config: Any = model.config.get_text_config()
    attention: Any = block
    head_dim, groups = getattr(block, "head_dim", None), getattr(block, QUERY_GROUPS, None)
    query = next((int(getattr(block, n)) for n in LOCAL_QUERY_HEADS if isinstance(getattr(block, n, None), int)), 0)
    if isinstance(getattr(block, "k_proj", None), nn.Linear) and head_dim:
        key = attention.k_proj.out_features // head_dim
        return (key * groups if groups else query or config.num_attention_heads), key
    query = query or int(config.num_attention_heads)
    if hasattr(block, "kv_b_proj") or not groups:
        return query, query
    return query, query // groups


def fused_parts(block: nn.Module | None) -> int | None:
    """In how many parts an attention block stores queries, keys and values together; None for any other block."""
    return getattr(block, FUSED_PARTS.get(type(block).__name__, ""), None)


def _heads_fit(heads: int, kv_heads: int, tp_size: int, plan: Plan) -> bool:
    # Gradients are summed over the copies of whole parameters. A fused one would be copied in a part of it alone.
    may_copy = tp_size % kv_heads == 0 and not _is_fused(plan)
    return heads % tp_size == 0 and (kv_heads % tp_size == 0 or may_copy)


def _is_fused(plan: Plan) -> bool:
    return "qkv" in plan.styles.values()


def _works(model: PreTrainedModel, plan: Plan) -> str:
    """The sizes that everything in the model allows, not only what was in the way."""
    counts = {head_counts(model, model.get_submodule(region)) for region in plan.regions} - {None}
    cuts = {parts for region in plan.regions if (parts := fused_parts(model.get_submodule(region)))}
    vocabulary = sys.maxsize
    for name, style in plan.styles.items():
        leaf = name.rpartition(".")[2]
        if leaf not in (*QUERY_HEADS, *KEY_HEADS) and style not in WITHOUT_SIZE:
            module: Any = _get(model, name)
            weight = module if isinstance(module, torch.Tensor) else module.weight
            size = weight.shape[_cut_dim(style, weight is module, weight.dim())]
            if style == "vocabulary":
                vocabulary = min(vocabulary, size)
                continue
            cuts.add(size // 2 if style.startswith("packed") else size)
    most = max((query for query, _ in cast(Iterable[tuple[int, int]], counts)), default=max(cuts, default=vocabulary))
    works = [
        n
        for n in range(1, min(most, vocabulary) + 1)
        if all(_heads_fit(*count, n, plan) for count in counts if count) and not any(size % n for size in cuts)
    ]
    return f"tp_size must be one of {works}."


def _get(model: nn.Module, name: str) -> Any:
    owner, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(owner), leaf)


def swap_layers(
    model: PreTrainedModel, mesh: ParallelMesh, plan: Plan, specs: dict[str, ShardSpec], absent: tuple[type, ...]
) -> None:
    """Let every module of `plan` that is no stand-in (`absent`) have this rank's part of its weights."""
    for region in plan.regions:
        block = _present(model, region, absent)
        if block is not None:
            _localise(model, block, mesh.tp_size)
    swapped: dict[nn.Parameter, nn.Parameter] = {}
    for name, spec in specs.items():
        if spec.dim is None:
            continue
        owner, _, leaf = name.rpartition(".")
        module = _present(model, owner, absent)
        parameter = None if module is None else module._parameters.get(leaf)
        if module is None or parameter is None:
            continue
        if parameter not in swapped:
            part = spec.slice(parameter.detach()).clone()
            swapped[parameter] = nn.Parameter(part, requires_grad=parameter.requires_grad)
        module._parameters[leaf] = swapped[parameter]
    for name, style in plan.styles.items():
        module = _present(model, name, absent)
        if module is not None:
            _become_parallel(name, module, style, specs, mesh)
    for name, module in model.named_modules():
        if is_experts(module):
            cut = any(path.startswith(name + ".") for path in plan.styles)
            module.__class__ = experts_class(cast(Any, type(module)))
            experts = cast(ParallelExperts, module)
            if any(name == block or name.startswith(block + ".") for block in plan.spread):
                experts.group = mesh.ep
            else:
                experts.adds_bias = mesh.tp_rank == 0 or not cut
        elif type(module).__name__ in MIXES_DTYPES:
            module.__class__ = mixed_class(cast(Any, type(module)))
        elif type(module) is nn.Linear:  # uncut: the same layer, with our backward
            module.__class__ = Linear
        elif type(module) is nn.Embedding:
            module.__class__ = Embedding
        elif type(module) is nn.LayerNorm:
            module.__class__ = LayerNorm


def _present(model: nn.Module, name: str, absent: tuple[type, ...]) -> nn.Module | None:
    """A module that this rank holds; None for a bare parameter and for one of another stage."""
    module: nn.Module = model
    for part in name.split("."):
        following = module._modules.get(part)
        if following is None or isinstance(following, absent):
            return None
        module = following
    return module


def _become_parallel(name: str, module: nn.Module, style: str, specs: dict[str, ShardSpec], mesh: ParallelMesh) -> None:
    """Make a module whose weights are cut already the layer that knows what they are."""
    if style == "identity":  # every rank adds the whole token to a sum over the ranks
        module.register_forward_hook(lambda module, args, output: output / mesh.tp_size)
        return
    if style in ("norm", "unit_norm"):
        module.__class__ = split_norm_class(cast(Any, type(module)), style == "unit_norm")
        cast(Any, module).group = mesh.tp
        return
    if style == "heads":
        return
    spec = specs[join(name, "weight")]
    if isinstance(module, nn.Embedding):
        ((start, stop),) = spec.ranges
        padding = module.padding_idx
        module.__class__ = vocab_parallel_class(cast(Any, type(module)))
        embedding: Any = module
        embedding.start, embedding.length, embedding.group = start, stop - start, mesh.tp
        embedding.num_embeddings = stop - start
        embedding.padding_idx = padding - start if padding is not None and start <= padding < stop else None
    elif type(module) is nn.Linear:
        module.out_features, module.in_features = spec.local_shape
        module.__class__ = RowParallelLinear if style == "rowwise" else ColumnParallelLinear
        if style == "rowwise":
            cast(RowParallelLinear, module).adds_bias = mesh.tp_rank == 0
    else:
        raise ValueError(f"{name!r} is a {type(module).__name__}, which cannot be sharded as {style!r}; use tp_size=1.")


def _localise(model: PreTrainedModel, block: nn.Module, tp_size: int) -> None:
    """Set the head counts that an attention block's forward reads to this rank's."""
    heads = head_counts(model, block)
    if heads is None:
        return
    query, key = heads[0] // tp_size, max(1, heads[1] // tp_size)
    for names, value in ((LOCAL_QUERY_HEADS, query), (LOCAL_KEY_HEADS, key), ((QUERY_GROUPS,), query // key)):
        for name in names:
            if isinstance(getattr(block, name, None), int):
                setattr(block, name, value)
    if hasattr(block, "qkv_proj"):  # its forward finds the borders of the fused product by the config's head counts
        config = copy.copy(cast(Any, block).config)
        config.num_attention_heads, config.num_key_value_heads = query, key
        cast(Any, block).config = config
