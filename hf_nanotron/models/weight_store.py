"""What a model asks of the trainer that owns its weights."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn

from ..parallel.zero.segment import Segment


class WeightStore(Protocol):
    """The owner of a model's weights while it trains.

    It is the one thing of a trainer that a model has to know. Its parameters may be fp32 shards (ZeRO stage 3), may be
    on their way from other ranks, or have fp32 masters, so whoever reads, writes, moves or copies them through the
    model is sent here. The classes of `parallel/zero` are such owners.
    """

    segments: list[Segment]
    compute_dtype: torch.dtype

    def wait(self) -> None: ...

    def whole(self, name: str) -> torch.Tensor: ...

    def write(self, name: str, value: torch.Tensor) -> None: ...

    def gather_in_backward(self, module: nn.Module | None, needed: bool) -> None: ...

    def copying(self, memo: dict[int, Any]) -> AbstractContextManager[None]: ...

    def close(self) -> None: ...
