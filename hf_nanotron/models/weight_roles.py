"""What each weight of a stock model is for a rule that goes by shapes: a map from how many inputs to how many outputs.

A learning rate that transfers between widths, and an optimizer of matrices, ask the same of a weight: whether it is an
embedding, a head, a matrix, stacked matrices or something that is applied element by element; and which of its
dimensions are inputs. The answers come from the classes of modules and from shapes, on the whole model.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..parallel.shard_spec import Ranges
from .moe.routers import find_routers
from .stock.anatomy import Anatomy, join
from .stock.families import row_of
from .stock.plan import is_experts, packed_linears

Kind = Literal["embedding", "head", "router", "norm", "bias", "matrix", "experts", "other"]


@dataclass(frozen=True)
class WeightRole:
    """What one weight of the whole model is.

    Attributes:
        kind: `"matrix"` is that of a linear layer, `"experts"` one for each expert (`[experts, ...]`). `"router"`
            chooses or weighs experts, or gates with a single output. `"bias"` is any vector that is added or multiplied
            element by element, outside of norms. `"other"` is none of them, and named in a table below.
        fan_in: how many inputs each output sums over: 1 for vectors, the vocabulary for an embedding.
        fan_out: outputs, of one expert.
        out_dim: the dimension of the tensor that is the outputs.
        parts: where layers are stored together in one weight, the ranges of `out_dim` that belong to each of them.
    """

    kind: Kind
    fan_in: int
    fan_out: int
    out_dim: int = 0
    parts: tuple[Ranges, ...] | None = None

    @property
    def part_sizes(self) -> tuple[int, ...]:
        """Outputs of each of the layers that are stored together; of the only one."""
        if self.parts is None:
            return (self.fan_out,)
        return tuple(sum(stop - start for start, stop in ranges) for ranges in self.parts)


def weight_roles(anatomy: Anatomy) -> dict[str, WeightRole]:
    """The role of every weight of a whole stock model, which may be on the meta device, by its name there."""
    model = anatomy.model
    routers = tuple(router.name + "." for router in find_routers(model))
    fused = _fused(anatomy)
    roles = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner, _, leaf = name.rpartition(".")
        module, shape = model.get_submodule(owner), tuple(parameter.shape)
        role = _role(module, leaf, shape, owner == anatomy.head, name.startswith(routers))
        parts = fused.get(name) or _gate_and_up(module, leaf, role.fan_out)
        roles[name] = role if parts is None else replace(role, parts=parts)
    return roles


def _role(module: nn.Module, leaf: str, shape: tuple[int, ...], is_head: bool, is_routing: bool) -> WeightRole:
    is_linear = isinstance(module, nn.Linear) and leaf == "weight"
    if isinstance(module, nn.Embedding) and len(shape) == 2:
        return WeightRole("embedding", shape[0], shape[1], 1)
    if is_experts(module) or row_of(STACKED, module) is not None:
        if len(shape) < 3:
            return WeightRole("bias", 1, shape[-1], len(shape) - 1)
        out_dim = 2 if getattr(module, "is_transposed", None) or row_of(STACKED, module) == "[in, out]" else 1
        return WeightRole("experts", shape[3 - out_dim], shape[out_dim], out_dim)
    if len(shape) == 2 and is_linear and is_head:
        return WeightRole("head", shape[1], shape[0])
    if len(shape) == 2 and leaf == "weight" and (is_routing or _is_a(module, "Router") or is_linear):
        routes = is_routing or _is_a(module, "Router") or shape[0] == 1
        return WeightRole("router" if routes else "matrix", shape[1], shape[0])
    if isinstance(module, Conv1D) and leaf == "weight":
        return WeightRole("matrix", shape[0], shape[1], 1)
    longest = shape.index(max(shape)) if shape else 0
    by_element = WeightRole("other", 1, max(shape, default=1), longest)
    if _is_a(module, "Norm"):
        return replace(by_element, kind="norm")
    if len([length for length in shape if length > 1]) < 2:
        return replace(by_element, kind="bias")
    if isinstance(module, nn.modules.conv._ConvNd):
        fan_in = math.prod(shape[1:])
        return WeightRole("other", fan_in, shape[0])
    inputs = next((dim for (end, name), (dim, _) in OTHER.items() if _is_a(module, end) and leaf == name), None)
    if inputs is None:
        return by_element
    return WeightRole("other", shape[inputs], shape[1 - inputs], 1 - inputs)


def _is_a(module: nn.Module, part: str) -> bool:
    """Whether the class of a module, or one that it derives from, has this in its name."""
    return any(part in cls.__name__ for cls in type(module).__mro__)


# Classes with stacked experts without transformers' common interface -> the dimensions after the first.
STACKED: dict[str, str] = {
    "InklingSharedExperts": "[out, in]",
    "Llama4TextExperts": "[in, out]",
    "LongcatFlashExperts": "[out, in]",
}

# Weights of two dimensions or more that are no matrices of linear layers, besides convolutions (whose filters belong to
# channels): a part of the class's name and the weight's -> which dimension is summed over (None: it is applied element
# by element), and what it is.
OTHER: dict[tuple[str, str], tuple[int | None, str]] = {
    ("Mixer", "A_log"): (None, "decay rates of a state"),
    ("Compressor", "position_bias"): (None, "added to scores by position"),
    ("Indexer", "position_bias"): (None, "added to scores by position"),
    ("HyperConnection", "fn"): (1, "mixes a few residual streams"),
    ("HyperHead", "hc_fn"): (1, "mixes a few residual streams"),
    ("AttentionResidual", "query"): (None, "queries of attention over earlier layers"),
    ("DynamicShortConvolution", "static_weight"): (None, "a filter for each channel"),
    ("L2Clip", "scale"): (None, "a scale for each feature of a head"),
    ("RelativePositionBias", "proj"): (0, "a table of distances"),
    ("RelativeLogits", "proj"): (0, "a table of distances"),
    ("MultiheadAttention", "in_proj_weight"): (1, "of an encoder of images"),
    ("MultiModalProjector", "mm_input_projection_weight"): (0, "of an encoder of images"),
    ("Statics", "e_score_correction_bias"): (None, "a bias of a router"),
}


# ---- layers that are stored together ----

Parts = tuple[Ranges, ...]


@functools.cache
def _in_turn(*sizes: int, groups: int = 1) -> Parts:
    """Layers of these sizes, one after the other, in each of so many groups."""
    whole, found, start = sum(sizes), [], 0
    for size in sizes:
        found.append(tuple((at + start, at + start + size) for at in range(0, groups * whole, whole)))
        start += size
    return tuple(found)


def _mamba2(mixer: Any) -> Parts:
    """Gate, input, the two maps of each group's state, and a step for each head."""
    state = mixer.n_groups * mixer.ssm_state_size
    return _in_turn(mixer.intermediate_size, mixer.intermediate_size, state, state, mixer.num_heads)


