"""Ranks are killed under `hf-nanotron torchrun`: losses stay those of the unbroken run, bit for bit (`kills.py`)."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kills import HERE, SCHEDULES, Job, Outcome, matrix

RANKS = 2
SIZES = {"gradient_accumulation_steps": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kills")


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[int, float]:
    plain = {"memory_snapshot_steps": None, "memory_snapshot_dir": "/dev/shm"}
    return Job(folder / "whole", RANKS, {**SIZES, **plain}, 16).run().losses


def check(outcome: Outcome, expected: dict[int, float]) -> None:
    """Also the steps that were made again after a restart."""
    assert outcome.code == 0, (outcome.job.folder / "log").read_text()[-3000:]
    assert outcome.all_losses == {step: {loss} for step, loss in expected.items()}


@pytest.mark.full_matrix
@pytest.mark.parametrize(
    "kills",
    [
        [(1, "start", 0), (1, "backward", 5), (0, "resume", 0), (0, "snapshot", 8), (1, "marker", 11)],
        [(1, "forward", 2), (0, "reduce", 3), (0, "evaluation", 7), (1, "save", 10), (1, "step", 13)],
    ],
    ids=["memory", "step"],
)
def test_a_kill_in_each_phase(folder: Path, expected: dict[int, float], kills: list[tuple[int, str, int]]) -> None:
    outcome = Job(folder / f"kills-{kills[0][1]}", RANKS, SIZES, 16, kills).run()
    check(outcome, expected)
    assert len(outcome.killed_at) == len(kills) and outcome.from_memory >= 3


@pytest.mark.full_matrix
@pytest.mark.parametrize("launcher", ["preloaded", "torchrun"])
def test_a_kill_on_the_second_of_two_nodes(folder: Path, expected: dict[int, float], launcher: str) -> None:
    """Two agents, with a rank each: both start their ranks anew, and go on together."""
    kills = [(1, "backward", 5)]
    outcome = Job(folder / f"nodes-{launcher}", RANKS, SIZES, 16, kills, launcher=launcher, nodes=2).run()
    check(outcome, expected)
    assert len(outcome.killed_at) == outcome.from_memory == 1


@pytest.mark.full_matrix
def test_kills_at_random(folder: Path, expected: dict[int, float], request: pytest.FixtureRequest) -> None:
    kills = request.config.getoption("--kills")
    check(Job(folder / "random", RANKS, SIZES, 16, random_kills=kills, pause=0.5).run(), expected)


def test_the_matrix_has_every_phase_rank_and_schedule() -> None:
    jobs = matrix(Path("none"), 8, everything=True)
    assert [name for name, _ in jobs] == list(SCHEDULES)
    for _, job in jobs:
        assert {rank for rank, *_ in job.kills} == set(range(8)) and len(job.kills) == len(set(job.kills)) == 80
        assert all(step < job.steps for *_, step in job.kills)
        phases = [phase for _, phase, _ in job.kills]
        assert phases.index("resume") > phases.index("forward")  # there is nothing to resume from before


def test_a_launcher_does_not_outlive_who_started_it() -> None:
    code = """
import subprocess, sys, time
from kills import end_with_starter
print(subprocess.Popen(["sleep", "1000"], preexec_fn=end_with_starter, stdout=subprocess.DEVNULL).pid, flush=True)
time.sleep(1000)
"""
    starter = subprocess.Popen([sys.executable, "-c", code], cwd=HERE, stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    launcher = int(starter.stdout.readline())
    starter.send_signal(signal.SIGKILL)
    starter.wait()
    while Path(f"/proc/{launcher}/cmdline").exists() and Path(f"/proc/{launcher}/cmdline").read_bytes():
        time.sleep(0.01)  # for ever, if it stays
