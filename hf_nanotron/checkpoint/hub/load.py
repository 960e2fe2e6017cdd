"""The weights of a Hub repository, read into this rank's part of a model."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path

import torch
from transformers.utils import logging

from ...parallel.shard_spec import ShardSpec
from ...parallel.together import all_or_none, from_rank_0
from .contents import Contents
from .layout import HubSources
from .nonfinite_tensors import warn_nonfinite
from .read_once import StageReader, Target
from .sharded_model import ShardedModel, held_buffers
from .weights import HubWeights

logger = logging.get_logger(__name__)


def load_hub_weights(
    model: ShardedModel, directory: str | os.PathLike[str], parameters: Collection[str] | None = None
) -> int:
    """Fill `model` from a local Hub repository. All ranks of the job together.

    A single process reads the bytes of the model alone. Of several, each part of a file is read by one rank of a
    pipeline stage, which hands it on to the others (see `read_once.py`).

    The repository may have any layout that transformers would load: the one it saves, that of older versions, or the
    model's own names and shapes. One that lacks a parameter, such as the head, is refused. A buffer that is not there
    keeps its value.

    Args:
        parameters: names of those to fill, the same on all ranks of a stage; all of them, and the persistent buffers,
            if None.

    Returns:
        Bytes of tensors that this rank has read.

    Raises:
        ValueError: on every rank, naming the missing or damaged file or the tensors that are missing or of another
            shape.
    """
    mesh, layout = model.mesh, model.hub_layout
    if mesh.world_size == 1:
        return _load_alone(model, directory, parameters)

    def look() -> tuple[Contents, HubSources] | None:
        if mesh.rank != 0:
            return None
        weights = HubWeights(directory)
        sources = _find_sources(model, weights)
        return weights.contents(), sources

    found = from_rank_0(mesh, all_or_none(mesh, f"looking into {directory}", look))
    assert found is not None
    contents, sources = found
    reader = StageReader(Path(directory), contents, mesh)
    reader.fill(_targets(model, sources, parameters))
    if parameters is None:
        model.hub_layout = layout.after_loading(sources)
    return reader.bytes_read


def _targets(model: ShardedModel, sources: HubSources, parameters: Collection[str] | None) -> Iterator[Target]:
    """What this rank fills: its part of parameters and, with all of them, whole buffers."""
    layout, device = model.hub_layout, model.mesh.device
    for name, spec in model.shard_specs.items():
        if parameters is not None and name not in parameters:
            continue
        grids, own = sources.grids[layout.tied.get(spec.name, spec.name)], model.get_parameter(name).data
        if model.weights is None and own.is_contiguous():
            yield Target(spec, grids, partial(_same, own), _nothing)
        else:
            yield Target(spec, grids, partial(_empty, spec, device), partial(model.write_parameter, name))
    for name, buffer in held_buffers(model).items() if parameters is None else ():
        if name in sources.grids:
            spec = ShardSpec(name, layout.shapes[name])
            yield Target(spec, sources.grids[name], partial(_empty, spec, device), partial(_copy_to, buffer))


def _same(tensor: torch.Tensor, _: torch.dtype) -> torch.Tensor:
    return tensor


def _nothing(_: torch.Tensor) -> None: ...


def _empty(spec: ShardSpec, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(spec.local_shape, dtype=dtype, device=device)


def _copy_to(buffer: torch.Tensor, value: torch.Tensor) -> None:
    buffer.copy_(value)


def _load_alone(
    model: ShardedModel, directory: str | os.PathLike[str], parameters: Collection[str] | None = None
) -> int:
    """`load_hub_weights` of a single process."""
    weights, layout = HubWeights(directory), model.hub_layout
    sources = _find_sources(model, weights)
    wanted = [item for item in model.shard_specs.items() if parameters is None or item[0] in parameters]
    with logging.tqdm(wanted, desc="Loading weights", unit="tensor") as bar:
        for name, spec in bar:
            part = weights.read(spec, sources.grids[layout.tied.get(spec.name, spec.name)])
            model.write_parameter(name, warn_nonfinite(name, part, str(directory)))
    if parameters is None:
        for name, buffer in held_buffers(model).items():
            if name in sources.grids:
                whole = ShardSpec(name, layout.shapes[name])
                buffer.copy_(weights.read(whole, sources.grids[name], buffer.is_floating_point()))
        model.hub_layout = layout.after_loading(sources)
    return weights.bytes_read


def _find_sources(model: ShardedModel, weights: HubWeights) -> HubSources:
    """Where the tensors of `model` are, each of which is checked; what is not used is said."""
    directory, layout = weights.directory, model.hub_layout
    sources = weights.sources(layout)
    missing = [name for name in sources.missing if name not in layout.buffers]
    if missing:
        raise ValueError(
            f"{directory} lacks {len(missing)} tensors of {model.stock_class.__name__}: {', '.join(missing[:5])}"
            f"{', ...' if len(missing) > 5 else ''}. Is it a checkpoint of this architecture with its head?"
        )
    if unused := sources.unused:
        logger.warning(
            f"{directory}: ignoring tensors that the model does not have: {', '.join(unused[:5])} ({len(unused)})."
        )
    if len(sources.missing) > len(missing):
        logger.warning(f"{directory} lacks the buffers {', '.join(sources.missing[:5])} ({len(sources.missing)}).")
    for name, grids in sources.grids.items():
        weights.check(name, layout.shapes[name], grids, layout.dtypes[name].is_floating_point)
    return sources
