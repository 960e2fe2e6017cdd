"""One exchange for all that the ranks have to tell each other for a log line.

Trainer gathers its loss and its FLOPs one by one. Here they travel with the figures of speed, memory and uploads, and
Trainer goes on as in one process, with values that are the same on every rank by then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..monitor.ranks import exchange
from ..parallel.mesh import ParallelMesh
from ..training_args import NanotronTrainingArguments

LOSS, FLOS = "loss", "flos"


class LogLine:
    """What the ranks have exchanged for the line that Trainer is about to write.

    Args:
        parts: each tells its `own_figures`, by names that no other has.

    Attributes:
        of_ranks: the figures of all ranks, by name, until the line is written; None before and after.
    """

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = parts
        self.of_ranks: dict[str, list[float]] | None = None

    def exchange(self, args: NanotronTrainingArguments, mesh: ParallelMesh, loss: torch.Tensor, flos: float) -> None:
        """Have all ranks tell. `loss` becomes the mean of all; `args` let Trainer count alone from here on. All ranks
        together, before Trainer makes the line.
        """
        own: dict[str, float | torch.Tensor] = {LOSS: loss, FLOS: float(flos)}
        for part in self.parts:
            own |= part.own_figures()
        self.of_ranks = exchange(mesh, own)
        first, *others = self.of_ranks[LOSS]
        if any(other != first for other in others):  # a subclass made losses of its own
            loss.fill_(sum(self.of_ranks[LOSS]) / len(self.of_ranks[LOSS]))
        args.counts_alone = True

    def take_flos(self) -> float | None:
        """The FLOPs of all ranks, once; None if they were not exchanged."""
        found = None if self.of_ranks is None else self.of_ranks.pop(FLOS, None)
        return None if found is None else sum(found)

    def end(self, args: NanotronTrainingArguments) -> None:
        """The line is written, or could not be."""
        self.of_ranks, args.counts_alone = None, False
