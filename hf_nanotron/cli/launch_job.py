"""The job of `hf-nanotron launch`: its run is refused here if `hf-nanotron train` would refuse it on the nodes."""

from __future__ import annotations

import argparse
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from ..launch.job import Environment, Job
from ..models.sharding.parallelize import parallelize
from ..parallel.mesh import ParallelMesh
from ..plan.fake_world import fake_world
from ..redaction import is_secret, printable, redacted
from ..training_args import NanotronTrainingArguments
from ..version import __version__
from .errors import existing_path, explained
from .model_config import changed_config, make_config
from .settings import check_complete, read_settings
from .train import load_tokenizer

SAVE_SECONDS = 120.0  # of a file that does not say save_on_signal


def read_job(args: argparse.Namespace, processes: int, resumes: bool, may_save: bool) -> Job:
    """The job that the command line describes.

    Args:
        processes: on each node.
        resumes: whether it may be started again, and goes on then.
        may_save: whether it is told before it ends.

    Raises:
        ValueError: with the sentence of `hf-nanotron train` if it would refuse the file on so many processes; for a
            secret in the file or the overrides; for a run that cannot be resumed but would be.
    """
    overrides = [part for key, value in args.set for part in (f"--{key}", value)]
    settings, tokenizer = read_settings(args.config, overrides)
    _refuse_secrets(args.config, redacted("", settings) is not settings, args.set)
    check_complete(settings)
    training = settings["training"]
    with explained("training"):
        checked = NanotronTrainingArguments.of_job(args.nodes * processes, **training)
    config = _model_config(args.kind, settings["model"], tokenizer)
    if config is not None:
        check_model(config, checked, args.nodes * processes, processes)
    if resumes:
        _check_resumable(training.get("resume_from_checkpoint"), checked)
    output_dir = str(checked.output_dir)
    workdir = (args.chdir or Path()).absolute()
    if args.chdir is not None and not workdir.is_dir():
        raise ValueError(f"--chdir {args.chdir} is not a folder.")
    if args.kind != "slurm" and args.folder is None and Path(output_dir).is_absolute():
        raise ValueError(
            f"output_dir={output_dir!r} is a folder of the machines that are rented; say with --folder where the job's "
            "files go on this one."
        )
    return Job(
        name=_name(args.name, output_dir),
        config=args.config.read_text(encoding="utf-8-sig"),
        overrides=tuple(overrides),
        output_dir=output_dir,
        folder=(args.folder or workdir / output_dir / "launch").absolute(),
        workdir=workdir,
        nodes=args.nodes,
        processes=processes,
        on_cpu=bool(checked.use_cpu),
        environment=_environment(args),
        port=args.port,
        save_seconds=_save_seconds(args.save_seconds, checked.save_on_signal, resumes) if may_save else 0.0,
        chain=args.chain or 1,
        resumes=resumes,
        version=__version__,
    )


# ---- the run ----


def _model_config(kind: str, section: dict[str, Any], tokenizer: str | None) -> PreTrainedConfig | None:
    """Of the model; None where only the machines that are rented can read it."""
    if (name := section.get("name_or_path")) is not None:
        if kind != "slurm" and os.path.isabs(name):
            return None
        name = existing_path("model.name_or_path", name, "folder")
        source = {"revision": section["revision"]} if "revision" in section else {}
        with explained(f"model.name_or_path={name!r} cannot be loaded"):
            if overrides := section.get("config_overrides"):
                return changed_config(name, overrides, **source)
            return AutoConfig.from_pretrained(name, **source)
    if tokenizer is not None and kind != "slurm" and os.path.isabs(tokenizer):
        return None
    return make_config(section["config"], load_tokenizer(tokenizer))


