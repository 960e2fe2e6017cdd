"""Random combinations of what a run can have, each compared with one process; many of them with --full-matrix."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import fuzz_runs
import fuzz_stock
import pytest
from fuzz_axes import AXES, LIMIT, REFUSED, Case, Design, is_stock, layouts, pairs, settle, world
from fuzz_compare import differences
from pool import WorkerPool

HERE = Path(__file__).parent
# Two cases of the default suite, without a process of their own: what differs from the first values of the axes.
DEFAULT: dict[str, dict[str, Any]] = {
    "experts, other ranks go on": {
        "family": "qwen3_moe tied", "tp": 2, "dp": 2, "ep": 2, "zero_stage": 2, "router_loss": True, "average": "kept",
        "save": "steps", "end": "stop", "then pp": 2, "then dp": 1, "frozen": "norms", "data": "packed", "workers": 0,
    },
    "context, documents": {
        "family": "smollm3", "cp": 2, "pp": 2, "zero_stage": 3, "optimizer": "muon", "data": "mixture",
        "loss": "z-loss", "neftune": True, "prediction": True, "recompute": "selective",
    },
}  # fmt: skip
SEEDS, CASES = range(4), 25


def run(*options: str) -> tuple[int, list[dict[str, Any]], str]:
    """The tool in a process of its own, which forks from what it has imported."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    made = subprocess.run(
        [sys.executable, str(HERE / "fuzz.py"), *options], capture_output=True, text=True, env=environment
    )
    lines = [json.loads(line) for line in made.stdout.splitlines() if line.startswith("{")]
    return made.returncode, lines, made.stdout + made.stderr[-2000:]


def prepare(case: Case, folder: Path) -> None:
    fuzz_runs.write_data(case, folder)
    fuzz_runs.make_checkpoint(case, folder)


def leg(case: Case, prefix: str, layout: dict[str, Any] | None, folder: Path, name: str) -> None:
    fuzz_runs.leg(case, prefix, layout, folder, name, [])


@pytest.mark.parametrize("name", DEFAULT)
def test_a_case(pool: WorkerPool, tmp_path: Path, name: str) -> None:
    plain = {axis: values[0] for axis, values in AXES.items()}
    case = {**plain, "refused": None, **DEFAULT[name]}
    assert settle(case) == case
    pool.run(1, prepare, case, tmp_path)
    legs = []
    for prefix, layout in layouts(case):
        legs.append("second" if prefix else "first")
        pool.run(world(layout), leg, case, prefix, layout, tmp_path, legs[-1])
    pool.run(
        1,
        *((fuzz_stock.stock, case, tmp_path, "whole") if is_stock(case) else (leg, case, "", None, tmp_path, "whole")),
    )
    assert set(differences(case, tmp_path, legs)) >= {"first loss", "loss", "norm", "weights"}


@pytest.mark.full_matrix
@pytest.mark.parametrize("seed", SEEDS)
def test_cases(seed: int) -> None:
    code, lines, said = run("--seed", str(seed), "--cases", str(CASES), "--seconds", "3600")
    assert code == 0 and len(lines) == CASES + 1, said


@pytest.mark.full_matrix
def test_refusals() -> None:
    code, lines, said = run("--refusals", "--seconds", "3600")
    assert code == 0 and [line.get("result") for line in lines[:-1]] == ["refused"] * len(REFUSED), said


def test_pairs_come_soon() -> None:
    """Of the pairs of values that cases can have, more than plain random cases of the same number have."""
    design = Design(3)
    for number in range(60):
        case = design.case(number)
        assert settle(case) == case and set(case) >= set(AXES)
        assert all(1 <= world(layout) <= LIMIT for _, layout in layouts(case))
    plain = Design(3, candidates=1)
    plain.case(59)
    assert len(design.covered) > len(plain.covered)
    covered = {value for pair in design.covered for value in pair}
    lacking = {(axis, value) for axis, values in AXES.items() for value in values} - covered
    assert not lacking, lacking


def test_a_case_follows_from_its_number() -> None:
    assert Design(5).case(7) == Design(5).case(7) != Design(6).case(7)
    assert len(pairs(Design(5).case(7))) == len(AXES) * (len(AXES) - 1) // 2


def test_refusals_are_met_now_and_then() -> None:
    """A case has at most one refused combination, and knows which."""
    design = Design(0)
    for number in range(150):
        case = design.case(number)
        applying = [place for place, (applies, _, _) in enumerate(REFUSED) if applies(case)]
        assert applying == ([] if case["refused"] is None else [case["refused"]]), case
    assert 3 <= sum(case["refused"] is not None for case in design.cases) <= 60
    assert all(re.compile(pattern) for _, _, pattern in REFUSED)
