"""Process groups of meshes that are gone are destroyed when the next mesh is made.

A group keeps threads, files and a communicator's memory until it is destroyed, and with NCCL all its ranks are to do
that together. When Python collects a mesh differs from rank to rank, and nobody can wait for that. So the ranks agree
on which meshes are gone at the next call that all of them make.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from typing import cast

import torch
import torch.distributed as dist

from .communicators import Communicators, Reference


class MeshesOfJob:
    """The meshes that the ranks of a job have made together, which have the same numbers on all of them."""

    def __init__(self) -> None:
        self._made = 0
        self._gone: dict[int, list[Reference]] = {}

    def add(self, communicators: Communicators) -> None:
        """Number those of the next mesh."""
        communicators.number = self._made
        gone = weakref.finalize(communicators, self._gone.__setitem__, self._made, communicators.references)
        gone.atexit = False
        self._made += 1

    def destroy_gone(self, device: torch.device) -> None:
        """Destroy the groups of meshes that are gone on every rank. A collective operation, of all ranks."""
        if not self._made:
            return
        gc.collect()  # models and trainers are reference cycles
        gone = torch.tensor([number in self._gone for number in range(self._made)], dtype=torch.int32, device=device)
        dist.all_reduce(gone, op=dist.ReduceOp.MIN)
        for number in gone.nonzero().flatten().tolist():
            for reference in self._gone.pop(number):
                if (handle := reference()) is not None:
                    with contextlib.suppress(ValueError):  # it was destroyed by `ParallelMesh.close`
                        dist.destroy_process_group(handle)


# The default process group is the one object that all meshes of a job share; what is known of them goes with it.
_jobs: weakref.WeakKeyDictionary[dist.ProcessGroup, MeshesOfJob] = weakref.WeakKeyDictionary()


def meshes_of_job() -> MeshesOfJob:
    """Of the job whose default process group is at hand."""
    return _jobs.setdefault(cast(dist.ProcessGroup, dist.group.WORLD), MeshesOfJob())