def check_model(
    config: PreTrainedConfig, args: NanotronTrainingArguments, world_size: int, processes_per_node: int
) -> None:
    """Shard the model, without weights, as the first rank of the job would.

    Raises:
        ValueError: as there: for sizes that do not fit the model, and models that cannot be sharded.
    """
    with explained("model"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    before = dict(os.environ)
    try:
        with fake_world(0, world_size, processes_per_node), warnings.catch_warnings(action="ignore"):
            parallelize(model, ParallelMesh(args.parallel))
    finally:  # accelerate sets variables for the ranks of a node, which a job is not to take from here
        os.environ.clear()
        os.environ.update(before)


def _check_resumable(named: Any, checked: NanotronTrainingArguments) -> None:
    if str(getattr(checked.save_strategy, "value", checked.save_strategy)) == "no":
        raise ValueError(
            "training.save_strategy='no': a job that is started again, or comes after another, has nothing to go on "
            "from. Use save_strategy: steps, or with Slurm --no-requeue without --chain."
        )
    if checked.save_only_model:
        raise ValueError(
            "training.save_only_model=True: a job that is started again, or comes after another, cannot go on from "
            "weights alone. Leave it out, or use with Slurm --no-requeue without --chain."
        )
    if named not in (None, True, False, "true", "auto"):
        raise ValueError(
            f"training.resume_from_checkpoint={named!r}: a job that is started again, or comes after another, goes on "
            "from the newest checkpoint of its own run. Use auto, or with Slurm --no-requeue without --chain."
        )


def _save_seconds(asked: float | None, of_file: float, resumes: bool) -> float:
    if asked is not None and not 0 < asked < 86400:
        raise ValueError(f"--save-seconds {asked:g} must be above 0, and below a day.")
    return float(asked or of_file or SAVE_SECONDS * resumes)


def check_output(args: argparse.Namespace, job: Job, mounted: Sequence[str]) -> None:
    """Refuse a run whose checkpoints are gone with its machines.

    Args:
        mounted: paths on the machines that stay.
    """
    training = read_settings(args.config, job.overrides)[0]["training"]
    if training.get("remote_checkpoints") or (training.get("push_to_hub") and not job.resumes):
        return
    if not any(Path(job.output_dir).is_relative_to(path) for path in mounted):
        raise ValueError(
            f"output_dir={job.output_dir!r} is on the disk of a machine that is gone after the job; set "
            "remote_checkpoints, or --mount a bucket and put output_dir there."
        )


# ---- the environment ----


def _refuse_secrets(path: Path, in_file: bool, overrides: Sequence[Sequence[str]]) -> None:
    for key, value in overrides:
        if is_secret(key) or printable(value) != value:
            raise ValueError(
                f"--set {printable(key)} holds a secret, which is never written into a file; use an environment "
                "variable such as HF_TOKEN, and give its name with --secret."
            )
    text = path.read_text(encoding="utf-8-sig")
    if in_file or printable(text) != text:
        raise ValueError(
            f"{path} holds what looks like a secret, and its text would be copied into the job's files; use an "
            "environment variable such as HF_TOKEN, and give its name with --secret."
        )


def _name(given: str | None, output_dir: str) -> str:
    name = given or re.sub(r"[^A-Za-z0-9_.\-]+", "-", Path(output_dir).absolute().name).strip("-.") or "training"
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*", name):
        raise ValueError(f"--name {name!r} must have letters, digits, '-', '_' and '.' alone.")
    return name


def _environment(args: argparse.Namespace) -> Environment:
    variables = {}
    for text in args.env:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--env {name!r} is not NAME=VALUE; --secret is for a value of this environment.")
        variables[name] = value
    brings_python = args.kind != "slurm" or args.venv or args.conda or args.container
    return Environment(
        python=args.python or ("python" if brings_python else sys.executable),
        venv=None if args.venv is None else os.path.abspath(args.venv) if args.kind == "slurm" else args.venv,
        conda=args.conda,
        modules=tuple(args.module),
        setup=tuple(args.setup),
        variables=variables,
        secrets=tuple(dict.fromkeys(args.secret)),
        container=args.container,
        mounts=tuple(args.mount),
    )


def require_secrets(job: Job) -> None:
    """Raises ValueError for one that is not set here, where the job is submitted."""
    for name in job.environment.secrets:
        if not os.environ.get(name):
            raise ValueError(f"{name}, which --secret names, is not set in this environment.")
