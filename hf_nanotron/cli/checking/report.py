"""What `hf-nanotron check` has found, as rows and as text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .compare import Compared

COLUMNS = {"loss": "loss", "norm": "norm", "activation": "activations", "gradient": "gradients", "weight": "weights"}
ENDINGS = {True: "The same on every layout that was compared.", False: "Not the same.", None: "Nothing was compared."}
MOST_NAMES = 4


@dataclass
class Row:
    """What has been found of one layout. One of `compared`, `refused` and `failed` is there."""

    name: str
    processes: int
    seconds: float = 0.0
    compared: Compared | None = None
    refused: str | None = None
    failed: str | None = None

    @property
    def is_same(self) -> bool | None:
        """None: there is nothing to compare."""
        if self.refused is not None:
            return None
        return self.compared is not None and self.compared.first is None

    def to_dict(self) -> dict[str, Any]:
        found = {} if self.compared is None else self.compared.to_dict()
        return {
            "layout": self.name, "processes": self.processes, "seconds": round(self.seconds, 2), "same": self.is_same,
            "refused": self.refused, "failed": self.failed, **found,
        }  # fmt: skip


@dataclass
class Check:
    """All that is printed. `notes`: what differs from the run itself."""

    model: str
    reference: str
    steps: int
    notes: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    @property
    def is_same(self) -> bool | None:
        """None: nothing was compared."""
        found = [row.is_same for row in self.rows if row.is_same is not None]
        return all(found) if found else None

    def to_dict(self) -> dict[str, Any]:
        rows = [row.to_dict() for row in self.rows]
        return {
            "same": self.is_same, "model": self.model, "reference": self.reference, "steps": self.steps,
            "notes": self.notes, "layouts": rows,
        }  # fmt: skip


def as_text(found: Check) -> str:
    """What the terminal shows."""
    lines = [f"compared with {found.reference}, {found.steps} steps in fp32 on the CPU"]
    lines += [f"  {note}" for note in found.notes]
    if found.rows:
        width = max(len("layout"), *(len(row.name) for row in found.rows))
        heads = "".join(f"{name:>13}" for name in COLUMNS.values())
        lines += ["", f"{'layout':<{width}}{'processes':>11}{heads}"]
        for row in found.rows:
            lines.append(f"{row.name:<{width}}{row.processes:>11}{_cells(row)}")
    for row in found.rows:
        if row.compared is not None and row.compared.first is not None:
            lines += ["", f"{row.name}: {row.compared.first}."]
        elif row.refused is not None or row.failed is not None:
            lines += ["", f"{row.name}: {'refused' if row.refused else 'failed'}: {row.refused or row.failed}"]
        if row.compared is not None and row.compared.first is None and row.compared.unseen:
            lines += ["", f"{row.name}: not compared: the outputs of {listed(row.compared.unseen)}, of which no rank "
                      "has a row of features for each token."]  # fmt: skip
    lines += ["", ENDINGS[found.is_same]]
    return "\n".join(lines)


def listed(names: Sequence[str]) -> str:
    return ", ".join(names[:MOST_NAMES]) + (f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else "")


def finite(value: Any) -> Any:
    """Without inf and nan, which JSON does not have: null."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cells(row: Row) -> str:
    if row.compared is None:
        return f"{'refused' if row.refused is not None else 'failed':>13}"
    if row.compared.first is not None:
        return f"{'differs':>13}"
    return "".join(f"{row.compared.errors[name]:>13.1e}" for name in COLUMNS)
