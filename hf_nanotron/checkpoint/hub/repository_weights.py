"""The weights of a Hub repository: its files, their sizes and their index."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from math import prod
from pathlib import Path

import torch
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..files.safetensors_file import Entry, write_safetensors


def plan_files(
    shapes: Mapping[str, tuple[int, ...]], owners: Mapping[str, int], dtypes: Mapping[str, torch.dtype], max_bytes: int
) -> dict[str, list[str]]:
    """File name -> tensors, in the order of `shapes`, each file of one pipeline rank. The same on every rank."""
    files: list[list[str]] = []
    filling: dict[int, tuple[list[str], int]] = {}  # owner -> its last file, and the bytes in it
    for name, shape in shapes.items():
        size = dtypes[name].itemsize * prod(shape)
        names, filled = filling.get(owners[name], ([], 0))
        if not names or filled + size > max_bytes:
            names, filled = [], 0
            files.append(names)
        names.append(name)
        filling[owners[name]] = names, filled + size
    if len(files) == 1:
        return {SAFE_WEIGHTS_NAME: files[0]}
    return {f"model-{i:05d}-of-{len(files):05d}.safetensors": names for i, names in enumerate(files, 1)}


def write_repository_weights(
    directory: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, torch.dtype],
    tensors: Iterator[torch.Tensor],
    max_shard_size: str | int,
    numel: int,
) -> None:
    """Write the tensors of a Hub repository, which come in the order of `shapes`, by one process alone.

    `numel`: elements of all parameters, for the index.
    """
    files = plan_files(shapes, dict.fromkeys(shapes, 0), dtypes, parse_size(max_shard_size))
    for file_name, names in files.items():
        entries = [Entry(name, dtypes[name], shapes[name]) for name in names]
        write_safetensors(directory / file_name, entries, islice(tensors, len(names)))
    if len(files) > 1:
        write_index(directory, files, shapes, dtypes, numel)


def write_index(
    directory: Path,
    files: Mapping[str, list[str]],
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, torch.dtype],
    numel: int,
) -> None:
    """Say which tensor is in which file."""
    size = sum(dtype.itemsize * prod(shapes[name]) for name, dtype in dtypes.items())
    index = {
        "metadata": {"total_parameters": numel, "total_size": size},
        "weight_map": {name: file_name for file_name, names in files.items() for name in names},
    }
    (directory / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def parse_size(size: str | int) -> int:
    """Bytes of `"5GB"`, `"500MB"` (decimal, as in transformers) or a number."""
    if isinstance(size, int):
        return size
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)I?B", size.strip().upper())
    if match is None:
        raise ValueError(f"max_shard_size={size!r} is not a size; write it like '5GB' or '500MB'.")
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2] or " "))
