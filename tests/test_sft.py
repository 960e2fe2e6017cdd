"""TRL on top: the same losses, norms and metrics on every topology as stock `trl.SFTTrainer` in one process.

Four optimizer steps in fp32 on the same conversations. Tolerances are those of `test_parity.py`; TRL's metrics are means
over micro-batches of all ranks.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
from pool import WorkerPool
from sft_runs import MODES, Log, chat_checkpoint, train_our_sft, train_stock_sft

TOLERANCE = {"first loss": 1e-6, "loss": 2e-5, "norm": 1e-4, "metrics": 2e-5}
TITLE = "relative error against stock trl.SFTTrainer in one process, four steps in fp32"
HEADER = f"{'topology':64s} " + " ".join(f"{name:>10s}" for name in TOLERANCE)
ROWS: list[str] = []

# Data-parallel ranks, arguments, and the modes that run by default: each mode meets tp, stages and dp somewhere.
TOPOLOGIES: dict[str, tuple[int, dict[str, Any], tuple[str, ...]]] = {
    "one process": (1, {}, ()),
    "tp 2": (1, {"tp_size": 2}, ("packing", "assistant-only", "label smoothing")),
    "tp 2 whole sequences": (1, {"tp_size": 2, "sequence_parallel": False}, ()),
    "pp 2": (1, {"pp_size": 2}, ("padding-free", "dft")),
    "pp 2 interleaved": (1, {"pp_size": 2, "pp_schedule": "interleaved_1f1b", "pp_virtual_stages": 2}, ()),
    "pp 2 zb": (1, {"pp_size": 2, "pp_schedule": "zb"}, ("completion-only",)),
    "dp 2 zero 0": (2, {"zero_stage": 0}, ()),
    "dp 2 zero 1": (2, {}, ("packing wrapped",)),
    "dp 2 zero 2": (2, {"zero_stage": 2}, ()),
    "dp 2 zero 3": (2, {"zero_stage": 3}, ("completion-only chat",)),
    "cp 2": (1, {"cp_size": 2}, ("dft packed",)),
    "tp 2 pp 2": (1, {"tp_size": 2, "pp_size": 2}, ()),
    "tp 2 dp 2": (2, {"tp_size": 2, "zero_stage": 2}, ()),
    "tp 2 cp 2": (1, {"tp_size": 2, "cp_size": 2}, ()),
}
CP_CANNOT = {"label smoothing"}  # it needs whole rows
COMMON: dict[str, Any] = {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 4}


@functools.cache
def reference(mode: str, layers: int, dp: int) -> Log:
    sizes = {"per_device_train_batch_size": 2 * dp, "per_device_eval_batch_size": 2 * dp}
    return train_stock_sft(chat_checkpoint(num_hidden_layers=layers), mode, True, **COMMON, **sizes)


def run(modes: tuple[str, ...], layers: int, directory: str, sizes: dict[str, Any]) -> list[Log]:
    common = {**COMMON, "per_device_train_batch_size": 2}
    return [train_our_sft(directory, mode, True, **common, **sizes) for mode in modes]


def relative(got: list[float], expected: list[float]) -> float:
    return max(abs(a - b) / max(abs(b), 1e-3) for a, b in zip(got, expected, strict=True))


def errors(got: Log, expected: Log) -> dict[str, float]:
    """By the columns of the table."""

    def column(log: Log, name: str) -> list[float]:
        return [line[name] for line in log.lines]

    assert len(got.lines) == len(expected.lines) == 4
    assert [set(line) for line in got.lines] == [set(line) for line in expected.lines]
    assert [set(line) for line in got.evaluations] == [set(line) for line in expected.evaluations]
    both = [*zip(got.evaluations, expected.evaluations, strict=True)]
    names = sorted(set(expected.lines[0]) - {"loss", "grad_norm"})
    of_metrics = [relative(column(got, name), column(expected, name)) for name in names]
    of_metrics += [relative(list(one.values()), [other[name] for name in one]) for one, other in both]
    assert column(got, "num_tokens") == column(expected, "num_tokens")
    return {
        "first loss": relative(column(got, "loss")[:1], column(expected, "loss")[:1]),
        "loss": relative(column(got, "loss"), column(expected, "loss")),
        "norm": relative(column(got, "grad_norm"), column(expected, "grad_norm")),
        "metrics": max(of_metrics),
    }


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_sft_on_every_topology(pool: WorkerPool, pytestconfig: pytest.Config, name: str) -> None:
    dp, sizes, by_default = TOPOLOGIES[name]
    modes = tuple(MODES) if pytestconfig.getoption("full_matrix") else by_default
    modes = tuple(mode for mode in modes if not ("cp_size" in sizes and mode in CP_CANNOT))
    if not modes:
        pytest.skip("runs with --full-matrix")
    layers = max(2, sizes.get("pp_size", 1) * sizes.get("pp_virtual_stages", 1))
    world = dp * sizes.get("tp_size", 1) * sizes.get("pp_size", 1) * sizes.get("cp_size", 1)
    results = pool.run(world, run, modes, layers, chat_checkpoint(num_hidden_layers=layers), sizes)
    for index, mode in enumerate(modes):
        got = results[0][index]
        assert all(logs[index].lines == got.lines for logs in results), "ranks report different figures"
        error = errors(got, reference(mode, layers, dp))
        ROWS.append(f"{f'{mode}: {name}':64s} " + " ".join(f"{error[each]:10.1e}" for each in TOLERANCE))
        assert all(error[each] <= TOLERANCE[each] for each in TOLERANCE), f"{mode} on {name}: {error}"
