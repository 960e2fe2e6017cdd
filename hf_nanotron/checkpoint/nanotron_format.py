"""huggingface/nanotron's checkpoint files: finding, checking, merging and writing them.

A nanotron checkpoint is a folder with `latest.txt` and one folder per step. There, `model/<dotted name as folders>/`
holds one tensor a file under the key `data`: `model_weight.safetensors` for a replicated parameter, else one
`model_weight_pp-rank-P-of-PP_tp-rank-T-of-TP.safetensors` per tensor-parallel rank, whose header says which slices of
the whole parameter it is. `optimizer/optimizer_pp-P-of-PP_tp-T-of-TP_exp-0-of-1.pt` holds fp32 masters in the same
shards. Source: nanotron at commit 2411b022 (checkpoint format 1.5), `serialize/`.
"""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .inside import LONGEST_PATH, inside
from .nanotron_mapping import Parameter, Slices, shard_slices

VERSION = "1.5"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
SLICES_KEY, SHAPE_KEY = "local_global_slices_pairs", "unsharded_shape"
_SHARD_FILE = re.compile(r"model_(?P<kind>\w+?)_pp-rank-\d+-of-\d+_tp-rank-(?P<rank>\d+)-of-(?P<tp>\d+)\.safetensors")
_OPTIMIZER_FILE = re.compile(r"optimizer_pp-(\d+)-of-(\d+)_tp-(\d+)-of-(\d+)(?:_exp-0-of-1)?\.pt")


@dataclass(frozen=True)
class Shard:
    """One file of a nanotron parameter, as its header describes it; `pairs` are (local, global) slices."""

    path: Path
    name: str
    tp_rank: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    pairs: tuple[tuple[Slices, Slices], ...]


def step_folder(path: Path) -> Path:
    """The step folder of a nanotron checkpoint: `path` itself, or the step that its `latest.txt` names.

    Raises:
        FileNotFoundError: if `path` is neither.
        ValueError: if `latest.txt` names a step outside of `path`.
    """
    if (path / "model_config.json").is_file():
        return path
    latest = path / "latest.txt"
    if not latest.is_file():
        raise FileNotFoundError(
            f"{path} is no nanotron checkpoint: it has neither latest.txt nor model_config.json. Name the folder that "
            "holds latest.txt, or one step's folder."
        )
    with open(latest, "rb") as file:
        name = file.read(LONGEST_PATH).decode(errors="surrogateescape").strip()
    return inside(path, name, str(latest))


def parse_shape(text: str) -> tuple[int, ...]:
    """A printed shape such as `(64, 32)` or `(np.int64(64), 32)`, which newer numpy makes of it -> `(64, 32)`."""
    entries = [entry.strip() for entry in text.strip()[1:-1].split(",") if entry.strip()]
    matches = [re.fullmatch(r"(?:np\.\w+\()?(\d+)\)?", entry) for entry in entries]
    if not all(matches):
        raise ValueError(f"{text!r} is not a shape")
    return tuple(int(match[1]) for match in matches if match)


def parse_slices(text: str) -> tuple[tuple[Slices, Slices], ...]:
    """`LOCAL#GLOBAL;...` -> ((local, global), ...), each a slice per dimension, `start,stop,step|...` in the text."""

    def one(side: str) -> Slices:
        numbers = [[None if n == "None" else int(n) for n in dim.split(",")] for dim in side.split("|")]
        return tuple(slice(start, stop, step) for start, stop, step in numbers)

    sides = [pair.split("#") for pair in text.split(";")]
    return tuple((one(local), one(whole)) for local, whole in sides)


def format_slices(pairs: Iterable[tuple[Slices, Slices]]) -> str:
    """The inverse of `parse_slices`."""

    def one(side: Slices) -> str:
        return "|".join(f"{dim.start},{dim.stop},{dim.step}" for dim in side)

    return ";".join(f"{one(local)}#{one(whole)}" for local, whole in pairs)


