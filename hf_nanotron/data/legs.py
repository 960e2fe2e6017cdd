"""Legs of a run over data that brings its order: steps of one global batch size, one after the other."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import count
from typing import Any, NamedTuple

from torch.utils.data import Sampler
from transformers.trainer_utils import has_length


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


class RunSampler(Sampler[int]):
    """The numbers of the samples of a leg. Trainer's epochs are legs. Without legs, those of the dataset.

    Args:
        dataset: whose length is taken where there are no legs.
        begin: its first sample.

    Attributes:
        legs: of the run, by number, once it is planned.
    """

    def __init__(self, dataset: Any, begin: int) -> None:
        self.dataset, self.begin = dataset, begin
        self.legs: dict[int, Leg] = {}
        self._number: int | None = None

    def set_epoch(self, epoch: int) -> None:
        """Read the leg of this number."""
        self._number = epoch

    @property
    def leg(self) -> Leg:
        """That is read now; the first one before `set_epoch`."""
        return self.legs[min(self.legs) if self._number is None else self._number]

    def __len__(self) -> int:
        return self.leg.stop - self.leg.first if self.legs else len(self.dataset) - self.begin

    def __iter__(self) -> Iterator[int]:
        if not self.legs:
            return iter(range(self.begin, len(self.dataset))) if has_length(self.dataset) else count(self.begin)
        return iter(range(self.leg.first, self.leg.stop))
