"""Ways between neighbouring hosts, on which ranks exchange copies of their parts of a snapshot."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ...parallel.mesh import ParallelMesh
from .hosts import Hosts
from .transfer import Wire


def connect(mesh: ParallelMesh, hosts: Hosts, timeout: float) -> dict[int, Wire]:
    """Connect this rank by gloo to those on other hosts that copies go to or come from, until the mesh is closed.

    Args:
        timeout: seconds.

    Raises:
        RuntimeError: if two ranks cannot connect.
    """
    wires: dict[int, Wire] = {}
    for pair in hosts.pairs():
        if mesh.rank not in pair:
            continue
        try:
            handle: Any = dist.new_group(
                list(pair), timeout=timedelta(seconds=timeout), backend="gloo", use_local_synchronization=True
            )
        except RuntimeError as error:
            raise RuntimeError(
                f"memory_snapshot_steps: ranks {pair[0]} and {pair[1]}, of neighbouring hosts, cannot connect by gloo "
                f"({error}); GLOO_SOCKET_IFNAME=eth0 (or its like) names the interface."
            ) from error
        other = pair[0] if pair[1] == mesh.rank else pair[1]
        wires[other] = Wire(other, handle, torch.device("cpu"))
        mesh.at_close(_destroying(handle))
    return wires


def _destroying(handle: Any) -> Callable[[], None]:
    def destroy() -> None:
        with contextlib.suppress(Exception):  # the job may have destroyed all groups by then
            dist.destroy_process_group(handle)

    return destroy