def find_shards(step: Path, parameter: Parameter) -> list[Shard]:
    """The files of one parameter, in order of tensor-parallel rank, from their headers alone.

    Raises:
        FileNotFoundError: if a rank's file is missing.
        ValueError: if a header does not describe its share of the parameter, or files of several runs are mixed.
    """
    *folders, kind = parameter.name.split(".")
    folder = step.joinpath("model", *folders)
    if parameter.cut is None:
        return [_read_header(folder / f"model_{kind}.safetensors", parameter, 0)]
    matches = [match for path in folder.glob("*") if (match := _SHARD_FILE.fullmatch(path.name))]
    files = {(int(match["rank"]), int(match["tp"])): match.string for match in matches if match["kind"] == kind}
    sizes = {tp for _, tp in files}
    if len(sizes) > 1 or len(files) < sum(match["kind"] == kind for match in matches):
        raise ValueError(f"{folder} mixes shards of several topologies ({sorted(files.values())}): keep one.")
    tp = sizes.pop() if sizes else 1
    missing = [rank for rank in range(tp) if (rank, tp) not in files]
    if missing:
        raise FileNotFoundError(
            f"{folder / f'model_{kind}_pp-rank-*_tp-rank-{missing[0]}-of-{tp}.safetensors'} is missing: "
            f"{parameter.name} needs the shards of all {tp} tensor-parallel ranks. Copy the checkpoint again."
        )
    shards = [_read_header(folder / files[rank, tp], parameter, rank) for rank in range(tp)]
    held = sum(math.prod(_extent(whole, parameter.shape)) for shard in shards for _, whole in shard.pairs)
    if held != math.prod(parameter.shape):
        raise ValueError(
            f"{folder}: the slices of its {tp} shards hold {held} numbers, but {parameter.name} has shape "
            f"{parameter.shape}. Files of different runs are mixed, or the headers are damaged."
        )
    return shards


def _read_header(path: Path, parameter: Parameter, tp_rank: int) -> Shard:
    with open_safetensors(path) as file:
        if list(file.keys()) != ["data"]:
            raise ValueError(f"{path}: holds {list(file.keys())} instead of the single tensor 'data' of nanotron.")
        tensor, metadata = file.get_slice("data"), file.metadata() or {}
        shape, dtype = tuple(tensor.get_shape()), torch_dtype(path, tensor.get_dtype())
    pairs: tuple[tuple[Slices, Slices], ...]
    if parameter.cut is None:
        everything = (slice(None),) * len(shape)
        whole_shape, pairs = shape, ((everything, everything),)
    else:
        try:
            version = tuple(map(int, metadata["version"].split(".")))
            whole_shape, pairs = parse_shape(metadata[SHAPE_KEY]), parse_slices(metadata[SLICES_KEY])
        except (KeyError, ValueError, OverflowError) as error:
            raise ValueError(f"{path}: its header {metadata} does not say which slices it holds ({error}).") from error
        if version > tuple(map(int, VERSION.split("."))):
            raise ValueError(
                f"{path}: checkpoint format {metadata['version']} is newer than {VERSION}, the last known."
            )
    if whole_shape != parameter.shape:
        raise ValueError(
            f"{path}: {parameter.name} has shape {whole_shape} there, but model_config.json means {parameter.shape}."
        )
    for local, whole in pairs:
        if len(local) != len(shape) or _extent(local, shape) != _extent(whole, whole_shape):
            raise ValueError(
                f"{path}: slices {format_slices([(local, whole)])} do not fit its tensor of shape {shape}."
            )
    return Shard(path, parameter.name, tp_rank, shape, dtype, pairs)


