"""A model from and to a standard Hub repository, tensor by tensor, in the layout that transformers gives its files."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, logging

from ...parallel.mesh import Group
from ...parallel.shard_spec import ShardSpec
from ..files.repository import WEIGHTS, unlink_links
from ..files.safetensors_file import Entry, write_safetensors
from .layout import Part
from .repository_weights import parse_size, plan_files, write_index
from .sharded_model import ShardedModel, held_buffers

logger = logging.get_logger(__name__)


def save_hub_model(
    model: ShardedModel,
    directory: str | os.PathLike[str],
    max_shard_size: str | int = "5GB",
    write: Callable[[Path, list[Entry], Iterator[torch.Tensor]], None] = write_safetensors,
) -> None:
    """Write config, generation config and weights as a standard Hub repository. All ranks of the job together.

    Every pipeline stage writes its own files, at the same time as the others; within a stage the files are dealt to its
    ranks, and the tensor- and expert-parallel ranks send the one that writes their parts one tensor of the model at a
    time, which is the most it holds besides the model (and one tensor of the file, where the two differ).

    Args:
        max_shard_size: largest file, bytes or a string such as `"5GB"`. A single larger tensor gets its own file.
        write: takes a file's path, its header, and its tensors, which arrive while it iterates over them.
    """
    directory = Path(directory)
    model.check_cut()
    write_hub_config(model, directory)
    _barrier(model.mesh.world)
    write_hub_weights(model, directory, max_shard_size, write)
    _barrier(model.mesh.world)


def write_hub_config(model: ShardedModel, directory: Path) -> None:
    """Everything of a Hub repository but the weights; old weights go. By rank 0 alone; others do nothing.

    Old weights are files of the names that these have, as in transformers, and nothing is written through links.
    """
    if model.mesh.rank != 0:
        return
    directory.mkdir(parents=True, exist_ok=True)
    unlink_links(directory)
    for old in directory.iterdir():
        if re.fullmatch(WEIGHTS, old.name) and old.is_file():
            old.unlink()
    config = model.config.__class__.from_dict(model.config.to_dict())
    config.architectures, config.dtype, config.use_cache = [model.stock_class.__name__], model.dtype, True
    stock = model.stock_class
    if stock._auto_class is not None:  # remote code goes with its weights, as in transformers
        custom_object_save(stock.__new__(stock), directory, config=config)
    config.save_pretrained(directory)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(directory)


def write_hub_weights(
    model: ShardedModel,
    directory: Path,
    max_shard_size: str | int,
    write: Callable[[Path, list[Entry], Iterator[torch.Tensor]], None],
) -> list[Path]:
    """Hand the weights to `write` file by file, each on the rank that writes it. All ranks together.

    Returns the files of this rank.
    """
    mesh, layout, written = model.mesh, model.hub_layout, []
    files, planned = _plan(model, max_shard_size)
    if mesh.rank == 0 and len(files) > 1:
        names_of = {file.name: file.tensors for file in files}
        write_index(directory, names_of, layout.hub_shapes, planned, layout.numel)
        written.append(directory / SAFE_WEIGHTS_INDEX_NAME)
    dtypes = layout.hub_dtypes(_held_dtypes(model))
    for file in files:
        if file.stage != mesh.pp_rank:
            continue
        tensors = _arriving(model, file)
        if file.writer == mesh.rank:
            entries = [Entry(name, dtypes[name], layout.hub_shapes[name]) for name in file.tensors]
            write(directory / file.name, entries, tensors)
            written.append(directory / file.name)
        for _ in tensors:
            pass
    return written


def hub_bytes(model: ShardedModel, max_shard_size: str | int) -> int:
    """Bytes of the tensors in the files that this rank writes."""
    (files, planned), shapes = _plan(model, max_shard_size), model.hub_layout.hub_shapes
    mine = [name for file in files if file.writer == model.mesh.rank for name in file.tensors]
    return sum(planned[name].itemsize * prod(shapes[name]) for name in mine)


@dataclass(frozen=True)
class HubFile:
    """A file of the Hub's weights.

    Attributes:
        tensors: in the order in which they are written.
        stage: the pipeline rank that holds them.
        writer: the rank of the job that writes them.
    """

    name: str
    tensors: list[str]
    stage: int
    writer: int


def _plan(model: ShardedModel, max_shard_size: str | int) -> tuple[list[HubFile], dict[str, torch.dtype]]:
    """The files of a model, and the dtypes of the tensors in them. The same on every rank.

    The files of a stage are dealt to its ranks: first to those with different copies of its weights, which may be on
    other hosts, and then to the tensor-parallel ranks.
    """
    mesh, layout = model.mesh, model.hub_layout
    owners = {name: _owner(model, part) for part in layout.parts for name in part.hub}
    planned = layout.hub_dtypes(_planned_dtypes(model))
    names_of = plan_files(layout.hub_shapes, owners, planned, parse_size(max_shard_size))
    copies, dealt, files = mesh.dp_size * mesh.cp_size, dict.fromkeys(owners.values(), 0), []
    for name, tensors in names_of.items():
        stage = owners[tensors[0]]
        turn, copy = divmod(dealt[stage], copies)
        rank = (stage * copies + copy) * mesh.tp_size + turn % mesh.tp_size
        files.append(HubFile(name, tensors, stage, rank))
        dealt[stage] += 1
    return files, planned


def is_writer(model: ShardedModel) -> bool:
    """Whether this rank writes what its pipeline stage holds."""
    return model.mesh.is_first_copy and model.mesh.tp_rank == 0


def _owner(model: ShardedModel, part: Part) -> int:
    """The pipeline rank that writes the tensors of a part."""
    owners = {model.hub_owners[name] for name in part.model}
    if len(owners) > 1:
        raise ValueError(
            f"{part.hub[0]!r} in the Hub's files is made of {', '.join(part.model[:3])}, which are on pipeline ranks "
            f"{sorted(owners)}; use pp_size=1 for a {model.stock_class.__name__}."
        )
    return owners.pop()


def _planned_dtypes(model: ShardedModel) -> dict[str, torch.dtype]:
    """Name -> dtype of every tensor of the model, as far as a rank knows that may not hold it."""
    layout = model.hub_layout
    usual = next((dtype for name, dtype in layout.dtypes.items() if name not in layout.buffers), model.dtype)
    return {
        name: model.dtype if dtype == usual and name not in layout.buffers else dtype
        for name, dtype in layout.dtypes.items()
    }


def _held_dtypes(model: ShardedModel) -> dict[str, torch.dtype]:
    """As `_planned_dtypes`, but those of the tensors that this rank holds are what they are."""
    held = {name: buffer.dtype for name, buffer in held_buffers(model).items()}
    for name, spec in model.shard_specs.items():
        is_fully_sharded = model.weights is not None and model.parallel.zero_stage == 3
        held[spec.name] = model.dtype if is_fully_sharded else model.get_parameter(name).dtype
    return _planned_dtypes(model) | held


def _arriving(model: ShardedModel, file: HubFile) -> Iterator[torch.Tensor]:
    """The tensors of a file, one after the other, on the rank that writes it; nothing on the others.

    All ranks of the stage iterate together. In each part the tensors of the model are gathered when its first Hub
    tensor is asked for, and let go with the last.
    """
    layout, buffers = model.hub_layout, held_buffers(model)
    held = {layout.tied.get(spec.name, spec.name): name for name, spec in model.shard_specs.items()}
    wanted = set(file.tensors)
    for part in (part for part in layout.parts if not wanted.isdisjoint(part.hub)):
        whole = {
            name: buffers[name] if name in buffers else _gathered(model, held[name], file.writer) for name in part.model
        }
        if file.writer == model.mesh.rank:
            for name in part.hub:
                if name in wanted:
                    yield layout.tensors[name].made_of(cast(dict[str, torch.Tensor], whole))
        del whole  # before the next ones are made


def _gathered(model: ShardedModel, name: str, writer: int) -> torch.Tensor | None:
    """A whole parameter on the rank that writes. All ranks of the stage together."""
    mesh, spec, part = model.mesh, model.shard_specs[name], model.whole_parameter(name)
    group = mesh.ep if spec.axis == "ep" else mesh.tp
    return gather_whole(part, spec, group, group.ranks.index(writer)) if writer in group.ranks else None


def gather_whole(part: torch.Tensor, spec: ShardSpec, group: Group, to: int = 0) -> torch.Tensor | None:
    """The whole tensor on the group's rank `to` (`part` itself where that is all), None on the others."""
    if spec.dim is None or group.size == 1:
        return part if group.rank == to else None
    part = spec.padded(part).contiguous()  # ranks exchange tensors of one shape
    parts = [torch.empty_like(part) for _ in range(group.size)] if group.rank == to else None
    dist.gather(part, parts, dst=group.ranks[to], group=group.handle)
    return None if parts is None else spec.assemble(parts)


def _barrier(group: Group) -> None:
    if group.size > 1:
        dist.barrier(group=group.handle)
