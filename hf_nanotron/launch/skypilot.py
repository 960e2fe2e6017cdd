"""A run as a managed job of SkyPilot, which starts it anew where a machine was taken away."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .job import Job
from .rendering import render

TEMPLATE = "skypilot.yaml.j2"
FILE = "skypilot.yaml"
PORT = 29500


@dataclass(frozen=True)
class SkyOptions:
    """What SkyPilot is asked for.

    Args:
        accelerator: name of the GPU; None on CPUs.
        image_id: image of the machines.
        resources: further keys of `resources`, such as `{"use_spot": True}`.
        workdir: folder that is copied to the machines, and in which the run starts.
    """

    accelerator: str | None = None
    image_id: str | None = None
    resources: Mapping[str, Any] = field(default_factory=dict)
    workdir: Path | None = None

    def __post_init__(self) -> None:
        for key in ("accelerators", "image_id"):
            if key in self.resources:
                option = "--image-id" if key == "image_id" else "--accelerator"
                raise ValueError(f"--resource {key}: use {option}.")
        for key in self.resources:
            if not re.fullmatch(r"[a-z_]+", key):
                raise ValueError(f"--resource {key!r} is no key of SkyPilot's resources, such as use_spot=true.")


def files(job: Job, options: SkyOptions, template: Path | None) -> dict[str, str]:
    """The texts of the job's files by their names.

    Raises:
        ValueError: for a mount without a target, or a template whose text is no YAML.
    """
    mounts = []
    for text in job.environment.mounts:
        source, colon, target = text.rpartition(":")
        if not colon or not source or not target.startswith(("/", "~")):
            raise ValueError(f"--mount {text!r} is not SOURCE:TARGET, such as s3://bucket/run:/out.")
        mounts.append((source, target))
    workdir = None if options.workdir is None else str(options.workdir)
    sky = {**vars(options), "workdir": workdir, "mounts": mounts, "port": job.port or PORT}
    text = render(TEMPLATE, {"job": job, "sky": sky}, template)
    try:
        yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{FILE} is not valid YAML; its template is at fault: {error}") from None
    return {"config.yaml": job.config, FILE: text}


def require_client() -> None:
    """Raises ValueError where there is no `sky`."""
    if shutil.which("sky") is None:
        raise ValueError(
            "--submit: sky is not on this machine (pip install skypilot). Without --submit the file is written; submit "
            "it with sky jobs launch."
        )


def command(job: Job) -> list[str]:
    """What submits the job."""
    secrets = [word for name in job.environment.secrets for word in ("--secret", name)]
    return ["sky", "jobs", "launch", "--yes", "--detach-run", *secrets, str(job.folder / FILE)]


def submit(job: Job) -> None:
    """Submit the job; SkyPilot prints what it does.

    Raises:
        RuntimeError: if it fails.
    """
    if status := subprocess.run(command(job)).returncode:
        raise RuntimeError(f"sky jobs launch ended with status {status}.")
