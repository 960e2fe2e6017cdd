"""Where tokens are gathered, split and summed: hooks at the border of stock modules.

Stock modules stay as they are; a border attaches to them through `torch.nn.Module`'s own hooks. With sequence
parallelism, activations between blocks are `[B, S/tp, H]` while a model trains. Evaluation and generation keep whole
sequences (any length, also one token), which computes the same function with an all-reduce.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..collectives import copy_to, gather_sequence, join_sequence, own_part, reduce_from, scatter_sum, split_sequence
from ..dropout_streams import dropout_stream
from ..mesh import Group
from .overlap import BlockOverlap

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Region:
    """Sums the partial outputs of the sharded layers inside one attention or MLP module.

    Args:
        sequence_parallel: gather tokens at the entry and scatter them at the exit while training.
        own_dropout: draw dropout inside from a stream of this rank's own (heads are sharded); the stream outside stays
            the same on every rank.
        flat: every argument is a tensor `[tokens, ...]` without a batch dimension.
        overlap: gathers and sums overlap with the matmuls of the module while training.
    """

    def __init__(
        self,
        group: Group,
        sequence_parallel: bool,
        own_dropout: bool,
        flat: bool = False,
        overlap: BlockOverlap | None = None,
    ) -> None:
        self.group, self.sequence_parallel, self.overlap = group, sequence_parallel, overlap
        self.own_dropout = own_dropout and not sequence_parallel
        self.flat = flat
        self._stream: dropout_stream | None = None
        self._shape: torch.Size | None = None

    def attach(self, module: nn.Module, sums_before: nn.Module | None = None) -> None:
        """Attach to `module`. Its partial outputs are summed at its end, or in front of `sums_before` inside it."""
        module.register_forward_pre_hook(self.enter, with_kwargs=True)
        if sums_before is None:
            module.register_forward_hook(self.leave)
        else:
            sums_before.register_forward_pre_hook(self.leave_before)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        splits = self.sequence_parallel and module.training
        dim = 0 if self.flat else 1

        def gather(x: torch.Tensor) -> torch.Tensor:
            if splits and self.overlap is not None:
                return self.overlap.enter(x)
            return gather_sequence(x, self.group, dim) if splits else copy_to(x, self.group)

        if self.flat:
            args = tuple(gather(x) if x.is_floating_point() or splits else x for x in args)
            kwargs = {k: gather(x) if x.is_floating_point() or splits else x for k, x in kwargs.items()}
        else:
            args, kwargs = replace_hidden(args, kwargs, gather)
        self._shape = hidden_of(args, kwargs).shape
        # A recomputation stops inside the region and never leaves it (torch.utils.checkpoint puts the generators back):
        # what it left here must not be taken for this call's.
        self._stream = dropout_stream(self.group.rank) if self.own_dropout and module.training else None
        if self._stream is not None:
            self._stream.__enter__()
        return args, kwargs

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self._stream is not None:
            self._stream.__exit__(None, None, None)
            self._stream = None
        splits = self.sequence_parallel and module.training

        def reduce(x: torch.Tensor) -> torch.Tensor:
            if not splits:
                return reduce_from(x, self.group)
            if self.flat:
                return scatter_sum(x, self.group, 0)
            assert self._shape is not None
            x = x.view(self._shape[:-1] + x.shape[-1:])  # some return [tokens, H]
            return scatter_sum(x, self.group) if self.overlap is None else self.overlap.leave(x)

        return replace_first(output, reduce)

    def leave_before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """`leave` in front of `module`. A method, as all hooks with a state: `copy.deepcopy` copies no closures."""
        return (self.leave(module, args, args[0]), *args[1:])


class WholeRegion:
    """Lets a module without cut weights see all tokens under sequence parallelism: every rank computes all of it."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def attach(self, module: nn.Module) -> None:
        module.register_forward_pre_hook(self.enter, with_kwargs=True)
        module.register_forward_hook(self.leave)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        return replace_hidden(args, kwargs, lambda x: join_sequence(x, self.group) if module.training else x)

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return replace_first(output, lambda x: split_sequence(x, self.group) if module.training else x)


