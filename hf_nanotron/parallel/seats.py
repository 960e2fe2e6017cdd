"""Which processes of a job train, and as which ranks: the others are spares.

A process that is unfit (its GPU does not answer) has no seat. Processes of one node sit next to each other. Where the
tensor- and context-parallel ranks of a row are on one node in the whole job, they stay on one: what is left on a node
when its rows are full are spares, and dp shrinks rather than that a row crosses the network.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from transformers.utils import logging

from .config import ParallelConfig

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Process:
    """A process that a launcher has started.

    Attributes:
        number: in the job, node by node.
        node: number of its node.
        host, local_rank: where it is, for people.
        unfit: why it cannot train; None if it can.
    """

    number: int
    node: int
    host: str
    local_rank: int
    unfit: str | None = None

    def __str__(self) -> str:
        return f"process {self.number} ({self.host}, local rank {self.local_rank})"


def training_size(parallel: ParallelConfig, max_dp_size: int, processes: int) -> int:
    """Processes that train, of so many that are fit: as many as `max_dp_size` takes, or as the layout can be shrunk to.

    Raises:
        ValueError: if they are too few for one replica of the model, or no data-parallel size fits the other sizes.
    """
    replica = parallel.model_parallel_size
    if processes < replica:
        raise ValueError(
            f"one replica of the model takes tp_size={parallel.tp_size} x pp_size={parallel.pp_size} x "
            f"cp_size={parallel.cp_size} = {replica} processes, but only {processes} can train; start more, or use "
            "smaller sizes."
        )
    refusal: ValueError | None = None
    for dp_size in range(min(max_dp_size, processes // replica), 0, -1):
        try:
            parallel.expert_copies(dp_size * replica)  # which also checks the copies
            return dp_size * replica
        except ValueError as error:
            refusal = refusal or error
    raise ValueError(f"max_dp_size={max_dp_size} with {processes} processes: {refusal}")


def seats_for(parallel: ParallelConfig, max_dp_size: int | None, processes: Sequence[Process]) -> list[int]:
    """Numbers of the processes that train, by rank. Without `max_dp_size`, all of them.

    Raises:
        ValueError: as `training_size`, naming those that are unfit.
    """
    if max_dp_size is None:
        return [process.number for process in processes]
    fit = [process for process in processes if process.unfit is None]
    rows = _whole_rows(processes, parallel.tp_size * parallel.cp_size)
    seated = rows if len(rows) >= parallel.model_parallel_size else fit
    try:
        size = training_size(parallel, max_dp_size, len(seated))
    except ValueError as error:
        unfit = "; ".join(f"{process}: {process.unfit}" for process in processes if process.unfit is not None)
        raise ValueError(f"{error}{f' Unfit: {unfit}.' if unfit else ''}") from None
    return [process.number for process in seated[:size]]


def _whole_rows(processes: Iterable[Process], row: int) -> list[Process]:
    """Of each node as many fit processes as fill rows; none at all if rows cross nodes anyway."""
    found: list[Process] = []
    for _, group in groupby(processes, lambda process: process.node):
        node = list(group)
        if len(node) % row:
            return []
        fit = [process for process in node if process.unfit is None]
        found += fit[: len(fit) - len(fit) % row]
    return found


def tell(parallel: ParallelConfig, max_dp_size: int, processes: Sequence[Process], seats: Sequence[int]) -> None:
    """Log who does not train, and why; by one process."""
    dp_size = len(seats) // parallel.model_parallel_size
    spares = [process for process in processes if process.number not in set(seats)]
    for process in spares:
        if process.unfit is not None:
            logger.warning(f"{process} does not train: {process.unfit}.")
    if dp_size < max_dp_size:
        logger.warning(
            f"{len(processes)} processes: the data-parallel size is {dp_size} instead of max_dp_size={max_dp_size}. A "
            "step has the same samples, in more micro-batches."
        )
    if spares:
        logger.warning(f"{len(seats)} of {len(processes)} processes train; {len(spares)} are spares.")
