"""Optimizer and scheduler beside the Hub files, for a resume with the same tp and pp."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..parallel.mesh import ParallelMesh
from ..parallel.segment import ShardedWeights

DIRECTORY = "training_state"


def _path(directory: str | os.PathLike[str], mesh: ParallelMesh) -> Path:
    return Path(directory) / DIRECTORY / f"pp-{mesh.pp_rank:03d}_tp-{mesh.tp_rank:03d}.pt"


def _layout(mesh: ParallelMesh) -> dict[str, Any]:
    """What a part of the optimizer state depends on; the data-parallel size is free."""
    parallel = mesh.parallel
    return {
        "tp_size": parallel.tp_size,
        "pp_size": parallel.pp_size,
        "pp_virtual_stages": parallel.pp_virtual_stages,
        "pp_layers_per_stage": list(parallel.pp_layers_per_stage or ()),
    }


def save_training_state(
    directory: str | os.PathLike[str], mesh: ParallelMesh, optimizer: Any, scheduler: Any, masters: ShardedWeights
) -> None:
    """One file for each part of the model, by the first data-parallel rank that holds it."""
    if mesh.dp_rank == 0:
        path = _path(directory, mesh)
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "layout": _layout(mesh),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "masters": {name: master.detach() for name, master in masters.masters.items()},
        }
        torch.save(state, path)
    if mesh.world.handle is not None:
        dist.barrier(group=mesh.world.handle)


def load_training_state(
    directory: str | os.PathLike[str], mesh: ParallelMesh, optimizer: Any, scheduler: Any, masters: ShardedWeights
) -> None:
    """Restore what `save_training_state` wrote, on any data-parallel size.

    Raises:
        ValueError: if there is no such state, or it was written with another tp or pp.
    """
    folder = Path(directory) / DIRECTORY
    files = sorted(folder.glob("pp-*.pt"))
    if not files:
        raise ValueError(
            f"{directory} has no {DIRECTORY}/ (it was saved with save_only_model=True, or by another program); start "
            "from its weights with from_pretrained instead of resume_from_checkpoint."
        )
    layout = torch.load(files[0], map_location="cpu", weights_only=True, mmap=True)["layout"]
    if layout != _layout(mesh):
        raise ValueError(
            f"{directory} was saved with {layout}, but this run has {_layout(mesh)}; this version resumes with the "
            "same tensor- and pipeline-parallel layout only (any data-parallel size)."
        )
    # On the host: the optimizer moves its part to where the masters are. (accelerate's device "cpu:0" is no location.)
    state = torch.load(_path(directory, mesh), map_location="cpu", weights_only=True)
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    with torch.no_grad():
        for name, master in masters.masters.items():
            master.copy_(state["masters"][name])
    masters.write_back()
