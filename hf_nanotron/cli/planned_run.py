"""The run that `hf-nanotron plan` plans: a YAML file or a model's name becomes a `Job`, a plan a YAML file."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoConfig, PretrainedConfig

from ..parallel.config import ParallelConfig
from ..plan.job import Job, parallel_config
from ..plan.layouts import DECIDED
from ..plan.make import NODE
from ..plan.result import Plan
from ..plan.table import share
from ..redaction import redacted
from ..training_args import NanotronTrainingArguments
from ..version import __version__
from .errors import existing_model, existing_path, explained
from .launch_job import check_model
from .model_config import changed_config, make_config
from .settings import Settings, read_settings, sections_of

# Of a run without a file: one row at a time, in bf16.
FRESH = {"output_dir": "out", "bf16": True, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
FRESH_DATA = {"path": "corpus.jsonl", "text_column": "text"}


@dataclass(frozen=True)
class PlannedRun:
    """What is planned.

    Args:
        settings: the sections of its file.
        tokenizer: its name, if it has one.
        job: the model, the training and the GPUs.
        rows: of an optimizer step.
        steps: optimizer steps; None where their number depends on the data.
    """

    settings: Settings
    tokenizer: str | None
    job: Job
    rows: int
    steps: int | None


def planned_run(args: argparse.Namespace, needs_layout: bool) -> PlannedRun:
    """The run that the command line `args` means.

    Args:
        needs_layout: whether it is planned in its own layout, which then has to fit the number of GPUs.

    Raises:
        ValueError: for sizes and batches that do not go together, and for what the file needs and does not say.
    """
    overrides = [f"--{key}={value}" for key, value in args.set]
    if args.config is not None:
        settings, tokenizer = read_settings(args.config, overrides)
        config = _config_of(settings["model"], tokenizer)
    else:
        config = _named_config(args.model)
        fresh: dict[str, dict[str, Any]] = {
            "model": {"name_or_path": args.model},
            "training": dict(FRESH),
            "dataset": dict(FRESH_DATA),
        }
        if Path(args.model).is_file():
            fresh["model"] = {"config": {"model_type": config.model_type, **_changed_fields(config)}}
        settings, tokenizer = sections_of(fresh, "the command line", overrides)
        tokenizer = tokenizer or (None if Path(args.model).is_file() else args.model)
    length = _sequence_length(args, settings)
    if args.config is None or "sequence_length" in settings["dataset"]:
        settings["dataset"]["sequence_length"] = length
    training = {key: value for key, value in settings["training"].items() if key not in ("output_dir", "max_dp_size")}
    _check_dp_size(args, settings["training"], needs_layout)
    job = Job(config, _without_secrets(training), args.gpus, gpus_per_node(args), length, _documents(args, length))
    if args.tokens_per_step is not None:
        job = _with_tokens(job, args.tokens_per_step, needs_layout)
        rows = args.tokens_per_step // length
    else:
        rows = job.tokens_per_step // length  # refuses a layout that the GPUs do not have
    steps = settings["training"].get("max_steps")
    return PlannedRun(settings, tokenizer, job, rows, steps if isinstance(steps, int) and steps > 0 else None)


def _check_dp_size(args: argparse.Namespace, training: dict[str, Any], needs_layout: bool) -> None:
    """Refuse `max_dp_size` in a search, and GPUs of which it would leave some, or that shrink the layout."""
    if (most := training.get("max_dp_size")) is None:
        return
    if not needs_layout:
        raise ValueError(f"--search with training.max_dp_size={most}: the search finds that size; leave it out.")
    with explained("training"):
        checked = NanotronTrainingArguments.of_job(args.gpus, **training)
    size = checked.full_dp_size * checked.parallel.model_parallel_size
    if size != args.gpus:
        raise ValueError(
            f"training.max_dp_size={most} trains on {size} GPUs, not {args.gpus}: plan with --gpus {size}, without its "
            "spares; or leave it out, with the gradient_accumulation_steps of fewer ranks."
        )


def check_run(run: PlannedRun, searched: bool) -> None:
    """Refuse what the trainer would refuse of the arguments and sizes of a run, before anything is searched or run.

    Args:
        searched: whether its layout is to be found, so that sizes in the file do not count.

    Raises:
        ValueError: in the trainer's words.
    """
    job = run.job
    sizes = [entry.name for entry in fields(ParallelConfig)] if searched else []
    arguments = {name: value for name, value in job.arguments.items() if name not in sizes}
    with explained("training"):
        checked = NanotronTrainingArguments.of_job(job.world_size, output_dir="out", **arguments)
    if not searched:
        check_model(job.config, checked, job.world_size, job.gpus_per_node)


def gpus_per_node(args: argparse.Namespace) -> int:
    """GPUs of a node, from --gpus and --nodes.

    Raises:
        ValueError: if there are not as many on every node.
    """
    if args.nodes is None:
        if args.gpus > NODE and args.gpus % NODE:
            raise ValueError(
                f"--gpus {args.gpus} is no multiple of {NODE}, the GPUs of a node; give --nodes, or another number."
            )
        return int(min(args.gpus, NODE))
    if args.gpus % args.nodes:
        raise ValueError(
            f"--nodes {args.nodes} does not divide --gpus {args.gpus}; every node has as many, so --gpus must be a "
            "multiple of it."
        )
    return int(args.gpus // args.nodes)


def write_run(path: Path, run: PlannedRun, plan: Plan) -> str:
    """Write the run in the layout of a plan, and say so in a sentence. Secrets of the file are left out.

    Raises:
        FileExistsError: if there is such a file.
    """
    layout = {name: value for name, value in plan.job.arguments.items() if name in DECIDED}
    if plan.steps is not None:
        layout["max_steps"] = plan.steps
    training = {name: value for name, value in run.settings["training"].items() if name not in DECIDED} | layout
    sections = {**run.settings, "training": training}
    public = {name: _without_secrets(section) for name, section in sections.items() if section}
    left_out = [
        f"{name}.{key}" for name, section in sections.items() for key in section if key not in public.get(name, section)
    ]
    if run.tokenizer is not None:
        named: dict[str, Any] = {"model": public.pop("model"), "tokenizer": run.tokenizer}
        public = named | public
    job = plan.job
    head = [
        f"# By hf-nanotron plan {__version__}: {job.world_size} {plan.gpu.name}, {job.world_size // job.gpus_per_node} "
        f"x {job.gpus_per_node}.",
        f"# {job.tokens_per_step:,} tokens a step, {plan.step_seconds:.3g} s a step, MFU {share(plan.mfu)}, "
        f"{plan.peak_memory_gib:.1f} GiB on the fullest rank.",
        *(f"# Left out, since it may be a secret: {name}" for name in left_out),
    ]
    text = "\n".join(head) + "\n" + yaml.safe_dump(_plain(public), sort_keys=False, allow_unicode=True)
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
    return f"{path} has the run in this layout" + ("" if not left_out else f", without {', '.join(left_out)}")


def _config_of(model: dict[str, Any], tokenizer: str | None) -> PretrainedConfig:
    """The config of the section `model`; nothing but it is read of a model with weights."""
    name, fields = model.get("name_or_path"), model.get("config")
    if name is not None and fields is not None or name is None and fields is None:
        raise ValueError("model needs either name_or_path (existing weights) or config (random weights).")
    if fields is not None:
        known = None if tokenizer is None or "vocab_size" in fields else _tokenizer(tokenizer)
        return make_config(fields, known)
    assert name is not None
    source = {"revision": model["revision"]} if model.get("revision") is not None else {}
    if overrides := model.get("config_overrides"):
        name = existing_model("model.name_or_path", name)
        with explained(f"the config of model.name_or_path={name!r} cannot be loaded"):
            return changed_config(name, overrides, **source)
    return _named_config(name, "model.name_or_path=", **source)


def _named_config(name: str, option: str = "--model ", **source: Any) -> PretrainedConfig:
    name = existing_path(option.strip(" ="), name, "folder or config.json")
    with explained(f"{option}{name!r}: its config cannot be loaded"):
        return AutoConfig.from_pretrained(name, **source)


def _tokenizer(name: str) -> Any:
    from .train import load_tokenizer

    try:
        return load_tokenizer(name)
    except ValueError as error:
        raise ValueError(
            f"{str(error).rstrip('.')}; it says the size of the vocabulary: without it, give "
            "--set model.config.vocab_size N."
        ) from error


def _sequence_length(args: argparse.Namespace, settings: Settings) -> int:
    length = args.sequence_length
    if length is None:
        length = settings["dataset"].get("sequence_length")
    if length is None:
        raise ValueError(
            "the tokens of a row are not known: " + ("dataset.sequence_length is not set; " if args.config else "")
            + "give --sequence-length."
        )  # fmt: skip
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        raise ValueError(f"a row of {length!r} tokens: its length must be an integer of at least 1.")
    return length


def _documents(args: argparse.Namespace, length: int) -> tuple[int, ...] | None:
    """Equal documents that fill a row, with a shorter one at its end."""
    each = args.document_length
    if each is None or each >= length:
        return None
    full, rest = divmod(length, each)
    return (each,) * full + ((rest,) if rest else ())


def _with_tokens(job: Job, tokens: int, needs_layout: bool) -> Job:
    """The job with as many tokens in a step, by the number of micro-batches."""
    length = job.sequence_length
    if tokens % length:
        below = tokens // length * length
        raise ValueError(
            f"--tokens-per-step {tokens} is no multiple of the {length} tokens of a row; give "
            f"{f'{below} or ' if below else ''}{below + length}."
        )
    if not needs_layout:
        return job
    rows = parallel_config(job).dp_size(job.world_size) * job.samples
    if tokens // length % rows:
        step = rows * length
        below = tokens // step * step
        raise ValueError(
            f"--tokens-per-step {tokens} is no multiple of {step}, the tokens of one micro-batch of all data-parallel "
            f"ranks ({rows} rows of {length}); give {f'{below} or ' if below else ''}{below + step}, or --search."
        )
    return replace(job, arguments={**job.arguments, "gradient_accumulation_steps": tokens // length // rows})


def _changed_fields(config: PretrainedConfig) -> dict[str, Any]:
    """What a config says that its class does not say by itself, as `model.config` takes it."""
    fields = config.to_diff_dict()
    own = ("model_type", "transformers_version", "architectures", "dtype", "torch_dtype", "_name_or_path")
    return {name: value for name, value in fields.items() if name not in own}


def _without_secrets(section: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in section.items() if redacted(name, value) == value}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
