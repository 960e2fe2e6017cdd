"""What training holds of a model, beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..models.base import ParallelModel
from ..ops.fp8_linear import WeightCopies
from ..ops.offload import Transfers
from ..optim.offload import StateOnHost
from ..parallel.zero.segment import ShardedWeights
from .attention import Attention
from .neftune import EmbeddingNoise


class ForwardObserver(Protocol):
    """Is told which micro-batch the modules of the model are called for, while they train."""

    def over(self, step: int, micro_batches: Sequence[Mapping[str, Any]]) -> AbstractContextManager[None]:
        """While the window of optimizer step `step` (from 0) runs. All ranks together.

        `micro_batches`: of this data-parallel rank. The weights are those that the step computes with.
        """

    def begin_forward(self, micro_batch: int, inputs: Mapping[str, Any]) -> None:
        """The forward of a micro-batch of the window comes next, with what the stages are called with."""

    def end_forward(self) -> None:
        """What is called from here on is no forward of a micro-batch: recomputation in a backward, say."""


@dataclass
class TrainingState:
    """A model that is ready to train, and what training holds besides. Made by `prepare_training`.

    Attributes:
        fp8: the FP8 copies of its weights, or None if it computes without.
        attention: what stands for its own attention, or None.
        recomputed: numbers of the layers that recompute activations.
        noise: what is added to embeddings in this run, or None.
        offload: the host memory of activations, or None.
        host: the masters and the optimizer's state that are on the host, or None.
        observers: are told of each forward.
    """

    model: ParallelModel
    weights: ShardedWeights
    fp8: WeightCopies | None = None
    attention: Attention | None = None
    recomputed: frozenset[int] = frozenset()
    recompute_options: Mapping[str, Any] = field(default_factory=dict)
    noise: EmbeddingNoise | None = None
    offload: Transfers | None = None
    host: StateOnHost | None = None
    observers: list[ForwardObserver] = field(default_factory=list)
