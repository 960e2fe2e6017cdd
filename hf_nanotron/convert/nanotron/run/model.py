"""The section `model` of nanotron's configuration -> ours: an architecture with fresh weights, or existing weights.

A table for each of nanotron's architectures says what its fields are in transformers' config, which fields choose
another `model_type` there, and which do not change the model. Source: nanotron at commit 2411b022,
`config/models_config.py` and `examples/{mamba,moe}/config*.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..config import SAME
from .keys import Keys

PREFIX = "model.model_config"
KERNELS = "kernels are chosen here by what the model and the device allow (training.attention)"
_SHARED = {name: name for name in SAME if name != "pretraining_tp"}
_KERNELS = dict.fromkeys(
    ("_attn_implementation", "_fused_rotary_emb", "_fused_rms_norm", "_use_qkv_packed", "fused_add_norm",
     "ring_attn_heads_k_stride", "log_attn_probs"), KERNELS
)  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """One of nanotron's.

    Attributes:
        model_type: transformers' for it; other fields may choose another one (`_variant`).
        fields: nanotron's name -> transformers'.
        defaults: of nanotron, where transformers has others.
        training: nanotron's name -> our training argument.
        dropped: fields that do not change the model, with why.
    """

    model_type: str
    fields: Mapping[str, str]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, str] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)


_ROTARY = {**_SHARED, "rope_theta": "rope_theta"}
_DEFAULTS = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "vocab_size": 32000,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_UNUSED = {
    "pretraining_tp": "it changes nothing",
    "interleaved_rotary": "with fresh weights the order of rotary dimensions does not matter",
    "rope_interleaved": "with fresh weights the order of rotary dimensions does not matter",
    "rope_scaling": "nanotron stores it without using it; for scaled positions set model.config.rope_scaling",
    **_KERNELS,
}

ARCHITECTURES = {
    "is_llama_config": Architecture(
        "llama", _ROTARY, _DEFAULTS, dropped={**_UNUSED, "attention_bias": "nanotron's Llama has no biases"}
    ),
    "is_qwen2_config": Architecture("llama", _ROTARY, _DEFAULTS, dropped=_UNUSED),
    "is_llamoe_config": Architecture(
        "mixtral",
        {**_ROTARY, "moe_num_experts": "num_local_experts", "num_experts_per_tok": "num_experts_per_tok"},
        _DEFAULTS,
        training={"moe_capacity_factor": "moe_capacity_factor"},
        dropped=_UNUSED,
    ),
    "is_starcoder2_config": Architecture(
        "starcoder2",
        {
            **{name: name for name in SAME if name in (
                "bos_token_id", "eos_token_id", "hidden_size", "initializer_range", "intermediate_size",
                "max_position_embeddings", "num_attention_heads", "num_hidden_layers", "vocab_size",
            )},
            "rope_theta": "rope_theta",
            "activation_function": "hidden_act",
            "layer_norm_epsilon": "norm_epsilon",
            "attn_pdrop": "attention_dropout",
            "embd_pdrop": "embedding_dropout",
            "resid_pdrop": "residual_dropout",
            "num_kv_heads": "num_key_value_heads",
            "sliding_window_size": "sliding_window",
        },
        {"num_kv_heads": 1, "hidden_size": 2048, "max_position_embeddings": 4096, "attn_pdrop": 0.1, "embd_pdrop": 0.1,
         "resid_pdrop": 0.1, "bos_token_id": 49152, "eos_token_id": 49152, "vocab_size": 49280},
        dropped={**_KERNELS, **dict.fromkeys(
            ("attention_softmax_in_fp32", "scale_attention_softmax_in_fp32", "scale_attn_weights", "grouped_query",
             "multi_query", "use_position_embeddings", "use_rotary_embeddings"), "as transformers' Starcoder2 has it"
        )},
    ),
    "is_mamba_config": Architecture(
        "mamba",
        {
            "d_model": "hidden_size",
            "num_hidden_layers": "num_hidden_layers",
            "vocab_size": "vocab_size",
            "pad_token_id": "pad_token_id",
            "rms_norm_eps": "layer_norm_epsilon",
            "residual_in_fp32": "residual_in_fp32",
            "ssm_cfg.bias": "use_bias",
            "ssm_cfg.conv_bias": "use_conv_bias",
            "ssm_cfg.d_conv": "conv_kernel",
            "ssm_cfg.d_state": "state_size",
            "ssm_cfg.dt_init": "time_step_init_scheme",
            "ssm_cfg.dt_init_floor": "time_step_floor",
            "ssm_cfg.dt_max": "time_step_max",
            "ssm_cfg.dt_min": "time_step_min",
            "ssm_cfg.dt_rank": "time_step_rank",
            "ssm_cfg.dt_scale": "time_step_scale",
            "ssm_cfg.expand": "expand",
        },
        dropped={
            **_KERNELS,
            "ssm_cfg.use_fast_path": KERNELS,
            "dtype": "model.dtype holds",
            "rms_norm": "transformers' Mamba has RMS norms",
            "pad_vocab_size_multiple": "the vocabulary is not padded",
        },
    ),
}  # fmt: skip


def model_config(keys: Keys) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of `model.config`, and those of `training` that nanotron has in the model's.

    Raises:
        ValueError: for an architecture that nanotron does not have either.
    """
    given = keys.below(PREFIX)
    flags = [name for name, value in given.items() if name.startswith("is_") and name.endswith("_config") and value]
    flags = flags or ["is_qwen2_config"]  # as nanotron takes a mapping without one
    if len(flags) > 1 or flags[0] not in ARCHITECTURES:
        raise ValueError(
            f"{keys.source}: {PREFIX} is of {', '.join(flags)}; known are {', '.join(ARCHITECTURES)}. Put one "
            "of them into a copy of the file, and write model.config of the result yourself."
        )
    architecture = ARCHITECTURES[flags[0]]
    given = {name: value for name, value in given.items() if name not in ARCHITECTURES}
    values = {**architecture.defaults, **{name: value for name, value in given.items() if value is not None}}
    found: dict[str, Any] = {"model_type": architecture.model_type}
    found |= {ours: values[theirs] for theirs, ours in architecture.fields.items() if theirs in values}
    done = {*architecture.fields, *architecture.training}
    if flags[0] == "is_qwen2_config":
        done |= _variant(keys, values, found)
    training = {ours: values[theirs] for theirs, ours in architecture.training.items() if theirs in values}
    training |= _z_loss(values)
    done |= {"z_loss_enabled", "z_loss_coefficient"}
    for name, value in given.items():
        if name not in done and value is not None and value is not False:
            keys.note(f"{PREFIX}.{name}", architecture.dropped.get(name, f"{found['model_type']} has nothing like it"))
    return found, training


