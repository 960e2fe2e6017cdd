"""Which blocks of transformers' models can be divided by the heads of their states, and how."""

from __future__ import annotations

from typing import Any

from ...parallel.cp.mixer_heads import HeadCut


def _mamba2_features(block: Any) -> tuple[int, ...]:
    state = block.n_groups * block.ssm_state_size
    return block.intermediate_size, state, state


def _mamba2_projection(block: Any) -> tuple[int, ...]:
    return block.intermediate_size, *_mamba2_features(block), block.num_heads


def _delta_features(block: Any) -> tuple[int, ...]:
    return block.key_dim, block.key_dim, block.value_dim


def _kimi_features(block: Any) -> tuple[int, ...]:
    return (block.qkv_dim,) * 3


MAMBA2 = HeadCut(
    counts=("num_heads", "n_groups"),
    widths=("intermediate_size", "conv_dim"),
    projections={("in_proj",): _mamba2_projection},
    weights={
        "conv1d.weight": (0, _mamba2_features),
        "conv1d.bias": (0, _mamba2_features),
        **dict.fromkeys(("dt_bias", "A_log", "D", "norm.weight"), (0, None)),
    },
)

_DELTA: dict[str, Any] = {
    "counts": ("num_k_heads", "num_v_heads"),
    "widths": ("key_dim", "value_dim", "conv_dim"),
    "weights": {"conv1d.weight": (0, _delta_features), "dt_bias": (0, None), "A_log": (0, None)},
}
# Queries, keys, values and gates lie head by head of the keys.
QWEN3_NEXT = HeadCut(projections={("in_proj_qkvz",): None, ("in_proj_ba",): None}, **_DELTA)
QWEN3_5 = HeadCut(projections={("in_proj_qkv",): _delta_features, **{(f"in_proj_{x}",): None for x in "zba"}}, **_DELTA)
OLMO_HYBRID = HeadCut(projections={(f"{x}_proj",): None for x in "qkvabg"}, output="o_proj", **_DELTA)
KIMI = HeadCut(
    counts=("num_heads",),
    widths=("qkv_dim", "conv_dim"),
    projections={
        **{(f"{x}_proj",): None for x in "qkvb"},
        ("forget_gate.f_a_proj", "forget_gate.f_b_proj"): None,
        ("g_a_proj", "g_b_proj"): None,
    },
    weights={
        "conv1d.weight": (0, _kimi_features),
        "forget_gate.dt_bias": (0, None),
        "forget_gate.A_log": (2, None),
    },
    output="o_proj",
)

# By class.
DIVIDED_BY_HEADS = {
    "BambaMixer": MAMBA2,
    "NemotronHMamba2Mixer": MAMBA2,
    "Qwen3NextGatedDeltaNet": QWEN3_NEXT,
    "Qwen3_5GatedDeltaNet": QWEN3_5,
    "Qwen3_5MoeGatedDeltaNet": QWEN3_5,
    "LaraMiniGatedDeltaNet": QWEN3_5,
    "OlmoHybridGatedDeltaNet": OLMO_HYBRID,
    "KimiLinearDeltaAttention": KIMI,
}
