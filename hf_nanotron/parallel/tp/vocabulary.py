"""A vocabulary that is cut over the tensor-parallel ranks: how many ids each rank has, and how logits are joined.

No row is added where the ranks do not divide the vocabulary. Their slices differ in length instead, so that there is
nothing to be masked in a loss, to be drawn in generation, or to be left out of a file.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from ..collectives import all_gather
from ..mesh import Group
from ..shard_spec import Ranges, even_parts

TILE = 8  # rows: 16 bytes of 16-bit logits, without which matrix products are slow


def vocabulary_parts(size: int, tp_size: int) -> tuple[Ranges, ...]:
    """Shard `size` ids into `tp_size` ranges, equal where `tp_size` divides.

    Otherwise all slices but the last are whole tiles, if there are enough, and differ by at most one tile; the first is
    the longest.
    """
    if size < tp_size:
        raise ValueError(f"a vocabulary of {size} cannot be sharded over {tp_size} ranks.")
    if size % tp_size == 0:
        return even_parts(size, tp_size)
    tile = TILE if size >= TILE * tp_size else 1
    tiles = -(-size // tile)
    stops = [min(size, tile * (-(-tiles * (rank + 1) // tp_size))) for rank in range(tp_size)]
    return tuple(((start, stop),) for start, stop in zip([0, *stops], stops, strict=False))


def gather_vocabulary(logits: torch.Tensor, group: Group, sizes: tuple[int, ...]) -> torch.Tensor:
    """Join the slices of the vocabulary (of lengths `sizes`), `[..., V_local] -> [..., V]`, on every rank.
    Differentiable.

    Every rank must compute the same from the whole logits: the gradient of a slice is our slice of the whole gradient,
    without a sum.
    """
    return logits if group.size == 1 else _GatherVocabulary.apply(logits, group, sizes)


class _GatherVocabulary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, group: Group, sizes: tuple[int, ...]) -> torch.Tensor:
        ctx.start, ctx.length = sum(sizes[: group.rank]), sizes[group.rank]
        slices = all_gather(F.pad(logits, (0, max(sizes) - ctx.length)), group, 0).chunk(group.size)
        return torch.cat([part[..., :size] for part, size in zip(slices, sizes, strict=True)], -1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grad.narrow(-1, ctx.start, ctx.length).contiguous(), None, None
