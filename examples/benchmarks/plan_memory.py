"""The memory that a plan predicts, beside the peaks that were measured (`measured_peaks.json`).

    python examples/benchmarks/plan_memory.py            # every row: the real trainer on tensors without memory
    python examples/benchmarks/plan_memory.py --counted  # and what it counts where layers are not compiled

Peaks are torch's `max_memory_allocated` of the fullest rank.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shapes import make_config

from hf_nanotron import NanotronTrainer
from hf_nanotron.plan.job import Job
from hf_nanotron.plan.memory import RankMemory, rank_memory
from hf_nanotron.plan.processes import rehearse
from hf_nanotron.plan.roles import roles

FILE = Path(__file__).parent / "measured_peaks.json"
GIB = 2**30


@dataclass(frozen=True)
class Row:
    """A measured peak and its prediction; `counted` and `reported`: GiB by the other two ways."""

    said: dict[str, Any]
    memory: RankMemory
    counted: float
    reported: float

    @property
    def error(self) -> float:
        return self.memory.total / GIB / float(self.said["peak_gib"]) - 1.0


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


def read() -> list[dict[str, Any]]:
    """The measured rows."""
    rows: list[dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8"))["rows"]
    return rows


def predict(said: dict[str, Any]) -> Row:
    """One row: the fullest of its ranks."""
    job = job_of(said)
    done = rehearse(job, roles(job), NanotronTrainer)
    fullest = max(done, key=lambda each: rank_memory(job, each).total)
    state = fullest.report.total - fullest.report.activations
    counted = (state + fullest.peak - fullest.live) / GIB
    return Row(said, rank_memory(job, fullest), counted, fullest.report.total / GIB)


def errors(rows: Sequence[Row]) -> tuple[float, float]:
    """Median and largest size of the errors."""
    sizes = [abs(row.error) for row in rows]
    return statistics.median(sizes), max(sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="rows whose names have this in them")
    parser.add_argument("--counted", action="store_true", help="the other two ways, too")
    options = parser.parse_args()
    rows = []
    print("| GPUs | run | measured, GiB | predicted | error |" + (" counted | report |" if options.counted else ""))
    print("|---|---|---|---|---|" + ("---|---|" if options.counted else ""))
    for said in read():
        if options.only and options.only not in said["name"]:
            continue
        row = predict(said)
        rows.append(row)
        name = said["name"] if said["use"] == "test" else f"*{said['name']}*"
        line = f"| {said['gpus']} {said['gpu'].upper()} | {name} | {said['peak_gib']:.1f} | "
        line += f"{row.memory.total / GIB:.1f} | {row.error:+.1%} |"
        print(line + (f" {row.counted:.1f} | {row.reported:.1f} |" if options.counted else ""), flush=True)
    for label, some in (("rows that test", [r for r in rows if r.said["use"] == "test"]), ("all rows", rows)):
        if some:
            median, worst = errors(some)
            print(f"\n{label}: {len(some)}, median {median:.1%}, worst {worst:.1%}")


if __name__ == "__main__":
    main()
