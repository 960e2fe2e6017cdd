"""Two-way converters between huggingface/nanotron's checkpoints and Hub checkpoints, one tensor at a time.

Both walk the parameters that `nanotron_mapping` declares. They read every header first, so that a checkpoint with a
missing, truncated or foreign file is refused before anything is written; then they stream, holding one parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from math import prod
from pathlib import Path

import torch
from transformers import GenerationConfig
from transformers.utils import CONFIG_NAME

from ...checkpoint.files.inside import refuse_links
from ...checkpoint.hub.nonfinite_tensors import warn_nonfinite
from ...checkpoint.hub.repository_weights import parse_size, write_repository_weights
from ...checkpoint.hub.weights import HubWeights
from ...parallel.shard_spec import ShardSpec
from ..folder import TEXTS, WEIGHTS, load_config, read_json, refuse_same, writing
from . import config as nanotron_config
from .format import (
    Shard,
    check_topology,
    find_shards,
    load_tensor,
    merge_shards,
    one_dtype,
    refuse_mup,
    refuse_strangers,
    step_folder,
    write_parameter,
    write_run_files,
)
from .mapping import Architecture, HubTensor, Parameter, check_tp, parameters, place_blocks, unstack
from .masters import Masters, check_masters, open_masters

STEP_FOLDER = ("*/model/*.safetensors", "*/model_config.json", "*/config.yaml", "*/checkpoint_metadata.json")


def nanotron_to_hub(
    source: str | Path,
    destination: str | Path,
    *,
    master_weights: bool = False,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> None:
    """Convert a nanotron checkpoint of any tp and pp into a Hub repository that stock transformers loads.

    Args:
        source: a checkpoint folder with `latest.txt`, or one of its step folders.
        destination: folder for `config.json`, `generation_config.json` and safetensors; new or empty.
        master_weights: take the optimizer's fp32 masters instead of the model's weights; the result is fp32.
        max_shard_size: bytes of tensors per file, or a string such as `"5GB"`; more than one file gets an index.
        overwrite: take away an earlier repository in `destination`.

    Raises:
        FileNotFoundError: if a file of the checkpoint is missing.
        ValueError: if a file is truncated or foreign, the architecture is not supported, or `destination` is in use.
    """
    source, destination, limit = Path(source), Path(destination), parse_size(max_shard_size)
    refuse_same(source, destination)
    step = step_folder(source)
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
    dtypes, numel = dict.fromkeys(shapes, dtype), sum(map(prod, shapes.values()))
    with writing(destination, (*WEIGHTS, *TEXTS), CONFIG_NAME, overwrite):
        tensors = _hub_tensors(wanted, shards, load, dtype, architecture)
        write_repository_weights(destination, shapes, dtypes, tensors, limit, numel)
        GenerationConfig.from_model_config(config).save_pretrained(destination)
        config.save_pretrained(destination)  # last: without it nothing loads a conversion that was cut short


def hub_to_nanotron(
    source: str | Path, destination: str | Path, *, tp: int = 1, pp: int = 1, step: int = 0, overwrite: bool = False
) -> None:
    """Convert a local Hub checkpoint (safetensors) into a nanotron checkpoint, weights only.

    A nanotron run starts from it with `model.init_method.path` set to the step folder.

    Args:
        source: folder with `config.json` and `model.safetensors`, or the files of `model.safetensors.index.json`.
        destination: folder for `latest.txt` and the step folder; new or empty.
        tp: tensor-parallel ranks to cut the parameters for.
        pp: pipeline ranks to name in the files; layers are placed as nanotron itself places them.
        step: name of the step folder.
        overwrite: take away an earlier conversion in `destination`.

    Raises:
        FileNotFoundError: if `config.json` is missing.
        ValueError: if weights are missing or damaged, a tensor is missing or has another shape, the architecture is not
            supported, `tp` or `pp` does not fit the model, or `destination` is in use.
    """
    source, destination = Path(source), Path(destination)
    refuse_same(source, destination)
    # By itself first: for a missing file or a foreign type, transformers' own message would speak of the Hub.
    nanotron_config.hub_family(read_json(source / CONFIG_NAME))
    model_config = nanotron_config.from_hub(load_config(source))
    architecture = nanotron_config.architecture(model_config)
    check_tp(architecture, tp)
    stages = place_blocks(architecture, pp)
    wanted = parameters(architecture)
    weights = HubWeights(source)
    dtype = _check_hub_tensors(weights, wanted, tied=not architecture.untied)
    with writing(destination, ("latest.txt", "[0-9]*"), "latest.txt", overwrite, STEP_FOLDER):
        folder = destination / str(step)
        for parameter in wanted:
            whole = torch.cat([_read(weights, part) for part in parameter.parts])
            write_parameter(folder, parameter, whole, tp=tp, pp_rank=stages[parameter.block], pp=pp)
        write_run_files(folder, model_config, dtype, tp=tp, pp=pp, step=step)
        (destination / "latest.txt").write_text(str(step))  # last: it is what makes the folder a checkpoint


def _read(weights: HubWeights, part: HubTensor) -> torch.Tensor:
    return warn_nonfinite(part.name, weights.read(ShardSpec(part.name, part.shape)), str(weights.directory))


def _hub_tensors(
    wanted: Iterable[Parameter],
    shards: dict[str, list[Shard]],
    load: Callable[[Shard], torch.Tensor],
    dtype: torch.dtype,
    architecture: Architecture,
) -> Iterator[torch.Tensor]:
    for parameter in wanted:
        whole = merge_shards(parameter, shards[parameter.name], load, dtype)
        for index, part in enumerate(parameter.parts):
            yield warn_nonfinite(part.name, unstack(whole, parameter, index, architecture), "the checkpoint")
        del whole  # before the next parameter is merged


def _check_hub_tensors(weights: HubWeights, wanted: Iterable[Parameter], *, tied: bool) -> torch.dtype:
    """Refuse tensors that are missing, misshapen, of several dtypes or unknown; returns the one dtype."""
    parts = {part.name: part for parameter in wanted for part in parameter.parts}
    for name, part in parts.items():
        weights.check(name, part.shape)
    # A tied model may store its head once more, and old Llama files a buffer; transformers drops both as well.
    droppable = {"lm_head.weight"} if tied else set()
    for name in set(weights.names()) - parts.keys() - droppable:
        if not name.endswith("rotary_emb.inv_freq"):
            raise ValueError(f"{weights.file_of(name)}: nanotron's model has no place for the tensor {name}.")
    return one_dtype({f"{weights.file_of(name)}: {name}": weights.dtype_name(name) for name in parts})
