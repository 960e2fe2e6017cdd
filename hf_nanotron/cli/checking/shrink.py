"""A model like another one, of the same family and with the same mechanisms, that computes in milliseconds on a CPU."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from ...models.spectral.sizes import HIDDEN
from ...parallel.config import ParallelConfig
from .sizes import Reduced

MOST_PARAMETERS = 30_000_000  # of a model that is trained on the CPU a few times, and compared
MOST_LAYERS = 8
MOST_RATIO = 8  # of query heads to key-value heads
HEAD = 8  # features of an attention head
WIDTH = 64  # of the hidden states, if it is not that of the heads
EXPERTS = 4
VOCABULARY, KEPT_REMAINDER = 240, 24  # remainders by 2, 3, 4, 6, 8 and 12 stay what they are
SEEN = 8  # tokens of a window of attention

QUERY = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
KEY = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "multi_query_group_num")
INNER = (  # features of an MLP
    *("intermediate_size", "intermediate_size_mlp", "dense_intermediate_size", "prefix_dense_intermediate_size"),
    *("moe_intermediate_size", "shared_intermediate_size", "shared_expert_intermediate_size"),
    *("shared_experts_intermediate_size", "moe_shared_expert_intermediate_size", "expert_ffn_hidden_size"),
    *("ffn_hidden_size", "ffn_dim", "n_inner"),
)
NUMBER_OF_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
CHOSEN_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
SMALLER = {  # other sizes, and what they are at most
    "head_dim": HEAD, "global_head_dim": HEAD, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": HEAD,
    "qk_rope_head_dim": HEAD, "qk_head_dim": 2 * HEAD, "v_head_dim": HEAD, "sliding_window": SEEN,
    "n_group": 2, "num_group": 2, "num_expert_group": 2,
    "attention_chunk_size": SEEN, "local_attn_window_size": SEEN, "topk_group": 1, "first_k_dense_replace": 1,
    "hidden_size_per_layer_input": 8, "rotary_dim": HEAD,
}  # fmt: skip
PERIODS = (  # every so many layers another kind
    *("full_attention_interval", "no_rope_layer_interval", "sliding_window_pattern", "decoder_sparse_step"),
    *("attn_layer_period", "expert_layer_period", "moe_layer_freq", "interleave_moe_layer_step"),
)
TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")


class CannotShrink(ValueError):
    """A model of which no small one is known."""


def smaller(config: PreTrainedConfig, full: ParallelConfig, sizes: Reduced) -> PreTrainedConfig:
    """A small config of the family of `config`.

    The heads keep their ratio, and divide by `sizes` as those of `config` do by `full`, or are repeated on ranks as
    they are. Experts, layers of all kinds, tied weights and fields that are no sizes are kept.

    Raises:
        CannotShrink: if transformers makes no model of what the tables of this file say.
    """
    text = config.get_text_config()
    layers = chosen_layers(text, sizes)
    reasons = []
    for widths in (True, False):
        values = config.to_dict()
        inner = values if text is config else next(v for v in values.values() if _is_text(v, text))
        inner.update(_small_fields(inner, text, full, sizes, widths))
        _take_layers(inner, int(text.num_hidden_layers), layers)
        for name in ("dtype", "torch_dtype", "quantization_config"):
            values.pop(name, None)
        try:
            small = _made(config, values)
            if (count := parameters(small)) <= MOST_PARAMETERS:
                return small
            reasons.append(f"it would still have {count:,} parameters")
        except Exception as error:  # whatever a config class or a model says of sizes that do not fit
            reasons.append(str(error).strip().split("\n")[0])
    raise CannotShrink(
        f"no small model of {config.model_type!r} is known here ({reasons[0]}). Give small sizes yourself, such as "
        "--set model.config.num_hidden_layers 2, and --as-is."
    )


def parameters(config: PreTrainedConfig) -> int:
    """Of the causal LM that transformers makes of a config."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    return sum(parameter.numel() for parameter in model.parameters())


