"""What copies of the training state take of the host's memory, and whether the host has it."""

from __future__ import annotations

import socket

import torch
from transformers.utils import logging

from ..checkpoint.directory.host_copies import HostCopies
from ..monitor.memory import moment_bytes
from ..ops.host_memory import available_bytes
from ..ops.host_region import ALIGNMENT
from ..optim.ema import WeightAverage
from ..parallel.collectives import all_gather
from ..parallel.mesh import ParallelMesh
from ..parallel.node import host_number
from ..parallel.zero.buckets import is_owner
from ..parallel.zero.segment import ShardedWeights

logger = logging.get_logger(__name__)
TENSORS = 8  # of a segment, each at an aligned place: master, average, the optimizer's own, and numbers


def state_bytes(
    weights: ShardedWeights, optimizer: torch.optim.Optimizer, average: WeightAverage | None, mesh: ParallelMesh
) -> int:
    """Bytes of what this rank writes of a training state; without the optimizer's, if its class is not known."""
    owned = [segment for segment in weights.segments if is_owner(segment.spec, mesh)]
    elements = sum(segment.master.numel() for segment in owned)
    every = sum(segment.master.numel() for segment in weights.segments)
    masters = sum(segment.master.nbytes for segment in owned)
    moments = moment_bytes(optimizer, weights) * elements // max(1, every)
    return masters * (1 if average is None else 2) + moments + TENSORS * ALIGNMENT * len(owned)


def shortage(mesh: ParallelMesh, size: int) -> str | None:
    """What to say if this host has less memory left than its processes need, of which this one needs `size` bytes.

    All ranks together; None if there is enough, or nobody knows.
    """
    host = host_number()
    own = torch.tensor([[host, max(0, size)]], dtype=torch.int64, device=mesh.device)
    sizes = [needed for name, needed in all_gather(own, mesh.world, 0).tolist() if name == host]
    free = available_bytes()
    if free is None or sum(sizes) <= free:
        return None
    return (
        f"async_save=True: the {len(sizes)} processes of host {socket.gethostname()} need {sum(sizes) / 2**30:.1f} GiB "
        f"of host memory for copies of a checkpoint, and {free / 2**30:.1f} GiB are free. Save with async_save=False, "
        "leave the Hub's weights to the last checkpoint (save_hub_weights='last'), or divide the optimizer's state "
        "over more ranks (zero_stage=1, more GPUs)."
    )


def warn_of_unpinned(copies: HostCopies, option: str) -> None:
    """Once, if copies that `option` makes are slow."""
    if copies.unpinned is not None:
        logger.warning_once(
            f"{option}: not all host memory could be pinned ({copies.unpinned}), so training waits for copies; raise "
            "the limit of locked memory (ulimit -l unlimited)."
        )
