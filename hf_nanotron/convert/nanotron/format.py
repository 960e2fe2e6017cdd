"""huggingface/nanotron's checkpoint files: finding, checking, merging and writing them.

A nanotron checkpoint is a folder with `latest.txt` and one folder per step. There, `model/<dotted name as folders>/`
holds one tensor a file under the key `data`: `model_weight.safetensors` for a replicated parameter, else one
`model_weight_pp-rank-P-of-PP_tp-rank-T-of-TP.safetensors` per tensor-parallel rank, whose header says which slices of
the whole parameter it is. `optimizer/optimizer_pp-P-of-PP_tp-T-of-TP_exp-0-of-1.pt` holds fp32 masters in the same
shards (`masters.py`). Source: nanotron at commit 2411b022 (checkpoint format 1.5), `serialize/`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from safetensors.torch import save_file

from ...checkpoint.files.inside import LONGEST_PATH, inside
from ...checkpoint.files.safetensors_file import DTYPES, open_safetensors
from ..folder import read_json
from .mapping import Parameter, Slices, shard_slices
from .tiling import shard_fault, stage_fault

VERSION = "1.5"
SUPPORTED = ("BF16", "F16", "F32")
SLICES_KEY, SHAPE_KEY = "local_global_slices_pairs", "unsharded_shape"
_SHARD_FILE = re.compile(
    r"model_(?P<kind>\w+?)_pp-rank-(?P<stage>\d+)-of-(?P<pp>\d+)_tp-rank-(?P<rank>\d+)-of-(?P<tp>\d+)\.safetensors"
)


@dataclass(frozen=True)
class Shard:
    """One file of a nanotron parameter, as its header describes it; `pairs` are (local, global) slices.

    Ranks and sizes are those of its name; a replicated parameter has none, and `tp_rank` 0.
    """

    path: Path
    name: str
    tp_rank: int
    shape: tuple[int, ...]
    dtype: str
    pairs: tuple[tuple[Slices, Slices], ...]
    tp: int | None = None
    pp_rank: int | None = None
    pp: int | None = None


def step_folder(path: Path) -> Path:
    """The step folder of a nanotron checkpoint: `path` itself, or the step that its `latest.txt` names."""
    if (path / "model_config.json").is_file():
        return path
    latest = path / "latest.txt"
    if not latest.is_file():
        raise FileNotFoundError(
            f"{path} is not a nanotron checkpoint: it has neither latest.txt nor model_config.json. Name the folder "
            "that holds latest.txt, or one step's folder."
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
    """The files of one parameter, in order of tensor-parallel rank, from their headers alone."""
    *folders, kind = parameter.name.split(".")
    folder = step.joinpath("model", *folders)
    present = {path.name for path in folder.glob(f"model_{kind}*.safetensors")}
    if parameter.cut is None:
        name = f"model_{kind}.safetensors"
        if present - {name}:
            raise ValueError(f"{folder}: {parameter.name} is replicated, one file {name}; there are {sorted(present)}.")
        return [_read_header(folder / name, parameter, 0)]
    matches = [match for name in sorted(present) if (match := _SHARD_FILE.fullmatch(name)) and match["kind"] == kind]
    sizes = {(int(match["pp"]), int(match["tp"]), int(match["stage"])) for match in matches}
    files = {int(match["rank"]): match.string for match in matches}
    if len(sizes) > 1 or len(files) < len(present):
        raise ValueError(f"{folder} mixes shards of several topologies ({sorted(present)}): keep one.")
    pp, tp, stage = sizes.pop() if sizes else (1, 1, 0)
    if stage >= pp or tp < 1 or any(rank >= tp for rank in files):
        raise ValueError(f"{folder} has shards of ranks that do not exist: {sorted(present)}.")
    missing = [rank for rank in range(tp) if rank not in files]
    if missing:
        raise FileNotFoundError(
            f"{folder / f'model_{kind}_pp-rank-*_tp-rank-{missing[0]}-of-{tp}.safetensors'} is missing: "
            f"{parameter.name} needs the shards of all {tp} tensor-parallel ranks. Copy the checkpoint again."
        )
    shards = [_read_header(folder / files[rank], parameter, rank) for rank in range(tp)]
    for rank, shard in enumerate(shards):
        if (fault := shard_fault(parameter, shard.shape, shard.pairs, tp=tp, rank=rank)) is not None:
            raise ValueError(f"{shard.path}: {fault}. Copy the checkpoint again.")
    return [replace(shard, tp=tp, pp_rank=stage, pp=pp) for shard in shards]


def check_topology(step: Path, shards: Iterable[Sequence[Shard]]) -> None:
    """Refuse files of several jobs: other sizes, or stages that no one job can have."""
    cut = [group[0] for group in shards if group[0].tp is not None]
    metadata = step / "checkpoint_metadata.json"
    tp = read_json(metadata).get("tp") if metadata.is_file() else None
    for shard in cut:
        if (shard.pp, shard.tp) != (cut[0].pp, cut[0].tp):
            raise ValueError(f"{shard.path} and {cut[0].path} are of different topologies: two runs are mixed.")
        if tp not in (None, shard.tp):
            raise ValueError(f"{shard.path} is of tp={shard.tp}, but {metadata} says {tp!r}: two runs are mixed.")
    stages = [(shard.name.split(".pp_block.")[0], cast(int, shard.pp_rank)) for shard in cut]
    if (fault := stage_fault(stages)) is not None:
        raise ValueError(f"{step / 'model'}: by the names of its files, {fault}: files of several runs are mixed.")


def _read_header(path: Path, parameter: Parameter, tp_rank: int) -> Shard:
    with _open(path) as file:
        if list(file.keys()) != ["data"]:
            raise ValueError(f"{path}: holds {list(file.keys())} instead of nanotron's single tensor 'data'.")
        tensor, metadata = file.get_slice("data"), file.metadata() or {}
        shape, dtype = tuple(tensor.get_shape()), tensor.get_dtype()
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
    return Shard(path, parameter.name, tp_rank, shape, dtype, pairs)


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
    """Refuse a run under spectral muP, which only `config.yaml` (may be absent) tells: its Llama attention differs."""
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
    """Shards of one parameter, which tile it (`find_shards`) -> the whole of it, of shape `parameter.shape`."""
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


def _open(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing. Copy the checkpoint again.")
    return open_safetensors(path, "copy the checkpoint again")


def load_tensor(path: Path, name: str) -> torch.Tensor:
    """One tensor of a safetensors file; nothing else of the file is read."""
    with _open(path) as file:
        return file.get_tensor(name)


def one_dtype(dtypes: dict[str, str]) -> torch.dtype:
    """The dtype that all tensors share: a mix would lose precision on loading, as the configuration states one.

    `dtypes`: where a tensor is -> its dtype, as safetensors calls it.
    """
    first, expected = next(iter(dtypes.items()))
    for where, dtype in dtypes.items():
        if dtype not in SUPPORTED:
            raise ValueError(f"{where}: dtype {dtype} is not supported; only {', '.join(SUPPORTED)} are.")
        if dtype != expected:
            raise ValueError(
                f"{where} is {DTYPES[dtype]}, but {first} is {DTYPES[expected]}: convert them to one dtype first."
            )
    return DTYPES[expected]
