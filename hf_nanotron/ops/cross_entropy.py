"""Cross-entropy over the logits of some tokens: what a token's loss needs of them, and their gradient in their place.

The maximum and the sum of exponentials are found in one pass over the logits (Milakov & Gimelshein 2018,
arXiv:1805.02867). All mathematics is in fp32 (fp64 for fp64 logits), whatever the logits' dtype.
"""

from __future__ import annotations

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # without CUDA nothing of it is needed
    triton = None

IGNORE_INDEX = -100  # a target that predicts nothing: its logits are not read, its gradient is zero
ABSENT = -1  # a target in another rank's slice of the vocabulary
BLOCK = 4096  # logits that a program reads at a time
WARPS = 8


def token_statistics(
    logits: torch.Tensor, target: torch.Tensor, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Maximum of `scale * logits`, sum of `exp(x - maximum)`, and the target's logit (0 if absent). One read.

    `logits` are `[T, V]` with contiguous rows; `target` is `[T]` int64, a column, `ABSENT` or `IGNORE_INDEX`. Each
    result is `[T]` in fp32 (fp64); ignored tokens have 0, 1 and 0.
    """
    if _has_kernel(logits):
        maximum, total, chosen = torch.empty((3, len(logits)), dtype=torch.float32, device=logits.device)
        if logits.numel():
            target = target.contiguous()
            with torch.cuda.device_of(logits):
                _statistics_kernel[(len(logits),)](
                    logits, target, maximum, total, chosen, *_layout(logits), scale, BLOCK=BLOCK, num_warps=WARPS
                )
        return maximum, total, chosen
    values = _exact(logits) * scale
    ignored, present = target == IGNORE_INDEX, target >= 0
    maximum = values.amax(-1).masked_fill_(ignored, 0.0)
    chosen = values.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1).masked_fill_(~present, 0.0)
    total = values.sub_(maximum.unsqueeze(-1)).exp_().sum(-1).masked_fill_(ignored, 1.0)
    return maximum, total, chosen


def write_gradient(
    logits: torch.Tensor,
    target: torch.Tensor,
    maximum: torch.Tensor,
    factor: torch.Tensor,
    weight: torch.Tensor,
    scale: float = 1.0,
) -> None:
    """Overwrite `logits` with `factor * exp(scale * logits - maximum)`, less `weight` at the target. One read, one
    write.

    `maximum`, `factor` and `weight` are `[T]` in fp32 (fp64); rows of ignored tokens become zero.
    """
    if _has_kernel(logits):
        if logits.numel():
            target, maximum, factor, weight = (x.contiguous() for x in (target, maximum, factor, weight))
            with torch.cuda.device_of(logits):
                _gradient_kernel[(len(logits), triton.cdiv(logits.shape[1], BLOCK))](
                    logits, target, maximum, factor, weight, *_layout(logits), scale, BLOCK=BLOCK, num_warps=WARPS
                )
        return
    gradient = (_exact(logits) * scale).sub_(maximum.unsqueeze(-1)).exp_().mul_(factor.unsqueeze(-1))
    at_target = -weight.masked_fill(target < 0, 0.0)
    gradient.scatter_add_(-1, target.clamp(min=0).unsqueeze(-1), at_target.unsqueeze(-1))
    logits.copy_(gradient.masked_fill_((target == IGNORE_INDEX).unsqueeze(-1), 0.0))


def _exact(logits: torch.Tensor) -> torch.Tensor:
    """In the dtype of the mathematics. Always multiplied next, so a view of the argument does no harm."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _layout(logits: torch.Tensor) -> tuple[int, int]:
    """Columns, and the distance of rows."""
    return logits.shape[1], logits.stride(0)


def _has_kernel(logits: torch.Tensor) -> bool:
    return triton is not None and logits.is_cuda and logits.dtype != torch.float64


if triton is not None:

    @triton.jit
    def _statistics_kernel(logits, target, maximum, total, chosen, columns, distance, scale, BLOCK: tl.constexpr):
        """One program a token."""
        row = tl.program_id(0).to(tl.int64)
        column = tl.load(target + row)
        if column == -100:
            tl.store(maximum + row, 0.0)
            tl.store(total + row, 1.0)
            tl.store(chosen + row, 0.0)
        else:
            start = logits + row * distance
            # A maximum and a sum for each lane; joined once, at the end.
            highest = tl.full((BLOCK,), float("-inf"), tl.float32)
            summed = tl.zeros((BLOCK,), tl.float32)
            for first in range(0, columns, BLOCK):
                offsets = first + tl.arange(0, BLOCK)
                x = tl.load(start + offsets, mask=offsets < columns, other=float("-inf")).to(tl.float32) * scale
                x = tl.where(offsets < columns, x, float("-inf"))  # a negative scale would turn the filling around
                higher = tl.maximum(highest, x, propagate_nan=tl.PropagateNan.ALL)
                # Where a lane has seen -inf alone, the differences are no numbers.
                summed = tl.where(higher == float("-inf"), 0.0, summed * tl.exp(highest - higher) + tl.exp(x - higher))
                highest = higher
            top = tl.max(highest, 0)
            summed = tl.where(highest == float("-inf"), 0.0, summed * tl.exp(highest - top))
            tl.store(maximum + row, top)
            tl.store(total + row, tl.sum(summed, 0))
            value = tl.load(start + tl.maximum(column, 0)).to(tl.float32) * scale
            tl.store(chosen + row, tl.where(column >= 0, value, 0.0))

    @triton.jit
    def _gradient_kernel(logits, target, maximum, factor, weight, columns, distance, scale, BLOCK: tl.constexpr):
        """One program a block of a token's logits."""
        row = tl.program_id(0).to(tl.int64)
        offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < columns
        place = logits + row * distance + offsets
        column = tl.load(target + row)
        if column == -100:
            tl.store(place, tl.zeros((BLOCK,), logits.dtype.element_ty), mask=mask)
        else:
            x = tl.load(place, mask=mask, other=0.0).to(tl.float32) * scale
            gradient = tl.exp(x - tl.load(maximum + row)) * tl.load(factor + row)
            gradient -= tl.where(offsets == column, tl.load(weight + row), 0.0)
            tl.store(place, gradient.to(logits.dtype.element_ty), mask=mask)
