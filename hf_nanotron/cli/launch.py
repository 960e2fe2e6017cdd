"""`hf-nanotron launch`: a run becomes a job of Slurm, of HF Jobs or of SkyPilot."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..launch.job import Job

DESCRIPTION = """\
Write the files of a job that trains as CONFIG.yaml says on several nodes, and with --submit submit it:

  hf-nanotron launch --slurm CONFIG.yaml --nodes 16 --time 24:00:00 --partition gpu --submit --max_steps 20000
  hf-nanotron launch --hf-jobs CONFIG.yaml --nodes 2 --flavor h200x8 --image pytorch/pytorch --secret HF_TOKEN
  hf-nanotron launch --skypilot CONFIG.yaml --nodes 2 --accelerator H100

After CONFIG.yaml, keys override the file, as with `hf-nanotron train`: --max_steps 20000, --model.name_or_path PATH.
The files are put into OUTPUT_DIR/launch. Sizes, keys and models that `hf-nanotron train` would refuse on so many
processes are refused here, with the same sentence. Before its time limit a job of Slurm saves, is queued again, and
goes on.

--template FILE takes the place of the job's template; --print-template shows ours. A template that begins with
{% extends "slurm.sh.j2" %} replaces blocks alone."""

KINDS = ("slurm", "hf_jobs", "skypilot")
# Options that one or two of the kinds take; the others refuse them.
ONLY_FOR = {
    ("slurm",): (
        "partition account qos constraint exclusive cpus_per_node sbatch requeue save_seconds chain module "
        "container container_runtime conda min_nodes"
    ),
    ("hf_jobs",): "flavor image namespace attempts",
    ("skypilot",): "accelerator resource image_id",
    ("slurm", "hf_jobs"): "time",
    ("slurm", "skypilot"): "venv",
}


def add_launch_arguments(parser: argparse.ArgumentParser) -> None:
    """The parsed arguments get `run`, which takes them."""
    kinds = parser.add_mutually_exclusive_group(required=True)
    for kind, what in zip(KINDS, ("Slurm", "HF Jobs", "SkyPilot"), strict=True):
        kinds.add_argument(
            f"--{kind.replace('_', '-')}", dest="kind", action="store_const", const=kind, help=f"a job of {what}"
        )
    parser.add_argument("config", type=Path, nargs="?", metavar="CONFIG.yaml", help="of hf-nanotron train")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="machines (default: %(default)s)")
    parser.add_argument(
        "--gpus-per-node",
        type=int,
        metavar="N",
        help="processes on each node, one for each GPU (default: 8, or those of --flavor). With use_cpu=true in the "
        "file no GPU is asked for",
    )
    parser.add_argument(
        "--set",
        nargs=2,
        action="append",
        default=[],
        metavar=("KEY", "VALUE"),
        help="override a key; the same as --KEY VALUE, also where an option of this command has the name",
    )
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=0,
        metavar="N",
        help="times that torchrun starts the ranks anew after a failure, without the job ending (default: %(default)s)",
    )
    parser.add_argument("--time", help="time limit: of sbatch, such as 24:00:00, or of HF Jobs, such as 24h")
    files = parser.add_argument_group("files")
    files.add_argument("--name", help="of the job (default: the name of output_dir)")
    files.add_argument("--folder", type=Path, metavar="DIR", help="for the files (default: OUTPUT_DIR/launch)")
    files.add_argument("--overwrite", action="store_true", help="replace the files of an earlier launch")
    files.add_argument("--submit", action="store_true", help="submit the job, too")
    files.add_argument("--template", type=Path, metavar="FILE", help="of the job, in place of ours (Jinja)")
    files.add_argument("--print-template", action="store_true", help="print our template, and do nothing else")
    where = parser.add_argument_group("environment on the nodes")
    where.add_argument("--chdir", type=Path, metavar="DIR", help="where the run starts (default: here)")
    where.add_argument("--python", metavar="PATH", help="interpreter (default with Slurm: the one that runs this)")
    where.add_argument("--venv", metavar="DIR", help="virtual environment to activate")
    where.add_argument("--conda", metavar="ENV", help="conda environment to activate")
    where.add_argument("--module", action="append", default=[], metavar="NAME", help="module to load; repeatable")
    where.add_argument("--setup", action="append", default=[], metavar="LINE", help="line of shell to run; repeatable")
    where.add_argument(
        "--env", action="append", default=[], metavar="NAME=VALUE", help="variable, such as NCCL_DEBUG=INFO; repeatable"
    )
    where.add_argument(
        "--secret",
        action="append",
        default=[],
        metavar="NAME",
        help="variable whose value is taken from the environment at submission, and written nowhere; repeatable",
    )
    where.add_argument("--container", metavar="IMAGE", help="run nodes of Slurm in this container")
    where.add_argument(
        "--container-runtime", choices=("pyxis", "apptainer"), help="of --container with Slurm (default: pyxis)"
    )
    where.add_argument(
        "--mount",
        action="append",
        default=[],
        metavar="SOURCE:TARGET",
        help="into the container, or the machines: a folder, hf://buckets/NAME/BUCKET with HF Jobs, a bucket's URL "
        "with SkyPilot; repeatable",
    )
    where.add_argument(
        "--port", type=int, metavar="N", help="of the rendezvous (default with Slurm: by the job's number)"
    )
    slurm = parser.add_argument_group("Slurm")
    for name in ("partition", "account", "qos", "constraint"):
        slurm.add_argument(f"--{name}", metavar="TEXT", help="as sbatch takes it")
    slurm.add_argument(
        "--exclusive", action=argparse.BooleanOptionalAction, help="do not share nodes with other jobs (default: yes)"
    )
    slurm.add_argument("--cpus-per-node", type=int, metavar="N", help="cores of a node")
    slurm.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="another option, such as mail-type=END"
    )
    slurm.add_argument(
        "--min-nodes",
        type=int,
        metavar="N",
        help="go on with as few when nodes are lost, with --max-restarts and training.max_dp_size (default: --nodes)",
    )
    slurm.add_argument("--chain", type=int, metavar="N", help="jobs, each after the one before (default: 1)")
    slurm.add_argument(
        "--requeue",
        action=argparse.BooleanOptionalAction,
        help="queue the job again before its time is over, and when a node fails (default: yes)",
    )
    slurm.add_argument(
        "--save-seconds",
        type=float,
        metavar="S",
        help="for a save before the time limit (default: save_on_signal of the file, or 120)",
    )
    hub = parser.add_argument_group("HF Jobs")
    hub.add_argument("--flavor", metavar="NAME", help="hardware of a node, such as h200x8")
    hub.add_argument("--image", metavar="IMAGE", help="Docker image, with torch or with what --setup needs")
    hub.add_argument("--namespace", metavar="NAME", help="user or organization that pays (default: you)")
    hub.add_argument("--attempts", type=int, metavar="N", help="starts of a job that fails, the first included")
    sky = parser.add_argument_group("SkyPilot")
    sky.add_argument("--accelerator", metavar="NAME", help="GPU, such as H100")
    sky.add_argument("--image-id", metavar="IMAGE", help="image, such as docker:pytorch/pytorch")
    sky.add_argument(
        "--resource", action="append", default=[], metavar="KEY=VALUE", help="such as use_spot=true; repeatable"
    )
    parser.set_defaults(run=_launch, takes_keys=True)


def _launch(args: argparse.Namespace) -> None:
    if args.print_template:
        from ..launch.rendering import template_text

        print(template_text(_module(args.kind).TEMPLATE), end="")
        return
    _check_options(args)
    if args.kind == "slurm":
        _launch_slurm(args)
    elif args.kind == "hf_jobs":
        _launch_hf_jobs(args)
    else:
        _launch_skypilot(args)


def _module(kind: str) -> Any:
    from ..launch import hf_jobs, skypilot, slurm

    return {"slurm": slurm, "hf_jobs": hf_jobs, "skypilot": skypilot}[kind]


def _check_options(args: argparse.Namespace) -> None:
    if args.config is None:
        raise ValueError("CONFIG.yaml is missing: which run is to be launched?")
    if args.overrides and not args.config.is_file():
        raise ValueError(f"file not found: {args.config} (keys such as {args.overrides[0]} come after CONFIG.yaml).")
    for kinds, names in ONLY_FOR.items():
        for name in names.split():
            if args.kind not in kinds and getattr(args, name) not in (None, []):
                flags = " and ".join(f"--{kind.replace('_', '-')}" for kind in kinds)
                raise ValueError(f"--{name.replace('_', '-')} is for {flags}, not for --{args.kind.replace('_', '-')}.")
    if args.max_restarts < 0:
        raise ValueError(f"--max-restarts {args.max_restarts} must be at least 0.")
    for name in ("nodes", "min_nodes", "gpus_per_node", "chain", "attempts", "port"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be at least 1.")
    if args.port is not None and args.port > 65535:
        raise ValueError(f"--port {args.port} must be at most 65535.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("hf-nanotron launch runs once, not under torchrun: it writes the job that starts torchrun.")


# ---- kinds ----


def _launch_slurm(args: argparse.Namespace) -> None:
    from ..launch import slurm
    from ..launch.files import write_files
    from .launch_job import read_job, require_secrets

    requeue = args.requeue is not False
    resumes = requeue or (args.chain or 1) > 1 or args.max_restarts > 0
    job = read_job(args, args.gpus_per_node or 8, resumes, may_save=True)
    options = slurm.SlurmOptions(
        partition=args.partition,
        account=args.account,
        qos=args.qos,
        constraint=args.constraint,
        time=args.time,
        exclusive=args.exclusive is not False,
        cpus_per_node=args.cpus_per_node,
        extra=tuple(args.sbatch),
        requeue=requeue,
        runtime=args.container_runtime or slurm.RUNTIMES[0],
    )
    slurm.check(job, options)
    if job.environment.venv is not None and not Path(job.environment.venv, "bin", "activate").is_file():
        raise ValueError(f"--venv {args.venv} is no virtual environment: it has no bin/activate.")
    if args.submit:
        slurm.require_client()
        require_secrets(job)
    texts = slurm.files(job, options, args.template)
    written = write_files(job.folder, texts, args.overwrite, stale=(slurm.FINISHED,))
    (job.folder / "logs").mkdir(exist_ok=True)
    (job.workdir / job.output_dir).mkdir(parents=True, exist_ok=True)  # a container cannot mount what is not there
    _tell(job, written)
    if args.submit:
        ids = slurm.submit(job)
        print(f"submitted: {' '.join(ids)} (cancel with: scancel {' '.join(ids)}); log: {job.folder}/logs/{ids[0]}.log")
    else:
        print(f"submit with: bash {job.folder}/submit.sh")


def _launch_hf_jobs(args: argparse.Namespace) -> None:
    from ..launch import hf_jobs
    from ..launch.files import write_files
    from .errors import explained
    from .launch_job import check_output, read_job

    for name, example in (("flavor", "h200x8"), ("image", "pytorch/pytorch:2.11.0-cuda13.0-cudnn9-devel")):
        if getattr(args, name) is None:
            raise ValueError(f"--hf-jobs needs --{name}, such as {example}.")
    devices = hf_jobs.devices_of(args.flavor)
    if None not in (devices, args.gpus_per_node) and devices != args.gpus_per_node:
        raise ValueError(f"--flavor {args.flavor} has {devices} GPUs, but --gpus-per-node is {args.gpus_per_node}.")
    job = read_job(
        args,
        args.gpus_per_node or devices or 1,
        resumes=(args.attempts or 1) > 1 or args.max_restarts > 0,
        may_save=False,
    )
    if (devices is None) != job.on_cpu:
        raise ValueError(
            f"--flavor {args.flavor} has {devices or 'no'} GPUs, but training.use_cpu={job.on_cpu}: the run and the "
            "hardware have to go together."
        )
    check_output(args, job, [volume["mount_path"] for volume in hf_jobs.volumes_of(job.environment.mounts)])
    options = hf_jobs.HubOptions(args.image, args.flavor, args.time, args.attempts, args.namespace)
    secrets = hf_jobs.secret_values(job) if args.submit else {}
    _tell(job, write_files(job.folder, hf_jobs.files(job, options, args.template), args.overwrite))
    if args.submit:
        with explained("the job cannot be submitted"):
            addresses = hf_jobs.submit(job, secrets)
        print(f"submitted: {' '.join(addresses)}")
    else:
        print("submit with the same command, --overwrite and --submit")


def _launch_skypilot(args: argparse.Namespace) -> None:
    from ..launch import skypilot
    from ..launch.files import write_files
    from .launch_job import check_output, read_job, require_secrets

    job = read_job(args, args.gpus_per_node or 8, resumes=True, may_save=False)
    if (args.accelerator is None) != job.on_cpu:
        use = "--skypilot needs --accelerator, such as H100" if args.accelerator is None else "leave --accelerator out"
        raise ValueError(f"training.use_cpu={job.on_cpu}: {use}.")
    options = skypilot.SkyOptions(
        args.accelerator,
        args.image_id,
        dict(_resource(text) for text in args.resource),
        None if args.chdir is None else job.workdir,
    )
    check_output(args, job, [text.rpartition(":")[2] for text in args.mount])
    texts = skypilot.files(job, options, args.template)
    if args.submit:
        skypilot.require_client()
        require_secrets(job)
    _tell(job, write_files(job.folder, texts, args.overwrite))
    if args.submit:
        skypilot.submit(job)
    else:
        print(f"submit with: {' '.join(skypilot.command(job))}")


def _resource(text: str) -> tuple[str, Any]:
    from .settings import given_value

    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--resource {text!r} is not KEY=VALUE, such as use_spot=true.")
    return key, given_value(value, f"--resource {key}")


def _tell(job: Job, written: Sequence[Path]) -> None:
    for path in written:
        print(path)
    if job.resumes and any((job.workdir / job.output_dir).glob("checkpoint-*")):
        print(f"{job.output_dir} has checkpoints: the job goes on from the newest one of the run started last.")
