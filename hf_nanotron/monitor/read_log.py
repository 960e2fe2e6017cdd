"""Reads the log of a run (`monitor/run_log.py`), also while it is being written. Imports nothing but Python's own.

A line that is not whole, as a killed run leaves one, is left out; the last line may become whole later.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RUN_LOG = "_metrics.jsonl"  # in output_dir; pushes leave out what begins with "_"
DETAIL_LOG = "_metrics_detail.jsonl"  # beside it, of single tensors
EVENTS = ("begin", "log", "detail", "save", "end")


@dataclass
class Run:
    """One call of `train`: what the lines of its id say.

    Attributes:
        begin, end: their lines; empty for one that is not there.
        logs: of the log lines, in order: `step`, `time`, `epoch`, `ranks` and all metrics.
        saves: of the checkpoints, in order: `step`, `time`, `checkpoint`.
        last: time of the last line.
    """

    id: str
    begin: dict[str, Any] = field(default_factory=dict)
    logs: list[dict[str, Any]] = field(default_factory=list)
    saves: list[dict[str, Any]] = field(default_factory=list)
    end: dict[str, Any] = field(default_factory=dict)
    last: float = 0.0

    @property
    def step(self) -> int:
        """The last optimizer step that is told of."""
        told = [line["step"] for line in (self.begin, *self.logs[-1:], *self.saves[-1:], self.end) if line]
        return max(told, default=0)

    @property
    def steps(self) -> list[dict[str, Any]]:
        """Log lines with a loss."""
        return [line for line in self.logs if "loss" in line]


class LogReader:
    """The runs of one log, read further at each call."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._forget()

    def _forget(self) -> None:
        self._place, self._rest, self._file = 0, b"", (0, 0)
        self._runs: dict[str, Run] = {}
        self.unreadable = 0  # lines, but for one that is being written

    def read(self) -> list[Run]:
        """All runs so far, in the order in which they began.

        Raises:
            OSError: if there is no such file.
        """
        with open(self.path, "rb") as file:
            stat = os.fstat(file.fileno())
            if (stat.st_dev, stat.st_ino) != self._file or stat.st_size < self._place:  # another file
                self._forget()
                self._file = stat.st_dev, stat.st_ino
            file.seek(self._place)
            data = file.read()
        self._place += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._take(line)
        return list(self._runs.values())

    def _take(self, data: bytes) -> None:
        line = parse_line(data)
        if line is None:
            self.unreadable += bool(data.strip())
            return
        run = self._runs.setdefault(line["run"], Run(line["run"]))
        run.last = max(run.last, line["time"])
        if line["event"] == "begin":
            run.begin, run.end = line, {}
        elif line["event"] == "end":
            run.end = line
        elif line["event"] == "save":
            run.saves.append(line)
        else:
            metrics = line.get("metrics")
            known: dict[str, Any] = {name: line[name] for name in ("step", "time", "epoch", "ranks") if name in line}
            run.logs.append(numbers(metrics if isinstance(metrics, Mapping) else {}) | known)


def parse_line(data: bytes) -> dict[str, Any] | None:
    """A line of the log; None for one that is not whole or not of such a log."""
    try:
        line = json.loads(data)
    except (ValueError, RecursionError):
        return None
    is_ours = (
        isinstance(line, dict)
        and line.get("event") in EVENTS
        and isinstance(line.get("run"), str)
        and type(line.get("step")) is int
        and type(line.get("time")) in (int, float)
    )
    return line if is_ours else None


def numbers(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `metrics` that are numbers, among them the texts "nan", "inf" and "-inf"."""
    found = {}
    for name, value in metrics.items():
        if value in ("nan", "inf", "-inf"):
            found[name] = float(value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = value
    return found


def read_runs(path: Path) -> list[Run]:
    """The runs of a log.

    Raises:
        OSError: if there is no such file.
    """
    return LogReader(path).read()


def joined(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The log lines of the last training: those of the runs that it was resumed from, as far as they count, first."""
    lines: list[dict[str, Any]] = []
    for run in runs:
        start = run.begin.get("step", 0)
        lines = [line for line in lines if line["step"] <= start] if start else []
        lines += run.logs
    return lines


def process_start(pid: int) -> str | None:
    """When a process of this host began, in clock ticks since the host did; None if it is gone or cannot be seen.

    Together with the pid it names one process: a pid is used again.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (OSError, ValueError):
        return None
    fields = text.rpartition(")")[2].split()
    return None if fields[0] == "Z" else fields[19]
