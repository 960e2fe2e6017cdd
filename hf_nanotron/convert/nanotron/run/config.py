"""`hf-nanotron convert nanotron-config`: huggingface/nanotron's configuration of a run -> our YAML file.

Each key is carried over, or named in the output and at the top of the file that is written. Source of the keys:
nanotron at commit 2411b022, `config/config.py`, and its examples, some of which have keys of earlier versions.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from ....redaction import printable
from .data import Found, Run, dataset_section
from .keys import Keys, read
from .model import PREFIX, init_method, model_config
from .schedule import from_step, read_schedule, training_keys
from .secrets import cleaned

NANOTRON = ("general", "parallelism", "tokens", "optimizer")  # what every configuration of a run has

# Same value, other name.
RENAMED = {
    "general.project": "project",
    "parallelism.tp": "tp_size",
    "parallelism.pp": "pp_size",
    "tokens.micro_batch_size": "per_device_train_batch_size",
    "tokens.batch_accumulation_per_replica": "gradient_accumulation_steps",
    "checkpoints.checkpoints_path": "output_dir",
    "logging.log_level": "log_level",
    "logging.log_level_replica": "log_level_replica",
    "s3_upload.upload_s3_path": "remote_checkpoints",
}
# And numbers: other name, whether it is whole, the least.
NUMBERS: dict[str, tuple[str, bool, float]] = {
    "general.seed": ("seed", True, 0),
    "optimizer.zero_stage": ("zero_stage", True, 0),
    "optimizer.weight_decay": ("weight_decay", False, 0),
    "model.ddp_bucket_cap_mb": ("ddp_bucket_cap_mb", True, 1),
    "checkpoints.checkpoint_interval": ("save_steps", True, 1),
    "logging.iteration_step_info_interval": ("logging_steps", True, 1),
}
# Patterns of weights without decay, and what names these weights here.
NOT_DECAYED = {".*token_embedding.*": "embed_tokens"}
NOT_ONE = {"parallelism.expert_parallel_size": "ep_size", "parallelism.context_parallel_size": "cp_size"}

# What has no counterpart, by key or section.
REASONS = {
    "general.benchmark_csv_path": "figures are in the log",
    "general.consumed_train_samples": "the position in the data is in each checkpoint",
    "general.step": "the step is in each checkpoint",
    "general.ignore_sanity_checks": "checks are always on, and cost nothing that can be measured",
    "parallelism.tp_recompute_allgather": "decided by sequence_parallel and tp_overlap",
    "parallelism.moe_layer_recompute": "activation_checkpointing_policy says what is recomputed of a layer",
    "tokens.limit_test_batches": "there is no test loop",
    "tokens.limit_val_batches": "the whole of dataset.eval is evaluated",
    "tokens.val_check_interval": "set training.eval_strategy, training.eval_steps and dataset.eval",
    "tokenizer.tokenizer_max_length": "samples have dataset.sequence_length tokens",
    "tokenizer.tokenizer_revision": "download the revision and give its folder as tokenizer",
    "checkpoints.checkpoints_path_is_shared_file_system": "all ranks must share output_dir",
    "checkpoints.save_initial_state": "step 0 is not saved",
    "checkpoints.save_final_state": "the final model is in output_dir, checkpoints are at each save_steps",
    "checkpoints.load_optimizer": "moments of nanotron's checkpoints are not read",
    "checkpoints.load_lr_scheduler": "set the schedule for the steps that are left",
    "metrics_logging": "gradient norm, throughput and memory are always logged",
    "profiler": "use torch.profiler in a callback",
    "lighteval": "evaluate a checkpoint with lighteval: it is a repository that transformers loads",
    "s3_upload": "uploads are made by fsspec",
    "doremi": "give the weights of the sets in dataset.mixture",
}
UNKNOWN = "not known here"
# Values that ask for nothing, or for what is done anyway.
NEUTRAL = {
    "tokens.limit_test_batches": 0,
    "tokens.limit_val_batches": 0,
    "tokens.val_check_interval": -1,
    "checkpoints.save_initial_state": False,
    "checkpoints.load_optimizer": False,
    "parallelism.moe_layer_recompute": False,
    "general.ignore_sanity_checks": False,
}


def nanotron_config(source: str | Path, destination: str | Path, *, overwrite: bool = False) -> None:
    """Write what the configuration `source` of huggingface/nanotron says as a file for `hf-nanotron train`.

    Args:
        source: nanotron's YAML file.
        destination: the YAML file to write.
        overwrite: replace `destination`.

    Raises:
        FileNotFoundError: if there is no `source`.
        ValueError: if it is no configuration of nanotron, holds what cannot be, or `destination` is there already.
    """
    source, destination = Path(source), Path(destination)
    if destination.is_dir() or (destination.exists() and not overwrite):
        raise ValueError(f"{destination} exists; choose another name, or set `overwrite` (--overwrite).")
    if not destination.absolute().parent.is_dir():
        raise ValueError(f"{destination}: its folder does not exist.")
    if destination.exists() and source.resolve() == destination.resolve():
        raise ValueError(f"source and destination are the same file ({destination}); choose another destination.")
    keys = read(source)
    sections = {key.split(".")[0].split("[")[0] for key in keys.values}
    if missing := [name for name in NANOTRON if name not in sections]:
        raise ValueError(f"{source} is no configuration of a nanotron run: it has no section {', '.join(missing)}.")
    settings, commands = converted(keys, destination.name)
    settings, secret = cleaned(settings)
    told = keys.told()
    if secret:
        told.append(f"{', '.join(secret)}: credentials are left out; let the environment have them (for S3, ~/.aws)")
    lines = [*_told("Run it with", commands), *_told("Not carried over, or different here", told)]
    head = [f"Written by hf-nanotron convert nanotron-config from {source.name} of huggingface/nanotron.", "", *lines]
    comments = "".join(f"# {line}".rstrip() + "\n" for line in printable("\n".join(head)).splitlines())
    destination.write_text(comments + "\n" + dump(settings), encoding="utf-8")
    print(printable("\n".join([f"{destination} is written.", "", *lines])).rstrip())


def converted(keys: Keys, name: str = "FILE.yaml") -> tuple[dict[str, Any], list[str]]:
    """The sections of our YAML file, and the commands that start its run."""
    training: dict[str, Any] = {"output_dir": "checkpoints"}
    for theirs, ours in RENAMED.items():
        if (value := keys.take(theirs)) is not None:
            training[ours] = value
    for theirs, (ours, whole, least) in NUMBERS.items():
        if keys.take(theirs) is not None:
            training[ours] = keys.number(theirs, whole=whole, least=least)
    for theirs, ours in NOT_ONE.items():
        if (size := keys.number(theirs, 1, least=1)) != 1:
            training[ours] = size
    _run_name(keys, training)
    steps, processes = _sizes(keys, training)
    _optimizer(keys, training)
    _parallelism(keys, training)
    _uploads(keys, training)

    config, more = model_config(keys)
    training |= more
    masks = bool(keys.values.get(f"{PREFIX}._use_doc_masking"))
    keys.notes.pop(f"{PREFIX}._use_doc_masking", None)
    weights = init_method(keys, config)
    model, commands, step, consumed = _weights(keys, config, weights)
    schedule = read_schedule(keys, steps)
    if step >= steps:
        raise ValueError(f"{keys.source}: the checkpoint has trained {step} steps, and tokens.train_steps is {steps}.")
    training["max_steps"] = steps - step
    training |= training_keys(from_step(schedule, step, keys), steps - step, keys)

    length = keys.number("tokens.sequence_length", least=2)
    batch = training["per_device_train_batch_size"] * training["gradient_accumulation_steps"]
    samples = steps * batch * keys.number("parallelism.dp", 1)
    data = dataset_section(keys, Run(length, samples, step, consumed, masks))
    if data.workers is not None:
        training["dataloader_num_workers"] = data.workers
    tokenizer = keys.take("tokenizer.tokenizer_name_or_path", data.tokenizer)
    _vocabulary(keys, model, data, training)
    _dtype(keys, training)
    keys.note_rest(REASONS, NEUTRAL, UNKNOWN)
    settings = {"model": model, "tokenizer": tokenizer, "dataset": data.section, "training": training}
    start = f"torchrun --nproc-per-node {min(processes, 8)} -m hf_nanotron.cli train {name}"
    nodes = "" if processes <= 8 else f"  # {processes} processes in all: on each node, with torchrun's --nnodes"
    return {key: value for key, value in settings.items() if value is not None}, [*commands, start + nodes]


def _run_name(keys: Keys, training: dict[str, Any]) -> None:
    name = keys.take("general.run")
    if name is None:
        return
    if "%" in str(name):
        keys.note("general.run", "the date and the number of the job are not filled in")
        name = re.sub(r"[_-]?%(date|jobid)", "", str(name))
    training["run_name"] = str(name)


def _sizes(keys: Keys, training: dict[str, Any]) -> tuple[int, int]:
    """The steps of the run, and the processes of its job."""
    for theirs in (
        "tokens.micro_batch_size",
        "tokens.batch_accumulation_per_replica",
        "parallelism.tp",
        "parallelism.pp",
    ):
        training[RENAMED[theirs]] = keys.number(theirs, 1 if theirs.startswith("parallelism") else None, least=1)
    processes = keys.number("parallelism.dp", 1, least=1) * training["tp_size"] * training["pp_size"]
    processes *= training.get("cp_size", 1) * training.get("ep_size", 1)
    if "ep_size" in training:
        keys.note(
            "parallelism.expert_parallel_size",
            "the ranks of ep_size share experts and have samples of their own: a step has ep_size times as many; "
            "divide gradient_accumulation_steps by it",
        )
    return keys.number("tokens.train_steps", least=1), processes


def _optimizer(keys: Keys, training: dict[str, Any]) -> None:
    prefix = "optimizer.optimizer_factory"
    if not any(key.startswith(prefix) for key in keys.values):
        prefix = "optimizer"  # as before there was a factory
    name = str(keys.take(f"{prefix}.name", "adamW"))
    fused = keys.take(f"{prefix}.torch_adam_is_fused", False)
    if name.lower() == "sgd":
        training["optim"] = "sgd"
    else:
        training["optim"] = "adamw_torch_fused" if fused else "adamw_torch"
        if name.lower() != "adamw":
            keys.note(f"{prefix}.name", "AdamW is used")
    for theirs, ours in (("adam_beta1", "adam_beta1"), ("adam_beta2", "adam_beta2"), ("adam_eps", "adam_epsilon")):
        if keys.take(f"{prefix}.{theirs}") is not None:
            training[ours] = keys.number(f"{prefix}.{theirs}", whole=False, least=0)
    training["max_grad_norm"] = keys.number("optimizer.clip_grad", 0.0, whole=False)
    if not keys.take("optimizer.accumulate_grad_in_fp32", True):
        keys.note("optimizer.accumulate_grad_in_fp32", "gradients are always summed in fp32")
    excluded = keys.take("optimizer.weight_decay_exclude_named_params", [])
    if training.get("weight_decay"):
        if named := [NOT_DECAYED[pattern] for pattern in excluded if pattern in NOT_DECAYED]:
            training["no_weight_decay"] = named
            excluded = [pattern for pattern in excluded if pattern not in NOT_DECAYED]
        key = "optimizer.weight_decay_exclude_named_params" if excluded else "optimizer.weight_decay"
        but = f", but for {', '.join(named)}" if named else ""
        keys.note(key, f"norms and biases do not decay here, as in Trainer, and all other weights do{but}")


def _parallelism(keys: Keys, training: dict[str, Any]) -> None:
    mode = keys.one_of("parallelism.tp_mode", "ALL_REDUCE", ("ALL_REDUCE", "REDUCE_SCATTER"))
    engine = keys.one_of("parallelism.pp_engine", "afab", ("afab", "1f1b"))
    overlap = keys.take("parallelism.tp_linear_async_communication", False)
    if training["pp_size"] > 1:
        if engine == "1f1b" and training.get("gradient_accumulation_steps", 1) < training["pp_size"]:
            # nanotron's runs with fewer micro-batches, in the order that afab has.
            keys.note("parallelism.pp_engine", "afab: with fewer micro-batches than stages 1f1b gains nothing")
            engine = "afab"
        training["pp_schedule"] = engine
    if training["tp_size"] > 1:
        training["sequence_parallel"] = mode == "REDUCE_SCATTER"
        if overlap and training["sequence_parallel"]:
            training["tp_overlap"] = True
        elif overlap:
            keys.note(
                "parallelism.tp_linear_async_communication", "tp_overlap needs sequence_parallel (REDUCE_SCATTER)"
            )
    if keys.take("parallelism.recompute_layer", False):
        training["activation_checkpointing"] = True


def _uploads(keys: Keys, training: dict[str, Any]) -> None:
    removed = keys.take("s3_upload.remove_after_upload")
    if "remote_checkpoints" in training and removed is False:
        training["remote_keep_local"] = 10**6  # all of them


def _weights(
    keys: Keys, config: dict[str, Any], initial: str | None
) -> tuple[dict[str, Any], list[str], int, dict[str, int]]:
    """The section `model`, commands that come first, the step of a checkpoint, and samples of its stages."""
    resumed = keys.take("checkpoints.resume_checkpoint_path")
    source = initial if resumed is None else str(resumed)
    if resumed is None:  # they are of a resumed run
        keys.take("checkpoints.load_optimizer")
        keys.take("checkpoints.load_lr_scheduler")
    if source is None:
        return {"config": config}, [], 0, {}
    key = "model.init_method.path" if resumed is None else "checkpoints.resume_checkpoint_path"
    if resumed is not None and initial is not None:
        keys.note("model.init_method.path", "the weights are those of resume_checkpoint_path")
    command = f"hf-nanotron convert nanotron-to-hub {source} {source.rstrip('/')}-hub"
    metadata = _metadata(Path(source))
    if resumed is not None and metadata is None:
        keys.note(
            key,
            "no checkpoint was found there, so that the run begins with fresh weights. If there is one, "
            + ("copy it into a folder, name that, " if "://" in source else f"run {command}, ")
            + "and convert this file again where it can be read",
        )
        return {"config": config}, [], 0, {}
    keys.note(key, "weights are converted first, by the command above; moments of the optimizer are not")
    goes_on = resumed is not None and keys.take("checkpoints.load_lr_scheduler", True)
    step, consumed = (int(metadata["last_train_step"]), _consumed(metadata)) if metadata and goes_on else (0, {})
    return {"name_or_path": f"{source.rstrip('/')}-hub"}, [command], step, consumed


def _metadata(folder: Path) -> dict[str, Any] | None:
    """What a checkpoint says of its run; None if there is none in the folder."""
    latest = folder / "latest.txt"
    try:
        step = folder / latest.read_text().strip() if latest.is_file() else folder
        path = step / "checkpoint_metadata.json"
        if not path.is_file():
            return None
        found = json.loads(path.read_bytes())["metas"]
        return {"last_train_step": int(found["last_train_step"]), "data_stages": list(found.get("data_stages") or [])}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{folder}: its checkpoint_metadata.json cannot be read ({type(error).__name__}).") from error


def _consumed(metadata: dict[str, Any]) -> dict[str, int]:
    return {str(stage["name"]): int(stage["consumed_train_samples"]) for stage in metadata["data_stages"]}


def _vocabulary(keys: Keys, model: dict[str, Any], data: Found, training: dict[str, Any]) -> None:
    divisor = keys.number("model.make_vocab_size_divisible_by", 1) * training["tp_size"]
    size = model.get("config", {}).get("vocab_size")
    if size == -1:  # that of the tokenizer of the data
        del model["config"]["vocab_size"]
    elif size is not None and size % divisor:
        keys.note("model.make_vocab_size_divisible_by", f"the vocabulary of {size} ids is not padded")


def _dtype(keys: Keys, training: dict[str, Any]) -> None:
    dtype = keys.take("model.dtype", "bfloat16")
    if dtype == "bfloat16":
        training["bf16"] = True
    elif dtype != "float32":
        keys.note("model.dtype", "trains in float32; bf16: true is the other choice")


# ---- YAML ----


class _Dumper(yaml.SafeDumper):
    """Texts in quotes where they could be read as anything else."""


def _text(dumper: _Dumper, value: str) -> yaml.Node:
    is_plain = re.fullmatch(r"[A-Za-z_./][\w./\-]*", value) and value.lower() not in (
        "true",
        "false",
        "null",
        "yes",
        "no",
    )
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if is_plain else '"')


_Dumper.add_representer(str, _text)


def dump(settings: dict[str, Any]) -> str:
    """As YAML, in the order of the keys."""
    return str(yaml.dump(settings, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120))


def _told(title: str, lines: list[str]) -> list[str]:
    return [f"{title}:", *(f"  {line}" for line in lines), ""] if lines else []
