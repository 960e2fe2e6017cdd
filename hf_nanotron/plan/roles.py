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
    """The distinct roles of a job, by their first rank. Each rank has one of them.

    Stages differ by their layers, first and last ones by embedding and head. Along every other axis the first rank and
    the last one may differ from those between: the first reads for the others and reports, and padding is on the last.

    Raises:
        ValueError: as `parallel_config`.
    """
    config = parallel_config(job)
    kinds: dict[tuple[object, ...], list[int]] = {}
    for rank in range(job.world_size):
        kinds.setdefault(_kind(coordinates_in(config, job.world_size, rank), config, job.world_size), []).append(rank)
    return [Role(ranks[0], coordinates_in(config, job.world_size, ranks[0]), tuple(ranks)) for ranks in kinds.values()]


def _kind(at: Coordinates, config: ParallelConfig, world_size: int) -> tuple[object, ...]:
    sizes = {"dp": config.dp_size(world_size), "cp": config.cp_size, "tp": config.tp_size}
    return (at.pp, *(_end(getattr(at, axis), size) for axis, size in sizes.items()))


def _end(index: int, size: int) -> str:
    return "first" if index == 0 else "last" if index == size - 1 else "between"