def _extent(slices: Slices, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of `tensor[slices]` for a tensor of this shape."""
    return tuple(len(range(*dim.indices(size))) for dim, size in zip(slices, shape, strict=False))


def refuse_strangers(step: Path, wanted: Iterable[Parameter]) -> None:
    """Refuse parameters on disk that the model as configured does not have: dropping them would change the model."""
    known = {parameter.name for parameter in wanted}
    root = step / "model"
    for path in sorted(root.rglob("*.safetensors")):
        kind = path.name.removesuffix(".safetensors").removeprefix("model_").split("_pp-rank-")[0]
        name = ".".join((*path.parent.relative_to(root).parts, kind))
        if name not in known or "_exp-rank-" in path.name:
            raise ValueError(
                f"{path}: the model of model_config.json has no parameter {name} in such a file. Supported are Llama "
                "and Qwen2 without experts; a tied model has no lm_head, and biases need is_qwen2_config with "
                "attention_bias=true."
            )


def refuse_mup(step: Path) -> None:
    """Refuse a run under spectral muP, which only `config.yaml` (may be absent) tells: its Llama attention differs.

    Raises:
        ValueError: if the run set `use_mup`.
    """
    path = step / "config.yaml"
    try:
        found: Any = yaml.safe_load(path.read_bytes()) if path.is_file() else None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML: {error}. Copy the checkpoint again.") from error
    for key in ("model", "init_method", "use_mup"):
        found = found.get(key) if isinstance(found, dict) else None
    if found:
        raise ValueError(
            f"{path}: model.init_method.use_mup scales attention by 1/head_dim in nanotron, which Hub models do not; "
            "checkpoints of muP runs cannot be converted."
        )


def merge_shards(
    parameter: Parameter, shards: Sequence[Shard], load: Callable[[Shard], torch.Tensor], dtype: torch.dtype
) -> torch.Tensor:
    """Shards of one parameter -> the whole of it, of shape `parameter.shape`."""
    whole = torch.empty(parameter.shape, dtype=dtype)
    for shard in shards:
        tensor = load(shard)
        for local, target in shard.pairs:
            whole[target] = tensor[local]
    return whole


def write_parameter(folder: Path, parameter: Parameter, whole: torch.Tensor, *, tp: int, pp_rank: int, pp: int) -> None:
    """Write one parameter, `whole` of shape `parameter.shape`, as nanotron's ranks would into step folder `folder`."""
    *folders, kind = parameter.name.split(".")
    target = folder.joinpath("model", *folders)
    target.mkdir(parents=True, exist_ok=True)
    if parameter.cut is None:
        save_file({"data": whole}, target / f"model_{kind}.safetensors", metadata={})
        return
    for rank in range(tp):
        pairs = shard_slices(parameter, tp, rank)
        shard = torch.cat([whole[target_slices] for _, target_slices in pairs], dim=parameter.cut).contiguous()
        metadata = {"version": VERSION, SHAPE_KEY: str(parameter.shape), SLICES_KEY: format_slices(pairs)}
        name = f"model_{kind}_pp-rank-{pp_rank}-of-{pp}_tp-rank-{rank}-of-{tp}.safetensors"
        save_file({"data": shard}, target / name, metadata=metadata)


def write_run_files(
    folder: Path, model_config: dict[str, Any], dtype: torch.dtype, *, tp: int, pp: int, step: int
) -> None:
    """The files beside `model/`: the architecture, the smallest run configuration nanotron parses, and its metadata."""
    (folder / "model_config.json").write_text(json.dumps(model_config))
    # nanotron's YAML reader insists on integer token ids; without a key it takes its own default.
    loose = {name for name in ("bos_token_id", "eos_token_id") if not isinstance(model_config[name], int)}
    run = {
        "general": {"project": "converted", "run": "hub_to_nanotron", "step": step, "consumed_train_samples": 0},
        "model": {
            "model_config": {name: value for name, value in model_config.items() if name not in loose},
            "init_method": {"path": str(folder)},
            "dtype": str(dtype).removeprefix("torch."),
            "make_vocab_size_divisible_by": 1,
        },
        "parallelism": {"dp": 1, "pp": pp, "tp": tp, "expert_parallel_size": 1, "context_parallel_size": 1},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(run))
    training = {
        "consumed_tokens_total": 0,
        "consumed_train_samples": 0,
        "data_stages": [],
        "last_stage_idx": 0,
        "last_train_step": step,
    }
    metadata = {"cp": 1, "custom_metas": None, "dp": 1, "metas": training, "tp": tp, "version": VERSION}
    (folder / "checkpoint_metadata.json").write_text(json.dumps(metadata, indent=2))


def open_masters(step: Path) -> dict[tuple[str, int], torch.Tensor]:
    """The optimizer's fp32 masters, as (parameter name, tensor-parallel rank) -> shard, mapped from disk, not read.

    A tied embedding stands in the first and in the last stage's file; the first stage's is taken, as for the weights.

    Raises:
        FileNotFoundError: if there are no optimizer files, or a rank's is missing.
        ValueError: if a file is truncated, holds anything but tensors and plain containers, or no masters.
    """
    folder = step / "optimizer"
    if any(folder.glob("optimizer_*_dp-*.pt")):
        raise ValueError(
            f"{folder}: ZeRO-1 optimizer files (…_dp-…) hold flat pieces of the masters and are not supported; convert "
            "without master weights, or save with zero_stage: 0."
        )
    ranks = {}
    for path in folder.glob("*.pt"):
        if match := _OPTIMIZER_FILE.fullmatch(path.name):
            pp_rank, pp, tp_rank, tp = map(int, match.groups())
            ranks[pp_rank, tp_rank, pp, tp] = path
    sizes = {(pp, tp) for _, _, pp, tp in ranks}
    if len(sizes) != 1:
        raise FileNotFoundError(
            f"{folder} has no optimizer_pp-*-of-*_tp-*-of-*_exp-0-of-1.pt of one single topology (found "
            f"{sorted(path.name for path in ranks.values())}): the fp32 masters live there; convert without them."
        )
    pp, tp = sizes.pop()
    masters: dict[tuple[str, int], torch.Tensor] = {}
    for pp_rank in range(pp):
        for tp_rank in range(tp):
            if (pp_rank, tp_rank, pp, tp) not in ranks:
                name = f"optimizer_pp-{pp_rank}-of-{pp}_tp-{tp_rank}-of-{tp}_exp-0-of-1.pt"
                raise FileNotFoundError(f"{folder / name} is missing: the masters need every rank's file.")
            for name, tensor in _open_optimizer(ranks[pp_rank, tp_rank, pp, tp]).items():
                masters.setdefault((name, tp_rank), tensor.detach())
    return masters


def _open_optimizer(path: Path) -> dict[str, torch.Tensor]:
    try:
        state = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path}: holds objects other than tensors, which are never unpickled ({error}).") from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path}: not a readable torch file, probably truncated; copy it again ({error}).") from error
    masters = state.get("gradient_accumulator") if isinstance(state, dict) else None
    if not masters:
        raise ValueError(
            f"{path}: has no fp32 masters (gradient_accumulator): the run did not set accumulate_grad_in_fp32. Convert "
            "without master weights."
        )
    return masters


