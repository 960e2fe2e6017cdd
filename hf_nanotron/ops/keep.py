"""Selective checkpointing without compilation: outputs of some operators are kept, the others run again.

As `torch.utils.checkpoint.create_selective_checkpoint_contexts`. But that one hands out what was kept even if it was
written to since, through a view with a version of its own: stock models add to outputs of linear layers in place. Here
a copy is made before such a write.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

Keeps = Callable[[Any, tuple[Any, ...], Mapping[str, Any]], bool]


class _Kept:
    """The outputs of one region in the order in which they were made, by operator."""

    def __init__(self) -> None:
        self._outputs: defaultdict[Any, deque[list[Any]]] = defaultdict(deque)
        self._at: defaultdict[int, list[list[Any]]] = defaultdict(list)  # by the address of their memory

    def add(self, op: Any, output: Any) -> None:
        entry = [tree_map_only(torch.Tensor, lambda x: x.detach(), output)]
        self._outputs[op].append(entry)
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self._at[tensor.untyped_storage()._cdata].append(entry)

    def before_write(self, written: torch.Tensor) -> None:
        """Keep copies of what lies in the memory of `written`."""
        for entry in self._at.pop(written.untyped_storage()._cdata, ()):
            entry[0] = tree_map_only(torch.Tensor, torch.clone, entry[0])

    def next(self, op: Any) -> Any:
        """The kept output of the next call of `op`, which is then dropped."""
        if not self._outputs[op]:
            raise RuntimeError(f"no kept output of {op} is left: selective recomputation supports one backward.")
        return self._outputs[op].popleft()[0]

    def end_forward(self) -> None:
        self._at.clear()


class _Keep(TorchDispatchMode):
    def __init__(self, kept: _Kept, keeps: Keeps) -> None:
        super().__init__()
        self.kept, self.keeps = kept, keeps

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = getattr(func, "_schema", None)
        if schema is not None and schema.is_mutable:
            for index, argument in enumerate(schema.arguments):
                value = args[index] if index < len(args) else kwargs.get(argument.name)
                if argument.alias_info is not None and argument.alias_info.is_write:
                    for tensor in tree_leaves(value):
                        if isinstance(tensor, torch.Tensor):
                            self.kept.before_write(tensor)
        output = func(*args, **kwargs)
        if self.keeps(func, args, kwargs):
            self.kept.add(func, output)
        return output

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.kept.end_forward()


class _Reuse(TorchDispatchMode):
    def __init__(self, kept: _Kept, keeps: Keeps) -> None:
        super().__init__()
        self.kept, self.keeps = kept, keeps

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return self.kept.next(func) if self.keeps(func, args, kwargs) else func(*args, **kwargs)


def keeping_contexts(keeps: Keeps) -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """A `context_fn` of `torch.utils.checkpoint.checkpoint`, once `keeps` is bound.

    `keeps` says of a call `(operator, args, kwargs)` whether its output is kept. It may depend on numbers among the
    arguments, not on the values of tensors.
    """
    kept = _Kept()
    return _Keep(kept, keeps), _Reuse(kept, keeps)
