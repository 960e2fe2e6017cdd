"""Which tensors of a Hub repository make up which tensors of a model, in both directions, without any weights.

Many families keep their modules' tensors in another form than their files, as transformers declares it
(`transformers.conversion_mapping`): experts stacked, gate and up joined, other names. Its own conversions are run here
on tensors without data (`trace.Traced`), towards the files for a save and from what a repository holds for a load.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from .trace import ZEROS, Grid, Sizes, Traced, copy_grids

FORMER_BUFFERS = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")  # in old files of many families


@dataclass(frozen=True)
class HubTensor:
    """A tensor of the files."""

    name: str
    shape: Sizes  # its shape there
    grids: tuple[Grid, ...]  # which elements of which tensors of the model it is made of, and which are zero

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """The tensors of the model that it is made of."""
        return tuple(dict.fromkeys(grid.name for grid in self.grids if grid.name != ZEROS))

    def made_of(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The tensor itself, from whole tensors of the model. No copy if it is one of them."""
        first = tensors[self.sources[0]]
        if tuple(first.shape) == self.shape and self.grids == (Grid.whole(self.grids[0].name, self.shape),):
            return first
        whole = {name: tensors[name].contiguous() for name in self.sources}
        return copy_grids(first.new_empty(self.shape), self.grids, whole.__getitem__)


@dataclass(frozen=True)
class Part:
    """Tensors of the files and of the model that are made of each other alone: what is gathered at once."""

    model: tuple[str, ...]  # names of the tensors of the model
    hub: tuple[str, ...]  # names of those of the files


@dataclass(frozen=True)
class HubSources:
    """What a repository offers a model."""

    # name in the model -> the elements of the repository's tensors that it is made of
    grids: dict[str, tuple[Grid, ...]]
    missing: list[str]  # tensors of the model that are not there
    unused: list[str]  # tensors of the repository for which the model has no place
    used: frozenset[int] = frozenset()  # the indices of the layout's `conversions` that took part


