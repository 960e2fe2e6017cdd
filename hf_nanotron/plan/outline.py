"""Run real code on tensors that have shapes and no memory, in a job of imagined ranks, and note what it does.

Large models do not fit into the memory of the machine that plans them, and their values do not matter. So inside of an
`Outline` every tensor of floating point numbers with more than one element is on the meta device, whatever device the
code asks for; single numbers, integers and what is computed from them alone are real, so that code that reads them goes
its usual way. Where code reads a number that was computed from tensors without values, it finds a one.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

META = torch.device("meta")
READABLE = 4096  # elements that are read on the host: numbers of a log line, loads of experts



class Outline(TorchDispatchMode):
    """A dispatch mode, entered around the code that is to run.

    Args:
        watch: called for each communication with the name of the operator, its schema's arguments by name, tensors that
            it reads and tensors that it writes; it may write what is received into those that have values.
        label: called with the name of each range of `record_function`, and with None where it ends.

    Attributes:
        live: bytes of the tensors that are alive.
        peak: the most there were.
    """

    def __init__(self, watch: Any, label: Callable[[str | None], None]) -> None:
        super().__init__()
        self._watch, self._label = watch, label
        self._sizes: dict[weakref.ref[Any], int] = {}
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "profiler":
            self._label(args[0] if name.startswith("_record_function_enter") else None)
            return func(*args, **kwargs)
        if namespace == "c10d":
            return self._watch(func, name, args, kwargs)
        leaves, structure = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        outlined = any(tensor.is_meta for tensor in tensors)
        if name == "_local_scalar_dense" and outlined:
            return torch.ones((), dtype=args[0].dtype).item()
        if not outlined and kwargs.get("device") is not None and kwargs["device"] != META:
            return self._made(func, args, kwargs)
        if not outlined:
            if name in ("new_empty", "new_zeros", "new_full", "new_ones", "empty_like", "zeros_like", "ones_like"):
                return self._made(func, args, {**kwargs, "device": args[0].device})
            return func(*args, **kwargs)
        mutated = _mutated(func, args, kwargs)
        if mutated is not None and not mutated.is_meta:
            return mutated  # a number that is real keeps its value
        to = kwargs.get("device")
        if name == "_to_copy" and to is not None and torch.device(to) != META and _is_read(args[0]):
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        leaves = [_outlined(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        args, kwargs = tree_unflatten(leaves, structure)
        if to is not None:
            kwargs = {**kwargs, "device": META}
        made = func(*args, **kwargs)
        if mutated is not None:
            return made
        return tree_map_only(torch.Tensor, lambda x: self._kept(x, func), made)

    def _made(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The result of a factory: without memory, if it has many numbers of floating point."""
        made = func(*args, **{**kwargs, "device": META, **({"pin_memory": None} if "pin_memory" in kwargs else {})})
        if isinstance(made, torch.Tensor) and made.is_floating_point() and made.numel() > 1:
            return self._kept(made, func)
        return func(*args, **kwargs)

    def _kept(self, x: torch.Tensor, func: Any) -> torch.Tensor:
        """`x`, counted; a single number that is not part of another tensor gets a value."""
        if x.numel() == 1 and not func.is_view:
            return torch.ones(x.shape, dtype=x.dtype)
        storage = x.untyped_storage()
        if storage not in self._known:
            self._known.add(storage)
            size = storage.nbytes()
            weakref.finalize(storage, self._dropped, size).atexit = False
            self.live += size
            self.peak = max(self.peak, self.live)
        return x

    def _dropped(self, size: int) -> None:
        self.live -= size


def _outlined(x: torch.Tensor) -> torch.Tensor:
    return x if x.is_meta else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=META)


def _is_read(x: torch.Tensor) -> bool:
    return x.numel() <= (64 if x.is_floating_point() else READABLE)


def _mutated(func: Any, args: Any, kwargs: Any) -> torch.Tensor | None:
    """The first tensor that an operator writes to."""
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            if isinstance(value, torch.Tensor):
                return value
    return None
