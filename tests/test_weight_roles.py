"""What each weight of a stock model is, and the parameter groups that a rule for each makes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family_runs import KNOWN
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hf_nanotron.models.stock.anatomy import dissect
from hf_nanotron.models.weight_roles import OTHER, weight_roles
from hf_nanotron.optim.adamw import AdamW
from hf_nanotron.optim.build import UpdateRule, build_optimizer
from hf_nanotron.parallel.shard_spec import ShardSpec
from hf_nanotron.parallel.zero.segment import Segment

# Types outside of the table of families.
MORE: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128},
    "mamba": {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 128, "state_size": 8},
    "mamba2": {"hidden_size": 64, "num_heads": 8, "head_dim": 16, "num_hidden_layers": 2, "vocab_size": 128},
}
CHOSEN = ("llama", "qwen3_moe", "gpt_oss", "llama4_text", "deepseek_v4", "zaya", "gemma4_text", "bamba", "phi3", *MORE)


def stock_model(family: str) -> PreTrainedModel:
    """On the meta device."""
    fields = MORE[family] if family in MORE else KNOWN[family]["config"]
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields))


@pytest.mark.parametrize("family", [*KNOWN, *MORE])
def test_every_weight_has_a_role(family: str, pytestconfig: pytest.Config) -> None:
    """Some families; all with `--full-matrix`. What is called "other" is in a table, or a convolution."""
    if family not in CHOSEN and not pytestconfig.getoption("full_matrix"):
        pytest.skip("runs with --full-matrix")
    try:
        model = stock_model(family)
    except ImportError as error:
        pytest.skip(str(error).strip().splitlines()[0])
    roles = weight_roles(dissect(model))
    assert roles.keys() == dict(model.named_parameters(remove_duplicate=False)).keys()
    kinds = {role.kind for role in roles.values()}
    assert "embedding" in kinds and ("matrix" in kinds or "experts" in kinds)
    for name, role in roles.items():
        owner, _, leaf = name.rpartition(".")
        module, shape = model.get_submodule(owner), tuple(model.get_parameter(name).shape)
        assert role.fan_out == shape[role.out_dim] and sum(role.part_sizes) == role.fan_out, name
        if role.kind in ("matrix", "head", "embedding"):
            assert len(shape) == 2 and role.fan_in == shape[1 - role.out_dim], name
        elif role.kind == "experts":
            assert {role.fan_in, role.fan_out} == set(shape[1:]), name
        elif role.kind in ("norm", "bias"):
            assert role.fan_in == 1, name
        elif role.kind == "other":
            classes = [cls.__name__ for cls in type(module).__mro__]
            named = any(leaf == its and any(part in cls for cls in classes) for part, its in OTHER)
            assert named or isinstance(module, nn.modules.conv._ConvNd), name
        if isinstance(module, nn.Linear) and leaf == "weight":
            assert (role.fan_in, role.fan_out) == (module.in_features, module.out_features), name
            assert role.kind in ("matrix", "head", "router"), name


# As the code of transformers uses each weight: kind, inputs, outputs (of each layer that is stored in it).
EXPECTED: dict[str, dict[str, tuple[str, int, tuple[int, ...]]]] = {
    "qwen3_moe": {
        "model.embed_tokens.weight": ("embedding", 128, (64,)),
        "lm_head.weight": ("head", 64, (128,)),
        "model.layers.1.self_attn.q_norm.weight": ("norm", 1, (16,)),
        "model.layers.1.self_attn.k_proj.weight": ("matrix", 64, (32,)),
        "model.layers.1.mlp.gate.weight": ("router", 64, (8,)),
        "model.layers.1.mlp.experts.gate_up_proj": ("experts", 64, (32, 32)),
        "model.layers.1.mlp.experts.down_proj": ("experts", 32, (64,)),
    },
    "llama4_text": {  # [experts, in, out], and a sigmoid over each expert's score
        "model.layers.1.feed_forward.router.weight": ("router", 64, (8,)),
        "model.layers.1.feed_forward.experts.gate_up_proj": ("experts", 64, (32, 32)),
        "model.layers.1.feed_forward.experts.down_proj": ("experts", 32, (64,)),
    },
    "gpt_oss": {
        "model.layers.1.self_attn.sinks": ("bias", 1, (4,)),
        "model.layers.1.self_attn.q_proj.bias": ("bias", 1, (64,)),
        "model.layers.1.mlp.experts.gate_up_proj": ("experts", 64, (32, 32)),
        "model.layers.1.mlp.experts.gate_up_proj_bias": ("bias", 1, (32, 32)),
    },
    "phi3": {
        "model.layers.0.self_attn.qkv_proj.weight": ("matrix", 64, (64, 32, 32)),
        "model.layers.0.mlp.gate_up_proj.weight": ("matrix", 64, (128, 128)),
        "model.layers.0.mlp.down_proj.weight": ("matrix", 128, (64,)),
    },
    "mamba2": {
        "backbone.layers.0.mixer.in_proj.weight": ("matrix", 64, (128, 128, 1024, 1024, 8)),
        "backbone.layers.0.mixer.conv1d.weight": ("other", 4, (128 + 2 * 1024,)),
        "backbone.layers.0.mixer.A_log": ("bias", 1, (8,)),
        "backbone.layers.0.mixer.norm.weight": ("norm", 1, (128,)),
    },
    "gpt2": {  # [in, out]
        "transformer.wpe.weight": ("embedding", 1024, (64,)),
        "transformer.h.0.attn.c_attn.weight": ("matrix", 64, (64, 64, 64)),
        "transformer.h.0.mlp.c_proj.weight": ("matrix", 256, (64,)),
    },
    "gpt_neox": {"gpt_neox.layers.0.attention.query_key_value.weight": ("matrix", 64, (64, 64, 64))},
    "falcon": {"transformer.h.0.self_attention.query_key_value.weight": ("matrix", 64, (64, 16, 16))},
    "qwen3_5_text": {"model.layers.0.linear_attn.in_proj_qkv.weight": ("matrix", 64, (32, 32, 64))},
    "qwen3_next": {
        "model.layers.0.linear_attn.in_proj_qkvz.weight": ("matrix", 64, (32, 32, 64, 64)),
        "model.layers.0.linear_attn.in_proj_ba.weight": ("matrix", 64, (4, 4)),
    },
}


@pytest.mark.parametrize("family", EXPECTED)
def test_roles_are_those_of_the_code(family: str) -> None:
    roles = weight_roles(dissect(stock_model(family)))
    found = {name: (roles[name].kind, roles[name].fan_in, roles[name].part_sizes) for name in EXPECTED[family]}
    assert found == EXPECTED[family]


@pytest.mark.parametrize(
    ("family", "name", "first"),
    [
        ("gpt_oss", "model.layers.0.mlp.experts.gate_up_proj", ((0, 1), (2, 3))),
        ("gpt_neox", "gpt_neox.layers.0.attention.query_key_value.weight", ((0, 16), (48, 64))),
    ],
)
def test_interleaved_layers_are_taken_apart(family: str, name: str, first: Any) -> None:
    """GPT-OSS stores the outputs of gate and up by turns, GPT-NeoX query, key and value of each head."""
    role = weight_roles(dissect(stock_model(family)))[name]
    assert role.parts is not None and role.parts[0][:2] == first
    assert [ranges[0][0] for ranges in role.parts] == [index * first[0][1] for index in range(len(role.parts))]


# ---- parameter groups ----


def segments_of(names: tuple[str, ...]) -> list[Segment]:
    masters = {name: nn.Parameter(torch.full((4,), float(index + 1))) for index, name in enumerate(names)}
    return [Segment(name, ShardSpec(name, (4,)), 0, 4, m, torch.ones(4)) for name, m in masters.items()]


def test_groups_by_rule() -> None:
    """Rates and epsilons are factors, and a step's decay is the same part of every decayed weight."""
    names = ("embedding", "matrix", "norm")
    rules = {"matrix": UpdateRule(rate=0.25, eps=0.5), "norm": UpdateRule(eps=0.5)}
    arguments = {"lr": 0.1, "eps": 1e-6, "betas": (0.9, 0.95)}
    segments = segments_of(names)
    decayed = {"embedding", "matrix"}
    optimizer = build_optimizer(segments, names, decayed, 0.01, AdamW, arguments, rules)
    groups = [
        (tuple(int(p[0]) for p in group["params"]), group["lr"], group["eps"], group["weight_decay"])
        for group in optimizer.param_groups
    ]
    assert groups == [
        ((1,), 0.1, 1e-6, 0.01),
        ((), 0.1, 1e-6, 0.0),
        ((2,), 0.025, 5e-7, 0.04),
        ((), 0.025, 5e-7, 0.0),
        ((), 0.1, 5e-7, 0.01),
        ((3,), 0.1, 5e-7, 0.0),
    ]
    # The same groups where other ranks have the weights.
    others = build_optimizer(segments[:1], names, decayed, 0.01, AdamW, arguments, rules)
    assert [len(group["params"]) for group in others.param_groups] == [1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("rules", [None, {}, {"matrix": UpdateRule()}])
def test_one_rule_makes_the_groups_of_trainer(rules: Any) -> None:
    names = ("embedding", "matrix", "norm")
    optimizer = build_optimizer(segments_of(names), names, {"matrix"}, 0.01, torch.optim.AdamW, {"lr": 0.1}, rules)
    found = [(len(group["params"]), group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert found == [(1, 0.1, 0.01), (2, 0.1, 0.0)]