@dataclass(frozen=True)
class HubLayout:
    """How the Hub stores a model."""

    architecture: str  # name of the stock class
    # name -> shape of the stock model's tensors, in its order: parameters, a tied one under the name of its source, and
    # persistent buffers
    shapes: dict[str, Sizes]
    dtypes: dict[str, torch.dtype]  # their dtypes in the stock model
    buffers: frozenset[str]  # which of them are buffers
    tied: dict[str, str]  # parameter -> the name of its source, for those that are not stored
    config: PreTrainedConfig  # of the model
    # from the files to the model, as transformers applies them, the legacy ones included
    conversions: tuple[WeightTransform, ...] = ()
    reverted: frozenset[int] = frozenset()  # which of them are undone on the way to the files
    prefix: str = ""  # `base_model_prefix` of the model
    optional: tuple[str, ...] = ()  # patterns of names in files that no warning is given for
    tensors: dict[str, HubTensor] = field(init=False)

    def __post_init__(self) -> None:
        conversions = [deepcopy(c) for i, c in enumerate(self.conversions) if i in self.reverted]
        # What `revert_weight_conversion` asks of a model.
        model: Any = SimpleNamespace(config=self.config, _weight_conversions=conversions)
        traced: dict[str, Any] = {name: Traced.of(name, shape) for name, shape in self.shapes.items()}
        try:
            converted = revert_weight_conversion(model, traced) if conversions else traced
        except (ValueError, KeyError, RuntimeError, IndexError) as error:
            raise ValueError(f"{self.architecture}: its layout on the Hub cannot be traced: {error}") from error
        found = [HubTensor(name, tuple(tensor.shape), tensor.grids) for name, tensor in converted.items()]
        place = {name: index for index, name in enumerate(self.shapes)}
        found.sort(key=lambda tensor: min(place[name] for name in tensor.sources))  # stable: stock's order otherwise
        object.__setattr__(self, "tensors", {tensor.name: tensor for tensor in found})
        counts = dict.fromkeys(self.shapes, 0)
        for tensor in found:
            for grid in tensor.grids:
                if grid.name != ZEROS:
                    counts[grid.name] += grid.numel
            self._check_whole(tensor.name, tensor.shape, tensor.grids)
        if lost := [name for name, count in counts.items() if count != torch.Size(self.shapes[name]).numel()]:
            raise ValueError(
                f"{self.architecture}: the Hub's layout does not cover {', '.join(lost[:5])} ({len(lost)} tensors)."
            )

    def _check_whole(self, name: str, shape: Sizes, grids: Iterable[Grid]) -> None:
        if sum(grid.numel for grid in grids) != torch.Size(shape).numel():
            raise ValueError(f"{self.architecture}: each element of {name!r} must come from exactly one place.")

    # ---- to the files ----

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """All tensors, in model order, in the smallest groups that can be written on their own."""
        leader = {name: name for name in self.shapes}

        def find(name: str) -> str:
            while leader[name] != name:
                name = leader[name]
            return name

        for tensor in self.tensors.values():
            first = find(tensor.sources[0])
            for other in tensor.sources[1:]:
                leader[find(other)] = first
        parts: dict[str, tuple[list[str], list[str]]] = {}
        for name in self.shapes:
            parts.setdefault(find(name), ([], []))[0].append(name)
        for tensor in self.tensors.values():
            parts[find(tensor.sources[0])][1].append(tensor.name)
        return tuple(Part(tuple(model), tuple(hub)) for model, hub in parts.values())

    @cached_property
    def hub_shapes(self) -> dict[str, Sizes]:
        """Name -> shape of every tensor of the files, in the order in which they are written."""
        return {name: self.tensors[name].shape for part in self.parts for name in part.hub}

    @property
    def numel(self) -> int:
        """Elements of all parameters."""
        return sum(torch.Size(shape).numel() for name, shape in self.shapes.items() if name not in self.buffers)

    def hub_dtypes(self, dtypes: Mapping[str, torch.dtype]) -> dict[str, torch.dtype]:
        """Dtypes of the files' tensors, given those of the model's (all sources of a tensor have one)."""
        return {name: dtypes[self.tensors[name].sources[0]] for name in self.hub_shapes}

    # ---- from the files ----

    def sources(self, available: Mapping[str, Sizes], where: str = "the files") -> HubSources:
        """Find the model's tensors among those of a repository, in any layout that transformers would load."""
        conversions = deepcopy(self.conversions)
        renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        converters = [c for c in conversions if isinstance(c, WeightConverter)]
        by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
        known: dict[str, Sizes] = self.shapes | {name: self.shapes[source] for name, source in self.tied.items()}
        collected: dict[str, WeightTransform] = {}
        unused = []
        for stored in sorted(available, key=dot_natural_key):
            name, pattern = rename_source_key(stored, renamings, converters, self.prefix, known)
            if name not in known and stored in known:  # in the model's own layout
                name, pattern = stored, None
            if name not in known:
                unused.append(stored)
                continue
            own = deepcopy(by_pattern[pattern]) if pattern is not None else WeightRenaming(stored, name)
            conversion = collected.setdefault(name, own)
            tensor: Any = Traced.of(stored, available[stored])
            conversion.add_tensor(name, stored, stored if pattern is None else pattern, tensor)
        place = {name: index for index, name in enumerate(known)}
        ordered = {name: collected[name] for name in sorted(collected, key=place.__getitem__)}
        grids = self._convert(ordered, known, where)
        for name, source in self.tied.items():
            if (other := grids.pop(name, None)) is not None:
                grids.setdefault(source, other)
        return HubSources(
            grids,
            [name for name in self.shapes if name not in grids],
            [name for name in unused if not any(re.search(pattern, name) for pattern in self.optional)],
            frozenset(index for index, conversion in enumerate(conversions) if conversion.was_used()),
        )

    def _convert(
        self, collected: dict[str, WeightTransform], known: Mapping[str, Sizes], where: str
    ) -> dict[str, tuple[Grid, ...]]:
        model = SimpleNamespace(config=self.config, get_parameter=lambda name: torch.empty(known[name], device="meta"))
        grids: dict[str, tuple[Grid, ...]] = {}
        for first, conversion in collected.items():
            try:
                made: dict[str, Any] = conversion.convert(first, model=model, config=self.config)  # type: ignore[attr-defined]
            except (ValueError, KeyError, RuntimeError, IndexError) as error:
                stored = sorted(name for names in conversion.layer_targets.values() for name in names)
                raise ValueError(
                    f"{first!r} of {self.architecture} cannot be assembled from the tensors in {where}, "
                    f"{', '.join(stored[:3])} ({len(stored)} tensors): {error}"
                ) from error
            for name, value in made.items():
                tensor = value[0] if isinstance(value, list) else value
                if name not in known:
                    continue
                if tuple(tensor.shape) != known[name]:
                    made_of = sorted({grid.name for grid in tensor.grids} - {name})
                    origin = f" (of {', '.join(made_of[:3])}{', ...' if len(made_of) > 3 else ''})" if made_of else ""
                    raise ValueError(
                        f"{name!r} in {where}{origin} has shape {tuple(tensor.shape)}, but the config implies "
                        f"{known[name]}."
                    )
                self._check_whole(name, known[name], [grid for grid in tensor.grids if grid.name != ZEROS])
                grids[name] = tensor.grids
        return grids

    def after_loading(self, sources: HubSources) -> HubLayout:
        """The layout in which transformers would save a model that it has loaded from these sources.

        It undoes what it does for the family, and besides that what the files at hand have needed, such as a prefix.
        """
        added = sources.used - self.reverted
        return replace(self, reverted=self.reverted | added) if added else self


