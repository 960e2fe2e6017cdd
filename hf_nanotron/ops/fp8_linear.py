"""A linear layer whose three matmuls are in FP8, with fp32 weight gradients as in `linear.py`.

Everything between the operators is traced with the block around it: scales are computed inside the kernels that produce
the values, and layers with the same input (queries, keys and values) share its FP8 copy by common subexpression
elimination. The backward keeps only the transposed FP8 input, half of what bf16 keeps.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch

from .fp8 import aligned, product, quantize, quantize_columns, quantize_rows, scales, weight_scales
from .linear import Linear, WeightGradient


@runtime_checkable
class ScaledWeightGradient(WeightGradient, Protocol):
    """A gradient that takes products of FP8 numbers."""

    def add_scaled_product(
        self, grad_output: torch.Tensor, input: torch.Tensor, grad_scale: torch.Tensor, input_scale: torch.Tensor
    ) -> None:
        """Add `grad_output @ input.T`, of `[out, tokens]` and `[in, tokens]` FP8 numbers: see `fp8`."""


class WeightCopies:
    """The lifetime of FP8 copies of weights, shared by all layers of a model.

    Weights change only between optimizer steps. Within a step, a copy is made on first use (by then gathered weights
    have arrived) and serves all micro-batches; outside of a step, each use makes its own. 1 byte per weight stays
    allocated; the transposed copy is made by each backward that needs it.
    """

    def __init__(self, recipe: str) -> None:
        self.recipe = recipe
        self.step = 0
        self.is_open = False

    def begin(self) -> None:
        """A step begins: copies of the one before are stale."""
        self.step += 1
        self.is_open = True

    def end(self) -> None:
        """The step is done; its weights may change."""
        self.is_open = False


class WeightCopy(NamedTuple):
    """`rows` and the scales of the `Operands` that a weight (`[out, in]`) is."""

    rows: torch.Tensor
    row_scale: torch.Tensor
    column_scale: torch.Tensor


class Fp8Weight:
    """The FP8 copy of one weight, and where its gradient goes."""

    def __init__(self, copies: WeightCopies, total: ScaledWeightGradient) -> None:
        self.copies, self.total = copies, total
        self._copy: WeightCopy | None = None
        self._made_in = 0

    def copy(self, weight: torch.Tensor) -> WeightCopy:
        """Of `weight`, which is that of the layer as it is now."""
        copies, held = self.copies, self._copy
        if held is not None and copies.is_open and self._made_in == copies.step:
            return held
        row_scale, column_scale = weight_scales(weight, copies.recipe)
        # The memory is used again, but for a step's copy no other may be written over.
        memory = None if held is None or not copies.is_open else held.rows
        made = WeightCopy(quantize_rows(weight.detach(), row_scale, memory), row_scale, column_scale)
        if copies.is_open:
            self._copy, self._made_in = made, copies.step
        return made

    def columns(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The transposed copy and its scale. Each column's own scale makes other numbers than each row's."""
        made = self.copy(weight)
        if self.copies.recipe == "tensorwise":
            return quantize_columns(made.rows, None), made.column_scale
        return quantize_columns(weight.detach(), made.column_scale), made.column_scale


# As in `linear.py`: compiled code names a weight by a number in a tensor on the host.
_weights: weakref.WeakValueDictionary[int, Fp8Weight] = weakref.WeakValueDictionary()
_keys = itertools.count()


def _weight(key: torch.Tensor) -> Fp8Weight:
    return _weights[int(key.item())]


