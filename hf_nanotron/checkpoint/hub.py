"""Read and write standard Hub weights, tensor by tensor."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from ..parallel.mesh import Group
from ..parallel.spec import ShardSpec
from .safetensors_file import Entry, write_safetensors

if TYPE_CHECKING:
    from ..models.base import ParallelModel

logger = logging.get_logger(__name__)
FLOATS = ("F64", "F32", "BF16", "F16")  # as safetensors names them


class HubWeights:
    """The tensors of a local Hub repository, read by slices.

    Args:
        directory: holds `model.safetensors`, or an index and the files it names.

    Raises:
        ValueError: if a file is missing or damaged, naming it.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self.bytes_read = 0
        self._open: dict[str, Any] = {}
        index = self.directory / SAFE_WEIGHTS_INDEX_NAME
        if index.is_file():
            try:
                self._file_of: dict[str, str] = dict(json.loads(index.read_text())["weight_map"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{index} is truncated or damaged ({error!r}); fetch it again.") from error
        elif (self.directory / SAFE_WEIGHTS_NAME).is_file():
            self._file_of = dict.fromkeys(self._file(SAFE_WEIGHTS_NAME).keys(), SAFE_WEIGHTS_NAME)
        else:
            raise ValueError(
                f"{self.directory} holds neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}; weights in other "
                "formats are to be saved again as safetensors (`save_pretrained` of a current transformers)."
            )
        for name in sorted(set(self._file_of.values())):
            self._file(name)

    def _file(self, name: str) -> Any:
        if name not in self._open:
            path = self.directory / name
            if not path.is_file():
                raise ValueError(f"{path} is missing, but {SAFE_WEIGHTS_INDEX_NAME} names it; fetch it again.")
            try:
                self._open[name] = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{path} is truncated or damaged ({error}); fetch it again.") from error
        return self._open[name]

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def names(self) -> list[str]:
        return list(self._file_of)

    def _slice(self, name: str) -> Any:
        path = self.directory / self._file_of[name]
        try:
            return self._file(self._file_of[name]).get_slice(name)
        except SafetensorError as error:
            raise ValueError(f"{path} has no tensor {name!r}, but {SAFE_WEIGHTS_INDEX_NAME} says so.") from error

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Refuse a tensor that the model could not take. Reads none of its bytes.

        Raises:
            ValueError: if it is not there, has another shape than in the model, or is quantised.
        """
        if name not in self._file_of:
            raise ValueError(f"{self.directory} has no tensor {name!r}, which the model needs.")
        stored = self._slice(name)
        if tuple(stored.get_shape()) != shape:
            raise ValueError(
                f"{name!r} in {self.directory} has shape {tuple(stored.get_shape())}, but the config makes it {shape}."
            )
        if stored.get_dtype() not in FLOATS:
            raise ValueError(
                f"{name!r} in {self.directory} is stored as {stored.get_dtype()}, not as one of {', '.join(FLOATS)}: "
                "a quantised checkpoint cannot be cut; use the one it was made from."
            )

    def read(self, spec: ShardSpec) -> torch.Tensor:
        """This rank's part of a tensor, and no other bytes of it.

        Raises:
            ValueError: if it is not there, or has another shape than the model.
        """
        self.check(spec.name, spec.global_shape)
        stored = self._slice(spec.name)
        if spec.dim is None:
            part = stored[:] if spec.global_shape else self._file(self._file_of[spec.name]).get_tensor(spec.name)
        else:
            before = (slice(None),) * spec.dim
            pieces = [stored[(*before, slice(start, stop))] for start, stop in spec.ranges]
            part = pieces[0] if len(pieces) == 1 else torch.cat(pieces, spec.dim)
        self.bytes_read += part.numel() * part.element_size()
        return part


def load_hub_weights(
    model: ParallelModel, directory: str | os.PathLike[str], parameters: Collection[str] | None = None
) -> HubWeights:
    """Fill `model` from a local Hub repository, each rank reading only the bytes of its own part.

    A checkpoint of the bare base model (no head, no prefix) is refused like any other that lacks a tensor.

    Args:
        parameters: names of those to fill; all if None.

    Raises:
        ValueError: naming the missing or damaged file or the tensors that are missing or of another shape.
    """
    weights = HubWeights(directory)
    missing = [name for name in model.hub_shapes if name not in weights]
    if missing:
        raise ValueError(
            f"{directory} lacks {len(missing)} tensors of {model.stock_class.__name__}: {', '.join(missing[:5])}"
            f"{', ...' if len(missing) > 5 else ''}. Is it a checkpoint of this architecture with its head?"
        )
    if unused := [name for name in weights.names() if name not in model.hub_shapes]:
        logger.warning(f"{directory}: the model has no place for {', '.join(unused[:5])} ({len(unused)} tensors).")
    # Every rank checks every tensor: one that failed alone would leave the others waiting for it.
    for name, shape in model.hub_shapes.items():
        weights.check(name, shape)
    for name, spec in model.shard_specs.items():
        if parameters is None or name in parameters:
            model.write_parameter(name, weights.read(spec))
    return weights


def save_hub_model(
    model: ParallelModel,
    directory: str | os.PathLike[str],
    max_shard_size: str | int = "5GB",
    write: Callable[[Path, list[Entry], Iterator[torch.Tensor]], None] = write_safetensors,
) -> None:
    """Write config, generation config and weights as a standard Hub repository. All ranks of the job together.

    Every pipeline stage writes its own files, at the same time as the others; within a stage one rank writes, and the
    tensor-parallel ranks send it their parts one tensor at a time, which is the most it holds besides the model.

    Args:
        max_shard_size: largest file, bytes or a string such as `"5GB"`. A single larger tensor gets its own file.
        write: takes a file's path, its header, and its tensors, which arrive while it iterates over them.
    """
    directory = Path(directory)
    write_hub_config(model, directory)
    _barrier(model.mesh.world)
    write_hub_weights(model, directory, max_shard_size, write)
    _barrier(model.mesh.world)


def write_hub_config(model: ParallelModel, directory: Path) -> None:
    """Everything of a Hub repository but the weights; old weights go. By rank 0 alone; others do nothing."""
    if model.mesh.rank != 0:
        return
    directory.mkdir(parents=True, exist_ok=True)
    for old in (*directory.glob("model*.safetensors"), directory / SAFE_WEIGHTS_INDEX_NAME):
        old.unlink(missing_ok=True)
    config = model.config.__class__.from_dict(model.config.to_dict())
    config.architectures, config.dtype, config.use_cache = [model.stock_class.__name__], model.dtype, True
    config.save_pretrained(directory)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(directory)


def write_hub_weights(
    model: ParallelModel,
    directory: Path,
    max_shard_size: str | int,
    write: Callable[[Path, list[Entry], Iterator[torch.Tensor]], None],
) -> list[Path]:
    """Hand the weights to `write` file by file, on the ranks that write. All ranks together; returns this rank's."""
    mesh, written = model.mesh, []
    files = plan_files(model.hub_shapes, model.hub_owners, model.dtype.itemsize, parse_size(max_shard_size))
    if mesh.rank == 0 and len(files) > 1:
        _write_index(directory, files, model)
        written.append(directory / SAFE_WEIGHTS_INDEX_NAME)
    held = {spec.name: (spec, name) for name, spec in model.shard_specs.items()}

    def arriving(names: list[str]) -> Iterator[torch.Tensor]:
        for name in names:
            spec, key = held[name]
            part = model.whole_parameter(key)
            whole = gather_whole(part, spec, mesh.tp) if mesh.dp_rank == 0 else None
            if whole is not None:
                yield whole

    for file_name, names in files.items():
        if model.hub_owners[names[0]] != mesh.pp_rank:
            continue
        if mesh.dp_rank == 0 and mesh.tp_rank == 0:
            entries = [Entry(name, model.dtype, model.hub_shapes[name]) for name in names]
            write(directory / file_name, entries, arriving(names))
            written.append(directory / file_name)
        else:
            for _ in arriving(names):
                pass
    return written


def gather_whole(part: torch.Tensor, spec: ShardSpec, group: Group) -> torch.Tensor | None:
    """The whole tensor on the group's first rank (`part` itself where that is all), None on the others."""
    if spec.dim is None or group.size == 1:
        return part if group.rank == 0 else None
    part = part.contiguous()
    parts = [torch.empty_like(part) for _ in range(group.size)] if group.rank == 0 else None
    dist.gather(part, parts, dst=group.ranks[0], group=group.handle)
    return None if parts is None else spec.assemble(parts)


def plan_files(
    shapes: dict[str, tuple[int, ...]], owners: dict[str, int], item_size: int, max_bytes: int
) -> dict[str, list[str]]:
    """File name -> tensors, in model order; a file holds tensors of one pipeline rank. The same on every rank."""
    groups: list[tuple[int, int, list[str]]] = []  # owner, bytes, names
    for name, shape in shapes.items():
        size = item_size * int(torch.Size(shape).numel())
        open_group = next((g for g in reversed(groups) if g[0] == owners[name]), None)
        if open_group is None or open_group[1] + size > max_bytes:
            groups.append((owners[name], size, [name]))
        else:
            groups[groups.index(open_group)] = (owners[name], open_group[1] + size, [*open_group[2], name])
    if len(groups) == 1:
        return {SAFE_WEIGHTS_NAME: groups[0][2]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": g[2] for i, g in enumerate(groups, 1)}


def _write_index(directory: Path, files: dict[str, list[str]], model: ParallelModel) -> None:
    parameters = model.num_parameters()
    index = {
        "metadata": {"total_parameters": parameters, "total_size": parameters * model.dtype.itemsize},
        "weight_map": {name: file_name for file_name, names in files.items() for name in names},
    }
    (directory / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def parse_size(size: str | int) -> int:
    """Bytes of `"5GB"`, `"500MB"` (decimal, as in transformers) or a number.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(size, int):
        return size
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)I?B", size.strip().upper())
    if match is None:
        raise ValueError(f"max_shard_size={size!r} is not a size; write it like '5GB' or '500MB'.")
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2] or " "))


def _barrier(group: Group) -> None:
    if group.handle is not None:
        dist.barrier(group=group.handle)
