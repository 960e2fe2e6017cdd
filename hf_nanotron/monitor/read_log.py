"""Reads the log of a run (`monitor/run_log.py`), also while it is being written. Imports nothing but Python's own.

A line that is not whole, as a killed run leaves one, is left out; the last line may become whole later.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RUN_LOG = "_metrics.jsonl"  # in output_dir; pushes leave out what begins with "_"
DETAIL_LOG = "_metrics_detail.jsonl"  # beside it, of single tensors
EVENTS = ("begin", "log", "detail", "save", "end")
SPREAD = ("min", "median", "max", "rank")  # what a log line says of the ranks' figures
CHUNK = 1 << 24  # bytes that are read at once
LATEST = 1e11  # seconds since 1970: later times are none
OF_LOG = b'{"event":"log","run":"'  # begins the log lines that RunLog writes
SAME = len(OF_LOG) + 8  # the id of the run included


@dataclass
class Run:
    """One call of `train`: what the lines of its id say.

    Attributes:
        begin, end: their lines; empty for one that is not there.
        logs: of the log lines, in order: `step`, `time`, `epoch`, `ranks` and all metrics; of a reader that keeps few,
            the last ones.
        saves: of the checkpoints, in order: `step`, `time`, `checkpoint`.
        last: time of the last line.
        latest: the step and the value that each metric was told last, and `epoch`.
    """

    id: str
    begin: dict[str, Any] = field(default_factory=dict)
    logs: list[dict[str, Any]] = field(default_factory=list)
    saves: list[dict[str, Any]] = field(default_factory=list)
    end: dict[str, Any] = field(default_factory=dict)
    last: float = 0.0
    latest: dict[str, tuple[int, float]] = field(default_factory=dict)

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
    """The runs of one log, read further at each call.

    Args:
        keep: log lines of each run that are kept, the last ones, for who looks at the end of a long log again and
            again; all if None. Of many lines of one kind, those before are not even parsed.
    """

    def __init__(self, path: Path, keep: int | None = None) -> None:
        self.path, self.keep = path, keep
        self._forget()

    def _forget(self) -> None:
        self._place, self._rest, self._file = 0, b"", (0, 0)
        self._runs: dict[str, Run] = {}
        self.unreadable = 0  # lines, but for one that is being written

    def read(self) -> list[Run]:
        """All runs so far, in the order in which they began.

        Raises:
            OSError: if there is no such file, or it is something else than a file.
        """
        with open(self.path, "rb", opener=_open_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "it is no file", str(self.path))
            if (status.st_dev, status.st_ino) != self._file or status.st_size < self._place:  # another file
                self._forget()
                self._file = status.st_dev, status.st_ino
            file.seek(self._place)
            while data := file.read(CHUNK):
                self._place += len(data)
                *lines, self._rest = (self._rest + data).split(b"\n")
                for number, line in enumerate(lines):
                    if self.keep is None or not _is_followed(lines, number, self.keep):
                        self._take(line)
                self._trim()
        return list(self._runs.values())

    def _trim(self) -> None:
        if self.keep is not None:
            for run in self._runs.values():
                del run.logs[: -self.keep], run.saves[: -self.keep]

    def _take(self, data: bytes) -> None:
        line = parse_line(data)
        if line is None:
            self.unreadable += bool(data.strip())
            return
        run = self._runs.setdefault(line["run"], Run(line["run"]))
        run.last = line["time"]  # the clock may have been set back
        if line["event"] == "begin":
            run.begin, run.end = known_begin(line), {}
        elif line["event"] == "end":
            run.end = line
        elif line["event"] == "save":
            run.saves.append(line)
        else:
            metrics = line.get("metrics")
            found = numbers(metrics if isinstance(metrics, Mapping) else {}) | numbers({"epoch": line.get("epoch")})
            run.latest |= {name: (line["step"], value) for name, value in found.items()}
            run.logs.append(
                {**found, "step": line["step"], "time": line["time"], "ranks": known_ranks(line.get("ranks"))}
            )


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
        and 0 <= line["step"] < 2**63
        and type(line.get("time")) in (int, float)
        and 0 <= line["time"] <= LATEST
    )
    return line if is_ours else None


def known_begin(line: Mapping[str, Any]) -> dict[str, Any]:
    """A `begin` line, without what is of another type than `RunLog` writes."""
    types = {"max_steps": int, "world_size": int, "parameters": int, "pid": int, "sizes": dict}
    return {name: value for name, value in line.items() if type(value) is types.get(name, type(value))}


def known_ranks(value: Any) -> dict[str, dict[str, float]]:
    """Figures of ranks (`monitor/ranks.py`), as far as they are whole."""
    given = value.items() if isinstance(value, dict) else ()
    found = {name: numbers(figures) for name, figures in given if isinstance(figures, dict)}
    return {name: figures for name, figures in found.items() if set(SPREAD) <= set(figures)}


def _is_followed(lines: Sequence[bytes], number: int, by: int) -> bool:
    """Whether the line `by` lines later is as well one of the loss of the same run, and says all that this one does."""
    later = number + by
    return (
        later < len(lines)
        and lines[number].startswith(OF_LOG)
        and lines[number][:SAME] == lines[later][:SAME]
        and b'"loss":' in lines[number]
        and b'"loss":' in lines[later]
    )


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def numbers(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `metrics` that are numbers, among them the texts "nan", "inf" and "-inf"."""
    found: dict[str, Any] = {}
    for name, value in metrics.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            found[sys.intern(name)] = value  # one text for all lines
        elif value in ("nan", "inf", "-inf"):
            found[sys.intern(name)] = float(value)
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
        first = run.logs[0]["step"] if run.logs else 1  # of a log without such lines, as that of single tensors is
        start = run.begin.get("step", first - 1)
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


def process_numbers() -> str | None:
    """Which numbers this process sees: those of a container are others than those of its host. None if unknown."""
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return None