def _attention(attention: Any) -> Parts:
    """Queries, keys and values."""
    config, width = attention.config, attention.head_dim
    return _in_turn(*(width * heads for heads in (config.num_attention_heads, *(config.num_key_value_heads,) * 2)))


def _by_heads(attention: Any) -> Parts:
    """Query, key and value of one head after the other."""
    module: Any = getattr(attention, "query_key_value", None) or attention.qkv_proj
    width = attention.head_dim if hasattr(attention, "head_dim") else attention.head_size
    return _in_turn(width, width, width, groups=module.out_features // (3 * width))


def _falcon(attention: Any) -> Parts:
    """The queries that share a key and a value, that key and that value."""
    heads, width = attention.num_heads, attention.head_dim
    return _in_turn(heads // attention.num_kv_heads * width, width, width, groups=attention.num_kv_heads)


def _bigcode(attention: Any) -> Parts:
    width = attention.head_dim
    if attention.multi_query:
        return _in_turn(attention.embed_dim, width, width)
    return _in_turn(width, width, width, groups=attention.num_heads)


def _delta_rule(mixer: Any) -> Parts:
    """Queries, keys and values."""
    return _in_turn(mixer.key_dim, mixer.key_dim, mixer.value_dim)


def _delta_rule_by_heads(mixer: Any) -> Parts:
    """For each head of keys: query, key, and value and gate of the heads of values that share it."""
    values = mixer.value_dim // mixer.num_k_heads
    return _in_turn(mixer.head_k_dim, mixer.head_k_dim, values, values, groups=mixer.num_k_heads)


def _rates_by_heads(mixer: Any) -> Parts:
    """For each head of keys: the two rates of the heads of values that share it."""
    shared = mixer.num_v_heads // mixer.num_k_heads
    return _in_turn(shared, shared, groups=mixer.num_k_heads)


Fused = Mapping[str, Callable[[Any], Parts]]
_BY_HEADS: Fused = {"query_key_value": _by_heads}
_DELTA_RULE: Fused = {"in_proj_qkv": _delta_rule}
_MAMBA: Fused = {
    "in_proj": lambda mixer: _in_turn(mixer.intermediate_size, mixer.intermediate_size),
    "x_proj": lambda mixer: _in_turn(mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size),
}
_MAMBA2: Fused = {"in_proj": _mamba2}
_CONVOLUTION: Fused = {"in_proj": lambda block: _in_turn(*(block.in_proj.out_features // 3,) * 3)}

# Class of a block -> linear layer inside it -> the outputs of the layers that it stores, for those that no plan cuts
# apart.
FUSED: dict[str, Fused] = {
    "BambaMixer": _MAMBA2,
    "BloomAttention": _BY_HEADS,
    "CodeGenAttention": {"qkv_proj": lambda a: _in_turn(*(a.embed_dim // a.mp_num,) * 3, groups=a.mp_num)},
    "FalconAttention": {"query_key_value": _falcon},
    "FalconH1Mixer": _MAMBA2,
    "FalconMambaMixer": _MAMBA,
    "GPT2Attention": {"c_attn": lambda attention: _in_turn(*(attention.embed_dim,) * 3)},
    "GPTBigCodeAttention": {"c_attn": _bigcode},
    "GPTNeoXAttention": _BY_HEADS,
    "GraniteMoeHybridMambaLayer": _MAMBA2,
    "JambaMambaMixer": _MAMBA,
    "Lfm2MoeShortConv": _CONVOLUTION,
    "Lfm2ShortConv": _CONVOLUTION,
    "Lfm3ShortConv": _CONVOLUTION,
    "LaraMiniGatedDeltaNet": _DELTA_RULE,
    "Mamba2Mixer": _MAMBA2,
    "MambaMixer": _MAMBA,
    "MiniMaxLightningAttention": {"qkv_proj": _by_heads},
    "MptAttention": {"Wqkv": lambda attention: _in_turn(*(attention.hidden_size,) * 3)},
    "NemotronHMamba2Mixer": _MAMBA2,
    "PersimmonAttention": _BY_HEADS,
    "Phi3Attention": {"qkv_proj": _attention},
    "Phi4MultimodalAttention": {"qkv_proj": _attention},
    "Qwen3NextGatedDeltaNet": {"in_proj_qkvz": _delta_rule_by_heads, "in_proj_ba": _rates_by_heads},
    "Qwen3_5GatedDeltaNet": _DELTA_RULE,
    "Qwen3_5MoeGatedDeltaNet": _DELTA_RULE,
    "Qwen4ExpTextGatedDeltaNet": _DELTA_RULE,
}


def _fused(anatomy: Anatomy) -> dict[str, Parts]:
    """Weight or bias of a linear layer -> the outputs of each of the layers that it stores."""
    found: dict[str, Parts] = {}
    for path in packed_linears(anatomy):
        half = cast(nn.Linear, anatomy.model.get_submodule(path)).out_features // 2
        found[join(path, "weight")] = found[join(path, "bias")] = _in_turn(half, half)
    for path, block in anatomy.blocks():
        for name, parts in (row_of(FUSED, block) or {}).items():
            found[join(path, name, "weight")] = found[join(path, name, "bias")] = parts(block)
    return found


def _gate_and_up(module: nn.Module, leaf: str, size: int) -> Parts | None:
    """The two layers that stacked experts store in one weight, with the names of transformers' common interface."""
    if not leaf.startswith("gate_up_proj") or not (is_experts(module) or row_of(STACKED, module) is not None):
        return None
    half = size // 2
    return _in_turn(half, half) if getattr(module, "is_concatenated", True) else _in_turn(1, 1, groups=half)
