"""Which elements of a training state each tensor of the Hub repository is, as data: read in both directions.

An `Entry` is one Hub tensor and a `Slice` of a tensor of the state. For the families that train under the Hub's own
names and shapes that is the tensor itself (`identity`). A family whose layout transformers merges when it loads it
(experts, say) gets entries that are a part each of the merged tensor; the engine in `sharded_convert` stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from .slices import Sizes, Slice, find_fault


@dataclass(frozen=True)
class Entry:
    """One tensor of the Hub repository, and the elements of a state's tensor that it is.

    Args:
        hub: its name there.
        shape: its shape there; it has as many elements as `part`.
        part: of a tensor of the state, in row-major order.
        trained: it is a parameter, which has a master unless it was frozen; otherwise a buffer, which has none.
    """

    hub: str
    shape: Sizes
    part: Slice
    trained: bool = True


@dataclass(frozen=True)
class Layout:
    """What a Hub repository of a model holds: its entries, in model order, and the name of its stock class.

    Raises:
        ValueError: if the entries do not hold every element of the state's tensors exactly once.
    """

    entries: tuple[Entry, ...]
    architecture: str

    def __post_init__(self) -> None:
        for name, entries in self.parts.items():
            if (fault := find_fault(entry.part for entry in entries)) is not None:
                raise ValueError(f"the mapping of {self.architecture} does not hold {name!r} once: {fault}.")

    @cached_property
    def shapes(self) -> dict[str, Sizes]:
        """Hub name -> shape, in model order."""
        return {entry.hub: entry.shape for entry in self.entries}

    @cached_property
    def parts(self) -> dict[str, list[Entry]]:
        """Name in the state -> the Hub tensors that make it up, in model order. Parameters alone."""
        parts: dict[str, list[Entry]] = {}
        for entry in self.entries:
            if entry.trained:
                parts.setdefault(entry.part.name, []).append(entry)
        return parts

    @cached_property
    def state_shapes(self) -> dict[str, Sizes]:
        """Name in the state -> shape there, in model order. Parameters alone."""
        return {name: entries[0].part.global_shape for name, entries in self.parts.items()}


def identity(shapes: Mapping[str, Sizes], buffers: frozenset[str] = frozenset()) -> tuple[Entry, ...]:
    """The mapping of a model whose state has the Hub's own tensors. `buffers`: the names that are not parameters."""
    return tuple(Entry(n, shape, Slice.whole(n, shape), trained=n not in buffers) for n, shape in shapes.items())


def hub_layout(config: PreTrainedConfig) -> Layout:
    """The layout of the causal LM of a config. Makes the stock model on the meta device, without any weights.

    A tied parameter is there once, under the name of its source.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict(keep_vars=True).items()
        if name not in model.all_tied_weights_keys
    }
    buffers = frozenset(name for name, _ in model.named_buffers())
    return Layout(identity(shapes, buffers), type(model).__name__)
