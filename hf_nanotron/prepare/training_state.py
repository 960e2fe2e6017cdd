"""What training holds of a model, beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..models.base import ParallelModel
from ..ops.fp8_linear import WeightCopies
from ..ops.offload import Transfers
from ..optim.offload import StateOnHost
from ..parallel.zero.segment import ShardedWeights
from .attention import Attention
from .neftune import EmbeddingNoise


@dataclass
class TrainingState:
    """A model that is ready to train, and what training holds besides. Made by `prepare_training`.

    Attributes:
        fp8: the FP8 copies of its weights, or None if it computes without.
        attention: what stands for its own attention, or None.
        recomputed: numbers of the layers that recompute activations.
        trainable: names of the parameters of this rank that require a gradient.
        noise: what is added to embeddings in this run, or None.
        offload: the host memory of activations, or None.
        host: the masters and the optimizer's state that are on the host, or None.
    """

    model: ParallelModel
    weights: ShardedWeights
    fp8: WeightCopies | None = None
    attention: Attention | None = None
    recomputed: frozenset[int] = frozenset()
    recompute_options: Mapping[str, Any] = field(default_factory=dict)
    trainable: frozenset[str] = frozenset()
    noise: EmbeddingNoise | None = None
    offload: Transfers | None = None
    host: StateOnHost | None = None
