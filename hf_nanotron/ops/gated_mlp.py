"""`down(act(gate(x)) * up(x))` (Shazeer 2020, arXiv:2002.05202) over blocks of rows, one in memory at a time.

The same products as of the whole, a block of rows after the other, forward and backward. A backward computes gate and
up again. Weight gradients are summed over the blocks in fp32, as one product over all rows sums them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from .linear import add_product, can_add_product, total_of

aten: Any = torch.ops.aten


class Activation(NamedTuple):
    """A function of each element, and `(gradient, input) ->` the gradient of its input."""

    forward: Callable[[torch.Tensor], torch.Tensor]
    backward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


ACTIVATIONS: dict[str, Activation] = {
    "silu": Activation(F.silu, aten.silu_backward.default),
    "gelu": Activation(F.gelu, aten.gelu_backward.default),
    "gelu_tanh": Activation(
        lambda x: F.gelu(x, approximate="tanh"), lambda grad, x: aten.gelu_backward.default(grad, x, approximate="tanh")
    ),
    "relu": Activation(F.relu, lambda grad, x: aten.threshold_backward.default(grad, x, 0)),
}


def gated_mlp(
    input: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    keys: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
    rows: int,
    activation: str,
) -> torch.Tensor:
    """A gated MLP without biases: `[..., H] -> [..., H]`, in the dtype of the weights.

    Args:
        weights: of gate and up, `[I, H]`, and of down, `[H, I]`.
        keys: where the gradient of each weight is added in the backward (`Linear.key`), None to return it.
        rows: of a block.
        activation: one of `ACTIVATIONS`.
    """
    input = input.to(weights[0].dtype)
    output: torch.Tensor = torch.ops.hf_nanotron.gated_mlp(input, *weights, *keys, rows, activation)
    return output


SCHEMA = (
    "(Tensor input, Tensor gate, Tensor up, Tensor down, Tensor? gate_key, Tensor? up_key, Tensor? down_key, int rows,"
    " str activation) -> Tensor"
)
BACKWARD_SCHEMA = (
    "(Tensor grad, Tensor input, Tensor gate, Tensor up, Tensor down, Tensor? gate_key, Tensor? up_key,"
    " Tensor? down_key, bool[] returned, int rows, str activation) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _gate_and_up(block: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`[rows, H] -> [rows, 2 I]`, side by side."""
    both = block.new_empty(block.shape[0], gate.shape[0] + up.shape[0])
    torch.mm(block, gate.t(), out=both[:, : gate.shape[0]])
    torch.mm(block, up.t(), out=both[:, gate.shape[0] :])
    return both


def _gated(both: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "silu" and both.is_cuda:
        from .kernels.gated import forward

        return forward(both)
    gate, up = both.chunk(2, dim=-1)
    return ACTIVATIONS[activation].forward(gate) * up


def _gated_backward(grad: torch.Tensor, both: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "silu" and both.is_cuda:
        from .kernels.gated import backward

        return backward(grad, both)
    gate, up = both.chunk(2, dim=-1)
    of = ACTIVATIONS[activation]
    return torch.cat([of.backward(grad * up, gate), grad * of.forward(gate)], dim=-1)


@torch.library.custom_op("hf_nanotron::gated_mlp", mutates_args=(), schema=SCHEMA)
def _gated_mlp(*inputs: Any) -> torch.Tensor:
    input, gate, up, down, *_, rows, activation = inputs
    flat = input.reshape(-1, input.shape[-1])
    output = flat.new_empty(flat.shape[0], down.shape[0])
    for start in range(0, flat.shape[0], rows):
        block = flat[start : start + rows]
        torch.mm(_gated(_gate_and_up(block, gate, up), activation), down.t(), out=output[start : start + rows])
    return output.view(*input.shape[:-1], down.shape[0])


@_gated_mlp.register_fake
def _(*inputs: Any) -> torch.Tensor:
    input, _, _, down, *_ = inputs
    output: torch.Tensor = input.new_empty((*input.shape[:-1], down.shape[0]))
    return output


class _Sum:
    """The gradient of one weight, summed over blocks: added to its memory, returned, or neither if it is frozen."""

    def __init__(self, weight: torch.Tensor, key: torch.Tensor | None, returned: bool) -> None:
        self._total = None if key is None else total_of(key)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self._sum = weight.new_zeros(weight.shape, dtype=dtype) if returned else None
        self._dtype = weight.dtype

    def add(self, grad_output: torch.Tensor, input: torch.Tensor) -> None:
        if self._total is not None:
            self._total.add_product(grad_output, input)
        elif self._sum is not None:
            if not can_add_product(self._sum, input.dtype):  # a product in 16 bits, on the CPU
                grad_output, input = grad_output.to(self._sum.dtype), input.to(self._sum.dtype)
            add_product(self._sum, grad_output, input, overwrite=False)

    def result(self, like: torch.Tensor) -> torch.Tensor:
        return like.new_empty(0) if self._sum is None else self._sum.to(self._dtype)


@torch.library.custom_op("hf_nanotron::gated_mlp_backward", mutates_args=(), schema=BACKWARD_SCHEMA)
def _gated_mlp_backward(*inputs: Any) -> tuple[torch.Tensor, ...]:
    grad, input, gate, up, down, *keys, returned, rows, activation = inputs
    flat, flat_grad = input.reshape(-1, input.shape[-1]), grad.reshape(-1, grad.shape[-1])
    weights = (gate, up, down)
    sums = [_Sum(weight, key, back) for weight, key, back in zip(weights, keys, returned, strict=True)]
    grad_input, inner = flat.new_empty(flat.shape), gate.shape[0]
    for start in range(0, flat.shape[0], rows):
        part = slice(start, start + rows)
        both = _gate_and_up(flat[part], gate, up)
        sums[2].add(flat_grad[part], _gated(both, activation))
        both = _gated_backward(flat_grad[part] @ down, both, activation)
        for total, half in zip(sums, (both[:, :inner], both[:, inner:]), strict=False):
            total.add(half, flat[part])
        torch.mm(both[:, :inner], gate, out=grad_input[part])
        grad_input[part].addmm_(both[:, inner:], up)
    return grad_input.view(input.shape), *(total.result(flat) for total in sums)


@_gated_mlp_backward.register_fake
def _(*inputs: Any) -> tuple[torch.Tensor, ...]:
    _, input, *rest = inputs
    returned, weights = rest[-3], rest[:3]
    found = (w.new_empty(w.shape) if back else input.new_empty(0) for w, back in zip(weights, returned, strict=True))
    return input.new_empty(input.shape), *found


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.rows, ctx.activation = inputs
    ctx.keyed = [key is not None for key in tensors[4:]]
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    returned = [need and not keyed for need, keyed in zip(ctx.needs_input_grad[1:4], ctx.keyed, strict=True)]
    of_input, *of_weights = torch.ops.hf_nanotron.gated_mlp_backward(
        grad, *ctx.saved_tensors, returned, ctx.rows, ctx.activation
    )
    found = (one if back else None for one, back in zip(of_weights, returned, strict=True))
    return of_input, *found, None, None, None, None, None


_gated_mlp.register_autograd(_gradients, setup_context=_keep)
