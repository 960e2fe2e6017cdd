"""The job of `hf-nanotron launch`: its run is refused here if `hf-nanotron train` would refuse it on the nodes."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from ..checkpoint.directory.verify import check
from ..launch.job import Environment, Job
from ..models.sharding.parallelize import parallelize
from ..parallel.mesh import ParallelMesh
from ..plan.fake_world import fake_world
from ..redaction import hide, holds_secret, printable, secrets_of
from ..training.beginnings import AUTO, named_beginning
from ..training_args import NanotronTrainingArguments
from ..version import __version__
from .errors import existing_model, explained
from .model_config import changed_config, make_config
from .settings import SECTIONS, Settings, check_complete, read_settings
from .train import check_model_section, load_tokenizer

SAVE_SECONDS = 120.0  # of a file that does not say save_on_signal
NEVER_WRITTEN = (
    "which is never written into a file; use an environment variable such as HF_TOKEN, and give its name with --secret"
)


def read_job(args: argparse.Namespace, processes: int, resumes: bool, may_save: bool) -> Job:
    """The job that the command line describes.

    Args:
        processes: on each node.
        resumes: whether it may be started again, and goes on then.
        may_save: whether it is told before it ends.

    Raises:
        ValueError: with the sentence of `hf-nanotron train` if it would refuse the file on so many processes; for a
            secret in the file or the command line; for a run that cannot be resumed but would be.
    """
    workdir = (args.chdir or Path()).absolute()
    if not workdir.is_dir():
        raise ValueError(f"--chdir {args.chdir} is not a folder.")
    pairs = ([f"--{key}={value}"] if value.startswith("--") else [f"--{key}", value] for key, value in args.set)
    overrides = [part for pair in pairs for part in pair] + _keys(args)
    settings, tokenizer = read_settings(args.config, overrides)
    _refuse_secrets(args, settings)
    check_complete(settings)
    training = settings["training"]
    with explained("training"):
        checked = NanotronTrainingArguments.of_job(args.nodes * processes, **training)
    with contextlib.chdir(workdir):  # where the paths of the file begin
        config = _model_config(args.kind, settings["model"], tokenizer, checked)
    if config is not None:
        check_model(config, checked, checked.processes_that_train(args.nodes * processes), processes)
    output_dir = str(checked.output_dir)
    begins_at = None
    if resumes:
        _check_resumable(checked)
        named = training.get("resume_from_checkpoint")
        if isinstance(named, str) and not named.startswith(AUTO):
            named = f"{AUTO}:{named}"
        with contextlib.chdir(workdir):
            begins_at = named_beginning(named, output_dir)
        if begins_at is not None and args.kind == "slurm" and args.container is None:
            check(workdir / begins_at, deep=False)
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
        begins_at=begins_at,
        max_restarts=args.max_restarts,
        min_nodes=_min_nodes(args, checked, processes),
    )


# ---- the run ----


def _model_config(
    kind: str, section: dict[str, Any], tokenizer: str | None, checked: NanotronTrainingArguments
) -> PreTrainedConfig | None:
    """Of the model; None where only the machines that are rented can read it."""
    check_model_section(section, checked)
    if (name := section.get("name_or_path")) is not None:
        if kind != "slurm" and os.path.isabs(name):
            return None
        name = existing_model("model.name_or_path", name)
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


def _min_nodes(args: argparse.Namespace, checked: NanotronTrainingArguments, processes: int) -> int:
    """Of a job that goes on where nodes are lost.

    Raises:
        ValueError: if it could not: without restarts, without `max_dp_size`, or with too few processes.
    """
    least = args.nodes if args.min_nodes is None else args.min_nodes
    if least == args.nodes:
        return int(args.nodes)
    if least > args.nodes:
        raise ValueError(f"--min-nodes {least} is more than --nodes {args.nodes}.")
    if not args.max_restarts:
        raise ValueError(f"--min-nodes {least} needs --max-restarts, such as 100: torchrun starts the ranks anew.")
    if checked.max_dp_size is None:
        raise ValueError(
            f"--min-nodes {least} needs training.max_dp_size: without it the samples of a step would change with the "
            "number of nodes."
        )
    with explained(f"--min-nodes {least}"):
        checked.processes_that_train(least * processes)
    return int(least)


def _check_resumable(checked: NanotronTrainingArguments) -> None:
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


def _keys(args: argparse.Namespace) -> list[str]:
    """What follows the file, as for `train`. A key that only an option of this command is like is a slip."""
    own = set(vars(args)) - {"config", "run", "takes_keys", "overrides", "explains", "kind"}
    for word in args.overrides:
        name = word.lstrip("-").partition("=")[0].replace("-", "_")
        near = difflib.get_close_matches(name, own, 1, 0.8)
        if word.startswith("-") and "." not in name and name not in SECTIONS["training"] and near:
            raise ValueError(f"unrecognized argument {word}; did you mean --{near[0].replace('_', '-')}?")
    return list(args.overrides)


def _refuse_secrets(args: argparse.Namespace, settings: Settings) -> None:
    """In the command line, the file and what they say together."""
    known = tuple(secrets_of(os.environ))
    for key, value in args.set:
        if holds_secret(value, key, known):
            raise ValueError(f"--set {printable(key)} holds a secret, {NEVER_WRITTEN}.")
    for name, value in vars(args).items():
        if name in ("env", "setup"):  # `Environment` looks at their names and shapes
            found = any(hide(text, known) != text for text in value)
        else:
            found = name not in ("set", "secret", "overrides") and holds_secret(value, known=known)
        if found:
            raise ValueError(f"--{name.replace('_', '-')} holds a secret, {NEVER_WRITTEN}.")
    text = args.config.read_text(encoding="utf-8-sig")
    if holds_secret(text, known=known):
        raise ValueError(f"{args.config} holds what looks like a secret, and its text is copied: {NEVER_WRITTEN}.")
    if holds_secret(settings, known=known) or holds_secret(args.overrides, known=known):
        raise ValueError(f"{args.config} or what overrides it holds what looks like a secret, {NEVER_WRITTEN}.")


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
