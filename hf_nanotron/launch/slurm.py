"""A run as a job of Slurm: the script, and what submits it and the jobs after it."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .job import MARGIN, Job
from .rendering import render

TEMPLATE = "slurm.sh.j2"
FINISHED = "finished"  # written by the script when the run has ended
SIGNAL_MARGIN = 2 * MARGIN  # seconds between the end of a save and the time limit
EARLY = 60  # seconds by which Slurm may send a signal before its time (`man sbatch`, --signal)
RUNTIMES = ("pyxis", "apptainer")
# Options that the script sets, or that another option of the command is for.
SET = {
    "job-name": "--name", "J": "--name", "nodes": "--nodes", "N": "--nodes", "ntasks": "--gpus-per-node",
    "n": "--gpus-per-node", "ntasks-per-node": "--gpus-per-node", "signal": "--save-seconds", "output": "--folder",
    "o": "--folder", "chdir": "--chdir", "D": "--chdir", "requeue": "--requeue", "no-requeue": "--no-requeue",
    "dependency": "--chain", "d": "--chain", "array": "--chain", "a": "--chain", "time": "--time", "t": "--time",
    "partition": "--partition", "p": "--partition", "account": "--account", "A": "--account", "qos": "--qos",
    "q": "--qos", "constraint": "--constraint", "C": "--constraint", "exclusive": "--exclusive",
    "cpus-per-task": "--cpus-per-node", "c": "--cpus-per-node", "open-mode": "", "parsable": "", "wrap": "",
}  # fmt: skip


@dataclass(frozen=True)
class SlurmOptions:
    """What Slurm is asked for.

    Args:
        partition, account, qos, constraint: as `sbatch` takes them.
        time: limit, as `sbatch` takes it, such as `24:00:00`.
        exclusive: whether nodes are not shared with other jobs.
        cpus_per_node: cores for the processes of a node; None for what Slurm gives.
        extra: further options of `sbatch`, such as `mail-type=END`.
        requeue: whether the job is queued again when its time is over, or a node has failed.
        runtime: of containers: `pyxis`, or `apptainer`.

    Raises:
        ValueError: for a time that Slurm does not know, or an extra option that the script sets itself.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: str | None = None
    exclusive: bool = True
    cpus_per_node: int | None = None
    extra: tuple[str, ...] = ()
    requeue: bool = True
    runtime: str = RUNTIMES[0]

    def __post_init__(self) -> None:
        if self.time is not None:
            seconds_of(self.time)
        if self.cpus_per_node is not None and self.cpus_per_node < 1:
            raise ValueError(f"--cpus-per-node {self.cpus_per_node} must be at least 1.")
        for option in self.extra:
            name = option.lstrip("-").partition("=")[0]
            if not re.fullmatch(r"[A-Za-z][A-Za-z\-]*", name):
                raise ValueError(f"--sbatch {option!r} is not an option of sbatch, such as mail-type=END.")
            if name in SET:
                instead = f"use {SET[name]}" if SET[name] else "leave it out"
                raise ValueError(f"--sbatch {option}: the script sets --{name} itself; {instead}.")

    def header(self, job: Job) -> list[str]:
        """The options of the job beside its name and size, without dashes."""
        named: dict[str, Any] = {"partition": self.partition, "account": self.account, "qos": self.qos}
        named |= {"constraint": self.constraint, "time": self.time, "cpus-per-task": self.cpus_per_node}
        options = [f"{name}={value}" for name, value in named.items() if value is not None]
        extra = [option.lstrip("-") for option in self.extra]
        asks_for_gpus = any(re.match(r"(gres|gpus[a-z\-]*|G|tres[a-z\-]*)(=|$)", option) for option in extra)
        if not job.on_cpu and not asks_for_gpus:
            options.append(f"gpus-per-node={job.processes}")
        return [*options, *(["exclusive"] if self.exclusive else []), *extra]


