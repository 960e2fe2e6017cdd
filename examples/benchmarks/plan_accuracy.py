"""The seconds that a plan predicts, beside the steps that were measured (`measured_rows.json`).

    python examples/benchmarks/plan_accuracy.py              # the rows, and the error of both halves
    python examples/benchmarks/plan_accuracy.py --parts      # and what each predicted step goes to

Rates are the defaults of each GPU. Rows that set a rate or a constant are apart from those that test the model.
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

from hf_nanotron.plan.default_rates import default_rates
from hf_nanotron.plan.job import Job
from hf_nanotron.plan.step_time import StepTime, step_time

FILE = Path(__file__).parent / "measured_rows.json"


@dataclass(frozen=True)
class Row:
    """A measured step and its prediction."""

    said: dict[str, Any]
    measured: float
    predicted: StepTime

    @property
    def tests(self) -> bool:
        """Whether nothing in the model was set by it."""
        return bool(self.said["use"] == "test")

    @property
    def error(self) -> float:
        """Of the predicted seconds."""
        return self.predicted.seconds / self.measured - 1.0

    @property
    def waits(self) -> float:
        """Predicted seconds in which a rank waits for others."""
        return self.predicted.exposed_communication + self.predicted.parts.get("bubble", 0.0)


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


def read() -> dict[str, Any]:
    """The file of measured rows."""
    found: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


def predict() -> list[Row]:
    """All rows, in their order."""
    rows = []
    for said in read()["rows"]:
        job = job_of(said)
        measured = job.tokens_per_step / job.world_size / said["tokens_per_second"]
        rows.append(Row(said, measured, step_time(job, default_rates(said["gpu"]))))
    return rows


def errors(rows: Sequence[Row]) -> tuple[float, float]:
    """Median and largest size of the errors."""
    sizes = [abs(row.error) for row in rows]
    return statistics.median(sizes), max(sizes)


def table(rows: Sequence[Row]) -> str:
    """Markdown: what was measured and predicted, the rows that test first."""
    lines = [
        "| GPUs | run | measured, ms | predicted, ms | error | MFU: both | waits: both, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: not row.tests):
        said, known = row.said, row.said["mfu"]
        name = said["name"] if row.tests else f"*{said['name']}* ({said['use']})"
        mfu = f"{known:.1%}, " if known else ""
        waits = "" if said["waits_ms"] is None else f"{said['waits_ms']:.0f}, {1e3 * row.waits:.0f}"
        gpu = f"{said['gpus']} {said['gpu'].upper()}"
        lines.append(
            f"| {gpu} | {name} | {1e3 * row.measured:,.0f} | {1e3 * row.predicted.seconds:,.0f} | {row.error:+.1%} | "
            f"{mfu}{row.predicted.mfu:.1%} | {waits} |"
        )
    return "\n".join(lines)


def summary(rows: Sequence[Row]) -> str:
    """One sentence for each half."""
    lines = []
    for what, part in (
        ("rows that test", [row for row in rows if row.tests]),
        ("rows that set a figure", [row for row in rows if not row.tests]),
    ):
        median, worst = errors(part)
        lines.append(f"{len(part)} {what}: median error {median:.1%}, largest {worst:.1%}.")
    return " ".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", action="store_true", help="print what each predicted step goes to, in ms")
    args = parser.parse_args()
    rows = predict()
    print(table(rows))
    print(summary(rows))
    if args.parts:
        for row in rows:
            parts = {name: round(1e3 * seconds, 1) for name, seconds in row.predicted.parts.items()}
            print(json.dumps({"name": row.said["name"], **parts}))


if __name__ == "__main__":
    main()
