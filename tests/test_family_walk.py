"""The walk of families through the Trainer in bf16: what it calls wrong, and on a CPU the families that were.

`--full-matrix` walks every family with the default arguments here; `tests/test_gpu_families.py` walks on GPUs.
"""

from __future__ import annotations

import argparse
import copy
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from family_walk import (
    MODES,
    STEPS,
    Case,
    Figures,
    Worker,
    compare,
    judged,
    main,
    read,
    record,
    run_case,
    table,
    walk,
    wider,
)
from pool import WorkerPool

NEEDS_TIMM = "gemma3n"


def figures(losses: list[float], gradient: float = 0.0, weight: float = 0.0) -> dict[str, Any]:
    return asdict(Figures(losses, [1.0] * len(losses), gradient, weight, "a.weight"))


def case(mode: str, losses: list[float], gradient: float = 0.0, weight: float = 0.0) -> Case:
    stock = {"fp32": figures([4.0] * STEPS), "bf16": figures([4.02] * STEPS, 0.01, 0.02)}
    return judged(Case("llama", mode, "failed", figures=figures(losses, gradient, weight), stock=stock))


@pytest.mark.parametrize(
    ("mode", "losses", "gradient", "weight", "says"),
    [
        ("default", [4.0] * STEPS, 0.039, 0.139, ""),
        ("default", [4.1] * STEPS, 0.0, 0.0, "loss 2.50% from fp32 (stock 0.50%)"),
        ("default", [4.0] * STEPS, 0.05, 0.0, "gradient 5.00% from fp32 (stock 1.00%)"),
        ("packed", [4.0] * STEPS, 0.0, 0.2, "gradient of a.weight 20.00% from fp32"),
        ("fp8", [4.0] * STEPS, 0.179, 0.419, ""),
        ("fp8", [4.0] * STEPS, 0.181, 0.0, "gradient 18.10%"),
        ("fp8", [4.0] * STEPS, 0.0, 0.421, "gradient of a.weight 42.10% from fp32"),
        ("recompute", [4.0] * (STEPS - 1), 0.0, 0.0, "loss inf%"),
        ("recompute", [4.0, float("nan"), 4.0, 4.0], 0.0, 0.0, "loss inf%"),
        ("default", [4.0] * STEPS, float("nan"), 0.0, "gradient nan%"),
    ],
)
def test_what_is_wrong(mode: str, losses: list[float], gradient: float, weight: float, says: str) -> None:
    found = case(mode, losses, gradient, weight)
    assert found.state == ("off" if says else "ok")
    assert found.reason.startswith(says) and bool(found.reason) == bool(says)


def test_stock_may_fail_in_bf16() -> None:
    stock = {"fp32": figures([4.0] * STEPS)}
    rows = [
        Case("llama", "default", "failed", figures=figures([4.0] * STEPS, error), stock=stock) for error in (0.2, 0.3)
    ]
    assert [judged(row).state for row in rows] == ["ok", "off"]
    assert "| `llama` | fails | off (1) |" in table(map(asdict, rows))


def test_errors_of_gradients() -> None:
    exact = {"large": torch.full((4,), 10.0), "small": torch.full((4,), 0.5), "tied": torch.zeros(4)}
    found = Figures()
    compare(found, {"large": exact["large"], "small": -exact["small"]}, exact)
    assert found.worst_weight == "small" and found.weight_error == pytest.approx(2 / 1.2, rel=1e-2)
    assert found.gradient_error == pytest.approx(2 / 20.025, rel=1e-3)
    compare(found, {"small": exact["small"]}, exact)  # a gradient that is not there
    assert found.gradient_error == pytest.approx(1.0, rel=1e-2)
    compare(found, {"large": exact["large"] * float("nan"), "small": exact["small"]}, exact)
    assert found.worst_weight == "large" and found.weight_error != found.weight_error
    found = Figures()
    compare(found, {**exact, "unused": torch.zeros(4)}, exact)  # stock has none where the loss does not depend on it
    assert found.gradient_error == found.weight_error == 0.0
    compare(found, {**exact, "unused": torch.ones(4)}, exact)
    assert found.worst_weight == "unused" and found.weight_error == pytest.approx(10, rel=1e-2)