@torch.library.custom_op("hf_nanotron::fp8_quantize", mutates_args=())
def _quantize(
    x: torch.Tensor, row_scale: torch.Tensor, column_scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize(x, row_scale, column_scale)


@_quantize.register_fake
def _(x: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, width = x.shape
    kind = torch.float8_e4m3fn
    return x.new_empty(tokens, width, dtype=kind), x.new_empty(width, aligned(tokens), dtype=kind)


# `input` is there for its gradient alone; what is read is `rows`. `columns` and its scale are kept for the backward.
@torch.library.custom_op("hf_nanotron::fp8_linear", mutates_args=())
def _linear(
    input: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    row_scale: torch.Tensor,
    column_scale: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    key: torch.Tensor,
) -> torch.Tensor:
    copy = _weight(key).copy(weight)
    return product(rows, copy.rows, row_scale, copy.row_scale, input.dtype, bias)


@_linear.register_fake
def _(input: torch.Tensor, *others: Any) -> torch.Tensor:
    *_, weight, _, _ = others
    return input.new_empty(input.shape[0], weight.shape[0])


# It returns the gradient of the input, and also adds that of the weight to its memory: see `linear_backward`.
@torch.library.custom_op("hf_nanotron::fp8_linear_backward", mutates_args=())
def _linear_backward(
    grad_rows: torch.Tensor,
    grad_columns: torch.Tensor,
    grad_row_scale: torch.Tensor,
    grad_column_scale: torch.Tensor,
    columns: torch.Tensor,
    column_scale: torch.Tensor,
    weight: torch.Tensor,
    key: torch.Tensor,
) -> torch.Tensor:
    owner = _weight(key)
    owner.total.add_scaled_product(grad_columns, columns, grad_column_scale, column_scale)
    turned, scale = owner.columns(weight)
    return product(grad_rows, turned, grad_row_scale, scale, weight.dtype)


@_linear_backward.register_fake
def _(grad_rows: torch.Tensor, *others: Any) -> torch.Tensor:
    *_, weight, _ = others
    return weight.new_empty(grad_rows.shape[0], weight.shape[1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, _, columns, row_scale, column_scale, weight, _, key = inputs
    ctx.recipe = "rowwise" if row_scale.dim() else "tensorwise"
    ctx.save_for_backward(columns, column_scale, weight, key)


def _gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    columns, column_scale, weight, key = ctx.saved_tensors
    of_rows, of_columns = scales(grad, ctx.recipe)
    grad_rows, grad_columns = torch.ops.hf_nanotron.fp8_quantize(grad, of_rows, of_columns)
    grad_input = torch.ops.hf_nanotron.fp8_linear_backward(
        grad_rows, grad_columns, of_rows, of_columns, columns, column_scale, weight, key
    )
    grad_bias = grad.sum(0) if ctx.needs_input_grad[6] else None
    return grad_input, None, None, None, None, None, grad_bias, None


_linear.register_autograd(_gradients, setup_context=_keep)


class Fp8Linear(Linear):
    """A `Linear` that computes in FP8 while it trains, and exactly otherwise. Without FP8 it is a `stock_class`."""

    stock_class: ClassVar[type[Linear]]
    copies: WeightCopies
    recipe: str
    fp8_weight: Fp8Weight | None = None
    _fp8_key: torch.Tensor | None = None

    def accumulate_into(self, total: WeightGradient | None) -> None:
        super().accumulate_into(total)
        self.fp8_weight = self._fp8_key = None
        if isinstance(total, ScaledWeightGradient):
            self.fp8_weight, self._fp8_key = Fp8Weight(self.copies, total), torch.tensor(next(_keys), device="cpu")
            _weights[int(self._fp8_key)] = self.fp8_weight

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A copy has no trainer, which says when FP8 copies of weights are stale: it computes without."""
        own = ("copies", "recipe", "fp8_weight", "_fp8_key")
        state = {name: value for name, value in self.__getstate__().items() if name not in own}
        return self.stock_class.__new__, (self.stock_class,), state

    def linear(self, input: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        key = self._fp8_key
        trains = self.training and torch.is_grad_enabled() and self.weight.requires_grad and input.requires_grad
        if key is None or not trains or not input.is_floating_point() or not input.numel():
            return super().linear(input, bias)
        x = input.reshape(-1, input.shape[-1]).to(self.weight.dtype)
        row_scale, column_scale = scales(x, self.recipe)
        rows, columns = torch.ops.hf_nanotron.fp8_quantize(x.detach(), row_scale, column_scale)
        out = torch.ops.hf_nanotron.fp8_linear(x, rows, columns, row_scale, column_scale, self.weight, bias, key)
        return out.view(*input.shape[:-1], out.shape[-1])


@functools.cache
def fp8_class(stock: type[Linear]) -> type[Fp8Linear]:
    """`Fp8Linear` over a class of linear layers: `forward` stays the stock one's."""
    return type(f"Fp8{stock.__name__}", (Fp8Linear, stock), {"stock_class": stock})
