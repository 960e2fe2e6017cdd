"""What one rank's optimizer updates: a flat piece of a parameter, with its fp32 master and its gradient."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from ..shard_spec import ShardSpec


@dataclass
class Segment:
    """Elements `[start, stop)` of a flattened parameter (of this rank's part of it, of shape `spec.local_shape`).

    Args:
        name: of the parameter in the model.
        spec: which part of the Hub's tensor this rank holds.
        master: the fp32 weights, `[stop - start]`. The optimizer's parameter.
        gradient: the fp32 gradient, `[stop - start]`; valid after `ShardedWeights.finish`.
        weight: these elements of what the model computes with, unless that is the master itself.
        state_device: where the optimizer's state of it is between steps, unless beside the master.
    """

    name: str
    spec: ShardSpec
    start: int
    stop: int
    master: nn.Parameter
    gradient: torch.Tensor
    weight: torch.Tensor | None = None
    state_device: torch.device | None = None


def nothing() -> None:
    """Nobody is to be told."""


class WeightStore(Protocol):
    """The owner of a model's weights while it trains, as far as the model has to know it.

    The parameters may be fp32 shards (ZeRO stage 3), may be on their way from other ranks, or have fp32 masters. So
    whoever reads, writes, moves or copies them through the model is sent to their owner.
    """

    segments: list[Segment]
    compute_dtype: torch.dtype
    before_write: Callable[[], None]  # called before weights are written from outside of a step

    def wait(self) -> None:
        """Wait for weights on their way, so that the model's parameters can be read."""

    def whole(self, name: str) -> torch.Tensor:
        """This rank's part of a parameter, of shape `spec.local_shape`, in the compute dtype. All ranks together."""

    def write(self, name: str, value: torch.Tensor) -> None:
        """Set a parameter to `value` of shape `spec.local_shape` (not a master of its own: see `read_from_model`)."""

    def gather_in_backward(self, module: nn.Module | None, needed: bool) -> None:
        """Say whether the backward of `module` reads its weights, where they are gathered for it."""

    def copying(self, memo: dict[int, Any]) -> AbstractContextManager[None]:
        """For the time in which `copy.deepcopy` copies the model with `memo`: the copy has no part in these weights.

        Raises:
            ValueError: if they cannot be copied.
        """

    def close(self) -> None:
        """Take the hooks off the model."""


class ShardedWeights(WeightStore, Protocol):
    """Owns the weights and gradients of this rank's part of a model while it trains, by one of the ZeRO stages.

    Built over a model with whole parameters. An optimizer step calls `begin`, then for every backward of a stage
    `before_backward` and `after_backward` (or `start_deferring` and `stop_deferring`, and later `run_deferred`), then
    `finish`; the optimizer updates the masters of `segments` from their gradients; `publish` copies them to the model.
    """

    def begin(self) -> None:
        """Start a new optimizer step: gradients count from zero."""

    def before_backward(self, stage: int, is_last: bool) -> None:
        """A backward of `stage` comes next; `is_last`: the last one of this optimizer step."""

    def after_backward(self, stage: int, is_last: bool) -> None:
        """That backward has been issued."""

    def start_deferring(self, stage: int, micro_batch: int) -> None:
        """A backward of `stage` comes next that leaves products of weight gradients to `run_deferred`."""

    def stop_deferring(self) -> None:
        """That backward has been issued."""

    def run_deferred(self, stage: int, micro_batch: int, is_last: bool) -> None:
        """Compute what that backward left; `is_last`: the last one of `stage` in this optimizer step."""

    def finish(self) -> None:
        """Make `gradient` of every segment the sum over all ranks."""

    def publish(self, rounded: bool = False) -> None:
        """Copy the masters to the model's parameters; if `rounded`, the optimizer has written every `weight`."""

    def read_from_model(self) -> None:
        """Take over weights that were written into the model's parameters with `write`."""

    def take_written(self, compare: bool = False) -> None:
        """Copy what others have written into the model's parameters to the masters (see `written.py`).

        With `compare`, read all weights, to detect also writes that move no version counter (`weight.data.copy_(...)`).
        """

    def bytes_held(self) -> dict[str, int]:
        """Bytes of this rank's `parameters`, `gradients` and `masters` (without those that are parameters)."""
