"""Model configurations: nanotron's `model_config.json` <-> the Hub's `config.json`, for Llama and Qwen2.

Every field of either side is in one of the tables below: carried over, a setting of the run that leaves the model
as it is, or refused unless neutral. A field in none of them is refused too, because a converter that ignores what it
does not know writes a model that computes something else.

Source of the fields: nanotron at commit 2411b022, `config/models_config.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

from ...checkpoint.files.schema import anything, boolean, each, mapping, number, optional, record, require, text, whole
from .mapping import Architecture

# nanotron's flag that names the family -> the Hub's model_type and architecture.
FAMILIES = {
    "is_llama_config": ("llama", "LlamaForCausalLM"),
    "is_qwen2_config": ("qwen2", "Qwen2ForCausalLM"),
}

# The same name and the same meaning on both sides.
SAME = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "tie_word_embeddings",
    "use_cache",
    "vocab_size",
)

# Converted by hand: rotary embeddings, and biases that decide which Hub family the model is.
CONVERTED = ("rope_theta", "rope_scaling", "rope_interleaved", "attention_bias")

# Settings of a nanotron run that do not change the model, with the values written for a fresh one.
RUN_ONLY = {
    "pretraining_tp": 1,
    "_attn_implementation": "flash_attention_2",
    "z_loss_enabled": False,
    "z_loss_coefficient": 0.0001,
}
RUN_ONLY_QWEN2 = (
    "flex_attention_mask",
    "_fused_rotary_emb",
    "_fused_rms_norm",
    "_use_qkv_packed",
    "_use_doc_masking",
    "log_attn_probs",
    "ring_attn_heads_k_stride",
)

# nanotron fields that change the computation in ways the two Hub families here do not have.
NANOTRON_REFUSED = {
    "moe_config": "mixture of experts",
    "no_rope_layer": "layers without rotary embeddings",
    "sliding_window_size": "sliding window attention",
    "rope_seq_len_interpolation_factor": "interpolated positions",
}

_SIZE, _ID = whole(1, 1 << 31), whole(-1, 1 << 31)
_FIELDS = record(  # what they may be, where they are there
    {},
    {
        **dict.fromkeys(("hidden_size", "intermediate_size", "max_position_embeddings", "vocab_size"), _SIZE),
        "num_attention_heads": whole(1, 1 << 16),
        "num_hidden_layers": whole(1, 1 << 14),
        "num_key_value_heads": optional(whole(1, 1 << 16)),
        **dict.fromkeys(("initializer_range", "rms_norm_eps", "rope_theta"), number),
        **dict.fromkeys(("tie_word_embeddings", "use_cache"), boolean),
        **dict.fromkeys(("rope_interleaved", "attention_bias"), optional(boolean)),
        "hidden_act": text(),
        **dict.fromkeys(("bos_token_id", "pad_token_id"), optional(_ID)),
        "eos_token_id": lambda value: each(_ID)(value) if isinstance(value, list) else optional(_ID)(value),
        "rope_scaling": optional(mapping(anything)),
        "pretraining_tp": optional(_SIZE),
    },
)

# Hub fields that nanotron's Llama and Qwen2 cannot express: field, the only value they compute, what it would mean.
HUB_REFUSED = (
    ("attention_bias", False, "biases in Llama's attention"),
    ("mlp_bias", False, "biases in the MLP"),
    ("use_sliding_window", False, "sliding window attention"),
    ("quantization_config", None, "quantized weights"),
)


def architecture(model_config: Mapping[str, Any]) -> Architecture:
    """The sizes of the model that a `model_config.json` describes, after checking that it can be converted."""
    flag = _family_flag(model_config)
    required = [*SAME, "rope_theta"]
    if flag == "is_llama_config":
        # Its default was true in older nanotron, so a file without it could mean either.
        required.append("rope_interleaved")
    missing = [name for name in required if name not in model_config]
    if missing:
        raise ValueError(f"model_config.json lacks {', '.join(missing)}: add the values that the run used.")
    for name, what in NANOTRON_REFUSED.items():
        if model_config.get(name) is not None:
            raise ValueError(
                f"model_config.json: {name}={model_config[name]!r} means {what}, which Hub Llama and Qwen2 models "
                f"do not have; only checkpoints with {name}=null can be converted."
            )
    known = {*SAME, *CONVERTED, *RUN_ONLY, *RUN_ONLY_QWEN2, *NANOTRON_REFUSED, *FAMILIES}
    unknown = {name: value for name, value in model_config.items() if name not in known and value}
    if unknown:
        raise ValueError(
            f"model_config.json: unknown settings {unknown}; if they leave the model's outputs unchanged, remove them "
            "from the file and convert again."
        )
    require(_FIELDS, dict(model_config), "model_config.json", "copy the checkpoint again")
    heads, kv_heads = model_config["num_attention_heads"], model_config["num_key_value_heads"]
    kv_heads = heads if kv_heads is None else kv_heads
    if model_config["hidden_size"] % heads or heads % kv_heads:
        raise ValueError(
            f"hidden_size={model_config['hidden_size']}, num_attention_heads={heads}, num_key_value_heads={kv_heads}: "
            "each must be a multiple of the next."
        )
    return Architecture(
        hidden=model_config["hidden_size"],
        layers=model_config["num_hidden_layers"],
        heads=heads,
        kv_heads=kv_heads,
        mlp=model_config["intermediate_size"],
        vocabulary=model_config["vocab_size"],
        # nanotron's Llama has no biases whatever the field says.
        qkv_bias=flag == "is_qwen2_config" and bool(model_config.get("attention_bias", False)),
        untied=not model_config["tie_word_embeddings"],
        rope_interleaved=bool(model_config.get("rope_interleaved", False)),
    )


def _family_flag(model_config: Mapping[str, Any]) -> str:
    flags = [
        name for name, value in model_config.items() if name.startswith("is_") and name.endswith("_config") and value
    ]
    if len(flags) == 1 and flags[0] in FAMILIES:
        return flags[0]
    raise ValueError(
        f"model_config.json: unsupported architecture ({', '.join(flags) or 'no is_*_config key'}); supported are "
        f"{', '.join(FAMILIES)}."
    )


def to_hub(model_config: Mapping[str, Any], dtype: torch.dtype) -> PretrainedConfig:
    """The Hub configuration of a nanotron `model_config.json` that `architecture` accepted.

    A Qwen2 without biases (nanotron's default) becomes a `LlamaForCausalLM`: the Hub's Qwen2 always has biases, and
    without them the two compute the same, so no parameter need be made up.
    """
    family = "is_qwen2_config" if architecture(model_config).qkv_bias else "is_llama_config"
    model_type, class_name = FAMILIES[family]
    fields = {name: model_config[name] for name in SAME}
    if model_type == "llama":
        fields["pretraining_tp"] = model_config.get("pretraining_tp", 1)
    scaling = dict(model_config.get("rope_scaling") or {})
    if scaling:
        _warn_rope_scaling(scaling)
    if "type" in scaling:  # the key's older name
        scaling["rope_type"] = scaling.pop("type")
    rope = {"rope_type": "default", **scaling, "rope_theta": model_config["rope_theta"]}
    return AutoConfig.for_model(model_type, architectures=[class_name], dtype=dtype, rope_parameters=rope, **fields)


def hub_family(config: Mapping[str, Any]) -> str:
    """nanotron's family flag for the contents of a `config.json`."""
    model_type, architectures = config.get("model_type"), config.get("architectures") or []
    if not isinstance(architectures, list):
        raise ValueError(f"config.json: architectures={architectures!r} is not a list.")
    for flag, (supported_type, supported_class) in FAMILIES.items():
        if model_type == supported_type and all(name == supported_class for name in architectures):
            return flag
    raise ValueError(
        f"config.json: unsupported architecture (model_type={model_type!r}, architectures={architectures}); supported "
        f"are {', '.join(class_name for _, class_name in FAMILIES.values())}."
    )


def from_hub(config: PretrainedConfig) -> dict[str, Any]:
    """nanotron's `model_config.json` for a Hub Llama or Qwen2 configuration."""
    flag = hub_family({"model_type": config.model_type, "architectures": config.architectures})
    for name, neutral, what in HUB_REFUSED:
        if getattr(config, name, neutral) != neutral:
            raise ValueError(
                f"config.json: {name}={getattr(config, name)!r} means {what}, which nanotron's model does not have; "
                f"only models with {name}={neutral!r} can be converted."
            )
    head_dim = getattr(config, "head_dim", None)
    if head_dim is not None and head_dim * config.num_attention_heads != config.hidden_size:
        raise ValueError(
            f"config.json: head_dim={head_dim} with hidden_size={config.hidden_size} and num_attention_heads="
            f"{config.num_attention_heads}: nanotron's heads are always hidden_size / num_attention_heads wide."
        )
    rope = dict(config.rope_parameters)
    theta = rope.pop("rope_theta")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"config.json: partial_rotary_factor={rope['partial_rotary_factor']} must be 1 for nanotron.")
    scaling = None if rope.get("rope_type", "default") == "default" else rope
    if scaling:
        _warn_rope_scaling(scaling)
    return {
        **{name: getattr(config, name) for name in SAME},
        **RUN_ONLY,
        flag: True,
        "attention_bias": config.model_type == "qwen2",
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rope_interleaved": False,
    }


def _warn_rope_scaling(scaling: Mapping[str, Any]) -> None:
    warnings.warn(
        f"rope_scaling={dict(scaling)} is carried over, but nanotron stores it without using it: it trains with plain "
        "rotary embeddings, while transformers applies the scaling.",
        stacklevel=3,
    )
