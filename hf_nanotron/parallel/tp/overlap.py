"""Tensor-parallel communication that overlaps with matmuls.

Under sequence parallelism a block gathers its tokens, and sums and scatters its outputs. Its linears are split by
tokens here, so that both overlap with matmuls (Wang et al. 2023, doi:10.1145/3567955.3567959): at the entry, own tokens
go through the first linears while the others' arrive; at the exit, the others' tokens go through the last linear first,
and are sent while own ones are computed; in a backward, weight gradients run meanwhile.

The block stays stock code, compiled or not, and gets whole tensors. If it calls a first linear with the very tensor it
was given, the result made ahead is returned; if it returns the very output of its last linear, the sum under way is
used. Anything else is correct too, only slower. Which linears these are is learned in the first forward.
"""

from __future__ import annotations

import copy
import weakref
from typing import Any, cast

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from ...ops.linear import Linear, WeightGradient
from ..mesh import Group
from .held_products import HeldGradient, ProductQueue
from .layers import RowParallelLinear
from .transport import Exchange, Transport, cut


class Overlap:
    """Gathers and sums of one tensor-parallel group, of tensors `[B, S, H]` sharded along `S`.

    `transport` is used for nothing else. The tokens of a rank are processed in `pieces` as they arrive or before they
    leave: only the first piece is exposed.
    """

    def __init__(self, group: Group, transport: Transport, pieces: int = 2) -> None:
        self.group, self.transport, self.pieces = group, transport, pieces
        self.queue = ProductQueue()
        self._sent: tuple[_Partial, _Mark] | None = None  # an output under way that nobody has asked for yet

    def gather(self, x: torch.Tensor, layers: list[Linear]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Join the `[B, S/n, H]` of all ranks, and run `layers` over it. No gradient.

        Returns:
            The whole `[B, S, H]`, and the output of each layer.
        """
        self.drop()
        x = x.detach().contiguous()
        size, rank = self.group.size, self.group.rank
        whole = x.new_empty((x.shape[0], size * x.shape[1], x.shape[2]))
        outputs = [x.new_empty((*whole.shape[:2], layer.weight.shape[0])) for layer in layers]
        pieces = self.pieces if layers else 1
        exchange = self.transport.open(x.shape, x.dtype, pieces)
        exchange.place(x, self._part(whole, rank))
        own = cut(x, pieces)
        for step in range(1, size):
            for index, into in enumerate(cut(self._part(whole, rank - step), pieces)):
                exchange.swap(step, index, own[index], into)
        for layer, output in zip(layers, outputs, strict=True):
            multiply(x, layer.weight, layer.bias, self._part(output, rank))
        self.queue.cover((size - 1) * x.nbytes)
        for step in range(1, size):
            for index in range(len(own)):
                tokens = exchange.wait(step, index)
                for layer, output in zip(layers, outputs, strict=True):
                    multiply(tokens, layer.weight, layer.bias, cut(self._part(output, rank - step), pieces)[index])
        exchange.close()
        return whole, outputs

    def reduce(self, whole: torch.Tensor) -> torch.Tensor:
        """Sum the `[B, S, H]` of all ranks and keep our `[B, S/n, H]`. No gradient."""
        self.drop()
        partial = self._open(whole.detach().contiguous(), 1)
        for step in range(1, self.group.size):
            partial.exchange.swap(step, 0, self._part(partial.whole, self.group.rank + step))
        self.queue.cover(whole.nbytes // self.group.size * (self.group.size - 1))
        return partial.finish(self)

    def multiply_and_send(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`[B, S, F] -> [B, S, H]`, of which the others' parts are sent to be summed. `take` has the sum."""
        self.drop()
        output = input.new_empty((*input.shape[:2], weight.shape[0]))
        partial = self._open(output, self.pieces)
        for step in range(1, self.group.size):
            rank = self.group.rank + step
            lefts, outs = (cut(self._part(tensor, rank), self.pieces) for tensor in (input, output))
            for index, (left, out) in enumerate(zip(lefts, outs, strict=True)):
                multiply(left, weight, bias, out)
                partial.exchange.swap(step, index, out)
        multiply(self._part(input, self.group.rank), weight, bias, self._part(output, self.group.rank))
        self._sent = partial, _Mark(output)
        return output

    def take(self, output: torch.Tensor) -> torch.Tensor | None:
        """Our part of the sum of `output`, if it is what `multiply_and_send` returned last, unchanged."""
        if self._sent is None or not self._sent[1].matches(output):
            self.drop()
            return None
        partial, _ = self._sent
        self._sent = None
        return partial.finish(self)

    def drop(self) -> None:
        """Drop an output that is being sent. A recomputation never asks for the one at its end."""
        if self._sent is not None:
            self._sent[0].exchange.close()
            self._sent = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Overlap:
        """A copy of a model, which never runs at the same time, sends through the same memory."""
        return self

    def close(self) -> None:
        self._sent = None
        self.transport.close()

    def _open(self, whole: torch.Tensor, pieces: int) -> _Partial:
        part = self._part(whole, 0)
        return _Partial(whole, self.transport.open(part.shape, part.dtype, pieces), pieces)

    def _part(self, whole: torch.Tensor, rank: int) -> torch.Tensor:
        """What a rank (modulo the group's size) has of `[B, S, H]`."""
        length = whole.shape[1] // self.group.size
        return whole.narrow(1, rank % self.group.size * length, length)


class _Partial:
    """A tensor `[B, S, H]` whose parts are being sent to be summed."""

    def __init__(self, whole: torch.Tensor, exchange: Exchange, pieces: int) -> None:
        self.whole, self.exchange, self.pieces = whole.detach(), exchange, pieces

    def finish(self, overlap: Overlap) -> torch.Tensor:
        """Our part of the sum: in fp32, in one order, rounded once."""
        size, own = overlap.group.size, overlap._part(self.whole, overlap.group.rank)
        summed = torch.empty_like(own, memory_format=torch.contiguous_format)
        for index, (mine, out) in enumerate(zip(cut(own, self.pieces), cut(summed, self.pieces), strict=True)):
            if size == 2:
                torch.add(mine, self.exchange.wait(1, index), out=out)
                continue
            total = mine.to(torch.promote_types(own.dtype, torch.float32))
            for step in range(1, size):
                total = total + self.exchange.wait(step, index)
            out.copy_(total)
        self.exchange.close()
        return summed


class _Mark:
    """Recognises a tensor, or a view of all of it, as long as nothing is written to it. Keeps its memory."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor, self._version = tensor.detach(), tensor._version

    def matches(self, other: torch.Tensor) -> bool:
        own = self._tensor
        return (
            other.data_ptr() == own.data_ptr()
            and (other.numel(), other.dtype) == (own.numel(), own.dtype)
            and other.is_contiguous()
            and other._version == self._version
        )


class BlockOverlap:
    """What one attention or MLP module, whose linears are sharded already, does between its gather and its sum."""

    def __init__(self, shared: Overlap, block: nn.Module) -> None:
        self.shared = shared
        self._first: dict[LayerProducts, None] = {}  # linears that read the hidden states, in order
        self._last: LayerProducts | None = None  # the one whose output the block returns
        self._hidden: _Mark | None = None  # in the block, while gradients are recorded: what it was handed
        self._shape: torch.Size | None = None
        self._ahead: dict[LayerProducts, torch.Tensor] = {}
        self._output: tuple[LayerProducts, _Mark] | None = None  # of the row-parallel linear called last
        for module in block.modules():
            if isinstance(module, Linear):
                module.products = LayerProducts(self, module)

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, S/n, H] -> [B, S, H]`."""
        self._forget_call()
        ahead = {first: first.layer for first in self._first} if torch.is_grad_enabled() else {}
        whole, outputs = _Gather.apply(x, self.shared, list(ahead.values()))
        if torch.is_grad_enabled():
            self._hidden, self._shape = _Mark(whole), whole.shape
            self._ahead = dict(zip(ahead, outputs, strict=True))
        return cast(torch.Tensor, whole)

    def leave(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, S, H] -> [B, S/n, H]`, summed."""
        summed = self.shared.take(x)
        if summed is None:
            self._last = None
            if self._output is not None and self._output[1].matches(x):
                self._last = self._output[0]
        for layer in self._ahead:  # made ahead, and not asked for
            del self._first[layer]
        self._forget_call()
        return cast(torch.Tensor, _Scatter.apply(x, self.shared, (summed,)))

    def multiply(
        self, caller: LayerProducts, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """The product of one of the block's linears."""
        if self._hidden is None or self._shape is None:
            return nn.functional.linear(input, weight, bias)
        if input.shape[-1] == self._shape[-1] and self._hidden.matches(input):
            ahead = self._ahead.pop(caller, None)
            if ahead is not None:
                # Some blocks flatten their tokens first.
                return ahead if input.dim() == 3 else ahead.view(*input.shape[:-1], ahead.shape[-1])
            if not caller.is_row:
                self._first[caller] = None
        if caller is self._last and input.shape[:-1] == self._shape[:-1]:
            return self.shared.multiply_and_send(input, weight, bias)
        output = nn.functional.linear(input, weight, bias)
        if caller.is_row:
            self._output = (caller, _Mark(output))
        return output

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockOverlap:
        """For a copy of the block, which has yet to learn."""
        twin = copy.copy(self)
        twin._first, twin._last = {}, None
        twin._forget_call()
        return twin

    def _forget_call(self) -> None:
        # A recomputation stops inside the block and never leaves it, so this is done at the next entry as well.
        self._hidden = self._shape = self._output = None
        self._ahead = {}


class LayerProducts:
    """The `Products` of a linear layer in a `BlockOverlap`."""

    def __init__(self, block: BlockOverlap, layer: Linear) -> None:
        self._block, self._layer = block, weakref.ref(layer)
        self.is_row = isinstance(layer, RowParallelLinear)

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerProducts:
        return LayerProducts(copy.deepcopy(self._block, memo), copy.deepcopy(self.layer, memo))

    @property
    def layer(self) -> Linear:
        layer = self._layer()
        assert layer is not None
        return layer

    def multiply(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return self._block.multiply(self, input, weight, bias)

    def add_product(self, total: WeightGradient, grad_output: torch.Tensor, input: torch.Tensor) -> None:
        self._block.shared.queue.add(cast(HeldGradient, total), grad_output, input)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, shared: Overlap, layers: list[Linear]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        ctx.shared = shared
        return shared.gather(x, layers)  # autograd looks at the tensor alone, not into the list

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[torch.Tensor, None, None]:
        return ctx.shared.reduce(grad), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, shared: Overlap, taken: tuple[torch.Tensor | None]) -> torch.Tensor:
        ctx.shared, (summed,) = shared, taken
        return shared.reduce(x) if summed is None else summed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.shared.gather(grad, [])[0], None, None


def multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, output: torch.Tensor) -> None:
    """`output = x @ weight.T + bias`, between views `[B, S', in]` and `[B, S', out]` whose rows are contiguous."""
    right = weight.detach().t()
    x = x.detach()
    if x.shape[0] == 1:
        left, out = x[0], output[0]
        torch.mm(left, right, out=out) if bias is None else torch.addmm(bias.detach(), left, right, out=out)
        return
    right = right.expand(x.shape[0], *right.shape)  # one product of all samples, whose tokens are no single matrix
    torch.bmm(x, right, out=output) if bias is None else torch.baddbmm(bias.detach(), x, right, out=output)
