"""How fast the links between the ranks of a job are, measured."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from ..parallel.mesh import ParallelMesh
from .links import RECEIVED
from .rates import LinkRate
from .seconds import wait


def groups_to_measure(hosts: list[str]) -> list[tuple[str, tuple[int, ...]]]:
    """`("inside", ranks)` of the first 2, 4, 8, ... ranks of the first host and of all of them; `("between", ranks)` of
    the first rank of 2, 4, ... hosts and of all.

    Args:
        hosts: the host of each rank.
    """
    first = [rank for rank, host in enumerate(hosts) if host == hosts[0]]
    ones = list({host: rank for rank, host in reversed(list(enumerate(hosts)))}.values())[::-1]
    found = []
    for place, ranks in (("inside", first), ("between", ones)):
        sizes = {2**power for power in range(1, 20) if 2**power <= len(ranks)} | {len(ranks)} - {1}
        found += [(place, tuple(ranks[:size])) for size in sorted(sizes)]
    return found


def measure_links(mesh: ParallelMesh, sent: tuple[int, ...]) -> list[LinkRate]:
    hosts: list[Any] = [None] * mesh.world_size
    dist.all_gather_object(hosts, socket.gethostname())
    found = []
    for place, ranks in groups_to_measure(hosts):
        group = dist.new_group(list(ranks))
        for operation in RECEIVED:
            if operation == "send" and len(ranks) > 2:
                continue
            link = _link(operation, group, ranks, mesh, sent, place) if mesh.rank in ranks else None
            shared = [link]
            dist.broadcast_object_list(shared, src=ranks[0])
            assert shared[0] is not None
            found.append(shared[0])
        if mesh.rank in ranks:
            dist.destroy_process_group(group)
        dist.barrier()
    return found


def _link(
    operation: str, group: Any, ranks: tuple[int, ...], mesh: ParallelMesh, sent: tuple[int, ...], place: str
) -> LinkRate:
    """Latency from the smallest tensor, the rate from the largest."""
    size, device = len(ranks), mesh.device
    times = []
    for nbytes in sent:
        whole = torch.zeros(max(1, nbytes // 4 // size) * size, device=device)
        part = torch.zeros(whole.numel() // size, device=device)
        call = _call(operation, group, ranks, mesh.rank, whole, part)
        dist.barrier(group)
        repeats = 20 if nbytes <= 2**16 else 5
        for _ in range(2):
            call()
        wait(device)
        began = time.perf_counter()
        for _ in range(repeats):
            call()
        wait(device)
        slowest = torch.tensor((time.perf_counter() - began) / repeats, dtype=torch.float64, device=device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX, group)
        times.append((whole.numel() * 4, slowest.item()))
    (small, first), (large, last) = times[0], times[-1]
    received = RECEIVED[operation](size)
    # A small tensor takes latency alone, but for what its bytes take at the rate of large ones.
    rate = received * (large - small) / max(last - first, 0.1 * last)
    return LinkRate(operation, size, max(first - received * small / rate, 1e-7), rate, place)


def _call(
    operation: str, group: Any, ranks: tuple[int, ...], rank: int, whole: torch.Tensor, part: torch.Tensor
) -> Callable[[], Any]:
    arrived = torch.zeros_like(whole)
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return {
        "all_gather": lambda: all_gather(whole, part, group=group),
        "reduce_scatter": lambda: reduce_scatter(part, whole, group=group),
        "all_reduce": lambda: dist.all_reduce(whole, group=group),
        "all_to_all": lambda: dist.all_to_all_single(arrived, whole, group=group),
        "send": lambda: dist.send(whole, ranks[1], group) if rank == ranks[0] else dist.recv(whole, ranks[0], group),
    }[operation]