class TokenRegion:
    """Gives each tensor-parallel rank its own tokens of a replicated sequence: a block with distributed experts.

    Sequences are padded to a multiple of the group's size inside. With `flat`, every argument is a tensor `[tokens,
    ...]` without a batch dimension.
    """

    def __init__(self, group: Group, flat: bool = False) -> None:
        self.group, self.dim = group, 0 if flat else 1
        self._length = 0

    def attach(self, module: nn.Module) -> None:
        module.register_forward_pre_hook(self.enter, with_kwargs=True)
        module.register_forward_hook(self.leave)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        self._length = hidden_of(args, kwargs).shape[self.dim]
        missing = -self._length % self.group.size

        def split(x: Any) -> Any:
            if not isinstance(x, torch.Tensor) or x.dim() < 2 or x.shape[self.dim] != self._length:
                return x
            x = F.pad(x, (0, 0) * (x.dim() - 1 - self.dim) + (0, missing)) if missing else x
            return (split_sequence if x.is_floating_point() else own_part)(x, self.group, self.dim)

        return tuple(map(split, args)), {name: split(value) for name, value in kwargs.items()}

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return replace_first(output, lambda x: join_sequence(x, self.group, self.dim).narrow(self.dim, 0, self._length))


def hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden states among the arguments of a block."""
    return args[0] if args else kwargs["hidden_states"]


def replace_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[torch.Tensor], torch.Tensor]
) -> Call:
    """Arguments of a block, its hidden states changed."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}


def replace_first(output: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Output of a block, its hidden states changed: the tensor itself, or the first of a tuple."""
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)


def split_before(module: nn.Module, group: Group, dim: int = 1) -> None:
    """Cut the sequence in front of `module` (the first decoder layer) while training."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not module.training:
            return None
        length = hidden_of(args, kwargs).shape[dim]
        if length % group.size:
            raise ValueError(
                f"sequence_parallel shards the sequence over tp_size={group.size} ranks, which does not divide its "
                f"{length} tokens; pad to a multiple of {group.size} or use sequence_parallel=False."
            )
        return replace_hidden(args, kwargs, lambda x: split_sequence(x, group, dim))

    module.register_forward_pre_hook(hook, with_kwargs=True)


def join_after(module: nn.Module, group: Group, dim: int = 1) -> None:
    """Join the sequence behind `module` (the last decoder layer) while training: what follows sees all tokens."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return replace_first(output, lambda x: join_sequence(x, group, dim)) if module.training else None

    module.register_forward_hook(hook)


def own_ids_before(module: nn.Module, group: Group) -> None:
    """Shard the other per-token arguments (ids) of a block that works on this rank's tokens, while training."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not module.training:
            return None
        length = hidden_of(args, kwargs).shape[1] * group.size

        def own(x: Any) -> Any:
            per_token = isinstance(x, torch.Tensor) and not x.is_floating_point() and x.dim() > 1
            return own_part(x, group, 1) if per_token and x.shape[1] == length else x

        return tuple(map(own, args)), {name: own(value) for name, value in kwargs.items()}

    module.register_forward_pre_hook(hook, with_kwargs=True)


def split_argument(module: nn.Module, position: int, group: Group) -> None:
    """Cut what the argument at `position` of a decoder layer holds for each token, while training."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
        if not module.training or not isinstance(args[position], torch.Tensor):
            return None
        return (*args[:position], split_sequence(args[position], group), *args[position + 1 :])

    module.register_forward_pre_hook(hook)


def gather_before_head(head: nn.Module, group: Group, sequence_parallel: bool, is_cut: bool) -> None:
    """Hand whole sequences to the output embedding.

    With a sharded head the gradient of the hidden states is partial on every rank, else it is whole. Code that has
    already gathered the sequence sets `has_whole_input` on the head.
    """

    def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
        x, *rest = args
        if sequence_parallel and module.training and not getattr(module, "has_whole_input", False):
            x = gather_sequence(x, group) if is_cut else join_sequence(x, group)
        elif is_cut:
            x = copy_to(x, group)
        return (x, *rest)

    head.register_forward_pre_hook(hook)
