"""Two-way converters between huggingface/nanotron's checkpoints and Hub checkpoints, one tensor at a time.

Both walk the parameters that `nanotron_mapping` declares. They read every header first, so that a checkpoint with a
missing, truncated or foreign file is refused before anything is written; then they stream, holding one parameter and,
towards the Hub, the tensors of one output file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import GenerationConfig

from ...checkpoint.files.inside import inside, refuse_links
from ...checkpoint.hub.model import parse_size, plan_files
from ...checkpoint.hub.nonfinite_tensors import warn_nonfinite
from ...checkpoint.hub.weights import check_index, read_weight_map
from ..folder import load_config, read_json
from . import config as nanotron_config
from .format import (
    Shard,
    check_topology,
    find_shards,
    load_tensor,
    merge_shards,
    one_dtype,
    open_safetensors,
    refuse_mup,
    refuse_strangers,
    step_folder,
    torch_dtype,
    write_parameter,
    write_run_files,
)
from .mapping import Architecture, Parameter, check_tp, parameters, place_blocks, stack, unstack
from .masters import Masters, check_masters, open_masters


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor of a Hub checkpoint lies, and what its header says."""

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


def nanotron_to_hub(
    source: str | Path, destination: str | Path, *, master_weights: bool = False, max_shard_size: int | str = "5GB"
) -> None:
    """Convert a nanotron checkpoint of any tp and pp into a Hub repository that stock transformers loads.

    Args:
        source: a checkpoint folder with `latest.txt`, or one of its step folders.
        destination: folder for `config.json`, `generation_config.json` and safetensors; new or empty.
        master_weights: take the optimizer's fp32 masters instead of the model's weights; the result is fp32.
        max_shard_size: bytes of tensors per file, or a string such as `"5GB"`; more than one file gets an index.

    Raises:
        FileNotFoundError: if a file of the checkpoint is missing.
        ValueError: if a file is truncated or foreign, the architecture is not supported, or `destination` is in use.
    """
    step = step_folder(Path(source))
    refuse_links(step)
    model_config = read_json(step / "model_config.json")
    architecture = nanotron_config.architecture(model_config)
    wanted = parameters(architecture)
    refuse_mup(step)
    refuse_strangers(step, wanted)
    shards = {parameter.name: find_shards(step, parameter) for parameter in wanted}
    dtype = one_dtype({str(shard.path): shard.dtype for group in shards.values() for shard in group})
    check_topology(step, shards.values())
    masters: Masters = {}
    if master_weights:
        masters, dtype = check_masters(step, open_masters(step), shards), torch.float32

    def load(shard: Shard) -> torch.Tensor:
        return masters[shard.name, shard.tp_rank] if master_weights else load_tensor(shard.path, "data")

    config = nanotron_config.to_hub(model_config, dtype)

    shapes = {part.name: part.shape for parameter in wanted for part in parameter.parts}
    one_writer = dict.fromkeys(shapes, 0)
    files = plan_files(shapes, one_writer, dtype.itemsize, parse_size(max_shard_size))
    folder = _fresh_folder(Path(destination))
    write_hub_files(folder, _hub_tensors(wanted, shards, load, dtype, architecture), files)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    config.save_pretrained(folder)  # last: without it nothing loads a conversion that was cut short


def hub_to_nanotron(source: str | Path, destination: str | Path, *, tp: int = 1, pp: int = 1, step: int = 0) -> None:
    """Convert a local Hub checkpoint (safetensors) into a nanotron checkpoint, weights only.

    A nanotron run starts from it with `model.init_method.path` set to the step folder.

    Args:
        source: folder with `config.json` and `model.safetensors`, or the files of `model.safetensors.index.json`.
        destination: folder for `latest.txt` and the step folder; new or empty.
        tp: tensor-parallel ranks to cut the parameters for.
        pp: pipeline ranks to name in the files; layers are placed as nanotron itself places them.
        step: name of the step folder.

    Raises:
        FileNotFoundError: if a file of the checkpoint is missing.
        ValueError: if a tensor is missing or has another shape, the architecture is not supported, `tp` or `pp` does
            not fit the model, or `destination` is in use.
    """
    source, destination = Path(source), Path(destination)
    # By itself first: for a missing file or a foreign type, transformers' own message would speak of the Hub.
    nanotron_config.hub_family(read_json(source / "config.json"))
    model_config = nanotron_config.from_hub(load_config(source))
    architecture = nanotron_config.architecture(model_config)
    check_tp(architecture, tp)
    stages = place_blocks(architecture, pp)
    wanted = parameters(architecture)
    stored = index_hub(source)
    dtype = _check_hub_tensors(source, stored, wanted, tied=not architecture.untied)

    folder = _fresh_folder(destination) / str(step)
    for parameter in wanted:
        whole = stack(
            warn_nonfinite(part.name, load_tensor(stored[part.name].path, part.name), str(source))
            for part in parameter.parts
        )
        write_parameter(folder, parameter, whole, tp=tp, pp_rank=stages[parameter.block], pp=pp)
    write_run_files(folder, model_config, dtype, tp=tp, pp=pp, step=step)
    (destination / "latest.txt").write_text(str(step))  # last: it is what makes the folder a checkpoint


