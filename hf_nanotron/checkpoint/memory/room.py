"""Whether the snapshots of a run fit into the memory of its hosts, asked before the first is written."""

from __future__ import annotations

import os
import socket

import torch

from ...ops.host_memory import available_bytes
from ...parallel.collectives import all_gather
from ...parallel.mesh import ParallelMesh
from ...parallel.together import refuse_together, together
from .folder import OF, PREFIX, MemoryFolder, nbytes_of
from .hosts import Hosts

GENERATIONS = 2  # the one that is whole, and the one that is being written


def check_room(mesh: ParallelMesh, hosts: Hosts, folder: MemoryFolder, nbytes: int, awaited: int) -> None:
    """Refuse snapshots that do not fit, on every rank, naming the host. All ranks together.

    A host holds two snapshots of its ranks, and of the ranks whose copies it keeps; the copy from which a rank writes
    takes ordinary memory.

    Args:
        nbytes: of this rank's part of a snapshot.
        awaited: of ordinary memory that this process has still to get, for that copy among others.

    Raises:
        ValueError: if a host has less room.
    """
    asked = torch.tensor([[nbytes, awaited]], dtype=torch.int64, device=mesh.device)
    every, others = zip(*all_gather(asked, mesh.world, 0).tolist(), strict=True)
    own = hosts.ranks[hosts.own]
    kept = [rank for rank, target in hosts.neighbours() if target in own]
    needed = GENERATIONS * (sum(every[rank] for rank in own) + sum(every[rank] for rank in kept))
    buffers = sum(others[rank] for rank in own)

    def look() -> str | None:
        if not hosts.is_leader:
            return None
        held, host = folder.nbytes(), socket.gethostname()
        status = os.statvfs(folder.root)
        free = status.f_bavail * status.f_frsize + held
        memory = available_bytes()
        what = f"two snapshots of its {len(own)} ranks"
        what += f" and of {len(kept)} of the host before it" if kept else ""
        if needed > free:
            return (
                f"memory_snapshot_steps: {folder.root} on host {host} has {_gib(free)} free, but {what} take "
                f"{_gib(needed)}. Enlarge it (mount -o remount,size=..., or docker run --shm-size), set "
                f"memory_snapshot_dir to a larger one, or leave memory_snapshot_steps out.{_left_behind(folder)}"
            )
        if memory is not None and needed + buffers > memory + held:
            return (
                f"memory_snapshot_steps: host {host} has {_gib(memory + held)} of memory available, but {what} take "
                f"{_gib(needed)}, and copies on their way {_gib(buffers)}. Use more hosts, or leave "
                f"memory_snapshot_steps out.{_left_behind(folder)}"
            )
        return None

    refuse_together(mesh, together(mesh, "looking for room for snapshots", look))


def _left_behind(folder: MemoryFolder) -> str:
    """What runs of this user that do not run any more have left in the same place, in words."""
    said = []
    for path in sorted(folder.root.glob(f"{PREFIX}-{os.getuid()}-*")):
        if path == folder.path:
            continue
        try:
            of = (path / OF).read_text(errors="replace").strip()
        except OSError:
            of = "?"
        said.append(f"{path} ({_gib(nbytes_of(path))}, of output_dir {of})")
    return f" Other runs have snapshots there: {'; '.join(said[:5])}; delete those that have ended." if said else ""


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB"
