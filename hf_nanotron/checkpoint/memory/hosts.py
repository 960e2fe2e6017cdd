"""Which ranks share the memory of a host, and on which other host a rank keeps a second copy."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

import torch

from ...parallel.collectives import all_gather
from ...parallel.mesh import ParallelMesh
from ...parallel.node import name_number


@dataclass(frozen=True)
class Hosts:
    """The ranks of a job by the memory that they share.

    Args:
        ranks: of each host, ascending; hosts by their first rank.
        rank: this one.
    """

    ranks: tuple[tuple[int, ...], ...]
    rank: int

    @property
    def own(self) -> int:
        """The number of this rank's host."""
        return next(number for number, ranks in enumerate(self.ranks) if self.rank in ranks)

    @property
    def is_leader(self) -> bool:
        """Whether this rank does what one rank of a host does."""
        return self.ranks[self.own][0] == self.rank

    @property
    def place(self) -> tuple[int, int]:
        """Which of how many ranks of its host this one is."""
        own = self.ranks[self.own]
        return own.index(self.rank), len(own)

    def neighbours(self) -> list[tuple[int, int]]:
        """(rank, the rank on the next host that keeps a copy of its part), of all ranks; nothing on one host."""
        if len(self.ranks) == 1:
            return []
        following = (*self.ranks[1:], self.ranks[0])
        return [
            (rank, other[place % len(other)])
            for ranks, other in zip(self.ranks, following, strict=True)
            for place, rank in enumerate(ranks)
        ]

    def pairs(self) -> list[tuple[int, int]]:
        """The ranks that hand copies on, two by two, in an order in which all pairs can meet soon: every rank is to
        meet its partners in this one.
        """
        host_of = {rank: number for number, ranks in enumerate(self.ranks) for rank in ranks}
        count = len(self.ranks)

        def turn(pair: tuple[int, int]) -> int:  # neighbours on a ring, even ones first
            low, high = sorted(host_of[rank] for rank in pair)
            return 2 if (low, high) == (0, count - 1) and count > 2 else low % 2

        found = {(min(pair), max(pair)) for pair in self.neighbours()}
        return sorted(found, key=lambda pair: (turn(pair), pair))


def find_hosts(mesh: ParallelMesh, root: Path) -> Hosts:
    """Which ranks see one and the same folder `root` of a host. All ranks together."""
    try:
        host = Path("/proc/sys/kernel/random/boot_id").read_text().strip()  # of containers on one host the same
    except OSError:
        host = socket.gethostname()
    status = os.stat(root)
    said = f"{host}|{status.st_dev}|{status.st_ino}"
    numbers = all_gather(torch.tensor([name_number(said)], device=mesh.device), mesh.world, 0).tolist()
    ranks: dict[int, list[int]] = {}
    for rank, each in enumerate(numbers):
        ranks.setdefault(each, []).append(rank)
    return Hosts(tuple(map(tuple, ranks.values())), mesh.rank)
