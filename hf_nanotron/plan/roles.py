"""Which ranks of a job do the same, so that one of each kind stands for all of them."""

from __future__ import annotations

from dataclasses import dataclass

from ..parallel.config import ParallelConfig
from ..parallel.mesh import Coordinates, coordinates_in
from .job import Job, parallel_config


@dataclass(frozen=True)
class Role:
    """Ranks that take the same part in a job.

    Args:
        rank: one of them, which stands for all.
        coordinates: where it stands.
        ranks: all of them.
    """

    rank: int
    coordinates: Coordinates
    ranks: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many ranks have this role."""
        return len(self.ranks)


def roles(job: Job) -> list[Role]:
    """The distinct roles of a job; the first is that of rank 0. Each rank has one of them.

    Stages differ by their layers and their place in the schedule. Ranks of one stage run the same code on as much, but
    for those that the first rank of an axis stands for: it reads and reports for others, so in the first and in the
    last stage it has a role of its own.

    Raises:
        ValueError: as `parallel_config`.
    """
    config = parallel_config(job)
    kinds: dict[tuple[int, bool], list[int]] = {}
    for rank in range(job.world_size):
        kinds.setdefault(_kind(coordinates_in(config, job.world_size, rank), config), []).append(rank)
    found = [(ranks[0] if first else ranks[-1], ranks) for (_, first), ranks in kinds.items()]
    return [Role(rank, coordinates_in(config, job.world_size, rank), tuple(ranks)) for rank, ranks in found]


def _kind(at: Coordinates, config: ParallelConfig) -> tuple[int, bool]:
    is_end = at.pp in (0, config.pp_size - 1)
    return at.pp, not is_end or at.dp == at.cp == at.tp == 0
