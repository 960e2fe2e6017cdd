"""Several linear layers over one input, as one operator of compiled code: query, key and value; gate and up.

One product is faster than three narrow ones, and the gradient of the input needs no sum of three tensors. The weights
stay separate parameters: where they lie one behind the other in memory, as in a bucket, a view joins them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch.nn import functional as F

from .linear import WeightGradient, weight_gradient_of


@runtime_checkable
class JointWeightGradient(WeightGradient, Protocol):
    """A gradient whose memory others may follow."""

    def add_joint_product(
        self, others: Sequence[WeightGradient], grad_output: torch.Tensor, input: torch.Tensor
    ) -> bool:
        """`add_product` for this weight and `others` at once, if their memory follows this one's; returns whether it
        did.

        `grad_output` is `[tokens, sum of out]`, in the order of the weights.
        """


def joined(weights: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """`[sum of out, in]`, a view of `weights` `[out, in]` that lie one behind the other in memory; None if not."""
    first = weights[0]
    place = first.storage_offset()
    for weight in weights:
        if weight.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return None
        if weight.storage_offset() != place or not weight.is_contiguous():
            return None
        place += weight.numel()
    return first.as_strided((sum(map(len, weights)), first.shape[1]), (first.shape[1], 1))


@torch.library.custom_op("hf_nanotron::joint_linear", mutates_args=())
def joint_linear(input: torch.Tensor, weights: list[torch.Tensor], keys: list[torch.Tensor]) -> torch.Tensor:
    """The outputs of linear layers concatenated, `[..., sum of out]`, for an input `[..., in]` and weights `[out, in]`.

    `keys` are those of the memory of their gradients, see `ops.linear`.
    """
    whole = joined(weights)
    if whole is not None:
        return F.linear(input, whole)
    rows = input.reshape(-1, input.shape[-1])
    output = input.new_empty((len(rows), sum(map(len, weights))))
    for weight, part in zip(weights, output.split([len(w) for w in weights], dim=1), strict=True):
        torch.mm(rows, weight.t(), out=part)
    return output.view(*input.shape[:-1], output.shape[1])


@joint_linear.register_fake
def _(input: torch.Tensor, weights: list[torch.Tensor], *_: Any) -> torch.Tensor:
    return input.new_empty((*input.shape[:-1], sum(len(weight) for weight in weights)))


@torch.library.custom_op("hf_nanotron::joint_linear_backward", mutates_args=())
def _backward(
    grad: torch.Tensor, input: torch.Tensor, weights: list[torch.Tensor], keys: list[torch.Tensor]
) -> torch.Tensor:
    rows, columns = grad.reshape(-1, grad.shape[-1]), input.reshape(-1, input.shape[-1])
    parts = rows.split([len(weight) for weight in weights], dim=1)
    totals = [weight_gradient_of(key) for key in keys]
    first, *others = totals
    if not (isinstance(first, JointWeightGradient) and first.add_joint_product(others, rows, columns)):
        for total, part in zip(totals, parts, strict=True):
            total.add_product(part, columns)
    whole = joined(weights)
    if whole is not None:
        return (rows @ whole).view(input.shape)
    grad_input = parts[0] @ weights[0]
    for weight, part in zip(weights[1:], parts[1:], strict=True):
        torch.addmm(grad_input, part, weight, out=grad_input)
    return grad_input.view(input.shape)


@_backward.register_fake
def _(grad: torch.Tensor, input: torch.Tensor, *_: Any) -> torch.Tensor:
    return input.new_empty(input.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    input, weights, keys = inputs
    ctx.count = len(weights)
    ctx.save_for_backward(input, *weights, *keys)


def _gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, list[None], list[None]]:
    input, *rest = ctx.saved_tensors
    weights, keys = rest[: ctx.count], rest[ctx.count :]
    grad_input = torch.ops.hf_nanotron.joint_linear_backward(grad, input, weights, keys)
    return grad_input, [None] * ctx.count, [None] * ctx.count


joint_linear.register_autograd(_gradients, setup_context=_keep)
