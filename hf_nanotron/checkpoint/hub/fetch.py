"""A repository of the Hub on the hosts of a job: one process of each downloads it, and the others find it there."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from huggingface_hub import snapshot_download

from ...parallel.collectives import all_reduce
from ...parallel.mesh import ParallelMesh
from ...parallel.together import refuse_together, together_for_long


def seen_by_all(mesh: ParallelMesh, directory: Path) -> bool:
    """Whether `directory` is a folder, on every rank or on none. All ranks together.

    Raises:
        ValueError: on every rank, if it is one on some ranks alone.
    """
    here = directory.is_dir()
    there = int(all_reduce(torch.tensor(float(here), device=mesh.device), mesh.world))
    message = (
        f"{directory} is a folder on {there} of {mesh.world_size} ranks, but not on rank {mesh.rank} (host "
        f"{socket.gethostname()}): put it where all ranks find it under this path, or name a repository of the Hub."
    )
    refuse_together(mesh, message if there and not here else None)
    return here


def fetch_on_each_host(mesh: ParallelMesh, repository: str, patterns: list[str], options: dict[str, Any]) -> Path:
    """The folder in the Hub's cache with the files of `repository` that `patterns` name. All ranks together.

    Args:
        options: of `snapshot_download`, such as `revision`.
    """
    if mesh.world_size == 1:
        return Path(snapshot_download(repository, allow_patterns=patterns, **options))
    downloads = PartialState().local_process_index == 0

    def fetch() -> Path | None:
        return Path(snapshot_download(repository, allow_patterns=patterns, **options)) if downloads else None

    found = together_for_long(mesh, f"fetching {repository}", fetch)
    if found is None:
        cached = {name: value for name, value in options.items() if name in ("revision", "cache_dir")}
        found = Path(snapshot_download(repository, allow_patterns=patterns, local_files_only=True, **cached))
    return found
