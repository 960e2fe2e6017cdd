"""What a run has logged, from its own log or from a `trainer_state.json` (also a stock Trainer's), for plots.

Python's own modules only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .read_log import RUN_LOG, joined, numbers, read_runs

STATE = "trainer_state.json"


@dataclass(frozen=True)
class History:
    """The log lines of one training, by step.

    Attributes:
        source: the file that they are from.
        lines: with `step`, and the metrics that are numbers.
        tokens: read by the whole job up to each line; None where no line says how many.
    """

    source: Path
    lines: list[dict[str, Any]]
    tokens: list[float] | None

    def series(self, name: str, by_tokens: bool = False) -> tuple[list[float], list[float]]:
        """Steps (or tokens) and values of a metric, of the lines that have it."""
        places = self.tokens if by_tokens else [line["step"] for line in self.lines]
        if places is None:
            return [], []
        found = [(place, line[name]) for place, line in zip(places, self.lines, strict=True) if name in line]
        return [place for place, _ in found], [value for _, value in found]

    def names(self) -> list[str]:
        """Of all metrics, in the order in which they come."""
        return list(dict.fromkeys(name for line in self.lines for name in line if name != "step"))


def read_history(path: Path) -> History:
    """Of a run's `output_dir`, a checkpoint, or one of the two files.

    A folder's own log counts first, then its `trainer_state.json`, then that of its last checkpoint.

    Raises:
        ValueError: if there is none, or it has no log line.
    """
    source = _source(path)
    lines = _of_log(source) if source.suffix == ".jsonl" else _of_state(source)
    if not lines:
        raise ValueError(f"{source} has no log line yet.")
    return History(source, lines, tokens_of(lines))


def _source(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"{path} does not exist; give the output_dir of a run, a checkpoint, or its {STATE}.")
    checkpoints = [
        (int(found[1]), folder)
        for folder in path.iterdir()
        if (found := re.fullmatch(r"checkpoint-(\d+)", folder.name))
    ]
    places = [path, *(folder for _, folder in sorted(checkpoints, reverse=True))]
    files = [path / RUN_LOG, *(folder / STATE for folder in places)]
    source = next((file for file in files if file.is_file()), None)
    if source is None:
        raise ValueError(f"{path} has neither {RUN_LOG} nor {STATE}, and no checkpoint in it has: nothing was logged.")
    return source


def _of_log(source: Path) -> list[dict[str, Any]]:
    return _by_step({"step": line["step"], **numbers(_metrics(line))} for line in joined(read_runs(source)))


def _metrics(line: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name not in ("step", "time", "ranks", "epoch")}


def _of_state(source: Path) -> list[dict[str, Any]]:
    try:
        body = json.loads(source.read_bytes())
        history = body["log_history"]
        return _by_step({"step": int(line["step"]), **numbers(_metrics(line))} for line in history)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{source} is not a {STATE} of transformers: it has no log_history with steps.") from error


def _by_step(lines: Any) -> list[dict[str, Any]]:
    return sorted(lines, key=lambda line: line["step"])


def tokens_of(lines: Sequence[Mapping[str, Any]]) -> list[float] | None:
    """Tokens that the whole job has read up to each line.

    What Trainer counted (`num_input_tokens_seen`), else `tokens_per_second` times `step_time` for each step since the
    line before. Steps before the first line count as those of it. None without either.
    """
    counted = any("num_input_tokens_seen" in line for line in lines)
    measured = any("tokens_per_second" in line and "step_time" in line for line in lines)
    if not (counted or measured):
        return None
    tokens: list[float] = []
    total, step = 0.0, 0
    for line in lines:
        if counted:
            total = line.get("num_input_tokens_seen", total)
        elif "tokens_per_second" in line and "step_time" in line:
            total += line["tokens_per_second"] * line["step_time"] * (line["step"] - step)
            step = line["step"]
        tokens.append(total)
    return tokens
