"""Noise on the embeddings of a training model (NEFTune; Jain et al. 2023, arXiv:2310.05914).

It is drawn from the place of a micro-batch in the run, as dropout is, so it is the same on every topology.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from ..models.parts import ModelParts
from ..parallel.cp.rows import RowParts
from ..parallel.dropout_streams import seed_from

NAME = "embedding noise"  # among the decorations of a model


class EmbeddingNoise:
    """Uniform noise of at most `alpha / sqrt(tokens * width)`, as transformers adds."""

    def __init__(self, alpha: float, seed: int) -> None:
        self.alpha, self.seed = alpha, seed
        self._place: tuple[int, int] | None = None
        self._length = 0
        self._parts: RowParts | None = None

    def begin(self, step: int, micro_batch: int, length: int, parts: RowParts | None = None) -> None:
        """Where the run stands, how many tokens a row of the next micro-batch has before it is filled up, and how
        context-parallel ranks share it.
        """
        self._place, self._length, self._parts = (step, micro_batch), length, parts

    def end(self) -> None:
        self._place = None

    def add(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        """A forward hook of the embedding."""
        if not module.training or self._place is None:
            return None
        generator = torch.Generator(output.device).manual_seed(seed_from(self.seed, *self._place, "embedding"))
        batch, filled, width = output.shape
        if self._parts is not None:
            filled *= self._parts.group.size
        most = self.alpha / math.sqrt(self._length * width)
        noise = torch.empty((batch, self._length, width), dtype=output.dtype, device=output.device)
        noise.uniform_(-most, most, generator=generator)
        noise = F.pad(noise, (0, 0, 0, filled - self._length))
        return output + (noise if self._parts is None else self._parts.own(noise))


def set_noise(model: ModelParts, alpha: float | None, seed: int) -> EmbeddingNoise | None:
    """Have noise added to what the embedding of `model` returns in training steps; None takes it off."""
    model.decorations.remove(NAME, model)
    if alpha is None:
        return None
    noise = EmbeddingNoise(alpha, seed)
    hook = model.get_input_embeddings().register_forward_hook(noise.add)
    model.decorations.add(NAME, functools.partial(_remove, hook))
    return noise


def _remove(hook: RemovableHandle, model: ModelParts) -> None:
    hook.remove()
