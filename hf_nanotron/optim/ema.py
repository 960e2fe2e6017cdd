"""An exponential moving average of the weights, beside the weights that are trained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from ..parallel.zero.segment import ShardedWeights


class WeightAverage:
    """The exponential moving average (EMA) of the weights, in fp32, sharded as their masters are.

    The first update sets the average to the weights, each later one to `decay` x average + (1 - decay) x weights, as
    `torch.optim.swa_utils.AveragedModel` with `get_ema_multi_avg_fn(decay)`, to the last bit. It is element-wise, so
    the average is the same on any layout. A skipped step is no update; the host need not know which one was.

    Args:
        weights: whose `segments` are averaged.
        decay: of one optimizer step, at least 0 and below 1.
        start: optimizer steps before the first update. Until then the average is the weights themselves.

    Attributes:
        shadows: for each segment its elements of the average, `[stop - start]`.
        updates: how many there were, on the device.
    """

    def __init__(self, weights: ShardedWeights, decay: float, start: int, device: torch.device) -> None:
        self.weights, self.decay, self.start = weights, decay, start
        self.shadows = [segment.master.detach().clone() for segment in weights.segments]
        self.updates = torch.zeros((), dtype=torch.int64, device=device)
        self._factors = torch.tensor([0.0, 1.0 - decay, 1.0], device=device)  # of the weights

    @torch.no_grad()
    def update(self, step: int, found_inf: torch.Tensor | None) -> None:
        """Take in the weights after optimizer step `step`, from 1; a nonzero `found_inf` means that it was skipped."""
        skipped, factor, copy = self._factors
        weight = copy if step <= self.start else torch.where(self.updates == 0, copy, factor)
        is_update = torch.ones_like(self.updates) if found_inf is None else (found_inf == 0).to(self.updates)
        weight = torch.where(is_update.bool(), weight, skipped)
        for shadow, segment in zip(self.shadows, self.weights.segments, strict=True):
            shadow.lerp_(segment.master, weight)
        if step > self.start:
            self.updates += is_update

    def restart(self) -> None:
        """Begin anew with the weights at hand."""
        for shadow, segment in zip(self.shadows, self.weights.segments, strict=True):
            shadow.copy_(segment.master.detach())
        self.updates.zero_()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the shadows, the same on every rank."""
        return {"updates": int(self.updates), "decay": self.decay}

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """For the time of the context the model computes with the average, and saves it. All ranks together."""
        self.weights.take_written(compare=True)  # what others have written is not lost
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        self.weights.wait()
        for shadow, segment in zip(self.shadows, self.weights.segments, strict=True):
            trained = segment.master.detach().clone()
            segment.master.data.copy_(shadow)
            shadow.copy_(trained)
        self.weights.publish()
        self.weights.wait()

    @property
    def nbytes(self) -> int:
        """Bytes on this rank."""
        return sum(shadow.nbytes for shadow in self.shadows)
