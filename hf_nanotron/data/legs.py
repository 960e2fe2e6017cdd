"""Legs of a run over data that brings its order: steps of one global batch size, one after the other."""

from __future__ import annotations

import math
from typing import NamedTuple


class Leg(NamedTuple):
    """Steps that a run makes in one go.

    Attributes:
        number: of the stage; Trainer takes it for an epoch.
        step: before its first one.
        first, stop: its samples, counted over the run.
        batch: samples of a step, over all ranks.
        done: samples of the stage that were trained on before.
    """

    number: int
    step: int
    first: int
    stop: int
    batch: int
    done: int = 0

    @property
    def steps(self) -> int:
        """The last one may have fewer samples."""
        return math.ceil((self.stop - self.first) / self.batch)


def accumulation(batch: int, micro_batch: int, dp_size: int, what: str) -> int:
    """Micro-batches of a step on each rank.

    Raises:
        ValueError: if there is no whole number of them.
    """
    rounds, rest = divmod(batch, micro_batch * dp_size)
    if rest or not rounds:
        size = micro_batch * dp_size
        near = sorted({max(batch // size, 1) * size, -(-batch // size) * size})
        raise ValueError(
            f"{what}: global_batch_size={batch} is not a multiple of per_device_train_batch_size={micro_batch} x "
            f"{dp_size} data-parallel ranks = {size}; {' or '.join(map(str, near))} would be."
        )
    return rounds
