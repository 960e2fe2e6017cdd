"""Run real code on tensors that have shapes and no memory, and note how many bytes they would take.

Large models do not fit into the memory of the machine that plans them, and their values do not matter. So inside of an
`Outline` every tensor of floating point numbers with more than one element is on the meta device, whatever device the
code asks for. Single numbers, integers, numbers of 64 bits (figures of ranks, say: no part of a model is of them) and
what is computed from them alone are real, so that code that reads them goes its usual way. Where code reads a number
that was computed from tensors without values, it finds a one.

Operators are told apart by the shapes of what they are given: what comes out is looked up, since a model does the same
many times, and torch's own rules for shapes take most of the time.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

META = torch.device("meta")
READABLE = 4096  # integers that are read on the host, such as numbers of rows for experts
LIKE = ("new_empty", "new_zeros", "new_full", "new_ones", "empty_like", "zeros_like", "ones_like", "full_like")
Watch = Callable[[Any, str, Any, Any], Any]
Label = Callable[[str | None], None]


@dataclass(frozen=True)
class _Operator:
    """What is known of an operator: `writes` is the place of the first tensor that it changes."""

    namespace: str
    name: str
    writes: int | str | None
    returns: bool
    is_view: bool
    resizes: bool


class Outline(TorchDispatchMode):
    """A dispatch mode, entered around the code that is to run.

    Args:
        watch: runs the operators of process groups: `watch(operator, name, args, kwargs)`.
        label: called with the name of each range of `record_function`, and with None where one ends.
        has_values: leave tensors as they are, and only watch.

    Attributes:
        live: bytes of the tensors without memory that are alive.
        peak: the most there were.
    """

    def __init__(self, watch: Watch, label: Label, has_values: bool = False) -> None:
        super().__init__()
        self._has_values = has_values
        self._watch, self._label = watch, label
        self._operators: dict[Any, _Operator] = {}
        self._results: dict[Any, Any] = {}
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operator = self._operators.get(func) or self._study(func)
        if operator.namespace == "c10d":
            return self._watch(func, operator.name, args, kwargs)
        if operator.namespace == "profiler":
            self._label(args[0] if operator.name.startswith("_record_function_enter") else None)
            return func(*args, **kwargs)
        if self._has_values:
            return func(*args, **kwargs)
        outlined, key = _looked_at(args, kwargs)
        if not outlined:
            if kwargs.get("device", META) not in (META, None):
                return self._made(func, args, kwargs)
            if operator.name in LIKE and kwargs.get("device") is None:
                return self._made(func, args, {**kwargs, "device": args[0].device})
            return func(*args, **kwargs)
        if operator.name == "_local_scalar_dense":
            return torch.ones((), dtype=args[0].dtype).item()
        if operator.writes is not None and not operator.resizes:
            # Shapes stay, and there are no values. A number that is real keeps its own.
            written = args[operator.writes] if isinstance(operator.writes, int) else kwargs[operator.writes]
            return written if operator.returns else None
        if operator.name == "_to_copy" and kwargs.get("device", META) != META and _is_read(args[0]):
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        key = (func, key)
        if key in self._results:
            return self._renewed(self._results[key])
        args, kwargs = tree_map_only(torch.Tensor, _outlined, (args, dict(kwargs)))
        if kwargs.get("device") is not None:
            kwargs["device"] = META
        made = func(*args, **kwargs)
        if operator.is_view:
            return made
        recipe = _recipe(made)
        if recipe is not None and not _shares(made, args):
            self._results[key] = recipe
            return self._renewed(recipe)
        return tree_map_only(torch.Tensor, self._counted, made)

    def _study(self, func: Any) -> _Operator:
        schema = func._schema
        namespace, _, name = schema.name.partition("::")
        writes: int | str | None = None
        for index, argument in enumerate(schema.arguments):
            if writes is None and argument.alias_info is not None and argument.alias_info.is_write:
                writes = argument.name if argument.kwarg_only else index
        results = len(schema.returns)
        resizes = name in ("resize_", "set_")
        operator = _Operator(namespace, name, writes if results < 2 else None, bool(results), func.is_view, resizes)
        return self._operators.setdefault(func, operator)

    def _made(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The result of a factory: without memory, if it is of many numbers of floating point."""
        pinned = {"pin_memory": None} if "pin_memory" in kwargs else {}
        made = func(*args, **{**kwargs, "device": META, **pinned})
        if isinstance(made, torch.Tensor) and _has_no_values(made):
            return self._counted(made)
        return func(*args, **kwargs)

    def _renewed(self, recipe: Any) -> Any:
        if isinstance(recipe, tuple):
            return tuple(None if part is None else self._renewed(part) for part in recipe)
        if isinstance(recipe, list):
            return [None if part is None else self._renewed(part) for part in recipe]
        if recipe.is_single:
            return torch.ones(recipe.shape, dtype=recipe.dtype)
        return self._counted(torch.empty_strided(recipe.shape, recipe.stride, dtype=recipe.dtype, device=META))

    def _counted(self, x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage not in self._known:
            self._known.add(storage)
            size = storage.nbytes()
            weakref.finalize(storage, self._dropped, size).atexit = False
            self.live += size
            if self.live > self.peak:
                self.peak = self.live
        return x

    def _dropped(self, size: int) -> None:
        self.live -= size


@dataclass(frozen=True)
class _Recipe:
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def is_single(self) -> bool:
        return self.shape.numel() == 1


def _recipe(made: Any) -> Any:
    """How to make what an operator returned again; None for what is not of tensors alone."""
    if isinstance(made, torch.Tensor):
        return _Recipe(made.shape, made.stride(), made.dtype)
    if isinstance(made, tuple | list):
        parts = [None if part is None else _recipe(part) for part in made]
        if any(part is None and whole is not None for part, whole in zip(parts, made, strict=True)):
            return None
        return parts if isinstance(made, list) else tuple(parts)
    return None


def _shares(made: Any, args: Any) -> bool:
    """Whether a result is in the memory of an argument."""
    results: set[int] = set()
    tree_map_only(torch.Tensor, lambda x: results.add(x.untyped_storage()._cdata), made)
    given: set[int] = set()
    tree_map_only(torch.Tensor, lambda x: given.add(x.untyped_storage()._cdata), args)
    return bool(results & given)


def _looked_at(args: Any, kwargs: Any) -> tuple[bool, Any]:
    """Whether a tensor without memory is among the arguments, and what they are as far as shapes depend on it."""
    outlined = False
    key: list[Any] = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            outlined |= value.is_meta
            key.append((value.shape, value.stride(), value.dtype, value.is_meta))
        elif isinstance(value, list | tuple):
            inner, parts = _looked_at(value, {})
            outlined |= inner
            key.append(parts)
        else:
            key.append((type(value), value))
    return outlined, (tuple(key), tuple(kwargs))


def _outlined(x: torch.Tensor) -> torch.Tensor:
    return x if x.is_meta else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=META)


def _has_no_values(x: torch.Tensor) -> bool:
    return x.is_floating_point() and x.numel() > 1 and x.dtype != torch.float64


def _is_read(x: torch.Tensor) -> bool:
    return x.numel() <= (1 if x.is_floating_point() else READABLE)
