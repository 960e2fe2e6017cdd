"""A linear layer whose weight gradient is accumulated in fp32 by the matrix product itself."""

from __future__ import annotations

import itertools
import weakref
from typing import Any, Protocol

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .columns import product_parts


class WeightGradient(Protocol):
    """Where the gradient of one weight is accumulated."""

    def takes_product(self, dtype: torch.dtype) -> bool:
        """Whether `add_product` works for operands of `dtype` on this device."""

    def add_product(self, grad_output: torch.Tensor, input: torch.Tensor) -> None:
        """Add `grad_output.T @ input`, of `[tokens, out]` and `[tokens, in]`."""


class Products(Protocol):
    """Who computes the products of one layer where they overlap with communication: other work, the same values."""

    def multiply(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`input @ weight.T + bias`, in a new tensor."""

    def add_product(self, total: WeightGradient, grad_output: torch.Tensor, input: torch.Tensor) -> None:
        """Let `total.add_product(grad_output, input)` happen, before the end of this backward."""


def add_product(total: torch.Tensor, grad_output: torch.Tensor, input: torch.Tensor, overwrite: bool) -> None:
    """`total += grad_output.T @ input` in the matmul kernel, not rounded to the operands' dtype.

    `total` is `[out, in]` in fp32 (`overwrite` takes it as zero, which saves zeroing it); `grad_output` `[tokens, out]`
    and `input` `[tokens, in]` are fp32, or bf16 on CUDA.
    """
    beta = 0.0 if overwrite else 1.0
    for part in product_parts(grad_output):
        rows, columns = total[part], grad_output[:, part].t()
        if input.dtype == total.dtype:
            torch.addmm(rows, columns, input, beta=beta, out=rows)
        else:
            torch.addmm(rows, columns, input, out_dtype=total.dtype, beta=beta, out=rows)


def can_add_product(total: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether `add_product` works for operands of `dtype`: mixed precision is a CUDA kernel alone."""
    return dtype == total.dtype or (total.is_cuda and dtype == torch.bfloat16)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        total: WeightGradient,
        products: Products | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(input, weight)
        ctx.total, ctx.products = total, products
        return _multiply(input, weight, bias, products)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, None, torch.Tensor | None, None, None]:
        input, weight = ctx.saved_tensors
        grad_bias = _sum_of_rows(grad) if ctx.needs_input_grad[2] else None
        _add_product(ctx.total, grad, input, ctx.products)
        return grad @ weight if ctx.needs_input_grad[0] else None, None, grad_bias, None, None


def _multiply(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, products: Products | None
) -> torch.Tensor:
    return F.linear(input, weight, bias) if products is None else products.multiply(input, weight, bias)


def _sum_of_rows(grad: torch.Tensor) -> torch.Tensor:
    return grad.reshape(-1, grad.shape[-1]).sum(0)


def _add_product(total: WeightGradient, grad: torch.Tensor, input: torch.Tensor, products: Products | None) -> None:
    rows, input = grad.reshape(-1, grad.shape[-1]), input.reshape(-1, input.shape[-1])
    total.add_product(rows, input) if products is None else products.add_product(total, rows, input)


# Operators take tensors and numbers only, so compiled code names the memory of a weight's gradient by a number. It is
# in a tensor on the host: a constant would have every layer compiled anew.
_totals: weakref.WeakValueDictionary[int, WeightGradient] = weakref.WeakValueDictionary()
_products: weakref.WeakValueDictionary[int, Products] = weakref.WeakValueDictionary()
_keys = itertools.count()


def total_of(key: torch.Tensor) -> WeightGradient:
    """Where the gradient of a weight is accumulated, by `Linear.key`."""
    return _totals[int(key.item())]


@torch.library.custom_op("hf_nanotron::linear", mutates_args=())
def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, key: torch.Tensor) -> torch.Tensor:
    return _multiply(input, weight, bias, _products.get(int(key.item()))).contiguous()


@_linear.register_fake
def _(input: torch.Tensor, weight: torch.Tensor, *_: Any) -> torch.Tensor:
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


# It returns the gradient of the input, and also adds that of the weight to its memory. A compiler may remove an
# operator whose result is not used: there must be an input that has a gradient.
@torch.library.custom_op("hf_nanotron::linear_backward", mutates_args=())
def _linear_backward(grad: torch.Tensor, input: torch.Tensor, weight: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    number = int(key.item())
    _add_product(_totals[number], grad, input, _products.get(number))
    return (grad @ weight).contiguous()


@_linear_backward.register_fake
def _(grad: torch.Tensor, input: torch.Tensor, *_: Any) -> torch.Tensor:
    return input.new_empty(input.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    input, weight, _, key = inputs
    ctx.save_for_backward(input, weight, key)


def _gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor | None, None]:
    input, weight, key = ctx.saved_tensors
    grad_input = torch.ops.hf_nanotron.linear_backward(grad, input, weight, key)
    return grad_input, None, _sum_of_rows(grad) if ctx.needs_input_grad[2] else None, None


_linear.register_autograd(_gradients, setup_context=_keep)


class Linear(nn.Linear):
    """`nn.Linear` that adds its weight gradient to `weight_gradient`, if it has one, instead of returning it.

    An input of another floating-point dtype is rounded to that of the weight, as autocast does: blocks of a model in
    bf16 that compute in fp32 inside (a recurrence, a gate) hand fp32 to the next layer.
    """

    weight_gradient: WeightGradient | None = None
    products: Products | None = None  # set before `accumulate_into`
    _key: torch.Tensor | None = None  # of `weight_gradient`, for compiled code

    def accumulate_into(self, total: WeightGradient | None) -> None:
        """Set `weight_gradient`, or unset it."""
        self.weight_gradient, self._key = total, None
        if total is not None and total.takes_product(self.weight.dtype):
            self._key = torch.tensor(next(_keys), device="cpu")
            _totals[int(self._key)] = total
            if self.products is not None:
                _products[int(self._key)] = self.products

    @property
    def key(self) -> torch.Tensor | None:
        """The number of `weight_gradient` for operators, or None if they must return the gradient."""
        return self._key

    def __getstate__(self) -> dict[str, Any]:
        """What copies get: their gradients are their own."""
        return {name: value for name, value in vars(self).items() if name not in ("weight_gradient", "_key")}

    def linear(self, input: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`input @ weight.T + bias`, of `[..., in]`, in the dtype of the weight."""
        if input.dtype != self.weight.dtype and input.is_floating_point():
            input = input.to(self.weight.dtype)
        trains = torch.is_grad_enabled() and self.weight.requires_grad
        # The operator also where products overlap with communication: selective checkpointing recognizes it.
        if torch.compiler.is_compiling() or self.products is not None:
            if self._key is None or not trains or not input.requires_grad:
                return F.linear(input, self.weight, bias)
            return torch.ops.hf_nanotron.linear(input, self.weight, bias, self._key)
        total = self.weight_gradient
        if total is None or not trains or not total.takes_product(input.dtype):
            return F.linear(input, self.weight, bias)
        return _Linear.apply(input, self.weight, bias, total, self.products)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.linear(input, self.bias)
