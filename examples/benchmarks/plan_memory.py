"""The memory that a plan predicts, beside the peaks that were measured (`measured_peaks.json`).

    python examples/benchmarks/plan_memory.py         # every row, by arithmetic, as with `hf-nanotron plan --no-run`
    python examples/benchmarks/plan_memory.py --run   # and by the real trainer on tensors without memory; minutes

Peaks are torch's `max_memory_allocated` of the fullest rank.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import measured

from hf_nanotron import NanotronTrainer
from hf_nanotron.plan.estimate import Estimator
from hf_nanotron.plan.memory import rank_memory
from hf_nanotron.plan.processes import rehearse
from hf_nanotron.plan.roles import roles

FILE = "measured_peaks.json"
GIB = 2**30


@dataclass(frozen=True)
class Row:
    """A measured peak and its prediction, in GiB."""

    said: dict[str, Any]
    predicted: float

    @property
    def tests(self) -> bool:
        """Whether nothing in the model was set by it."""
        return bool(self.said["use"] == "test")

    @property
    def error(self) -> float:
        """Of the predicted bytes."""
        return self.predicted / float(self.said["peak_gib"]) - 1.0


def predict() -> list[Row]:
    """All rows, in their order."""
    rows = []
    for said in measured.read(FILE):
        job = measured.job_of(said)
        rows.append(Row(said, Estimator(job.config).fullest(job).total / GIB))
    return rows


def rehearsed(said: dict[str, Any]) -> tuple[float, float]:
    """GiB of a row by the real trainer's state, and with activations as the rehearsal counts them."""
    job = measured.job_of(said)
    done = rehearse(job, roles(job), NanotronTrainer)
    fullest = max(done, key=lambda each: rank_memory(job, each).total)
    state = fullest.report.total - fullest.report.activations
    return rank_memory(job, fullest).total / GIB, (state + fullest.peak - fullest.live) / GIB


def line(row: Row, *more: float) -> str:
    """A row of the table."""
    cells = "".join(f" {value:.1f} |" for value in more)
    return (
        f"| {measured.label(row.said)} | {row.said['peak_gib']:.1f} | {row.predicted:.1f} | {row.error:+.1%} |{cells}"
    )


def table(rows: Sequence[Row]) -> str:
    """Markdown: what was measured and predicted, the rows that test first."""
    lines = ["| GPUs | run | measured, GiB | predicted, GiB | error |", "|---|---|---|---|---|"]
    return "\n".join([*lines, *map(line, sorted(rows, key=lambda row: not row.tests))])


def summary(rows: Sequence[Row]) -> str:
    """One sentence for each half."""
    return measured.summary((row.tests, row.error) for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose names have this in them")
    parser.add_argument("--run", action="store_true", help="two more columns: rehearsed, and activations as counted")
    args = parser.parse_args()
    rows = [row for row in predict() if args.only in row.said["name"]]
    if args.run:
        for row in rows:
            print(line(row, *rehearsed(row.said)), flush=True)
    else:
        print(table(rows))
    print(summary(rows))


if __name__ == "__main__":
    main()