def test_the_record_keeps_what_was_not_run_again(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    rows = [asdict(case(mode, [4.0] * STEPS, 0.0123)) for mode in MODES[:2]]
    record(rows, path)
    record([asdict(case("packed", [5.0] * STEPS))], path)
    assert [(row["mode"], row["state"]) for row in read(path)] == [("default", "ok"), ("packed", "off")]
    page = table(read(path))
    assert "| `llama` | 1.0% | 1.2% | off (1) | not run | not run |" in page
    assert "1. loss 25.00% from fp32 (stock 0.50%)" in page


def test_a_family_that_is_not_known_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "sys.argv", ["family_walk.py", "--out", str(tmp_path / "walk.jsonl"), "--families", "llama", "lama"]
    )
    with pytest.raises(SystemExit):
        main()
    assert "--families lama: no tested family" in capsys.readouterr().err


def test_wider_configs() -> None:
    values = {"hidden_size": 64, "num_hidden_layers": 4, "n_inner": None, "mamba_head_dim": 16, "use_qk_norm": True}
    tower = {"vision_config": {"hidden_size": 32, "adapter_out_dim": 64}, "text_config": {"head_dim": 16}}
    before = copy.deepcopy({**values, **tower})
    found = wider(before)
    assert found == {
        **{**values, "hidden_size": 256},
        "vision_config": {"hidden_size": 32, "adapter_out_dim": 256},
        "text_config": {"head_dim": 64},
    }
    assert before == {**values, **tower}


FORMERLY_WRONG = ("minimax",)


def test_families_that_were_wrong(pool: WorkerPool, tmp_path: Path) -> None:
    (rows,) = pool.run(1, run_cases, [(name, "default") for name in FORMERLY_WRONG], str(tmp_path))
    assert [row["state"] for row in rows] == ["ok"] * len(rows), rows


def run_cases(jobs: list[tuple[str, str]], folder: str) -> list[dict[str, Any]]:
    return [asdict(run_case(name, mode, None, Path(folder, f"{name}.pt"), None)) for name, mode in jobs]


def options(path: Path, **changes: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"out": path, "workers": 2, "compile": None, "limit": 200, "seconds": 1e9, **changes})


def test_every_family_on_a_cpu(pytestconfig: pytest.Config, tmp_path: Path) -> None:
    if not pytestconfig.getoption("full_matrix"):
        pytest.skip("runs with --full-matrix")
    from family_runs import KNOWN

    rows = walk([(family, "default") for family in KNOWN], options(tmp_path / "walk.jsonl"))
    states = {row["family"]: (row["state"], row["reason"]) for row in rows}
    assert states.pop(NEEDS_TIMM, ("no stock", ""))[0] == "no stock"
    assert {name: state for name, state in states.items() if state[0] != "ok"} == {}
    assert states.keys() == KNOWN.keys() - {NEEDS_TIMM}


def test_a_worker_that_dies_or_is_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its case has failed, and the others run."""

    class Odd(Worker):
        def run(self, job: Any, limit: float) -> dict[str, Any] | str:
            if job["family"] == "dies":
                self._process.kill()
                return super().run(job, limit)
            if job["family"] == "slow":
                return super().run(job, 0.01)
            return asdict(case(job["mode"], [4.0] * STEPS)) | {"family": job["family"]}

    monkeypatch.setattr("family_walk.Worker", Odd)
    path = tmp_path / "walk.jsonl"
    walk([(name, "default") for name in ("dies", "slow", "llama")], options(path, workers=1))
    found = {row["family"]: (row["state"], row["reason"]) for row in read(path)}
    assert found.keys() == {"dies", "slow", "llama"} and found["llama"] == ("ok", "")
    assert found["slow"][0] == found["dies"][0] == "failed" and found["slow"][1] == "it took more than 0 s"
    assert "died" in found["dies"][1]
    assert os.environ.get("CUDA_LAUNCH_BLOCKING") is None