def _z_loss(values: Mapping[str, Any]) -> dict[str, Any]:
    return {"z_loss_coefficient": values.get("z_loss_coefficient", 1e-4)} if values.get("z_loss_enabled") else {}


def _variant(keys: Keys, values: Mapping[str, Any], found: dict[str, Any]) -> set[str]:
    """What nanotron's Qwen2 is in transformers, by the fields that make it another model. Returns what it has used."""
    if "moe_config.num_experts" in values or "moe_config.top_k" in values:
        return _experts(keys, values, found)
    if values.get("no_rope_layer") is not None:
        found |= {"model_type": "smollm3", "no_rope_layer_interval": values["no_rope_layer"]}
        found["attention_bias"] = bool(values.get("attention_bias", False))
        return {"no_rope_layer", "attention_bias"}
    window, biases = values.get("sliding_window_size"), bool(values.get("attention_bias", False))
    if biases:
        found["model_type"] = "qwen2"
        if window is not None:
            found |= {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 0}
    elif window is not None:
        found |= {"model_type": "mistral", "sliding_window": window}
    return {"attention_bias", "sliding_window_size"}


def _experts(keys: Keys, values: Mapping[str, Any], found: dict[str, Any]) -> set[str]:
    used = {f"moe_config.{name}" for name in ("num_experts", "top_k", "moe_intermediate_size", "router_aux_loss_coef",
                                              "enable_shared_expert", "shared_expert_intermediate_size",
                                              "token_dispatcher_type")}  # fmt: skip
    moe = {name.removeprefix("moe_config."): value for name, value in values.items() if name.startswith("moe_config.")}
    width, coefficient = moe.get("moe_intermediate_size", 1408), moe.get("router_aux_loss_coef", 0.01)
    common = {
        "num_experts_per_tok": moe.get("top_k", 2),
        "router_aux_loss_coef": coefficient,
        "output_router_logits": True,
    }
    if moe.get("enable_shared_expert"):
        found |= {
            "model_type": "qwen2_moe",
            "num_experts": moe.get("num_experts", 8),
            "moe_intermediate_size": width,
            "shared_expert_intermediate_size": moe.get("shared_expert_intermediate_size", 5632),
            "qkv_bias": bool(values.get("attention_bias", False)),
            **common,
        }
        used.add("attention_bias")
    else:
        found |= {"model_type": "mixtral", "num_local_experts": moe.get("num_experts", 8), **common}
        found["intermediate_size"] = width
        keys.note(f"{PREFIX}.moe_config.top_k", "Mixtral's weights of the chosen experts sum to 1")
    return used


def init_method(keys: Keys, config: dict[str, Any]) -> str | None:
    """Carry over how weights begin; the path of nanotron's weights, if they are not random."""
    path = keys.take("model.init_method.path")
    if path is not None:
        return str(path)
    rescale = keys.take("model.init_method.rescale_prenorm_residual")
    if config["model_type"] == "mamba" and rescale is not None:
        config["rescale_prenorm_residual"] = rescale
    std = keys.take("model.init_method.std", keys.take("model.init_method.initializer_range"))
    if std is not None:
        config["initializer_range"] = std
    if keys.take("model.init_method.use_mup"):
        keys.note(
            "model.init_method.use_mup",
            "nanotron's spectral muP has rates of its own (outputs over inputs); parametrization: spectral, with "
            "a base_hidden_size, has those that AdamW needs",
        )
    elif std is not None and config["model_type"] != "mamba":
        method = str(keys.take("model.init_method.scaling_method", "NUM_LAYERS"))
        if method.upper() == "NUM_LAYERS":
            keys.note(
                "model.init_method.scaling_method",
                "nanotron divides the standard deviation of the last matrix of attention and MLP by "
                "sqrt(2 x num_hidden_layers); transformers does not",
            )
    return None
