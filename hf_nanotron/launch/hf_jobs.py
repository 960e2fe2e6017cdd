"""A run as jobs of HF Jobs, one for each node, through `huggingface_hub.run_job`."""

from __future__ import annotations

import inspect
import os
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .job import Job
from .rendering import render

TEMPLATE = "hf_jobs.yaml.j2"
FILE = "hf_jobs.yaml"
PORT = 29500
_MOUNT = re.compile(
    r"hf://(?:(?P<kind>model|dataset|space|bucket)s/)?(?P<source>[^:]+):(?P<path>/[^:]*)(?::(?P<mode>ro|rw))?"
)


@dataclass(frozen=True)
class HubOptions:
    """What HF Jobs are asked for; see `huggingface_hub.run_job`.

    Args:
        image: Docker image.
        flavor: hardware of a node, such as `h200x8`.
        timeout: such as `24h`; None for the Hub's own, which is short.
        attempts: starts of a job that fails, the first included.
        namespace: user or organization that pays; None for the user.
    """

    image: str
    flavor: str
    timeout: str | None = None
    attempts: int | None = None
    namespace: str | None = None

    def __post_init__(self) -> None:
        if self.timeout is not None and not re.fullmatch(r"\d+(\.\d+)?[smhd]?", self.timeout):
            raise ValueError(f"--time {self.timeout!r} is not a time of HF Jobs, such as 90m, 24h or 2d.")


def devices_of(flavor: str) -> int | None:
    """GPUs of a node of this flavor, by its name; None for CPUs."""
    if flavor.startswith("cpu"):
        return None
    found = re.search(r"[a-z\-]x(\d+)$|\dx(\d+)$", flavor)
    return int(found[1] or found[2]) if found else 1


def volumes_of(mounts: tuple[str, ...]) -> list[dict[str, Any]]:
    """The arguments of `huggingface_hub.Volume`, for what `hf jobs run --volume` takes.

    Raises:
        ValueError: for a text that is none.
    """
    found = []
    for text in mounts:
        match = _MOUNT.fullmatch(text)
        if match is None:
            raise ValueError(
                f"--mount {text!r} is not a volume of HF Jobs, such as hf://buckets/NAME/BUCKET:/out or "
                "hf://datasets/NAME/DATA:/data."
            )
        owner, _, rest = match["source"].partition("/")
        name, _, inside = rest.partition("/")
        volume: dict[str, Any] = {"type": match["kind"] or "model", "mount_path": match["path"]}
        volume["source"] = f"{owner}/{name}" if name else owner
        if inside:
            volume["path"] = inside
        if match["mode"]:
            volume["read_only"] = match["mode"] == "ro"
        found.append(volume)
    return found


def files(job: Job, options: HubOptions, template: Path | None) -> dict[str, str]:
    """The texts of the jobs' files by their names.

    Raises:
        ValueError: for a template whose text cannot be submitted.
    """
    volumes_of(job.environment.mounts)
    group = f"{re.sub(r'[^a-z0-9]+', '-', job.name.lower()).strip('-')[:32]}-{uuid.uuid4().hex[:8]}"
    hub = {**vars(options), "network_group": group.lstrip("-"), "port": job.port or PORT}
    texts = {"config.yaml": job.config, FILE: render(TEMPLATE, {"job": job, "hub": hub}, template)}
    names = dict.fromkeys(job.environment.secrets, "")
    for node in range(job.nodes):
        job_arguments(texts[FILE], node, names)
    return texts


def job_arguments(text: str, node: int, secrets: Mapping[str, str]) -> dict[str, Any]:
    """The arguments of `run_job` for one node.

    Args:
        text: of the file.
        secrets: values by name.

    Raises:
        ValueError: for a file that is no YAML of such arguments.
    """
    from huggingface_hub import HfApi, Volume

    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{FILE} is not valid YAML; its template is at fault: {error}") from None
    known = set(inspect.signature(HfApi.run_job).parameters) - {"self", "command", "token"}
    if not isinstance(found, dict) or not isinstance(found.get("script"), str):
        raise ValueError(f"{FILE} needs script, the lines of shell that a node runs.")
    script = found.pop("script")
    if unknown := sorted(set(found) - known):
        raise ValueError(
            f"{FILE} has {unknown[0]}, which huggingface_hub.run_job of this version does not take; it takes "
            f"{', '.join(sorted(known))}."
        )
    alias = found.pop("network_aliases", None)
    if alias is not None:
        found["network_aliases"] = [str(alias).format(node=node)]
    found["env"] = {**(found.get("env") or {}), "NODE": str(node)}
    found["secrets"] = {name: secrets[name] for name in found.get("secrets") or ()} or None
    found["volumes"] = [Volume(**volume) for volume in volumes_of(tuple(found.get("volumes") or ()))] or None
    if alias is not None:
        found["name"] = f"{found['name']}-{node}"
    return {**found, "command": ["bash", "-c", script]}


def secret_values(job: Job) -> dict[str, str]:
    """The values of the secrets: of this environment, or the token that the Hub's own client has.

    Raises:
        ValueError: for one that is not set.
    """
    from huggingface_hub import get_token

    found = {}
    for name in job.environment.secrets:
        value = os.environ.get(name) or (get_token() if name == "HF_TOKEN" else None)
        if not value:
            login = " Run hf auth login, or export it." if name == "HF_TOKEN" else ""
            raise ValueError(f"{name}, which --secret names, is not set in this environment.{login}")
        found[name] = value
    return found


def submit(job: Job, secrets: Mapping[str, str], endpoint: str | None = None) -> list[str]:
    """Run the jobs; their addresses. If one cannot be, those before it are cancelled."""
    from huggingface_hub import HfApi

    api, started = HfApi(endpoint=endpoint), []
    text = (job.folder / FILE).read_text(encoding="utf-8")
    try:
        for node in range(job.nodes):
            started.append(api.run_job(**job_arguments(text, node, secrets)))
    except BaseException:
        for info in started:
            api.cancel_job(job_id=info.id, namespace=info.owner.name)
        raise
    return [info.url for info in started]
