"""Where tokens are gathered and partial sums reduced: hooks at the border of stock modules.

Stock modules stay as they are; a region attaches to them through `torch.nn.Module`'s own hooks. With sequence
parallelism, activations between regions are `[B, S/tp, H]` while a model trains. Evaluation and generation keep whole
sequences (any length, also one token), which computes the same function with an all-reduce.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .collectives import copy_to, gather_sequence, join_sequence, reduce_from, scatter_sum, split_sequence
from .mesh import Group
from .random import dropout_stream


class Region:
    """Sums what the cut layers inside one attention or MLP module compute in parts.

    Args:
        group: the tensor-parallel ranks.
        sequence_parallel: gather tokens at the entry and scatter them at the exit while training.
        own_dropout: draw dropout inside from a stream of this rank's own (heads are cut), and leave the stream outside
            as it is on every rank.
    """

    def __init__(self, group: Group, sequence_parallel: bool, own_dropout: bool) -> None:
        self.group, self.sequence_parallel = group, sequence_parallel
        self.own_dropout = own_dropout and not sequence_parallel
        self._stream: dropout_stream | None = None

    def attach(self, module: nn.Module) -> None:
        module.register_forward_pre_hook(self.enter, with_kwargs=True)
        module.register_forward_hook(self.leave)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        gather = gather_sequence if self.sequence_parallel and module.training else copy_to
        if args:
            args = (gather(args[0], self.group), *args[1:])
        else:
            kwargs = {**kwargs, "hidden_states": gather(kwargs["hidden_states"], self.group)}
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
        reduce = scatter_sum if self.sequence_parallel and module.training else reduce_from
        if isinstance(output, tuple):
            return (reduce(output[0], self.group), *output[1:])
        return reduce(output, self.group)


def split_before(module: nn.Module, group: Group) -> None:
    """Cut the sequence in front of `module` (the first decoder layer) while training."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
        if not module.training:
            return None
        hidden_states = args[0]
        if hidden_states.shape[1] % group.size:
            raise ValueError(
                f"sequence_parallel cuts the sequence over tp_size={group.size} ranks, which does not divide its "
                f"{hidden_states.shape[1]} tokens; pad to a multiple of {group.size} or use sequence_parallel=False."
            )
        return (split_sequence(hidden_states, group), *args[1:])

    module.register_forward_pre_hook(hook)


def gather_after(module: nn.Module, group: Group, head_is_cut: bool) -> None:
    """Join the sequence behind `module` (the final norm) while training.

    With a cut head every rank has a part of the gradient of the hidden states, without one every rank has all of it.
    """
    gather = gather_sequence if head_is_cut else join_sequence

    def hook(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> Any:
        return gather(output, group) if module.training else None

    module.register_forward_hook(hook)


def copy_before(module: nn.Module, group: Group, also_when_training: bool) -> None:
    """Sum the partial input gradients of `module` (a cut head that reads replicated hidden states)."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
        return (copy_to(args[0], group), *args[1:]) if also_when_training or not module.training else None

    module.register_forward_pre_hook(hook)
