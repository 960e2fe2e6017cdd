"""The sizes of a parallel run, as training arguments say them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ..parallel.config import ParallelConfig


def parallel_sizes(arguments: Mapping[str, Any]) -> ParallelConfig:
    """The sizes that training arguments say by their names; of those that are absent, the defaults.

    Raises:
        ValueError: as `ParallelConfig` does.
    """
    sizes = {entry.name: arguments[entry.name] for entry in fields(ParallelConfig) if entry.name in arguments}
    if (
        arguments.get("mlp_chunk_tokens") is not None
        and sizes.get("tp_size", 1) != 1
        and sizes.get("tp_overlap") is None
    ):
        sizes["tp_overlap"] = False
    layers = layer_counts(sizes.get("pp_layers_per_stage"))
    return ParallelConfig(**{**sizes, "pp_layers_per_stage": None if layers is None else tuple(layers)})


def layer_counts(value: Any) -> list[int] | None:
    """`pp_layers_per_stage` from a list, or from text like "3,5", "3 5" or "[3, 5]"."""
    if not value:
        return None
    text = value if isinstance(value, str) else ",".join(map(str, value))
    try:
        return [int(count) for count in text.strip("[]() ").replace(",", " ").split()] or None
    except ValueError:
        raise ValueError(
            f"pp_layers_per_stage={value!r} must be a list of integers, or text like '3,5': the decoder layers of "
            "each stage."
        ) from None