def _hub_tensors(
    wanted: Iterable[Parameter],
    shards: dict[str, list[Shard]],
    load: Callable[[Shard], torch.Tensor],
    dtype: torch.dtype,
    architecture: Architecture,
) -> Iterator[tuple[str, torch.Tensor]]:
    for parameter in wanted:
        whole = merge_shards(parameter, shards[parameter.name], load, dtype)
        for index, part in enumerate(parameter.parts):
            # Nothing here keeps a part that was handed over: its file may be written and gone by the next one.
            yield part.name, warn_nonfinite(part.name, unstack(whole, parameter, index, architecture), "the checkpoint")
        del whole  # before the next parameter is merged


def write_hub_files(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], files: dict[str, list[str]]) -> None:
    """Write a stream of named tensors into the files that `plan_files` laid out in the same order.

    Only the current file's tensors are held. More than one file gets `model.safetensors.index.json`.
    """
    stream, count, size = iter(tensors), 0, 0
    for file, names in files.items():
        held = dict(next(stream) for _ in names)
        if list(held) != names:
            raise RuntimeError(f"{file} was planned for {names}, but the stream brought {list(held)}.")
        count, size = count + sum(t.numel() for t in held.values()), size + sum(t.nbytes for t in held.values())
        save_file(held, folder / file, metadata={"format": "pt"})
        del held  # before the next tensor is made
    if len(files) > 1:
        index = {
            "metadata": {"total_parameters": count, "total_size": size},
            "weight_map": {name: file for file, names in files.items() for name in names},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def index_hub(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a local Hub checkpoint, from the headers of its safetensors files.

    Raises:
        FileNotFoundError: if there is no safetensors checkpoint, or a file that its index names is missing.
        ValueError: if a file is truncated.
    """
    file_of, single = read_weight_map(folder), inside(folder, "model.safetensors", str(folder))
    if file_of is not None:
        files = [folder / name for name in sorted(set(file_of.values()))]
    elif single.is_file():
        files = [single]
    else:
        raise FileNotFoundError(
            f"{folder} has neither model.safetensors nor model.safetensors.index.json; only safetensors are read "
            "(save_pretrained writes them)."
        )
    stored, held = {}, {}
    for path in files:
        with open_safetensors(path) as file:
            held[path.relative_to(folder).as_posix()] = list(file.keys())
            for name in file.keys():  # noqa: SIM118 -- the handle is not a mapping
                tensor = file.get_slice(name)
                stored[name] = StoredTensor(path, tuple(tensor.get_shape()), torch_dtype(path, tensor.get_dtype()))
    check_index(folder, file_of or {}, held)
    return stored


def _check_hub_tensors(
    folder: Path, stored: dict[str, StoredTensor], wanted: Iterable[Parameter], *, tied: bool
) -> torch.dtype:
    """Refuse tensors that are missing, misshapen, of several dtypes or unknown; returns the one dtype."""
    parts = {part.name: part for parameter in wanted for part in parameter.parts}
    for name, part in parts.items():
        if name not in stored:
            raise ValueError(f"{folder}: tensor {name} is missing, which config.json asks for.")
        if stored[name].shape != part.shape:
            raise ValueError(
                f"{stored[name].path}: {name} has shape {stored[name].shape}, but config.json means {part.shape}."
            )
    # A tied model may store its head once more, and old Llama files a buffer; transformers drops both as well.
    droppable = {"lm_head.weight"} if tied else set()
    for name in stored.keys() - parts.keys() - droppable:
        if not name.endswith("rotary_emb.inv_freq"):
            raise ValueError(f"{stored[name].path}: tensor {name} has no place in nanotron's model.")
    return one_dtype({f"{stored[name].path}: {name}": stored[name].dtype for name in parts})


def _fresh_folder(folder: Path) -> Path:
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty: files of two models would mix. Name a new or empty folder.")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
