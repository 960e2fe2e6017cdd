"""Blocks that mix tokens otherwise than by attention see whole rows: every context-parallel rank computes all of it.

The border of such a block gathers the hidden states of all ranks in order, and keeps this rank's tokens of the output.
The gradients of hidden states and of weights on a rank are then those of its own tokens, and the sums over ranks that
follow are exact. The work of the block is not divided.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..tp.regions import replace_first, replace_hidden
from .plan import ContextPlan
from .rows import RowParts


class WholeRowRegion:
    """Lets a block see whole rows, and its caller this rank's tokens.

    Args:
        argument: keyword in which the block gets a `ContextPlan`.
        is_dealt: whether rows are shared by ranks now; else blocks are called with whole ones.
    """

    def __init__(self, argument: str, is_dealt: Callable[[], bool]) -> None:
        self.argument, self.is_dealt = argument, is_dealt
        self._parts: RowParts | None = None

    def attach(self, module: nn.Module) -> list[Any]:
        """Attach to `module`, inside of the regions of tensor parallelism. Returns handles."""
        return [
            module.register_forward_pre_hook(self.enter, with_kwargs=True),
            module.register_forward_hook(self.leave, prepend=True),
        ]

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        plan: ContextPlan | None = kwargs.get(self.argument)
        if plan is None:
            self.check(module)
        self._parts = None if plan is None else plan.parts
        if plan is None:
            return args, kwargs
        # A kernel that takes any keyword argument would not know this one.
        kwargs = {name: value for name, value in kwargs.items() if name != self.argument}
        return replace_hidden(args, kwargs, plan.parts.join)

    def check(self, module: nn.Module) -> None:
        """Refuse `module` if it gets no plan though rows are shared."""
        if self.is_dealt():
            raise ValueError(
                f"{type(module).__name__} does not learn how rows are shared by ranks: its model does not pass keyword "
                "arguments on. Use cp_size=1."
            )

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        parts = self._parts
        return output if parts is None else replace_first(output, parts.own)
