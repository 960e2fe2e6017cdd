"""Process groups of meshes that are gone are destroyed when the next mesh is made.

A group keeps threads, files and a communicator's memory until it is destroyed, and with NCCL all its ranks are to do
that together. When Python collects a mesh differs from rank to rank, and nobody can wait for that. So the ranks agree
on which meshes are gone at the next call that all of them make.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Hashable
from typing import cast

import torch.distributed as dist

Reference = weakref.ref[dist.ProcessGroup]


class Handles:
    """The process groups made for one mesh. Whatever uses them holds this: the mesh, and each of its `Group`s."""

    def __init__(self) -> None:
        self._by_key: dict[Hashable, dist.ProcessGroup | None] = {}
        self.references: list[Reference] = []  # what is left of them here when this is gone; torch holds the groups

    def __contains__(self, key: Hashable) -> bool:
        return key in self._by_key

    def __getitem__(self, key: Hashable) -> dist.ProcessGroup | None:
        return self._by_key[key]

    def __setitem__(self, key: Hashable, handle: dist.ProcessGroup | None) -> None:
        self._by_key[key] = handle
        if handle is not None:
            self.references.append(weakref.ref(handle))

    def present(self) -> list[dist.ProcessGroup]:
        return [handle for handle in self._by_key.values() if handle is not None]

    def destroy(self) -> None:
        for handle in self.present():
            dist.destroy_process_group(handle)
        self._by_key.clear()


class MeshesOfJob:
    """The meshes that the ranks of a job have made together, which have the same numbers on all of them."""

    def __init__(self) -> None:
        self._made = 0
        self._gone: dict[int, list[Reference]] = {}

    def add(self, handles: Handles) -> None:
        weakref.finalize(handles, self._gone.__setitem__, self._made, handles.references).atexit = False
        self._made += 1

    def destroy_gone(self) -> None:
        """Destroy the groups of meshes that are gone on every rank. A collective operation, of all ranks."""
        if not self._made:
            return
        gc.collect()  # models and trainers are reference cycles
        gone = set(self._gone)
        of_all: list[set[int]] = [set()] * dist.get_world_size()
        dist.all_gather_object(of_all, gone)
        for number in sorted(gone.intersection(*of_all)):
            for reference in self._gone.pop(number):
                if (handle := reference()) is not None:
                    with contextlib.suppress(ValueError):  # it was destroyed by `ParallelMesh.close`
                        dist.destroy_process_group(handle)


# The default process group is the one object that all meshes of a job share; what is known of them goes with it.
_jobs: weakref.WeakKeyDictionary[dist.ProcessGroup, MeshesOfJob] = weakref.WeakKeyDictionary()


def meshes_of_job() -> MeshesOfJob:
    """Of the job whose default process group is at hand."""
    return _jobs.setdefault(cast(dist.ProcessGroup, dist.group.WORLD), MeshesOfJob())
