"""Hooks that a user has put on a module, told from those of this package and of the libraries below it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import nn

LIBRARIES = ("hf_nanotron", "torch", "transformers", "accelerate")
BACKWARD = ("_backward_pre_hooks", "_backward_hooks")
TABLES = ("_forward_pre_hooks", "_forward_hooks", *BACKWARD)


def users_hooks(module: nn.Module, tables: Sequence[str] = TABLES) -> list[str]:
    """Names of the functions that a user has hooked to `module` itself, forwards or backwards."""
    hooks = [hook for table in tables for hook in getattr(module, table).values()]
    return [_name(hook) for hook in hooks if _package(hook) not in LIBRARIES]


def inner_hooks(model: nn.Module, backbone: str) -> list[tuple[str, str]]:
    """(module, hook) of a user's hooks on the backbone and on what is inside it."""
    start = f"{backbone}." if backbone else ""
    inside = ((name, module) for name, module in model.named_modules() if name and f"{name}.".startswith(start))
    return [(name, hook) for name, module in inside for hook in users_hooks(module)]


def _function(hook: Any) -> Any:
    while isinstance(hook, functools.partial):
        hook = hook.func
    return hook


def _package(hook: Any) -> str:
    function = _function(hook)
    return str(getattr(function, "__module__", None) or type(function).__module__).partition(".")[0]


def _name(hook: Any) -> str:
    function = _function(hook)
    return str(getattr(function, "__qualname__", type(function).__qualname__))
