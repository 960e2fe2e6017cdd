"""Whether the ranks of one replica have read the same samples, and samples that the model accepts.

Every rank reads its batches itself, as under DDP, and all ranks of one model replica must read the same: otherwise a
later pipeline stage uses labels of other samples, and tensor-parallel ranks look up other tokens. So each window is
hashed on the host, and the hashes are added to the sum that counts the tokens of the step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ..ops.host_copy import HostCopy
from ..parallel.batch import DOMAIN
from ..parallel.early_sum import EarlySum, EarlySums
from ..parallel.mesh import Group, ParallelMesh
from ..parallel.rehearsal import is_rehearsal
from .columns import check_columns
from .hashing import tensor_hashes, window_hash
from .vocabulary import ADVICE, ForeignId, Vocabulary, foreign_id

Window = Sequence[Mapping[str, Any]]

# What the sum holds: a number is that of the whole job.
COUNT, DISAGREEMENT, FAULTS, SIZE, SQUARED_SIZE, OTHER_ORDER, WITH_DOMAINS = range(7)


class WindowCheck:
    """Sums what ranks report of their windows, and raises one error on all ranks of `group` for an invalid window.

    `group` consists of whole replicas.
    """

    def __init__(self, mesh: ParallelMesh, vocabulary: Vocabulary, group: Group | None = None) -> None:
        self.mesh, self.vocabulary = mesh, vocabulary
        self._sums = EarlySums(group or mesh.early, mesh.device)

    def start(
        self,
        window: Window,
        count: int = 0,
        failure: Exception | None = None,
        after: HostCopy | None = None,
        order: int = 0,
    ) -> PendingWindow:
        """Report this rank's window. All ranks of the group together.

        Args:
            window: micro-batches, or none. A batch that a loader has put on the device is copied back, which waits for
                it.
            count: to be summed over the data-parallel ranks.
            failure: why the window could not be read.
            after: see `EarlySums.start`.
            order: `DataParallelLoader.order`; 0 without such a loader.
        """
        group = self._sums.group
        model, leads = self.mesh.model, self.mesh.model.rank == 0
        foreign: list[tuple[int, ForeignId]] = []
        disagreement = 0
        try:
            window = [on_host(batch) for batch in window]
            for batch in window:
                check_columns(batch)
            foreign = [(n, found) for n, batch in enumerate(window) if (found := foreign_id(batch, self.vocabulary))]
            if model.size > 1:  # zero in the sum if all have the leader's; the seed keeps replicas from cancelling out
                own = window_hash(window, self.mesh.dp_rank)
                disagreement = (model.size - 1) * own if leads else -own
        except Exception as error:  # an invalid batch: reported to all ranks, like one that could not be read
            failure = failure or error
        other_order = (group.size - 1) * order if group.rank == 0 else -order
        if is_rehearsal():  # the others say the same, and their sum is known here
            count, leads, disagreement, other_order = count * self.mesh.dp_size, True, 0, 0
        faults = int(bool(foreign or failure))
        domains = has_domains(window)
        sent = [count * leads, disagreement, faults, len(window), len(window) ** 2, other_order, int(domains)]
        return PendingWindow(window, foreign, failure, order, self._sums.start(sent, after))

    def judge(self, pending: PendingWindow, where: str) -> list[int]:
        """The sums, in the order of this module's constants. All ranks of the group together.

        `where` names the window in an error, such as `"optimizer step 3"`.

        Raises:
            ValueError: on every rank, if ranks of one replica have read different samples, if ranks have different
                numbers of micro-batches, if some alone have a column `domain`, or an id is not in the vocabulary.
            RuntimeError: if reading failed on another rank. Where it failed, its own error.
        """
        total = pending.sum.read()
        group = self._sums.group
        if is_rehearsal() and total[FAULTS] == 0:
            return total
        same_size = group.size * total[SQUARED_SIZE] == total[SIZE] ** 2
        same_columns = total[WITH_DOMAINS] in (0, group.size)
        if total[DISAGREEMENT] == total[OTHER_ORDER] == total[FAULTS] == 0 and same_size and same_columns:
            return total
        mine = pending.report(self.mesh)
        reports: list[Any] = [mine]
        if group.size > 1:
            reports = [None] * group.size
            dist.all_gather_object(reports, mine, group=group.handle)
        if pending.failure is not None:
            raise pending.failure
        raise explain(reports, where)


@dataclass
class PendingWindow:
    """A window that ranks have reported, and whose sums have not been read yet."""

    window: Window
    foreign: list[tuple[int, ForeignId]]
    failure: Exception | None
    order: int
    sum: EarlySum

    @property
    def count(self) -> torch.Tensor:
        """`count` over the data-parallel ranks, 0-dim, for the current stream."""
        return self.sum.element(COUNT)

    def report(self, mesh: ParallelMesh) -> WindowReport:
        hashes = []
        if self.failure is None:
            hashes = [tensor_hashes(batch) for batch in self.window]
        return WindowReport(
            rank=mesh.rank,
            replica=mesh.dp_rank,
            size=len(self.window),
            hashes=hashes,
            foreign=self.foreign,
            order=self.order,
            domains=has_domains(self.window),
            failure=None if self.failure is None else f"{type(self.failure).__name__}: {self.failure}",
            failed=getattr(self.failure, "failed", FAILED),
        )


@dataclass
class WindowReport:
    """What one rank says of a window that something is wrong with."""

    rank: int
    replica: int
    size: int
    hashes: list[dict[str, int]]
    foreign: list[tuple[int, ForeignId]]
    order: int
    domains: bool
    failure: str | None
    failed: str  # what has


FAILED = "reading the data failed on rank"  # unless the exception has an attribute `failed` that says another thing

WHY = (
    "Each rank runs the script and reads the data itself, and the ranks of a replica (its tensor-, context- and "
    "pipeline-parallel ranks) must read the same samples. They do not if rows are shuffled or split without a seed "
    "(Dataset.shuffle(), train_test_split(), stream.shuffle(), random.shuffle before the trainer is made), if an order "
    "or a crop comes from the operating system's entropy, if a file was still being written while some ranks read it, "
    "or if a loader distributes its batches over all processes (DistributedSampler over args.world_size). Set a seed "
    "(shuffle(seed=42)), save the prepared data once and load it on every rank, draw from torch's, NumPy's or Python's "
    "global generator, which Trainer seeds with args.seed, and distribute over data-parallel ranks "
    "(trainer.mesh.dp_rank of args.dp_size)."
)


WHY_DEALT = (
    "Every rank reads all of the data in one order, and the trainer distributes it over data-parallel ranks. With a "
    "different order or a different part on each rank (split_dataset_by_node), samples would be trained on twice or "
    "never. Seed a stream or a sampler alike on every rank, and let it yield all samples on every rank."
)


def has_domains(window: Window) -> bool:
    """Whether a batch says of which domain its rows are, so that ranks sum losses by domain."""
    return any(isinstance(batch, Mapping) and batch.get(DOMAIN) is not None for batch in window)


def on_host(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """A batch whose tensors can be read without waiting."""
    copies = {k: HostCopy(v) for k, v in batch.items() if isinstance(v, torch.Tensor) and v.device.type != "cpu"}
    return {**batch, **{name: copy.read() for name, copy in copies.items()}} if copies else batch


def explain(reports: Sequence[WindowReport], where: str) -> Exception:
    """The error for windows of which ranks tell these `reports`, the same on every rank."""
    if failed := [report for report in reports if report.failure is not None]:
        return RuntimeError(f"{where}: {failed[0].failed} {failed[0].rank}: {failed[0].failure}")
    for replica in sorted({report.replica for report in reports}):
        ranks = [report for report in reports if report.replica == replica]
        if different := [report for report in ranks[1:] if report.hashes != ranks[0].hashes]:
            return ValueError(f"{where}: {_difference(ranks[0], different[0], ranks)}. {WHY}")
    for report in reports:
        for number, found in report.foreign:
            place = f"micro-batch {number + 1} of {report.size}, " if report.size > 1 else ""
            whose = say_ranks([other.rank for other in reports if other.replica == report.replica])
            return ValueError(f"{where}, {place}{whose}, {found}. {ADVICE}")
    if len({report.size for report in reports}) == 1:
        other = next((report for report in reports if report.order != reports[0].order), None)
        if other is None:
            one, none = (next(report.rank for report in reports if report.domains is has) for has in (True, False))
            return ValueError(
                f"{where}: the batches of rank {one} have a column {DOMAIN!r}, and those of rank {none} have not. "
                "Give the rows of all ranks that column, or of none."
            )
        differ = f"ranks {reports[0].rank} and {other.rank}"
        return ValueError(f"{where}: {differ} of different replicas read the data in different orders. {WHY_DEALT}")
    sizes = ", ".join(f"{report.size} on rank {report.rank}" for report in reports[:16])
    return ValueError(
        f"{where}: ranks have different numbers of micro-batches ({sizes}): the data of some ended earlier. Every "
        "data-parallel rank needs the same number of batches."
    )


def _difference(first: WindowReport, other: WindowReport, ranks: Sequence[WindowReport]) -> str:
    """Which of two ranks' micro-batches differ first, and in what."""
    replica = say_ranks([report.rank for report in ranks])
    said = f"ranks {first.rank} and {other.rank} of one replica ({replica}) read different samples"
    if first.size != other.size:
        return f"{said}: {first.size} micro-batches and {other.size}"
    for number, (one, two) in enumerate(zip(first.hashes, other.hashes, strict=True), 1):
        names = [name for name in sorted(one.keys() | two.keys()) if one.get(name) != two.get(name)]
        if names:
            return f"{said}, first in micro-batch {number} of {first.size} ({', '.join(names)})"
    return said


def say_ranks(ranks: Sequence[int]) -> str:
    """`"rank 3"`, or `"ranks 0, 1, 2"`; of many, the first."""
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank{'s' * (len(ranks) > 1)} {shown}"
