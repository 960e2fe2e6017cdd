"""Runs that were measured, as jobs of a plan (`measured_rows.json`, `measured_peaks.json`)."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from shapes import make_config

from hf_nanotron.plan.job import Job

FOLDER = Path(__file__).parent


def read(name: str) -> list[dict[str, Any]]:
    """The rows of a file of this folder."""
    rows: list[dict[str, Any]] = json.loads((FOLDER / name).read_text(encoding="utf-8"))["rows"]
    return rows


def job_of(said: dict[str, Any]) -> Job:
    """The run that a row was."""
    arguments = {
        "bf16": True,
        "per_device_train_batch_size": said["samples"],
        "gradient_accumulation_steps": said["micro_batches"],
        **said["arguments"],
    }
    documents = None if said["documents"] is None else tuple(said["documents"])
    length = said["sequence_length"]
    return Job(make_config(said["shape"], length), arguments, said["gpus"], 8, length, documents)


def errors(found: Iterable[float]) -> tuple[float, float]:
    """Median and largest size of relative errors."""
    sizes = [abs(error) for error in found]
    return statistics.median(sizes), max(sizes)


def label(said: dict[str, Any]) -> str:
    """Its GPUs and its name, as cells of a table; in italics where it set something."""
    name = said["name"] if said["use"] == "test" else f"*{said['name']}* ({said['use']})"
    return f"{said['gpus']} {said['gpu'].upper()} | {name}"


def summary(found: Iterable[tuple[bool, float]]) -> str:
    """One sentence for the rows that test (True), one for those that set a figure. Takes errors."""
    every, lines = list(found), []
    for what, tests in (("rows that test", True), ("rows that set a figure", False)):
        some = [error for is_test, error in every if is_test is tests]
        if some:
            median, worst = errors(some)
            lines.append(f"{len(some)} {what}: median error {median:.1%}, largest {worst:.1%}.")
    return " ".join(lines)
