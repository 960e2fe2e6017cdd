"""Experts over ranks compute what stock transformers computes in one process: losses, gradient norms, every gradient.

Also where routers leave experts without tokens or send all tokens to one, under every ZeRO stage, and with recomputed
activations. Relative tolerances in fp32: 1e-6 for the loss, 1e-5 for the norm and for the gradient of each parameter.
"""

from __future__ import annotations

import functools
import tempfile
from typing import Any

import pytest
import torch
from family_runs import compare, micro_batches, reference, tiny_model
from pool import WorkerPool

from hf_nanotron.models.stock.plan import is_experts

TOLERANCE = {"loss": 1e-6, "norm": 1e-5, "gradient": 1e-5}
RANKS, EXPERTS = 4, 8
MIXTURES = ("mixtral", "qwen3_moe", "deepseek_v3")
ONCE = {"steps": 1}
LAYOUTS: list[dict[str, Any]] = [
    {"ep_size": 1, **ONCE},
    {"ep_size": 2},
    {"ep_size": 4, **ONCE},
    {"ep_size": 2, "tp_size": 2, **ONCE},
    {"ep_size": 4, "tp_size": 2, "sequence_parallel": False, **ONCE},
    {"ep_size": 2, "pp_size": 2, **ONCE},
    {"ep_size": 2, "pp_size": 2, "pp_schedule": "zb", **ONCE},
    {"ep_size": 4, "cp_size": 2},
    {"ep_size": 2, "cp_size": 2, "tp_size": 2, "cp_mode": "heads", **ONCE},
    {"ep_size": 2, "cp_size": 2, "pp_size": 2, **ONCE},
]
# By default one mixture has all of them, and each other one three, whose parts differ from the first's.
BY_DEFAULT = {"qwen3_moe": range(10), "mixtral": (1, 4, 7), "deepseek_v3": (3, 6, 8)}
ALL_TO_FEW: dict[str, Any] = {"change": "tied routers"}
ALL_TO_ONE: dict[str, Any] = {"change": "tied routers", "num_experts_per_tok": 1}


@functools.cache
def stock(family: str, **overrides: Any) -> str:
    """File of the reference."""
    path = tempfile.mktemp()
    torch.save(reference(family, **overrides), path)
    return path


def check(pool: WorkerPool, family: str, layouts: list[dict[str, Any]], overrides: dict[str, Any]) -> None:
    by_rank = pool.run(RANKS, compare, family, stock(family, **overrides), layouts, overrides)
    for index, layout in enumerate(layouts):
        for errors in (rank[index] for rank in by_rank):
            assert not isinstance(errors, str), errors
            assert all(errors[kind] <= most for kind, most in TOLERANCE.items()), f"{layout}: {errors}"


@pytest.mark.parametrize("family", MIXTURES)
def test_parity(pool: WorkerPool, family: str, pytestconfig: pytest.Config) -> None:
    every = pytestconfig.getoption("full_matrix")
    check(pool, family, LAYOUTS if every else [LAYOUTS[index] for index in BY_DEFAULT[family]], {})


@pytest.mark.parametrize(("overrides", "busy"), [(ALL_TO_FEW, 2), (ALL_TO_ONE, 1)], ids=["empty experts", "one expert"])
@pytest.mark.parametrize("family", MIXTURES)
def test_experts_without_tokens(
    pool: WorkerPool, family: str, overrides: dict[str, Any], busy: int, pytestconfig: pytest.Config
) -> None:
    if (family, busy) not in (("deepseek_v3", 2), ("mixtral", 1)) and not pytestconfig.getoption("full_matrix"):
        pytest.skip("runs with --full-matrix")
    assert {len(chosen) for chosen in experts_chosen(family, overrides)} == {busy}
    check(pool, family, [LAYOUTS[1], LAYOUTS[2], LAYOUTS[3]], overrides)


def experts_chosen(family: str, overrides: dict[str, Any]) -> list[set[int]]:
    """Which experts get tokens in the first micro-batch, for each sparse layer of the stock model."""
    model = tiny_model(family, **overrides).train()
    chosen: list[set[int]] = []
    for module in model.modules():
        if is_experts(module):
            module.register_forward_pre_hook(lambda module, args: chosen.append(set(args[1].flatten().tolist())))
    model(**micro_batches(model)[0][0])
    assert chosen
    return chosen


@pytest.mark.parametrize("zero_stage", [*(pytest.param(n, marks=pytest.mark.full_matrix) for n in (0, 2)), 1, 3])
def test_zero_and_recomputed_activations(pool: WorkerPool, zero_stage: int) -> None:
    plain = {"ep_size": 2, "zero_stage": zero_stage}
    layouts = [plain, {**plain, "checkpointing": True, **ONCE}]
    if zero_stage < 3:
        layouts.append({**plain, "tp_size": 2, "checkpointing": True, **ONCE})
    check(pool, "qwen3_moe", layouts, {})


def test_experts_that_are_a_block_themselves(pool: WorkerPool) -> None:
    """Gemma 4 hands its experts flat tokens. (It is ill-conditioned: gradients to 1e-4.)"""
    layouts = [{"ep_size": 2, "tp_size": 2, "sequence_parallel": False, **ONCE}]
    for (errors,) in pool.run(RANKS, compare, "gemma4_text", stock("gemma4_text"), layouts, {}):
        assert not isinstance(errors, str), errors
        assert errors["loss"] <= 1e-6 and errors["gradient"] <= 1e-4, errors
