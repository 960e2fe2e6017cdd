"""An embedding whose weight gradient is added to fp32 memory row by row, without a dense gradient of the vocabulary."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class RowGradient(Protocol):
    """Where the gradient of one weight is accumulated."""

    def add_rows(self, ids: torch.Tensor, rows: torch.Tensor) -> None:
        """Add `rows`, `[tokens, width]`, to the rows `ids`, `[tokens]`; ids may repeat."""


def add_rows(total: torch.Tensor, ids: torch.Tensor, rows: torch.Tensor) -> None:
    """`total[ids] += rows`, deterministic (on CUDA, ids are sorted first).

    `total` is `[vocabulary, width]` in fp32, `ids` `[tokens]`, `rows` `[tokens, width]`. torch's own scatter-add takes
    a microsecond per repeated id, and padding repeats one thousands of times.
    """
    if total.is_cuda and total.is_contiguous():
        from .kernels.embedding import add_rows as add_rows_on_gpu  # needs Triton, which CPU builds of torch lack

        add_rows_on_gpu(total, ids, rows.contiguous())
    else:
        total.index_put_((ids,), rows.to(total.dtype), accumulate=True)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ids: torch.Tensor, weight: torch.Tensor, padding: int | None, total: RowGradient
    ) -> torch.Tensor:
        ctx.save_for_backward(ids)
        ctx.padding, ctx.total = padding, total
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, None, None, None]:
        (ids,) = ctx.saved_tensors
        if ctx.padding is not None:
            grad = grad.masked_fill((ids == ctx.padding).unsqueeze(-1), 0)
        ctx.total.add_rows(ids.reshape(-1), grad.reshape(-1, grad.shape[-1]))
        return None, None, None, None


class Embedding(nn.Embedding):
    """`nn.Embedding` that adds its weight gradient to `row_gradient`, if it has one, instead of returning it."""

    row_gradient: RowGradient | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What copies get: their gradients are their own."""
        return {name: value for name, value in vars(self).items() if name != "row_gradient"}

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        total = self.row_gradient
        plain = self.max_norm is None and not self.scale_grad_by_freq and not self.sparse
        trains = torch.is_grad_enabled() and self.weight.requires_grad and not torch.compiler.is_compiling()
        if total is None or not plain or not trains:
            return super().forward(input)
        return _Lookup.apply(input, self.weight, self.padding_idx, total)
