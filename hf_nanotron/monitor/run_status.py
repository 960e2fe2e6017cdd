"""How a run is doing, from its log alone: is it alive, where is it, when will it be done. Python's own modules only."""

from __future__ import annotations

import socket
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .read_log import Run, process_numbers, process_start

RECENT = 20  # log lines, for the speed and the usual time between two lines
SILENT_SECONDS = 60.0  # a run is not called silent before
SILENT_LINES = 10  # times the usual time between two lines


@dataclass(frozen=True)
class Status:
    """Of one run.

    Attributes:
        state: running, silent, dead, finished, stopped or failed.
        why: of the state, in words; empty if there is nothing to add.
        step, max_steps: done, and of the whole training.
        age: seconds since the last line.
        eta: seconds until `max_steps` at the recent speed, saves and evaluations included; None if it does not run, or
            nothing is known.
        latest: the last value of each metric.
        latest_step: the step of it.
        ranks: of the last line that has them.
        checkpoint: the last one: `step`, `time`, `checkpoint`, and `is_complete` (None if its folder is not there).
    """

    state: str
    why: str
    step: int
    max_steps: int
    age: float
    eta: float | None
    latest: dict[str, float]
    latest_step: dict[str, int]
    ranks: dict[str, Any]
    checkpoint: dict[str, Any] | None


def status_of(run: Run, folder: Path, now: float) -> Status:
    """How `run` is doing `now` (seconds since 1970); `folder` is its `output_dir`."""
    age = max(0.0, now - run.last)
    state, why = _state(run, age)
    max_steps = int(run.begin.get("max_steps") or 0)
    latest = {name: value for name, (_, value) in run.latest.items()}
    latest_step = {name: step for name, (step, _) in run.latest.items()}
    seconds = seconds_per_step(run.steps)
    eta = None
    if state in ("running", "silent") and seconds is not None and max_steps:
        eta = max(0, max_steps - run.step) * seconds
    ranks: dict[str, Any] = next((line["ranks"] for line in reversed(run.logs) if line.get("ranks")), {})
    return Status(state, why, run.step, max_steps, age, eta, latest, latest_step, ranks, _last_checkpoint(run, folder))


def _state(run: Run, age: float) -> tuple[str, str]:
    if run.end:
        return str(run.end.get("status", "stopped")), str(run.end.get("error", ""))
    begin = run.begin
    here = (begin.get("host"), begin.get("numbers")) == (socket.gethostname(), process_numbers())
    here = here and begin.get("start") is not None
    if here and process_start(int(begin.get("pid") or 0)) != begin["start"]:
        return "dead", f"its process {begin.get('pid')} is gone, and it has not said that it ended"
    usual = usual_seconds(run)
    if age > max(SILENT_SECONDS, SILENT_LINES * usual):
        expected = f"a line came every {usual:.3g} s" if usual else "no step has been logged"
        return "silent", f"{expected} before: it is stuck, dead, or cannot write"
    return "running", ""


def usual_seconds(run: Run) -> float:
    """Seconds between two log lines, of the last ones; 0 if there are none."""
    times = [line["time"] for line in run.logs[-RECENT - 1 :]]
    return (
        statistics.median(after - before for before, after in zip(times, times[1:], strict=False)) if times[1:] else 0.0
    )


def seconds_per_step(lines: Sequence[dict[str, Any]]) -> float | None:
    """By the clock, over the last log lines; by the measured steps, where there is one line alone, or the clock was set
    back.
    """
    recent = lines[-RECENT - 1 :]
    if not recent:
        return None
    seconds, steps = recent[-1]["time"] - recent[0]["time"], recent[-1]["step"] - recent[0]["step"]
    return float(seconds / steps) if steps > 0 and seconds > 0 else recent[-1].get("step_time")


def _last_checkpoint(run: Run, folder: Path) -> dict[str, Any] | None:
    if not run.saves:
        return None
    last = run.saves[-1]
    name, marker = str(last.get("checkpoint", "")), str(run.begin.get("marker", ""))
    is_complete = None
    if marker and all(Path(part).name == part for part in (name, marker)) and (folder / name).is_dir():
        is_complete = (folder / name / marker).is_file()
    return {"step": last["step"], "time": last["time"], "checkpoint": name, "is_complete": is_complete}
