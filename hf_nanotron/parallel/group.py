"""A set of ranks that communicate, and when its communicator is made: on first use, by its members alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist


@dataclass(eq=False)
class Connection:
    """The communicator of one set of ranks: none, until it is used.

    Args:
        name: what it is called in records; the first of the axes that share it.
        ranks: of the job, in order.
        multiprocessors: of a GPU that its kernels may take, if it is not to have as many as NCCL likes.
        make: makes the process groups of connections, and sets `made` of each.
        made: torch's process group, once there is one.
    """

    name: str
    ranks: tuple[int, ...]
    multiprocessors: int | None
    make: Callable[[Sequence[Connection]], None] = field(repr=False)
    made: dist.ProcessGroup | None = None

    @property
    def handle(self) -> dist.ProcessGroup:
        """The process group, which is made if there is none: a collective operation of the ranks."""
        if self.made is None:
            self.make([self])
            assert self.made is not None
        return self.made


@dataclass(frozen=True)
class Group:
    """A set of ranks that communicate.

    Args:
        ranks: of the job, in order.
        rank: the place of this one among them.
        given: a process group of theirs that exists already, if any.
        connection: makes it otherwise.
    """

    ranks: tuple[int, ...]
    rank: int
    given: dist.ProcessGroup | None = None
    connection: Connection | None = field(default=None, repr=False)

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def handle(self) -> dist.ProcessGroup | None:
        """torch's process group. Its first use is a collective operation of the group. None for a group of one, whose
        collectives do nothing.
        """
        return self.given if self.connection is None else self.connection.handle

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        """A copy of a model communicates in the same groups."""
        return self
