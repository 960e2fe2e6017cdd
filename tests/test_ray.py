"""A run inside Ray Train: `examples/ray` has the losses of the same ranks without Ray, and errors are reported."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pool import WorkerPool

pytest.importorskip("ray", reason="ray is not installed (pip install hf-nanotron[ray])")

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "ray" / "train.py"


def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ray_example", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def without_ray(config: dict[str, Any]) -> list[float]:
    losses: list[float] = example().train(config)
    return losses


def with_ray(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLE), "--output-dir", str(out), *options],
        env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_DEDUP_LOGS": "0", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def test_two_workers_of_ray(pool: WorkerPool, tmp_path: Path) -> None:
    done = with_ray(tmp_path / "out", "--steps", "6")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    config = {"output_dir": str(tmp_path / "plain"), "tp_size": 2, "steps": 6, "cpu": True}
    expected, _ = pool.run(2, without_ray, config)
    assert json.loads((tmp_path / "out" / "losses.json").read_text()) == pytest.approx(expected, rel=1e-6)
    assert expected[-1] < expected[0] and f"loss {expected[-1]:.3f} after 6 steps" in done.stdout
    assert (tmp_path / "out" / "checkpoint-6" / "model.safetensors").is_file()
    assert len(list((tmp_path / "out" / "ray").glob("ray/checkpoint_*/**/model.safetensors"))) == 2


def test_an_error_of_a_rank_is_reported(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    if not pytestconfig.getoption("full_matrix"):
        pytest.skip("with --full-matrix")
    done = with_ray(tmp_path / "out", "--tp-size", "3")
    assert done.returncode != 0 and "does not divide the world size 2" in done.stderr
