"""What differs between the releases of transformers that are supported, for the models.

A key-value cache is called `cache` since 5.24, and `past_key_values` before (`cache_params` in state-space models).
Layers of older families are handed it as `layer_past`, or by place.
Code that is loaded with `trust_remote_code` keeps the name that it was written with, so signatures are asked.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import transformers
from transformers import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

RELEASE = tuple(map(int, transformers.__version__.split(".")[:2]))

# Classes of decoder layers that return a tuple in 5.23 and the hidden states alone since.
FORMER_TUPLES = ("CodeGenBlock",) if RELEASE < (5, 24) else ()

CACHE_NAMES = ("cache", "past_key_values", "cache_params")


def name_among(names: Iterable[str]) -> str | None:
    """The one of `names` that is the cache's, or None."""
    return next((name for name in CACHE_NAMES if name in names), None)


OUTPUT_NAME = name_among({field.name for field in dataclasses.fields(CausalLMOutputWithPast)}) or CACHE_NAMES[0]


@functools.cache
def argument_name(forward: Callable[..., Any]) -> str:
    """The name of the cache among the parameters of `forward`; where it has none, that of this transformers."""
    return name_among(inspect.signature(forward).parameters) or OUTPUT_NAME


def cache_in(arguments: Mapping[str, Any], by_place: Iterable[Any] = ()) -> Any:
    """The cache among the arguments of a model or of a layer, under whatever name, or None."""
    named = next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)
    if named is not None:
        return named
    return next((value for value in (*by_place, *arguments.values()) if isinstance(value, Cache)), None)


def without_cache(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """`arguments` without the cache, under any of its names."""
    return {name: value for name, value in arguments.items() if name not in CACHE_NAMES}
