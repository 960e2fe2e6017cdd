"""Process groups that their members make alone, in one order on all of them.

`torch.distributed.new_group` is a call of all ranks for each group of each of them, which at ten thousand ranks is
thousands of calls. With `use_local_synchronization` the members alone call it, but they meet under a name that torch
counts: ranks that have made different numbers of groups would wait for each other for ever, and a group made after
another was destroyed would read what that one left in the store. So the name is given here, and the store's prefix.
"""

from __future__ import annotations

import contextlib
import hashlib
import weakref
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist

from .group import Connection
from .rehearsal import is_rehearsal

Reference = weakref.ref[dist.ProcessGroup]


class Communicators:
    """The process groups of one mesh. Whatever uses one holds this.

    Attributes:
        number: of the mesh, the same on all ranks and of no other mesh of the job.
        timeout: of collectives of groups that are made from now on.
        references: what is left here of the groups that were made, the oldest first; torch holds them.
    """

    def __init__(self, device: torch.device, timeout: timedelta | None) -> None:
        self.device, self.timeout = device, timeout
        self.number = 0
        self.references: list[Reference] = []
        self._connections: dict[tuple[tuple[int, ...], int | None], Connection] = {}
        self._generation = 0
        self._is_closed = False

    def of(self, name: str, ranks: tuple[int, ...], multiprocessors: int | None = None) -> Connection:
        """The connection of these ranks, one and the same for all names; `multiprocessors` sets one apart."""
        key = ranks, multiprocessors
        if key not in self._connections:
            self._connections[key] = Connection(name, ranks, multiprocessors, self.make)
        return self._connections[key]

    def present(self) -> list[dist.ProcessGroup]:
        """The process groups that there are, without the job's own."""
        return [made for reference in self.references if (made := reference()) is not None]

    def make(self, connections: Sequence[Connection]) -> None:
        """Make the process groups of those that have none. A collective operation of their members.

        Each is made when the one before is connected, and those that ranks have in common in one order on all of them,
        whatever the order of `connections`: else ranks could wait for each other in a circle.

        Raises:
            RuntimeError: after `destroy`.
        """
        wanted = {connection for connection in connections if connection.made is None}
        for connection in sorted(wanted, key=lambda each: (len(each.ranks), each.ranks, each.multiprocessors or 0)):
            if self._is_of_job(connection):
                connection.made = dist.group.WORLD
            elif self._is_closed:
                raise RuntimeError(f"the mesh was closed, and its group {connection.name} is used; make a mesh anew.")
            else:
                connection.made = self._make_one(connection)
                self.references.append(weakref.ref(connection.made))
            if self.device.type == "cuda" and not is_rehearsal():
                _connect(connection.made, self.device)

    def destroy(self) -> None:
        """Destroy them, for good."""
        for made in self.present():
            dist.destroy_process_group(made)
        self._is_closed = True
        self._forget()

    def renew(self) -> None:
        """Leave them all to whoever has destroyed them: they are made anew when they are used, under the same names.

        For a job whose default process group was made anew. To be called on all of its ranks as often.
        """
        self._generation += 1
        self._forget()

    def _forget(self) -> None:
        for connection in self._connections.values():
            connection.made = None
        self.references.clear()

    def _is_of_job(self, connection: Connection) -> bool:
        return connection.multiprocessors is None and len(connection.ranks) == dist.get_world_size()

    def _make_one(self, connection: Connection) -> dist.ProcessGroup:
        ranks, options = connection.ranks, None
        if connection.multiprocessors is not None:
            options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
            options.config.max_ctas = connection.multiprocessors
        # Of the ranks, not of the axis: others of the group may use it under another name first.
        digest = hashlib.sha1(" ".join(map(str, ranks)).encode(), usedforsecurity=False).hexdigest()[:16]
        name = f"mesh_{self.number}_{digest}" + ("_apart" if options else "")
        prefix = f"mesh {self.number} {self._generation}"
        store = dist.PrefixStore(prefix, dist.distributed_c10d._get_default_store())
        return make_process_group(ranks, store, name, self.timeout, options, connection.name)


def make_process_group(
    ranks: Sequence[int], store: Any, name: str, timeout: timedelta | None, options: Any = None, description: str = ""
) -> dist.ProcessGroup:
    """A process group of these ranks, of the backend of the default one. A collective operation of `ranks` alone.

    Args:
        ranks: of the job, ascending, with this one among them.
        store: where they meet; nobody else may have used this name in it.
        name: is to be the same on all of them, and no other group of this process may have it.
        timeout: of its collectives; None is torch's default, half an hour.
        options: of the backend.
        description: what profiles and torch's flight recorder call it.
    """
    c10d = dist.distributed_c10d
    with _no_bound_device():
        group, _ = c10d._new_process_group_helper(
            len(ranks),
            ranks.index(dist.get_rank()),
            list(ranks),
            dist.get_backend(),
            store,
            cast(Any, name),
            backend_options=options,
            timeout=timeout or dist.default_pg_timeout,
            group_desc=description or name,
        )
    c10d._world.pg_group_ranks[group] = {rank: index for index, rank in enumerate(ranks)}
    return cast(dist.ProcessGroup, group)


@contextlib.contextmanager
def _no_bound_device() -> Iterator[None]:
    """Where a script has bound its job to a device, torch would split the job's communicator for each group, which is
    a call of all ranks.
    """
    default = cast(dist.ProcessGroup, dist.group.WORLD)
    bound = default.bound_device_id
    if bound is None:
        yield
        return
    default.bound_device_id = None
    try:
        yield
    finally:
        default.bound_device_id = bound


def _connect(group: dist.ProcessGroup | None, device: torch.device) -> None:
    """Let NCCL connect a process group, which it would do when it is used first.

    A first use that is a message between two ranks would wait for the others of the group, and one in the middle of a
    step may wait for kernels that wait for it.
    """
    dist.all_reduce(torch.ones(1, device=device), group=group)
    torch.cuda.synchronize(device)
