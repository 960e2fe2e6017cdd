"""Process groups of a mesh: which ranks they have, who makes them and when, and what ten thousand ranks cost."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from pool import JobError, WorkerPool
from test_plan_ranks import LAYOUTS, job_of
from torch.distributed.device_mesh import DeviceMesh

from hf_nanotron import NanotronTrainer, ParallelConfig
from hf_nanotron.parallel.collectives import all_reduce
from hf_nanotron.parallel.group import Group
from hf_nanotron.parallel.mesh import ParallelMesh
from hf_nanotron.plan import rehearse
from hf_nanotron.plan.fake_world import fake_world
from hf_nanotron.plan.roles import roles

# Layouts of large jobs: ranks, sizes, and communicators that a rank holds before it trains, beside the job's own.
LARGE: list[tuple[int, dict[str, int], int]] = [
    (1024, {"tp_size": 8, "pp_size": 4}, 3),
    (1024, {"tp_size": 2, "cp_size": 4, "dp_replicate_size": 4}, 5),
    (10240, {"tp_size": 8, "pp_size": 4}, 3),
    (10240, {"tp_size": 8, "pp_size": 4, "ep_size": 16, "dp_replicate_size": 4}, 5),
]
SECONDS = 10.0  # of this process, on any machine: what grows with the ranks would take minutes


def imagined(world: int, sizes: dict[str, int], rank: int) -> dict[str, Any]:
    """Runs in a worker: a mesh of one rank of a large job, and what torch's own meshes say of its axes."""
    with fake_world(rank, world, 8), mock.patch.object(dist, "new_group", side_effect=AssertionError("a call of all")):
        # Its process groups are made by torch's function below `new_group`, once for each.
        c10d = dist.distributed_c10d
        with mock.patch.object(c10d, "_new_process_group_helper", wraps=c10d._new_process_group_helper) as made:
            began = time.process_time()
            mesh = ParallelMesh(ParallelConfig(**sizes))  # type: ignore[arg-type]
            seconds = time.process_time() - began
        shape = (mesh.pp_size, mesh.dp_size, mesh.cp_size, mesh.tp_size)
        names = ("pp", "dp", "cp", "tp")
        theirs = DeviceMesh("cpu", torch.arange(world).view(shape), mesh_dim_names=names, _init_backend=False)
        at = theirs.get_coordinate()
        assert at is not None

        def along(*axes: str) -> tuple[int, ...]:
            place = [slice(None) if name in axes else index for name, index in zip(names, at, strict=True)]
            return tuple(theirs.mesh[tuple(place)].flatten().tolist())

        axes = {name: along(name) for name in names} | {"row": along("cp", "tp"), "model": along("pp", "cp", "tp")}
        return {
            "seconds": seconds, "calls": made.call_count, "held": len(mesh._communicators.present()),
            "axes": axes, "ours": {name: mesh.groups[name].ranks for name in axes},
            "world": mesh.world.handle is dist.group.WORLD, "sizes": {n: g.size for n, g in mesh.groups.items()},
        }  # fmt: skip


