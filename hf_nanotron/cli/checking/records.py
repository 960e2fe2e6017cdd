"""What a rank has seen of a short run, and where it stands: plain tensors, which other processes compare."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Activation:
    """What a module returned for one micro-batch, as far as this rank has it.

    Attributes:
        place: of the micro-batch among all of the step, over all data-parallel ranks.
        columns: `[B, tokens]`, int64: the places of the tokens in their rows.
        values: `[B, tokens, H]`, fp32.
    """

    place: int
    columns: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True)
class Piece:
    """Elements of one of the Hub's tensors: `flat[start:stop]` of the part `ranges` of its dimension `dim`.

    `ranges` are half-open; `dim` None is the whole tensor.
    """

    name: str
    shape: tuple[int, ...]
    dim: int | None
    ranges: tuple[tuple[int, int], ...]
    start: int
    stop: int
    values: torch.Tensor  # `[stop - start]`, fp32

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """The same elements of `whole`, of `shape`: `[stop - start]`."""
        if self.dim is not None:
            whole = torch.cat([whole.narrow(self.dim, first, end - first) for first, end in self.ranges], self.dim)
        return whole.reshape(-1)[self.start : self.stop]


@dataclass
class Record:
    """Of one rank. Lists have an entry for each optimizer step; `weights` and
    `buffers` one more: those of the end.

    Attributes:
        where: the rank's coordinates, by axis.
        stages: the pipeline stages that the rank holds.
        modules: names of recorded modules in the order in which they were first called.
        activations: for each step, module -> its activations.
        gradients: for each step, before clipping.
        buffers: with fractions, as the weights; of this rank's modules.
        losses, norms: as logged.
        has_own_loss: whether a script has brought the loss.
        shapeless: names of modules that returned something else than a row of features for each token.
    """

    rank: int
    where: dict[str, int]
    stages: list[int]
    modules: list[str] = field(default_factory=list)
    activations: list[dict[str, list[Activation]]] = field(default_factory=list)
    gradients: list[list[Piece]] = field(default_factory=list)
    weights: list[list[Piece]] = field(default_factory=list)
    buffers: list[dict[str, torch.Tensor]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    has_own_loss: bool = False
    shapeless: list[str] = field(default_factory=list)
