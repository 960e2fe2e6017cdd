"""Rows in the order of their experts, and back.

Each of N tokens goes to K experts: pair `n * K + k` is token n with its k-th expert. A `Sorting` says which pair each
row is, and which row each pair. Everything stays on the device; sums are fp32 (or the input's dtype, if that is wider)
in a fixed order, without atomics.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable


class Sorting(NamedTuple):
    """Where pairs of a token and an expert are.

    Args:
        order: `[rows]`, int64: the pair of each row, or -1 for none.
        inverse: `[N, K]`, int64: the row of each pair, or -1 for none.
        counts: `[experts]`, int32: pairs of each expert, including those without a row.
        offsets: `[experts]`, int32: the end of each expert's rows.
    """

    order: torch.Tensor
    inverse: torch.Tensor
    counts: torch.Tensor
    offsets: torch.Tensor


def _sort(top_k_index: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Experts of the sorted pairs, the pairs, and the experts' counts and ends. Pairs of no expert come last."""
    experts = top_k_index.reshape(-1)
    experts = torch.where((experts < 0) | (experts >= num_experts), num_experts, experts)
    if num_experts < torch.iinfo(torch.int16).max:
        experts = experts.to(torch.int16)  # a radix sort takes time by the byte
    experts, pairs = torch.sort(experts, stable=True)
    bounds = torch.arange(num_experts, device=experts.device, dtype=experts.dtype)
    offsets = torch.searchsorted(experts, bounds, right=True, out_int32=True)
    counts = offsets.diff(prepend=offsets.new_zeros(1))
    return experts, pairs, counts, offsets


@torch.no_grad()
def sort_by_expert(top_k_index: torch.Tensor, num_experts: int) -> Sorting:
    """N * K rows for all pairs, sorted by expert, then by token. No host synchronisation.

    `top_k_index` is `[N, K]`; below 0 or from `num_experts` on means no expert. Such pairs have no row, and the last
    rows no pair.
    """
    _, pairs, counts, offsets = _sort(top_k_index, num_experts)
    rows = torch.arange(pairs.shape[0], device=pairs.device)
    # Not offsets[-1]: `num_experts` may be 0.
    has_expert = rows < counts.sum()
    inverse = torch.empty_like(rows).scatter_(0, pairs, torch.where(has_expert, rows, -1))
    return Sorting(torch.where(has_expert, pairs, -1), inverse.view(top_k_index.shape), counts, offsets)


@torch.no_grad()
def sort_into_slots(top_k_index: torch.Tensor, num_experts: int, capacity: int) -> Sorting:
    """`capacity` rows for each expert, in a tensor of fixed size. No host synchronisation.

    Expert e has rows `e * capacity` to `(e + 1) * capacity`, filled with its first pairs by token; pairs beyond them
    get no row.
    """
    experts, pairs, counts, offsets = _sort(top_k_index, num_experts)
    size = num_experts * capacity
    starts = torch.cat((offsets - counts, offsets[-1:])).long()
    rank = torch.arange(pairs.shape[0], device=pairs.device) - starts[experts.long()]
    rows = torch.where((rank < capacity) & (experts < num_experts), experts.long() * capacity + rank, -1)
    inverse = torch.empty_like(pairs).scatter_(0, pairs, rows)
    # Pairs without a row go to one more, which is cut off.
    order = pairs.new_full((size + 1,), -1).scatter_(0, torch.where(rows < 0, size, rows), pairs)[:size]
    ends = torch.arange(1, num_experts + 1, device=pairs.device, dtype=torch.int32) * capacity
    return Sorting(order, inverse.view(top_k_index.shape), counts, ends)


def _is_fused(x: torch.Tensor) -> bool:
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16, torch.float32)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def gather_rows(x: torch.Tensor, order: torch.Tensor, pairs_per_token: int) -> torch.Tensor:
    """`[N, H] -> [rows, H]`: the token of each row's pair, zeros for rows that are no pair. No gradient."""
    if _is_fused(x):
        from .kernels.permute import gather_rows as kernel

        return kernel(x.contiguous(), order, pairs_per_token)
    if x.shape[0] == 0:
        return x.new_zeros(order.shape[0], x.shape[1])
    rows = x[order.clamp(min=0) // pairs_per_token]
    return rows.masked_fill_((order < 0)[:, None], 0)


def sum_rows(y: torch.Tensor, inverse: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """`[rows, H] -> [N, H]`: the sum of each token's rows, times `weights` (`[N, K]`). No gradient."""
    if _is_fused(y):
        from .kernels.permute import sum_rows as kernel

        return kernel(y.contiguous(), inverse, weights)
    if y.shape[0] == 0:
        return y.new_zeros(inverse.shape[0], y.shape[1])
    rows = y[inverse.clamp(min=0)].to(_wide(y.dtype)).masked_fill((inverse < 0)[..., None], 0)
    if weights is not None:
        rows = rows * weights[..., None].to(rows.dtype)
    return rows.sum(1).to(y.dtype)


def unpermute_gradients(
    grad: torch.Tensor, y: torch.Tensor, order: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `y` (`[rows, H]`) and `weights` (`[N, K]`) for the gradient `[N, H]` of the weighted sum."""
    if _is_fused(y):
        from .kernels.permute import unpermute_gradients as kernel

        return kernel(grad.contiguous(), y, order, weights)
    wide = _wide(y.dtype)
    rows = gather_rows(grad, order, weights.shape[1]).to(wide)
    is_pair, pair = order >= 0, order.clamp(min=0)
    grad_weights = weights.new_zeros(weights.numel() + 1)
    products = (rows * y.to(wide)).sum(1).to(weights.dtype)
    grad_weights.scatter_(0, torch.where(is_pair, pair, weights.numel()), products)
    if weights.numel() == 0:
        return torch.zeros_like(y), torch.zeros_like(weights)
    grad_y = rows * weights.reshape(-1)[pair][:, None].to(wide)
    return grad_y.to(y.dtype), grad_weights[:-1].view(weights.shape)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        return gather_rows(x, order, inverse.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return sum_rows(grad, ctx.saved_tensors[0], None), None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        y = y.contiguous()
        ctx.save_for_backward(y, order, weights)
        return sum_rows(y, inverse, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, torch.Tensor]:
        grad_y, grad_weights = unpermute_gradients(grad, *ctx.saved_tensors)
        return grad_y, None, None, grad_weights


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(order)
        ctx.pairs_per_token = inverse.shape[1]
        return sum_rows(y, inverse, None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gather_rows(grad, ctx.saved_tensors[0], ctx.pairs_per_token), None, None


def permute(x: torch.Tensor, sorting: Sorting) -> torch.Tensor:
    """`[N, H] -> [rows, H]`: a copy of each token for each of its pairs; zeros in rows that are no pair."""
    return _Permute.apply(x, sorting.order, sorting.inverse)


def unpermute(y: torch.Tensor, sorting: Sorting, weights: torch.Tensor | None = None) -> torch.Tensor:
    """`[rows, H] -> [N, H]`: the sum of each token's rows, times `weights` (`[N, K]`, default ones); no row adds
    nothing.
    """
    shape = sorting.inverse.shape
    if weights is None:
        return _Sum.apply(y, sorting.order, sorting.inverse)
    if weights.shape != shape:
        raise ValueError(f"expected weights of shape {tuple(shape)}, got {tuple(weights.shape)}.")
    return _Unpermute.apply(y, sorting.order, sorting.inverse, weights.contiguous())
