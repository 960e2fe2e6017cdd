"""The seconds that a plan predicts, beside the steps that were measured (`measured_rows.json`).

    python examples/benchmarks/plan_accuracy.py              # the rows, and the error of both halves
    python examples/benchmarks/plan_accuracy.py --parts      # and what each predicted step goes to

Rates are the defaults of each GPU. Rows that set a rate or a constant are apart from those that test the model.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import measured

from hf_nanotron.plan.default_rates import default_rates
from hf_nanotron.plan.step_time import StepTime, step_time

FILE = "measured_rows.json"


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


def predict() -> list[Row]:
    """All rows, in their order."""
    rows = []
    for said in measured.read(FILE):
        job = measured.job_of(said)
        seconds = job.tokens_per_step / job.world_size / said["tokens_per_second"]
        rows.append(Row(said, seconds, step_time(job, default_rates(said["gpu"]))))
    return rows


def table(rows: Sequence[Row]) -> str:
    """Markdown: what was measured and predicted, the rows that test first."""
    lines = [
        "| GPUs | run | measured, ms | predicted, ms | error | MFU: both | waits: both, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: not row.tests):
        said, known = row.said, row.said["mfu"]
        mfu = f"{known:.1%}, " if known else ""
        waits = "" if said["waits_ms"] is None else f"{said['waits_ms']:.0f}, {1e3 * row.waits:.0f}"
        lines.append(
            f"| {measured.label(said)} | {1e3 * row.measured:,.0f} | {1e3 * row.predicted.seconds:,.0f} | "
            f"{row.error:+.1%} | {mfu}{row.predicted.mfu:.1%} | {waits} |"
        )
    return "\n".join(lines)


def summary(rows: Sequence[Row]) -> str:
    """One sentence for each half."""
    return measured.summary((row.tests, row.error) for row in rows)


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