def hub_layout(model: PreTrainedModel, tied: Mapping[str, str] | None = None) -> HubLayout:
    """The layout of a whole stock model, which may be on the meta device.

    `tied`: parameter -> the parameter it shares storage with; default: what the model declares and has.
    """
    state = model.state_dict(keep_vars=True)
    ignored = set(model._keys_to_ignore_on_save or ())
    tied = _tied(model, state) if tied is None else tied
    kept = {name: tensor for name, tensor in state.items() if name not in tied and name not in ignored}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    conversions, family = get_model_conversion_mapping(model), get_model_conversion_mapping(model, add_legacy=False)
    used: list[WeightTransform] | None = getattr(model, "_weight_conversions", None)
    if used is None:
        reverted = {i for i, conversion in enumerate(family) if not isinstance(conversion, PrefixChange)}
    else:  # of `from_pretrained`, which notes what it has used
        known = [_key(conversion) for conversion in conversions]
        conversions += [conversion for conversion in used if _key(conversion) not in known]
        wanted = {_key(conversion) for conversion in used}
        reverted = {i for i, conversion in enumerate(conversions) if _key(conversion) in wanted}
    return HubLayout(
        type(model).__name__,
        {name: tuple(tensor.shape) for name, tensor in kept.items()},
        {name: tensor.dtype for name, tensor in kept.items()},
        frozenset(kept.keys() - parameters),
        dict(tied),
        model.config,
        tuple(conversions),
        frozenset(reverted),
        model.base_model_prefix,
        (*sorted(model._keys_to_ignore_on_load_unexpected or ()), *FORMER_BUFFERS),
    )


def layout_of(config: PreTrainedConfig) -> HubLayout:
    """The layout of the causal LM of a config. Makes the stock model on the meta device, without any weights."""
    with torch.device("meta"):
        return hub_layout(AutoModelForCausalLM.from_config(config))


def _key(conversion: WeightTransform) -> tuple[Any, ...]:
    patterns = (*conversion._original_source_patterns, None, *conversion._original_target_patterns)
    return type(conversion), patterns, conversion.scope_prefix


def _tied(model: PreTrainedModel, state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Parameter -> source, for the ties that the model declares and that hold."""
    # What the config says now, too: a script may have tied weights after the model was made.
    declared = {**(getattr(model, "all_tied_weights_keys", None) or {}), **model.get_expanded_tied_weights_keys(True)}
    return {
        name: source
        for name, source in declared.items()
        if name in state and source in state and state[name] is state[source]
    }