@pytest.mark.parametrize("world, sizes, held", LARGE, ids=str)
def test_a_mesh_of_a_large_job_costs_little(pool: WorkerPool, world: int, sizes: dict[str, int], held: int) -> None:
    for rank in (0, world // 2 + 5, world - 1):
        found = pool.run(1, imagined, world, sizes, rank)[0]
        assert found["ours"] == found["axes"]
        assert found["calls"] == found["held"] == held and found["world"]
        assert found["seconds"] < SECONDS


def partitions(world: int, sizes: dict[str, int]) -> dict[str, Any]:
    """Runs in a worker: for every rank its groups, and the partitions of one of them."""
    groups, parts = [], {}
    for rank in range(world):
        with fake_world(rank, world, 8):
            mesh = ParallelMesh(ParallelConfig(**sizes))  # type: ignore[arg-type]
            groups.append({name: group.ranks for name, group in mesh.groups.items()})
            parts = {name: mesh.partition(name) for name in mesh.groups}
    return {"groups": groups, "partitions": parts}


def test_all_ranks_see_the_same_groups(pool: WorkerPool) -> None:
    """Those of an axis are a partition of the job; a tied weight is on the first stage and on the last alone."""
    found = pool.run(1, partitions, 24, {"tp_size": 2, "pp_size": 3, "ep_size": 2, "dp_replicate_size": 2})[0]
    for name, parts in found["partitions"].items():
        assert sorted(itertools.chain(*parts)) == list(range(24))
        for part in parts:
            assert all(found["groups"][rank][name] == part for rank in part)
    assert {len(part) for part in found["partitions"]["tied"]} == {4, 1}
    assert all((rank // 8) % 3 != 1 for part in found["partitions"]["tied"] for rank in part if len(part) == 4)


# ---- real ranks ----


def total(group: Group) -> float:
    """Of one from each rank of the group, with the rank's number."""
    return float(all_reduce(torch.tensor(float(dist.get_rank())), group))


def made_when_needed() -> dict[str, Any]:
    """Ranks that have made different numbers of groups, each by its members alone; a mesh after another."""
    rank = dist.get_rank()
    theirs = dist.new_group([0, 3], use_local_synchronization=True) if rank in (0, 3) else None
    first = ParallelMesh(ParallelConfig(tp_size=2))
    before = len(first._communicators.present())
    lower = first.group("lower", lambda c: (c.dp * 2 + c.tp) < 3)
    pair = first.group("pair", lambda c: (c.dp + c.tp) % 2)
    sums = {"lower": total(lower) if rank < 3 else None, "pair": total(pair), "tp": total(first.tp)}
    after = len(first._communicators.present())
    same = first.group("pair again", lambda c: (c.dp + c.tp) % 2)
    assert same.handle is pair.handle and first.world.handle is dist.group.WORLD
    second = ParallelMesh(ParallelConfig(tp_size=2))  # of the same ranks, while the first one is there
    sums["second"] = total(second.tp)
    assert second.tp.handle is not first.tp.handle
    second.close()
    third = ParallelMesh(ParallelConfig(tp_size=2))
    sums["third"] = total(third.tp)
    first.close()
    third.close()
    if theirs is not None:
        dist.all_reduce(torch.ones(1), group=theirs)
    return {"sums": sums, "before": before, "after": after}


def test_groups_are_made_by_their_members_when_they_are_used(pool: WorkerPool) -> None:
    for rank, found in enumerate(pool.run(4, made_when_needed)):
        tp = 1.0 if rank < 2 else 5.0
        assert found["sums"] == {
            "lower": 3.0 if rank < 3 else None, "pair": 3.0, "tp": tp, "second": tp, "third": tp,
        }  # fmt: skip
        assert (found["before"], found["after"]) == (2, 4 if rank < 3 else 3)


def test_groups_are_connected_and_used_in_any_order(pool: WorkerPool) -> None:
    """In the orders named here ranks 0, 1, 5 and 4 would wait for each other in a circle."""
    for rank, sums in enumerate(pool.run(8, in_many_orders)):
        assert sums == [float(rank // 2 * 4 + 1), float(rank % 4 * 2 + 4)]


def in_many_orders() -> list[float]:
    mesh, rank = ParallelMesh(ParallelConfig()), dist.get_rank()
    pairs = mesh.group("neighbours", lambda c: c.dp // 2), mesh.group("far", lambda c: c.dp % 4)
    order = pairs if (rank + rank // 4) % 2 == 0 else pairs[::-1]
    mesh.connect(*order)
    # All at once, and read afterwards: who waits for whom would be a circle if a use made its group.
    numbers = {group: torch.tensor(float(rank)) for group in order}
    works = [dist.all_reduce(numbers[group], group=group.handle, async_op=True) for group in order]
    for work in works:
        assert work is not None
        work.wait()
    return [float(numbers[group]) for group in pairs]


def used_after_close() -> None:
    mesh = ParallelMesh(ParallelConfig(tp_size=2))
    mesh.close()
    total(mesh.world)  # the job's own is still there
    total(mesh.tp)


def test_a_closed_mesh_says_so(pool: WorkerPool) -> None:
    with pytest.raises(JobError, match="the mesh was closed, and its group tp is used; make a mesh anew"):
        pool.run(4, used_after_close)


def renewed() -> tuple[list[float], list[float], bool]:
    """The job's own group is destroyed and made again, as after a failure; a group that was never used, too."""
    mesh = ParallelMesh(ParallelConfig(tp_size=2), timeout=timedelta(seconds=60))
    tp, other = mesh.tp, mesh.group("other", lambda c: (c.dp + c.tp) % 2)
    before, name = [total(tp), total(mesh.world)], tp.handle.group_name if tp.handle else ""
    rank, size, store = dist.get_rank(), dist.get_world_size(), dist.distributed_c10d._get_default_store()
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.PrefixStore("again", store), rank=rank, world_size=size)
    mesh.renew()
    mesh.connect(mesh.tp, mesh.dp)
    same = tp.handle is not None and tp.handle.group_name == name
    after = [total(tp), total(mesh.world), total(other)]
    mesh.close()
    return before, after, same


def test_groups_are_made_again_in_a_renewed_job(pool: WorkerPool) -> None:
    for rank, (before, after, same) in enumerate(pool.run(4, renewed)):
        assert before == [1.0 if rank < 2 else 5.0, 6.0] and after == [*before, 3.0] and same


# ---- a whole step ----


def made_in_steps(world: int, layout: dict[str, Any], every_role: bool) -> list[list[int]]:
    """Runs in a worker: for one rank of each role (or of the first and the last), its process groups when a step begins
    and when the run is over.
    """
    job, found, told = job_of(world, **layout), [], None
    begin, end = rehearse._Watcher.on_step_begin, rehearse._by_axis
    counts: list[int] = []

    def noted(action: Callable[..., Any]) -> Callable[..., Any]:
        def both(*args: Any, **kwargs: Any) -> Any:
            counts.append(len(dist.distributed_c10d._world.pg_map))
            return action(*args, **kwargs)

        return both

    with mock.patch.multiple(rehearse, _by_axis=noted(end)):
        with mock.patch.multiple(rehearse._Watcher, on_step_begin=noted(begin)):
            everyone = roles(job)
            for role in everyone if every_role else (everyone[0], everyone[-1]):
                counts.clear()
                done = rehearse.rehearse_role(job, role, NanotronTrainer, told)
                told = told or done.told
                found.append(list(counts))
    return found


@pytest.mark.parametrize("name", [name for name in LAYOUTS if "GPUs" not in name])
def test_no_step_makes_a_group(name: str, pool: WorkerPool, pytestconfig: pytest.Config) -> None:
    """A communicator that connects while kernels of others wait may wait for them, and they for it."""
    full = pytestconfig.getoption("full_matrix")
    if name != "experts, ep, tp, pp" and not full:
        pytest.skip("with --full-matrix")
    for begun, *ended in pool.run(1, made_in_steps, *LAYOUTS[name], full)[0]:
        assert ended and set(ended) == {begun} and begun >= 1


def collectives(worlds: list[int], layout: dict[str, Any]) -> list[dict[str, Any]]:
    """Runs in a worker: what the first rank does in a step of jobs of more and more replicas."""
    found = []
    for world in worlds:
        job = job_of(world, heads=8, **layout)
        began = time.process_time()
        events = rehearse.rehearse_role(job, roles(job)[0], NanotronTrainer).trace.events
        counts: dict[tuple[str, int], int] = {}
        for event in events:
            key = event.op, min(event.step, 1)
            counts[key] = counts.get(key, 0) + 1
        found.append({"seconds": time.process_time() - began, "counts": counts})
    return found


def test_a_step_has_as_many_collectives_on_ten_thousand_ranks(pool: WorkerPool) -> None:
    """And the whole trainer, from the model to the end of a step, takes a few seconds longer at most."""
    small, huge = pool.run(1, collectives, [64, 10240], {"tp_size": 8, "pp_size": 4})[0]
    assert small["counts"] == huge["counts"]
    assert sum(count for (_, step), count in huge["counts"].items() if step) > 100
    assert huge["seconds"] - small["seconds"] < SECONDS