def chosen_layers(text: Any, sizes: Reduced) -> list[int]:
    """Layers of `text` that the small model has: one of each kind, in order, and enough for all stages."""
    count = int(text.num_hidden_layers)
    lists = [value for value in vars(text).values() if isinstance(value, list | tuple) and len(value) == count]
    kinds = [tuple(map(repr, kind)) for kind in zip(*lists, strict=True)] if lists else [()] * count
    first = {kind: index for index, kind in reversed(list(enumerate(kinds)))}
    needed = max(2, sizes.layers)
    for name in PERIODS:
        period = getattr(text, name, None)
        if isinstance(period, int) and not isinstance(period, bool) and 1 < period <= MOST_LAYERS:
            needed = max(needed, period)
    chosen = set(first.values())
    others = iter(index for index in range(count) if index not in chosen)
    while len(chosen) < min(needed, count):
        chosen.add(next(others))
    order = sorted(chosen)
    while len(order) < sizes.layers:  # a model of fewer layers than stages is the trainer's to refuse
        order.append(order[-1])
    return order


def _small_fields(
    values: Mapping[str, Any], text: Any, full: ParallelConfig, sizes: Reduced, widths: bool
) -> dict[str, Any]:
    """What changes. Without `widths`: the vocabulary and tokens alone, besides the layers."""
    vocabulary = VOCABULARY + int(text.vocab_size) % KEPT_REMAINDER
    vocabulary = min(vocabulary, int(text.vocab_size))
    small: dict[str, Any] = {"vocab_size": vocabulary}
    if _count(values.get("vocab_size_per_layer_input")):
        small["vocab_size_per_layer_input"] = vocabulary
    for name in TOKEN_IDS:
        ids = values.get(name)
        if isinstance(ids, list):
            small[name] = [token % vocabulary for token in ids]
        elif isinstance(ids, int):
            small[name] = ids % vocabulary if ids >= 0 else ids
    if not widths:
        return small
    query, key = (next((name for name in names if _count(values.get(name))), "") for names in (QUERY, KEY))
    heads = _count(values.get(query)) or 1
    shared = _count(values.get(key)) or heads
    counts = small_head_counts(heads, shared, full.tp_size, sizes.tp_size, sizes.is_spectral)
    hidden = next(name for name in HIDDEN if _count(values.get(name)))
    head = _count(values.get("head_dim"))
    is_free = head is not None and head * heads != values[hidden]  # the heads together are not the hidden size
    small |= dict(zip((query, key), counts, strict=True))
    small[hidden] = WIDTH if is_free or not query else counts[0] * HEAD
    for name in INNER:
        size = _count(values.get(name))
        if size is not None:  # not a whole number of times the hidden size, so that neither is taken for the other
            multiple = math.lcm(sizes.tp_size * 4, 8)
            small[name] = min(size, multiple * max(1, round(1.5 * small[hidden] / multiple)))
    for name, most in SMALLER.items():
        if (size := _count(values.get(name))) is not None:
            small[name] = min(size, most)
    small |= _experts(values, sizes)
    if query == "num_heads" and (expand := _count(values.get("expand"))):  # Mamba-2: heads of the widened hidden states
        small["head_dim"] = expand * small[hidden] // counts[0]
        small |= {"n_groups": min(2, int(values["n_groups"])), "state_size": 16, "time_step_rank": 8}
    if _count(values.get("mamba_n_heads")):
        inner = int(values.get("mamba_expand") or 2) * small[hidden]
        small |= {"mamba_d_head": 2 * HEAD, "mamba_n_heads": inner // (2 * HEAD), "mamba_d_ssm": inner}
        small |= {"mamba_n_groups": 1, "mamba_d_state": 16}
    rope = values.get("rope_parameters") or values.get("rope_scaling")
    if isinstance(rope, dict):
        small["rope_parameters" if "rope_parameters" in values else "rope_scaling"] = _small_rope(rope, small, values)
    return {name: value for name, value in small.items() if name in values}


def small_head_counts(heads: int, shared: int, full_tp: int, tp: int, even: bool = False) -> tuple[int, int]:
    """Query heads and key-value heads of the small model, in the ratio of `heads` and `shared` (of at most 8).

    Ranks that hold the same key-value head (fewer heads than `full_tp`) do so at `tp`, too.
    """
    ratio = min(MOST_RATIO, max(1, heads // max(1, shared)))
    least = 1 if shared == 1 else tp if shared >= full_tp else max(1, tp * shared // full_tp)
    factor = 1
    while least * factor * ratio < 2 or least * factor * ratio % (2 * tp if even else tp):
        factor += 1
    small = least * factor * ratio
    if heads == shared:
        return small, small
    return small, 1 if shared == 1 else least * factor


def _experts(values: Mapping[str, Any], sizes: Reduced) -> dict[str, int]:
    small: dict[str, int] = {}
    for name in CHOSEN_EXPERTS:
        if (size := _count(values.get(name))) is not None:
            small[name] = min(size, 2)
    for name in NUMBER_OF_EXPERTS:
        if (size := _count(values.get(name))) is not None:
            groups = min(2, _count(values.get("n_group")) or 1)
            small[name] = min(size, math.lcm(max(EXPERTS, 2 * groups), sizes.ep_size))
    return small


def _small_rope(rope: Mapping[str, Any], small: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Factors of rotary embeddings, of which there is one for each pair of features of a head."""
    if any(isinstance(part, dict) for part in rope.values()):
        return {
            name: _small_rope(part, small, values) if isinstance(part, dict) else part for name, part in rope.items()
        }
    found = dict(rope)
    features = small.get("qk_rope_head_dim", small.get("head_dim", HEAD))
    for name in ("short_factor", "long_factor"):
        if isinstance(found.get(name), list):
            found[name] = found[name][: features // 2]
    if isinstance(sections := found.get("mrope_section"), list):
        rest = features // 2 - (len(sections) - 1)
        found["mrope_section"] = [rest, *[1] * (len(sections) - 1)]
    return found


def _take_layers(values: dict[str, Any], count: int, layers: list[int]) -> None:
    """Keep the entries of `layers` of whatever has one for each layer."""
    for name, value in list(values.items()):
        if isinstance(value, list | tuple) and len(value) == count:
            values[name] = [value[index] for index in layers]
        elif name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") and value == count:
            values[name] = len(layers)
        elif isinstance(value, list) and value and name.endswith(("_layers", "_layer_ids")):
            if all(type(entry) is int for entry in value):  # numbers of layers
                values[name] = [index for index, layer in enumerate(layers) if layer in value]
        elif isinstance(value, dict) and value and all(str(key).isdecimal() for key in value):
            by_layer = {int(key): entry for key, entry in value.items()}
            values[name] = {index: by_layer[layer] for index, layer in enumerate(layers) if layer in by_layer}
    if isinstance(top := values.get("max_window_layers"), int):
        values["max_window_layers"] = min(top, max(0, len(layers) - 1)) if top < count else len(layers)


def _made(config: PreTrainedConfig, values: dict[str, Any]) -> PreTrainedConfig:
    values = {name: value for name, value in values.items() if name not in ("transformers_version", "_name_or_path")}
    return AutoConfig.for_model(values.pop("model_type", config.model_type), **values)


def _is_text(value: Any, text: Any) -> bool:
    return isinstance(value, dict) and value.get("model_type") == text.model_type


def _count(value: Any) -> int | None:
    """A size: a whole number above 0."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def described(config: PreTrainedConfig) -> str:
    """The sizes of a config, in words."""
    return ", ".join(_parts(config.get_text_config()))


def _parts(text: Any) -> Iterator[str]:
    yield f"{text.num_hidden_layers} layers of hidden size {text.hidden_size}"
    heads, shared = (_first(text, names) for names in (QUERY, KEY))
    if heads is not None:
        yield f"{heads} heads" + (f" ({shared} of keys and values)" if shared not in (None, heads) else "")
    experts = _first(text, NUMBER_OF_EXPERTS)
    if experts is not None:
        yield f"{experts} experts"
    yield f"vocabulary {text.vocab_size}"


def _first(text: Any, names: tuple[str, ...]) -> int | None:
    """The first size of these names that a config has."""
    return next((size for name in names if (size := _count(getattr(text, name, None)))), None)