def check_masters(step: Path, masters: dict[tuple[str, int], torch.Tensor], shards: dict[str, list[Shard]]) -> None:
    """Refuse masters that are not fp32 twins of the weights' shards.

    Raises:
        ValueError: naming the first parameter without such a master.
    """
    for shard in (shard for group in shards.values() for shard in group):
        master = masters.get((shard.name, shard.tp_rank))
        if master is None or tuple(master.shape) != shard.shape or master.dtype != torch.float32:
            found = "nothing" if master is None else f"{master.dtype} of shape {tuple(master.shape)}"
            raise ValueError(
                f"{step / 'optimizer'}: {found} for {shard.name} at tensor-parallel rank {shard.tp_rank}, where fp32 "
                f"of shape {shard.shape} is expected as in {shard.path.name}: the optimizer is of another run."
            )


def open_safetensors(path: Path) -> Any:
    """A safetensors handle, after checking the header against the file's length.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if it is truncated or something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing. Copy the checkpoint again.")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a complete safetensors file ({error}). Copy the checkpoint again.") from error


def load_tensor(path: Path, name: str) -> torch.Tensor:
    """One tensor of a safetensors file; nothing else of the file is read."""
    with open_safetensors(path) as file:
        return file.get_tensor(name)


def torch_dtype(path: Path, name: str) -> torch.dtype:
    """The dtype that a header calls `name`; `path` is for the refusal."""
    if name not in DTYPES:
        raise ValueError(f"{path}: dtype {name} is not supported; only {', '.join(DTYPES)} are.")
    return DTYPES[name]


def one_dtype(dtypes: dict[str, torch.dtype]) -> torch.dtype:
    """The dtype that all tensors share: a mix would lose precision on loading, as the configuration states one."""
    first, expected = next(iter(dtypes.items()))
    for where, dtype in dtypes.items():
        if dtype != expected:
            raise ValueError(f"{where} is {dtype}, but {first} is {expected}: convert them to one dtype first.")
    return expected


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object; a missing or damaged file is refused by name."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the folder is no complete checkpoint.")
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}). Copy the checkpoint again.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: a {type(found).__name__} and not an object with keys. Copy the checkpoint again.")
    return found
