"""Whether the bases of a class are in an order in which ours has its say, and no default changes without a word."""

from __future__ import annotations

from dataclasses import MISSING, Field, fields
from typing import Any, cast


def check_base_order(cls: type, ours: type, stock: type, instead: str) -> None:
    """Refuse a class with another subclass of `stock` before `ours`, whose construction and defaults would win.

    Called while `cls` is made.

    Args:
        cls: derives from `ours`, which derives from `stock`.
        instead: for classes that are often combined: what to derive from, as the object of "or".

    Raises:
        ValueError: naming both.
    """
    for base in cls.__mro__[1 : cls.__mro__.index(ours)]:
        constructs = "__init__" in vars(base)  # others are mixins, whose methods are looked at one by one
        if issubclass(base, stock) and not issubclass(base, ours) and constructs:
            raise ValueError(
                f"class {cls.__name__}: {base.__name__} stands before {ours.__name__}, so that its methods and "
                f"defaults would silently take the place of ours; write class {cls.__name__}({ours.__name__}, "
                f"{base.__name__}), or derive from {instead}."
            )


def check_defaults(cls: type, ours: type, stock: type, instead: str) -> None:
    """Refuse a class of arguments in which `ours` silently sets back a default that another base has changed.

    A dataclass takes each default from its first base that has the field, and `ours` has all those of `stock`.

    Raises:
        ValueError: naming the first such field, and both of its values.
    """
    own = {entry.name: entry for entry in fields(cast(Any, ours))}
    plain = {entry.name: entry for entry in fields(cast(Any, stock))}
    at = cls.__mro__.index(ours)
    said = {name for base in cls.__mro__[:at] for name in vars(base).get("__annotations__", {})}
    for base in cls.__mro__[at + 1 :]:
        if not issubclass(base, stock) or issubclass(ours, base):
            continue
        for entry in fields(cast(Any, base)):
            changed = entry.name in plain and _default(entry) != _default(plain[entry.name])
            if changed and entry.name not in said and _default(own[entry.name]) != _default(entry):
                raise ValueError(
                    f"class {cls.__name__}: {entry.name} would be {_default(own[entry.name])!r} by default "
                    f"({ours.__name__}), not {_default(entry)!r} ({base.__name__}); derive from {instead}, or name the "
                    "field in the class."
                )


def _default(entry: Field[Any]) -> Any:
    return entry.default if entry.default_factory is MISSING else entry.default_factory()
