"""Where this rank stands, and the process groups it works in.

Ranks are laid out as `(pp, dp, cp, tp)` with `tp` fastest, so that the ranks that talk most sit next to each other:
`rank = ((pp_rank * dp_size + dp_rank) * cp_size + cp_rank) * tp_size + tp_rank`.

For weights, `cp` is data parallelism: its ranks hold the same weights and see other tokens. So ZeRO's shards, experts
and sums of gradients are taken over `dp` and `cp` together. Samples are dealt over `dp` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import PartialState

from .communicators import Communicators
from .config import ParallelConfig
from .gone_meshes import meshes_of_job
from .group import Group as Group
from .roll_call import attend

# The public name of newer torch, where the private one warns.
_set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout

MULTIPROCESSORS_OF_A_FEW_NUMBERS = 1

# What ranks of one group have in common: one or more numbers, of one rank or of all ranks at once.
Key = Callable[["Coordinates"], Any]


@dataclass(frozen=True)
class Coordinates:
    """Position of one rank on every axis.

    `shard` and `replica` divide `dp` and `cp` together (which ZeRO shards, in which copy); `ep` and `expert_copy`
    divide the `dp`, `cp` and `tp` ranks of a pipeline stage (which experts, in which copy).
    """

    pp: int
    dp: int
    cp: int
    tp: int
    shard: int
    replica: int
    ep: int
    expert_copy: int


def coordinates_in(parallel: ParallelConfig, world_size: int, rank: int) -> Coordinates:
    """Where `rank` stands in a job of `world_size` ranks."""
    return _coordinates(parallel, world_size, rank)


def _coordinates(parallel: ParallelConfig, world_size: int, rank: Any) -> Coordinates:
    """Of one rank, or of an array of them, with an array for each coordinate."""
    copies, shard_size = parallel.weight_copies(world_size), parallel.shard_size(world_size)
    rest, tp = divmod(rank, parallel.tp_size)
    pp, copy = divmod(rest, copies)
    dp, cp = divmod(copy, parallel.cp_size)
    replica, shard = divmod(copy, shard_size)
    expert_copy, ep = divmod(copy * parallel.tp_size + tp, parallel.ep_size)
    return Coordinates(pp=pp, dp=dp, cp=cp, tp=tp, shard=shard, replica=replica, ep=ep, expert_copy=expert_copy)


class ParallelMesh:
    """The ranks of a job arranged by `ParallelConfig`, with a `Group` for each kind of communication.

    Building a mesh is a collective operation; the process groups of earlier meshes that no rank holds any more are
    destroyed then. Besides `tp`, `cp`, `dp` and `pp` there are `shard` (ranks of `dp` and `cp` that share one set of
    ZeRO shards; neighbours, to be within one node), `replica` (ranks that hold the same shard), `row` (`cp` and `tp`
    ranks of a pipeline stage, which together see a row) and `model` (all ranks that read the same samples). Experts
    have axes over the `dp`, `cp` and `tp` ranks of a pipeline stage: `ep` (neighbours with different experts), and
    `expert_shard` and `expert_replica`, which correspond to `shard` and `replica`.

    Those that every step uses are connected here, all at once. Others are when `connect` is told of them, or else when
    they are used first. Groups of the same ranks share a communicator, which executes in order; that of all ranks is
    the job's own, torch's default one.

    Raises:
        ValueError: if the sizes do not divide the world size.
    """

    def __init__(self, parallel: ParallelConfig, timeout: timedelta | None = None) -> None:
        # Without cpu=True, accelerate takes every process of a job without an accelerator for a job of its own.
        state = PartialState(cpu=not torch.accelerator.is_available())
        self.parallel = parallel
        self.world_size: int = state.num_processes
        self.rank: int = state.process_index
        self.device: torch.device = state.device
        self._timeout = timeout
        # Before the groups are made: ranks of other sizes would wait for each other in them.
        self.assemble("making a parallel model or a NanotronTrainer", f" with {parallel}")
        self._communicators = Communicators(self.device, timeout)
        if self.world_size > 1:
            meshes_of_job().destroy_gone(self.device)
            meshes_of_job().add(self._communicators)
        self.dp_size = parallel.dp_size(self.world_size)
        self.shard_size = parallel.shard_size(self.world_size)
        self.ep_size = parallel.ep_size
        # Copies of the experts among the ranks that together hold one set of ZeRO shards.
        self._expert_copies = parallel.expert_copies(self.world_size)
        self.tp_size, self.cp_size, self.pp_size = parallel.tp_size, parallel.cp_size, parallel.pp_size
        self.coordinates = self.coordinates_of(self.rank)
        self.tp_rank, self.cp_rank = self.coordinates.tp, self.coordinates.cp
        self.dp_rank, self.pp_rank = self.coordinates.dp, self.coordinates.pp
        self._everywhere = _coordinates(parallel, self.world_size, np.arange(self.world_size))
        self._groups: dict[str, Group] = {}
        self._keys: dict[str, Key] = {}
        self._at_close: list[Callable[[], None]] = []

        self.tp = self.group("tp", lambda c: (c.pp, c.dp, c.cp))
        self.cp = self.group("cp", lambda c: (c.pp, c.dp, c.tp))
        self.pp = self.group("pp", lambda c: (c.dp, c.cp, c.tp))
        self.dp = self.group("dp", lambda c: (c.pp, c.cp, c.tp))
        self.row = self.group("row", lambda c: (c.pp, c.dp))
        self.shard = self.group("shard", lambda c: (c.pp, c.tp, c.replica))
        self.replica = self.group("replica", lambda c: (c.pp, c.tp, c.shard))
        self.model = self.group("model", lambda c: c.dp)
        # Ranks that hold the same shard of a weight, where its gradient is a sum over more than the replicas: of parts
        # that the tp ranks have, or of two uses, on the first and on the last stage.
        self.partial = self.group("partial", lambda c: (c.pp, c.shard))
        last = self.pp_size - 1
        self.tied = self.group(
            "tied", lambda c: (c.tp, c.shard, *_unless((c.pp == 0) | (c.pp == last), c.pp, c.replica))
        )
        self.every_stage = self.group("every_stage", lambda c: (c.tp, c.shard))
        self.ep = self.group("ep", lambda c: (c.pp, c.expert_copy))
        # Which set of ZeRO shards of the experts a rank has a part of, and which part.
        copies = self._expert_copies
        self.expert_shard = self.group("expert_shard", lambda c: (c.pp, c.ep, c.expert_copy // copies))
        self.expert_replica = self.group("expert_replica", lambda c: (c.pp, c.ep, c.expert_copy % copies))
        self.world = self.group("world", lambda c: 0)
        # All ranks again, for numbers that the host reads while weights are still being updated and gathered.
        early = MULTIPROCESSORS_OF_A_FEW_NUMBERS if self.device.type == "cuda" else None
        self.early = self.group("early", lambda c: 0, early)
        self.alone = Group((self.rank,), 0)
        self.connect(self.world, self.tp, self.cp, self.pp, self.dp, self.shard, self.replica, self.early)

    def coordinates_of(self, rank: int) -> Coordinates:
        return coordinates_in(self.parallel, self.world_size, rank)

    def group(self, name: str, key: Key, multiprocessors: int | None = None) -> Group:
        """The group of ranks whose coordinates share this rank's `key`, by `name`. Nothing is communicated.

        Groups of the same ranks share a communicator, which executes in order. With `multiprocessors`, a group has its
        own, of high priority, which takes no more than these of the GPU: it does not wait for others or for kernels.

        Args:
            key: of the coordinates of one rank, whose numbers make a number or several; also of those of all ranks,
                which are arrays.
        """
        if name not in self._groups:
            mine = np.ones(self.world_size, dtype=bool)
            for of_all, own in zip(_numbers(key(self._everywhere)), _numbers(key(self.coordinates)), strict=True):
                mine &= of_all == own
            ranks = tuple(np.flatnonzero(mine).tolist())
            self._keys[name] = key
            connection = self._communicators.of(name, ranks, multiprocessors) if len(ranks) > 1 else None
            self._groups[name] = Group(ranks, ranks.index(self.rank), connection=connection)
        return self._groups[name]

    @property
    def groups(self) -> Mapping[str, Group]:
        """The groups by name; the first of those that share a communicator comes first."""
        return self._groups

    def partition(self, name: str) -> tuple[tuple[int, ...], ...]:
        """The ranks of all groups of this name."""
        columns = [np.broadcast_to(column, self.world_size) for column in _numbers(self._keys[name](self._everywhere))]
        classes: dict[tuple[int, ...], list[int]] = {}
        for rank, key in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
            classes.setdefault(key, []).append(rank)
        return tuple(map(tuple, classes.values()))

    def kv_replicas(self, replicas: int) -> Group:
        """Ranks with the same shard of the same key-value head, which `replicas` neighbours on the tp axis hold."""
        return self.group(f"kv_replicas_{replicas}", lambda c: (c.pp, c.tp // replicas, c.shard))

    def alone_with_handle(self) -> dist.ProcessGroup:
        """A process group of this rank alone, for torch's own code, which takes no `Group`. Made on first use."""
        return self._communicators.of("alone", (self.rank,)).handle

    def connect(self, *groups: Group) -> None:
        """Make the communicators of `groups` that are to be used, at once. A collective operation of their members.

        Ranks that share several of them name these in the same order.
        """
        if connections := [group.connection for group in groups if group.connection is not None]:
            self._communicators.make(connections)

    def renew(self) -> None:
        """Forget the process groups, of a job that was aborted and whose default process group was made anew: groups
        make theirs again when they are used. All ranks together.
        """
        self._communicators.renew()

    def assemble(self, call: str, detail: str = "", group: Group | None = None) -> None:
        """Wait until every rank (of `group`, if given) has come to the same `call` with the same `detail`."""
        ranks = range(self.world_size) if group is None else group.ranks
        if len(ranks) > 1:
            attend().call(call, detail, ranks, self._timeout or dist.default_pg_timeout)

    def set_timeout(self, timeout: timedelta) -> None:
        """How long a collective of this mesh may take before the job is taken down."""
        self._timeout = self._communicators.timeout = timeout
        for group in {group.connection.made for group in self._groups.values() if group.connection} - {None}:
            _set_timeout(timeout, group)

    def __deepcopy__(self, memo: dict[int, Any]) -> ParallelMesh:
        """A copy of a model stands where the model stands."""
        return self

    @property
    def is_first_copy(self) -> bool:
        """Whether this rank holds the first of the copies of its weights that `dp` and `cp` make."""
        return self.dp_rank == self.cp_rank == 0

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def speaks_for_tokens(self) -> bool:
        """Whether this rank counts in a sum over the job of what the loss finds out of its tokens: the last stage
        computes it, and tensor-parallel ranks compute the same. Context-parallel ranks have other tokens.
        """
        return self.is_last_stage and self.tp_rank == 0

    def at_close(self, release: Callable[[], None]) -> None:
        """Call `release` in `close`, before the process groups go."""
        self._at_close.append(release)

    def close(self) -> None:
        """Destroy the process groups of this mesh (not the default one). The mesh cannot be used afterwards."""
        while self._at_close:
            self._at_close.pop()()
        self._communicators.destroy()


def _numbers(key: Any) -> tuple[Any, ...]:
    return key if isinstance(key, tuple) else (key,)


def _unless(condition: Any, *numbers: Any) -> tuple[Any, ...]:
    """`numbers` where the condition is false, of one rank or of arrays; what no number is where it is true."""
    return tuple(np.where(condition, -1, number) for number in numbers)
