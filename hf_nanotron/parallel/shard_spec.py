"""Which part of a parameter a rank holds: the one description that initialising, loading, saving and clipping share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class ShardSpec:
    """How one tensor of the model is sharded over the tensor-parallel or the expert-parallel ranks.

    Args:
        name: the tensor's name in the stock model. A tied parameter has the name of its source.
        global_shape: its shape there.
        dim: the sharded dimension, or None if every rank holds the whole tensor.
        parts: for each rank of `axis`, the half-open ranges of `dim` it holds, concatenated in that order.
        rank: which part is ours.
        partial_grad: every tensor-parallel rank computes a partial gradient, to be summed.
        stages: which pipeline stages hold the parameter: `"one"`, `"ends"` (a tied embedding and head) or `"all"` (what
            every stage computes for its own layers).
        axis: the ranks that `parts` lists, `"tp"` or `"ep"`.
    """

    name: str
    global_shape: tuple[int, ...]
    dim: int | None = None
    parts: tuple[Ranges, ...] = ()
    rank: int = 0
    partial_grad: bool = False
    stages: Literal["one", "ends", "all"] = "one"
    axis: Literal["tp", "ep"] = "tp"

    @property
    def ranges(self) -> Ranges:
        return self.parts[self.rank]

    @property
    def replicas(self) -> int:
        """How many neighbouring ranks of the axis hold the same part as this one."""
        return 1 if self.dim is None else self.parts.count(self.ranges)

    @property
    def is_first_replica(self) -> bool:
        """Whether this rank is the one that counts and writes this part (rank 0 for an uncut tensor)."""
        return self.rank == 0 if self.dim is None else self.parts.index(self.ranges) == self.rank

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of `dim`, how much each rank of the axis holds; of an uncut tensor, the first dimension."""
        if self.dim is None:
            return self.global_shape[:1]
        return tuple(sum(stop - start for start, stop in ranges) for ranges in self.parts)

    @property
    def longest_shape(self) -> tuple[int, ...]:
        """The shape of the largest part of any rank."""
        return self._with_length(max(self.lengths)) if self.dim is not None else self.global_shape

    @property
    def local_shape(self) -> tuple[int, ...]:
        return self._with_length(self.lengths[self.rank]) if self.dim is not None else self.global_shape

    def _with_length(self, length: int) -> tuple[int, ...]:
        assert self.dim is not None
        return (*self.global_shape[: self.dim], length, *self.global_shape[self.dim + 1 :])

    def slice(self, whole: torch.Tensor) -> torch.Tensor:
        """Our part of `whole` (shape `global_shape`), shape `local_shape`. A view where one range suffices."""
        if self.dim is None:
            return whole
        pieces = [whole.narrow(self.dim, start, stop - start) for start, stop in self.ranges]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, self.dim)

    def padded(self, part: torch.Tensor) -> torch.Tensor:
        """A part of `local_shape`, filled up with zeros to `longest_shape`; itself where that is the same."""
        if part.shape == self.longest_shape:
            return part
        filled = part.new_zeros(self.longest_shape)
        filled.narrow(cast(int, self.dim), 0, self.local_shape[cast(int, self.dim)]).copy_(part)
        return filled

    def assemble(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """The whole tensor from the parts of all ranks of the axis in rank order. What pads them is left out."""
        if self.dim is None:
            return parts[0]
        whole = parts[0].new_empty(self.global_shape)
        for part, ranges in zip(parts, self.parts, strict=True):
            offset = 0
            for start, stop in ranges:
                whole.narrow(self.dim, start, stop - start).copy_(part.narrow(self.dim, offset, stop - start))
                offset += stop - start
        return whole


def even_parts(size: int, tp_size: int) -> tuple[Ranges, ...]:
    """Cut `size` into `tp_size` equal ranges, one for each rank (`size` must divide)."""
    length = size // tp_size
    return tuple(((rank * length, (rank + 1) * length),) for rank in range(tp_size))


def joined_parts(sections: Sequence[tuple[Ranges, ...]], sizes: Sequence[int]) -> tuple[Ranges, ...]:
    """The parts of tensors of `sizes` that are stored one after the other, each cut by its own `sections`."""
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return tuple(
        tuple(
            (start + low, start + high) for start, ranges in zip(starts, of_rank, strict=True) for low, high in ranges
        )
        for of_rank in zip(*sections, strict=True)
    )


def head_parts(num_heads: int, head_size: int, tp_size: int) -> tuple[Ranges, ...]:
    """Shard heads of `head_size` features over `tp_size` ranks; with fewer heads, neighbours hold the same head."""
    if num_heads >= tp_size:
        return even_parts(num_heads * head_size, tp_size)
    replicas = tp_size // num_heads
    heads = (rank // replicas for rank in range(tp_size))
    return tuple(((head * head_size, (head + 1) * head_size),) for head in heads)
