"""The tensors of a local Hub repository, read by slices: a rank's own bytes and no others."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ...parallel.shard_spec import ShardSpec
from ..files.inside import inside
from ..files.safetensors_file import DTYPES, open_safetensors
from ..files.schema import HUB_INDEX, load_json, require
from .contents import AGAIN, Contents, read_contents
from .layout import HubLayout, HubSources
from .trace import Grid, Side, Sizes

LARGEST_INDEX = 1 << 30  # bytes
FLOATS = ("F64", "F32", "BF16", "F16")  # as safetensors names them


def read_weight_map(directory: Path) -> dict[str, str] | None:
    """Tensor -> file of a repository of several files, by its index; None if it has none."""
    index = inside(directory, SAFE_WEIGHTS_INDEX_NAME, str(directory))
    if not index.exists():
        return None
    if not index.is_file() or index.stat().st_size > LARGEST_INDEX:
        raise ValueError(f"{index} is not a file of at most {LARGEST_INDEX >> 20} MiB; {AGAIN}.")
    body = require(HUB_INDEX, load_json(index.read_bytes(), index, AGAIN), index, AGAIN)
    for name in set(body["weight_map"].values()):
        inside(directory, name, str(index))
    return body["weight_map"]


def check_index(directory: Path, file_of: Mapping[str, str], held: Mapping[str, Iterable[str]]) -> None:
    """Refuse files that hold a tensor twice, or another than the index says: which counts would depend on the reader.

    `held`: file -> the tensors in it.
    """
    holder: dict[str, str] = {}
    for file, names in held.items():
        for name in names:
            if (other := file_of.get(name, file)) != file or (other := holder.setdefault(name, file)) != file:
                raise ValueError(
                    f"{directory / file} holds {name!r}, which {SAFE_WEIGHTS_INDEX_NAME} and the other files have in "
                    f"{other}: files of two models are mixed; fetch it again."
                )


class HubWeights:
    """The tensors of a local Hub repository, read by slices.

    Raises:
        ValueError: if a file is missing or damaged, naming it.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self.bytes_read = 0
        self._open: dict[str, Any] = {}
        file_of = read_weight_map(self.directory)
        if file_of is not None:
            self._file_of = file_of
        elif (self.directory / SAFE_WEIGHTS_NAME).exists():
            self._file_of = dict.fromkeys(self._file(SAFE_WEIGHTS_NAME).keys(), SAFE_WEIGHTS_NAME)
        else:
            raise ValueError(
                f"{self.directory} contains neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}; save weights in "
                "other formats as safetensors first (`save_pretrained` of a current transformers)."
            )
        held = {name: self._file(name).keys() for name in sorted(set(self._file_of.values()))}
        check_index(self.directory, self._file_of, held)

    def _file(self, name: str) -> Any:
        if name not in self._open:
            path = inside(self.directory, name, str(self.directory / SAFE_WEIGHTS_INDEX_NAME))
            if not path.is_file():
                fault = "is not a regular file" if path.exists() else "is missing"
                raise ValueError(f"{path} {fault}, but {SAFE_WEIGHTS_INDEX_NAME} names it; {AGAIN}.")
            self._open[name] = open_safetensors(path, AGAIN)
        return self._open[name]

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def names(self) -> list[str]:
        return list(self._file_of)

    def _slice(self, name: str) -> Any:
        try:
            return self._file(self._file_of[name]).get_slice(name)
        except SafetensorError as error:
            raise ValueError(
                f"{self.file_of(name)} has no tensor {name!r}, but {SAFE_WEIGHTS_INDEX_NAME} says so."
            ) from error

    def contents(self) -> Contents:
        """Where each tensor is."""
        paths = {name: self.directory / name for name in sorted(set(self._file_of.values()))}
        found = read_contents(self.directory, paths)
        return Contents(found.files, {name: found.tensors[name] for name in self._file_of})

    def shapes(self) -> dict[str, Sizes]:
        """Name -> shape of every tensor. Reads headers alone."""
        return {name: self._shape(name) for name in self._file_of}

    def _shape(self, name: str) -> Sizes:
        return tuple(self._slice(name).get_shape())

    def file_of(self, name: str) -> Path:
        return self.directory / self._file_of[name]

    def sources(self, layout: HubLayout) -> HubSources:
        """Where the tensors of a model are in this repository."""
        return layout.sources(self.shapes(), str(self.directory))

    def check(self, name: str, shape: Sizes, grids: tuple[Grid, ...] | None = None, is_float: bool = True) -> None:
        """Refuse a tensor of the model that cannot be taken from here. Reads none of its bytes.

        Args:
            grids: what of this repository it is made of; the tensor of its own name if None.
            is_float: False for a buffer of whole numbers.

        Raises:
            ValueError: if it is not there, has another shape than in the model, or is quantised.
        """
        if grids is None:
            if name not in self._file_of:
                raise ValueError(f"{self.directory} has no tensor {name!r}, which the model needs.")
            if (stored := self._shape(name)) != shape:
                raise ValueError(f"{name!r} in {self.directory} has shape {stored}, but the config implies {shape}.")
        if not is_float:
            return
        for source in {name} if grids is None else {grid.name for grid in grids}:
            if (dtype := self.dtype_name(source)) not in FLOATS:
                raise ValueError(
                    f"{source!r} in {self.directory} is stored as {dtype}, not as one of {', '.join(FLOATS)}: "
                    "a quantized checkpoint cannot be sharded; use the one it was made from."
                )

    def read(self, spec: ShardSpec, grids: tuple[Grid, ...] | None = None, is_float: bool = True) -> torch.Tensor:
        """This rank's part of a tensor of the model, and no other bytes of it.

        Of a tensor whose rows the files interleave with others' (gate and up, in a few families) those are read too.
        """
        self.check(spec.name, spec.global_shape, grids, is_float)
        grids = grids or (Grid.whole(spec.name, spec.global_shape),)
        first = grids[0].name
        if grids == (Grid.whole(first, spec.global_shape),) and self._shape(first) == spec.global_shape:
            return self._read_plain(spec, first)
        out = torch.empty(spec.local_shape, dtype=self.dtype(grids))
        if spec.dim is None:
            for grid in grids:
                self._read_grid(grid, grid.own, out)
            return out
        offset = 0
        for start, stop in spec.ranges:
            for grid in grids:
                for part in grid.within("own", spec.dim, start, stop):
                    self._read_grid(part, part.own.shift(spec.dim, offset - start), out)
            offset += stop - start
        return out

    def dtype(self, grids: tuple[Grid, ...]) -> torch.dtype:
        """What the tensors of these grids are stored as: the widest, if there are several dtypes."""
        names = sorted({grid.name for grid in grids})
        return reduce(torch.promote_types, map(self.stored_dtype, names))

    def dtype_name(self, name: str) -> str:
        """As safetensors calls it."""
        return self._slice(name).get_dtype()

    def stored_dtype(self, name: str) -> torch.dtype:
        """Of a tensor as it is stored."""
        if (dtype := self.dtype_name(name)) not in DTYPES:
            raise ValueError(f"{name!r} in {self.directory} is stored as {dtype}, not as one of {', '.join(DTYPES)}.")
        return DTYPES[dtype]

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Those of rows `[start, stop)` that a tensor has, as it is stored; one without dimensions as a whole."""
        shape = self._shape(name)
        return self._slice(name)[start : min(stop, shape[0])] if shape else self._tensor(name)

    def _read_plain(self, spec: ShardSpec, name: str) -> torch.Tensor:
        """A part of a tensor that is stored as it is."""
        stored = self._slice(name)
        if spec.dim is None:
            part = stored[:] if spec.global_shape else self._tensor(name)
        else:
            before = (slice(None),) * spec.dim
            pieces = [stored[(*before, slice(start, stop))] for start, stop in spec.ranges]
            part = pieces[0] if len(pieces) == 1 else torch.cat(pieces, spec.dim)
        self.bytes_read += part.numel() * part.element_size()
        return part

    def _read_grid(self, grid: Grid, target: Side, out: torch.Tensor) -> None:
        """Copy a grid from the smallest box of its source that holds it."""
        box = grid.source.box(grid.sizes)
        data = self._slice(grid.name)[tuple(slice(*bounds) for bounds in box)] if box else self._tensor(grid.name)
        self.bytes_read += data.numel() * data.element_size()
        source = grid.source.view(grid.sizes, data.contiguous(), [low for low, _ in box])
        target.view(grid.sizes, out).copy_(source)

    def _tensor(self, name: str) -> torch.Tensor:
        return self._file(self._file_of[name]).get_tensor(name)
