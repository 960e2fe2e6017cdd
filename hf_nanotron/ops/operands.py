"""Operands as kernels read them: features side by side, at addresses and distances that are multiples of 16 bytes."""

from __future__ import annotations

import torch

ALIGNMENT = 16  # bytes that a kernel loads at once


def readable(x: torch.Tensor) -> torch.Tensor:
    """`x`, or a contiguous copy of it where a kernel could not read it.

    Kernels of attention load `ALIGNMENT` bytes at a time along the last dimension. A slice may begin between two such
    places, a transposed tensor has its features apart, and an expanded one has rows at a distance of 0. A copy costs a
    pass over memory; what a projection has written needs none.
    """
    return x if is_readable(x) else x.clone(memory_format=torch.contiguous_format)


def is_readable(x: torch.Tensor) -> bool:
    """Whether a kernel reads `x` as it is. Dimensions of one element have no distance that matters."""
    if x.data_ptr() % ALIGNMENT:
        return False
    if x.is_contiguous():  # a copy would be the same
        return True
    *outer, last = zip(x.shape, x.stride(), strict=True)
    if last[0] > 1 and last[1] != 1:
        return False
    return all(size == 1 or (stride > 0 and stride * x.element_size() % ALIGNMENT == 0) for size, stride in outer)