def seconds_of(time: str) -> float:
    """Seconds of a time limit of Slurm; infinite for none.

    Raises:
        ValueError: for a text that `sbatch` does not take.
    """
    if time.lower() in ("infinite", "unlimited", "0"):
        return float("inf")
    if match := re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time):
        days, *numbers = match.groups()
        given = [int(number) for number in numbers if number is not None]
        if days is not None:  # days-hours[:minutes[:seconds]]
            units = (3600, 60, 1)
        else:  # minutes[:seconds], or hours:minutes:seconds
            units = (3600, 60, 1) if len(given) == 3 else (60, 1, 0)
        return int(days or 0) * 86400 + sum(n * unit for n, unit in zip(given, units, strict=False))
    raise ValueError(
        f"--time {time!r} is not a time of Slurm: minutes, minutes:seconds, hours:minutes:seconds, days-hours, "
        "days-hours:minutes or days-hours:minutes:seconds."
    )


def check(job: Job, options: SlurmOptions) -> None:
    """Refuse a time limit that leaves none for training, and mounts into nothing.

    Raises:
        ValueError: with what would work.
    """
    if job.environment.mounts and job.environment.container is None:
        raise ValueError(
            f"--mount {job.environment.mounts[0]} needs --container: without one there is nothing to mount into."
        )
    early = job.grace + SIGNAL_MARGIN + EARLY
    if job.grace and options.time is not None and seconds_of(options.time) <= early:
        raise ValueError(
            f"--time {options.time} leaves no time to train: ranks may be told to save {early} seconds before the "
            f"limit (save_on_signal={job.save_seconds:g}, {SIGNAL_MARGIN} for the end, and {EARLY} by which Slurm may "
            "be early); raise it, or lower --save-seconds."
        )


def files(job: Job, options: SlurmOptions, template: Path | None) -> dict[str, str]:
    """The texts of the job's files by their names."""
    slurm: dict[str, Any] = {
        "options": options.header(job),
        "requeue": options.requeue,
        "signal_seconds": job.grace + SIGNAL_MARGIN,
        "step_options": [],
        "container_command": [],
    }
    if options.cpus_per_node is not None:  # which srun does not take from the job
        slurm["step_options"].append(f"--cpus-per-task={options.cpus_per_node}")
    environment = job.environment
    if environment.container is not None:
        # What a node has to see: the job's files, the folder of the run, and that of its checkpoints.
        own: tuple[Path, ...] = (job.folder, job.workdir, job.workdir / job.output_dir)
        if job.begins_at is not None:
            own += (job.workdir / job.begins_at,)
        mounts = dict.fromkeys([*environment.mounts, *(f"{path}:{path}" for path in own)])
        if options.runtime == "pyxis":
            slurm["step_options"] += [
                f"--container-image={shlex.quote(environment.container)}",
                f"--container-mounts={shlex.quote(','.join(mounts))}",
            ]
        else:
            gpus = [] if job.on_cpu else ["--nv"]
            slurm["container_command"] = ["apptainer", "exec", *gpus, "--bind", ",".join(mounts), environment.container]
    values = {"job": job, "slurm": slurm, "margin": MARGIN}
    return {
        "config.yaml": job.config,
        "job.sh": render(TEMPLATE, values, template),
        "submit.sh": render("slurm_submit.sh.j2", values),
    }


def require_client() -> None:
    """Raises ValueError where there is no `sbatch`."""
    if shutil.which("sbatch") is None:
        raise ValueError(
            "--submit: sbatch is not on this machine. Without --submit the files are written; run their submit.sh "
            "where Slurm is."
        )


def submit(job: Job) -> list[str]:
    """Submit the job, and those after it; their numbers.

    Raises:
        RuntimeError: with what `sbatch` says.
    """
    done = subprocess.run(["bash", str(job.folder / "submit.sh")], capture_output=True, text=True)
    ids = done.stdout.split()
    if done.returncode:
        kept = f" Submitted before: {' '.join(ids)}." if ids else ""
        raise RuntimeError(f"sbatch refused the job: {' '.join(done.stderr.split())}.{kept}")
    return ids
