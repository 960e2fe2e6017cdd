"""Average Hub repositories of one model, such as the last checkpoints of a run, weight by weight.

Uniform averages of checkpoints along a run: Izmailov et al. 2018, arXiv:1803.05407; of runs: Wortsman et al. 2022,
arXiv:2203.05482.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isfinite, prod
from pathlib import Path

import torch
from transformers.utils import CONFIG_NAME

from ..checkpoint.files.disk import CHUNK_BYTES
from ..checkpoint.hub.nonfinite_tensors import warn_nonfinite
from ..checkpoint.hub.repository_weights import parse_size, write_repository_weights
from ..checkpoint.hub.weights import FLOATS, HubWeights
from .folder import TEXTS, WEIGHTS, check_unchanged, copy_files, read_json, refuse_same, write_json, writing

ADAPTER = "adapter_config.json"  # PEFT's
# Of a config: what says nothing about the model.
FREE_KEYS = {"transformers_version", "_name_or_path", "use_cache", "dtype", "torch_dtype"}


def average(
    sources: Sequence[str | Path],
    destination: str | Path,
    *,
    weights: Sequence[float] | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> None:
    """Write the weighted mean of the weights of Hub repositories as one more, with the texts of the first.

    Sums are in float64, each tensor keeps its dtype. In memory are one tensor and a few blocks of 16 MiB.

    Args:
        sources: at least two folders with `config.json` and safetensors, in one file or several: a `checkpoint-N`, its
            `ema`, or what `save_pretrained` has written.
        destination: folder for the repository; new or empty. `config.json` is written last: without it nothing loads
            what was cut short.
        weights: one for each source, divided by their sum; uniform if None.
        max_shard_size: bytes of tensors per file, or a string such as `"5GB"`.
        overwrite: take away an earlier repository in `destination`.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is damaged, the sources are not of one model (config, names, shapes or dtypes differ,
            naming the first), a source is an adapter, weights are quantised, or `destination` is in use.
    """
    folders, destination = [Path(source) for source in sources], Path(destination)
    shares = _shares(folders, weights)
    for folder in folders:
        if not folder.exists():
            raise FileNotFoundError(
                f"{folder}: there is no such folder. Of a Hub repository, fetch it first (hf download {folder} "
                "--local-dir FOLDER)."
            )
        refuse_same(folder, destination)
        if (folder / ADAPTER).is_file() and not (folder / CONFIG_NAME).is_file():
            raise ValueError(
                f"{folder} is an adapter ({ADAPTER}), whose factors have no mean: the mean of products is another "
                "matrix. Merge each into its base first (PEFT's merge_and_unload, then save_pretrained)."
            )
        check_unchanged(folder, (*TEXTS, *WEIGHTS))
    config = _common_config(folders)
    limit, opened = parse_size(max_shard_size), [HubWeights(folder) for folder in folders]
    shapes, dtypes = _common_tensors(opened)
    with writing(destination, (*WEIGHTS, *TEXTS), CONFIG_NAME, overwrite):
        tensors = (_mean(name, shapes[name], dtypes[name], opened, shares) for name in shapes)
        write_repository_weights(destination, shapes, dtypes, tensors, limit, sum(map(prod, shapes.values())))
        copy_files(folders[0], destination, TEXTS)
        write_json(destination / CONFIG_NAME, config)


def _shares(folders: list[Path], weights: Sequence[float] | None) -> list[float]:
    """What each source counts."""
    if len(folders) < 2:
        raise ValueError(f"an average is of at least two repositories, not of {len(folders)}.")
    resolved = [folder.resolve() for folder in folders]
    if twice := [folder for folder, path in zip(folders, resolved, strict=True) if resolved.count(path) > 1]:
        raise ValueError(f"{twice[0]} is given twice; to count it more than others use `weights` (--weights 2,1).")
    given = [1.0] * len(folders) if weights is None else [float(weight) for weight in weights]
    if len(given) != len(folders):
        raise ValueError(f"{len(given)} weights for {len(folders)} repositories: give one for each.")
    if not all(isfinite(weight) and weight >= 0 for weight in given) or not sum(given) > 0:
        raise ValueError(f"weights={given}: each must be at least 0, and one above; they are divided by their sum.")
    return given


def _common_config(folders: list[Path]) -> dict[str, object]:
    """The config of the first; others may differ in what says nothing about the model."""
    first, *others = [read_json(folder / CONFIG_NAME) for folder in folders]
    for folder, other in zip(folders[1:], others, strict=True):
        for key in sorted((first.keys() | other.keys()) - FREE_KEYS):
            if first.get(key) != other.get(key):
                raise ValueError(
                    f"{folders[0]} and {folder} are not of one model: {key} is {first.get(key)!r} and "
                    f"{other.get(key)!r} in {CONFIG_NAME}."
                )
    return first


def _common_tensors(opened: list[HubWeights]) -> tuple[dict[str, tuple[int, ...]], dict[str, torch.dtype]]:
    """Shapes and dtypes, in the order of the first; refused unless all are alike. Reads headers alone."""
    first = opened[0]
    shapes = first.shapes()
    dtypes = {name: first.stored_dtype(name) for name in shapes}
    for other in opened[1:]:
        found = other.shapes()
        where = f"{first.directory} and {other.directory} are not of one model:"
        if stray := sorted(shapes.keys() ^ found.keys()):
            raise ValueError(f"{where} only one of them has {', '.join(stray[:5])} ({len(stray)} tensors).")
        for name, shape in shapes.items():
            if found[name] != shape:
                raise ValueError(f"{where} {name!r} has shapes {shape} and {found[name]}.")
            if (dtype := other.stored_dtype(name)) != dtypes[name]:
                raise ValueError(
                    f"{first.directory} and {other.directory} store {name!r} as {dtypes[name]} and {dtype}; save both "
                    "in one dtype first."
                )
    for name in shapes:
        if dtypes[name].is_floating_point and first.dtype_name(name) not in FLOATS:
            raise ValueError(
                f"{name!r} in {first.directory} is stored as {first.dtype_name(name)}: quantized weights have no mean; "
                "average what they were made from."
            )
    return shapes, dtypes


def _mean(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, opened: list[HubWeights], shares: list[float]
) -> torch.Tensor:
    """The weighted mean of a tensor, block of rows by block of rows."""
    out = torch.empty(shape, dtype=dtype)
    rows = max(1, CHUNK_BYTES // (8 * max(1, prod(shape[1:])))) if shape else 1
    spoilt: list[HubWeights] = []  # that hold nan or inf here

    def parts_from(start: int) -> Iterator[torch.Tensor]:
        for weights in opened:
            part = weights.read_rows(name, start, start + rows)
            if dtype.is_floating_point and weights not in spoilt and not part.isfinite().all():
                spoilt.append(weights)
            yield part

    for start in range(0, shape[0] if shape else 1, rows):
        block = _mean_of(name, dtype, parts_from(start), opened, shares)
        (out[start : start + rows] if shape else out).copy_(block)
    if not dtype.is_floating_point:
        return out
    where = " and ".join(str(weights.directory) for weights in spoilt)
    return warn_nonfinite(name, out, where or f"the average of {opened[0].directory} and others")


def _mean_of(
    name: str, dtype: torch.dtype, parts: Iterator[torch.Tensor], opened: list[HubWeights], shares: list[float]
) -> torch.Tensor:
    first = next(parts)
    if not dtype.is_floating_point:  # counters and tables have no mean
        for weights, part in zip(opened[1:], parts, strict=True):
            if not torch.equal(part, first):
                raise ValueError(
                    f"{name!r} holds whole numbers, of which there is no mean, and those of {opened[0].directory} and "
                    f"{weights.directory} differ."
                )
        return first
    total = first.double() * shares[0]
    for share, part in zip(shares[1:], parts, strict=True):
        total += part.double() * share
    return total / sum(shares)
