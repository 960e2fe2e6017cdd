"""A simulated clock: how much of its time a job spends on training where GPUs fail, by how it restarts.

    python examples/benchmarks/failures.py
    python examples/benchmarks/failures.py --gpus 16384 --hours-between-failures 3.1 --parameters 405e9 --seeds 500

Failures come at exponential times, also while the job restarts. After one it stands for `restart` seconds, and goes on
behind the newest snapshot that was whole. Then

    goodput = optimizer steps that count x seconds of a step without failures / seconds that have passed

where a step counts if it was not lost. Printed are the median over the seeds, and from the 5th to the 95th percentile.
Without lag, and with one kind of failure, the mean is Daly's closed form (J. T. Daly, A higher order estimate of the
optimum checkpoint interval for restart dumps, 2006), and the best interval about Young's (J. W. Young, A first order
approximation to the optimum checkpoint interval, 1974): `closed_form`, `best_interval`. Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

BYTES_OF_STATE = 12  # of a parameter: fp32 master and two moments
BYTES_ON_DISK = 14  # and the bf16 weight

# Measured, with where it is written down.
# NOTEBOOK, "Saving and loading": async_save of 8.05 GiB a rank, 0.23 s of standstill and a next step 0.37 s longer
COPIED_GB_PER_SECOND = 14.4
DISK_GB_PER_SECOND = 1.4  # the same: of a node, with fsync
READ_GB_PER_SECOND = 2.9  # the same: 16.1 GiB checked and read in 6.0 s, of a node
# Assumed: of a rank, from its copy into shared memory, with checksums.
SHARED_GB_PER_SECOND = 1.0
# Published.
HOURS_BETWEEN_FAILURES = 1.0  # of 64 GPUs: Clockwork's comparison of ways to restart has a failure in 45 to 75 minutes
# (Llama 3, arXiv:2407.21783: 419 unexpected interruptions in 54 days on 16,384 GPUs, one in 3.1 hours.)


@dataclass(frozen=True)
class Strategy:
    """How a job goes on after a failure. Seconds.

    Attributes:
        name: of its row.
        every: steps from one snapshot to the next.
        standstill: of the training, for a snapshot.
        lag: from the end of the standstill until the snapshot can be gone on from.
        restart: from a failure to the first step after it.
        restart_of_node: the same, where the failure takes a node.
        spares: nodes that stand ready.
        shrinks: whether the job goes on with fewer nodes; else it waits until the lost one is back.
    """

    name: str
    every: int
    standstill: float
    restart: float
    lag: float = 0.0
    restart_of_node: float | None = None
    spares: int = 0
    shrinks: bool = True


@dataclass(frozen=True)
class Cluster:
    """What a job runs on. Seconds.

    Attributes:
        step: of an optimizer step on all nodes.
        between_failures: mean, of the whole job.
        nodes: that train.
        nodes_lost: share of the failures that take a node away.
        repair: until a lost node, or one in its place, is there.
    """

    step: float
    between_failures: float
    nodes: int = 8
    nodes_lost: float = 0.0
    repair: float = 3600.0


def goodput(cluster: Cluster, strategy: Strategy, seconds: float, seed: int) -> float:
    """Of one job over so many seconds.

    Raises:
        ValueError: for a snapshot that is not whole before the next one begins.
    """
    if strategy.every < 1 or min(cluster.step, cluster.between_failures, seconds) <= 0:
        raise ValueError("a step, the time between failures, the run and the steps between snapshots are above 0.")
    if strategy.lag > strategy.every * cluster.step:
        raise ValueError(
            f"{strategy.name}: a snapshot takes {strategy.lag:.1f} s to be whole, but the next one begins after "
            f"{strategy.every} steps = {strategy.every * cluster.step:.1f} s."
        )
    draw = random.Random(seed)
    now, kept, away = 0.0, 0.0, list[float]()  # away: when lost nodes are back
    while now < seconds:
        away = [back for back in away if back > now]
        missing = max(len(away) - strategy.spares, 0)
        step = cluster.step * cluster.nodes / max(cluster.nodes - missing, 1)
        failure = now + draw.expovariate(1 / cluster.between_failures)
        # A node that is back joins by a restart of its own, with nothing lost but the time.
        joins = min(away) if missing else math.inf
        end = min(failure, joins, seconds)
        done, saved = progress(end - now, strategy, step)
        kept += done if end == seconds or end == joins else saved
        now = end
        if end == seconds:
            break
        pause = strategy.restart
        if end == failure and draw.random() < cluster.nodes_lost:
            pause = strategy.restart if strategy.restart_of_node is None else strategy.restart_of_node
            if strategy.shrinks or len(away) < strategy.spares:
                away.append(now + cluster.repair)
            else:
                pause += cluster.repair
        now = restarted(now, pause, cluster.between_failures, draw)
    return kept * cluster.step / max(now, seconds)


def restarted(now: float, pause: float, between_failures: float, draw: random.Random) -> float:
    """When a restart is over, which begins anew with each failure that falls into it."""
    while (failure := draw.expovariate(1 / between_failures)) < pause:
        now += failure
    return now + pause


def progress(seconds: float, strategy: Strategy, step: float) -> tuple[float, float]:
    """Steps that are done after so many seconds without a failure, and those of them behind the newest whole
    snapshot.
    """
    cycle = strategy.every * step + strategy.standstill
    cycles = int(seconds // cycle)
    done = cycles * strategy.every + min((seconds - cycles * cycle) / step, strategy.every)
    whole = max(int((seconds - strategy.lag) // cycle), 0)
    return done, whole * strategy.every


def closed_form(cluster: Cluster, strategy: Strategy) -> float:
    """Daly's goodput of a strategy without lag, where no node is lost."""
    mean, work = cluster.between_failures, strategy.every * cluster.step
    return work / (mean * math.exp(strategy.restart / mean) * math.expm1((work + strategy.standstill) / mean))


def best_interval(standstill: float, between_failures: float) -> float:
    """Young's seconds of work between two snapshots."""
    return math.sqrt(2 * standstill * between_failures)


def best_steps(cluster: Cluster, strategy: Strategy) -> Strategy:
    """With the best number of steps between snapshots, which are whole in time."""
    seconds = max(best_interval(strategy.standstill, cluster.between_failures), strategy.lag)
    return replace(strategy, every=max(math.ceil(seconds / cluster.step), 1))


@dataclass(frozen=True)
class Row:
    """Median, 5th and 95th percentile of the goodput over the seeds."""

    strategy: Strategy
    median: float
    low: float
    high: float


def rows(cluster: Cluster, strategies: Sequence[Strategy], seconds: float, seeds: int) -> list[Row]:
    """Of each strategy; all meet the same seeds."""
    found = []
    for strategy in strategies:
        values = sorted(goodput(cluster, strategy, seconds, seed) for seed in range(seeds))
        low, high = (values[min(int(share * len(values)), len(values) - 1)] for share in (0.05, 0.95))
        found.append(Row(strategy, statistics.median(values), low, high))
    return found


def strategies(cluster: Cluster, parameters: float, gpus: int, start: float, in_process: float) -> list[Strategy]:
    """Those that are compared, for a model of so many parameters whose state all GPUs share.

    Args:
        start: seconds from a failure to the first step, without reading the state.
        in_process: seconds that the same takes where processes live on.
    """
    nodes = cluster.nodes
    gigabytes = parameters * BYTES_OF_STATE / gpus / 1e9  # of a rank
    copied, shared = gigabytes / COPIED_GB_PER_SECOND, gigabytes / SHARED_GB_PER_SECOND
    written = parameters * BYTES_ON_DISK / nodes / 1e9 / DISK_GB_PER_SECOND
    read = parameters * BYTES_ON_DISK / nodes / 1e9 / READ_GB_PER_SECOND
    half_hour = max(round(1800 / cluster.step), 1)
    disk = Strategy("disk, synchronous save", 1, written, start + read)
    behind = Strategy("disk, asynchronous save", 1, copied, start + read, lag=written)
    memory = Strategy("memory snapshots", 1, copied, start, lag=shared)
    return [
        replace(disk, name="disk, synchronous save each half hour", every=half_hour),
        best_steps(cluster, disk),
        best_steps(cluster, behind),
        best_steps(cluster, memory),
        best_steps(cluster, replace(memory, name="memory snapshots, processes live on", restart=in_process)),
    ]


def table(found: Sequence[Row], cluster: Cluster) -> str:
    """In Markdown."""
    lines = [
        "| restart from | a snapshot every | it stops for | restart | goodput, median (5 % to 95 %) |",
        "|---|---|---|---|---|",
    ]
    for row in found:
        each = row.strategy
        lines.append(
            f"| {each.name} | {each.every * cluster.step:.0f} s | {each.standstill:.1f} s | {each.restart:.0f} s | "
            f"{100 * row.median:.1f} % ({100 * row.low:.1f} to {100 * row.high:.1f}) |"
        )
    return "\n".join(lines)


def nodes_table(cluster: Cluster, memory: Strategy, seconds: float, seeds: int) -> str:
    """What the loss of whole nodes costs, with one spare node, with fewer ranks, and where the job waits."""
    kinds = [
        replace(memory, name="spare node", spares=1),
        replace(memory, name="dp shrinks"),
        replace(memory, name="waits until it is back", shrinks=False),
    ]
    lines = ["| one failure in five takes a node for an hour | goodput, median (5 % to 95 %) |", "|---|---|"]
    for row in rows(replace(cluster, nodes_lost=0.2), kinds, seconds, seeds):
        lines.append(
            f"| {row.strategy.name} | {100 * row.median:.1f} % ({100 * row.low:.1f} to {100 * row.high:.1f}) |"
        )
    return "\n".join(lines)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gpus", type=int, default=64, help="eight on each node")
    parser.add_argument(
        "--hours-between-failures", type=float, default=HOURS_BETWEEN_FAILURES, help="mean, of the whole job"
    )
    parser.add_argument("--parameters", type=float, default=8.03e9, help="of the model")
    parser.add_argument("--step", type=float, default=5.0, help="seconds of an optimizer step, an assumption")
    parser.add_argument(
        "--start", type=float, default=30.0, help="seconds from a failure to the next step, an assumption"
    )
    parser.add_argument("--in-process", type=float, default=10.0, help="the same, where processes live on")
    parser.add_argument("--days", type=float, default=30.0)
    parser.add_argument("--seeds", type=int, default=200)
    return parser


def report(options: argparse.Namespace) -> str:
    """Both tables."""
    nodes = max(options.gpus // 8, 1)
    cluster = Cluster(options.step, options.hours_between_failures * 3600, nodes)
    compared = strategies(cluster, options.parameters, options.gpus, options.start, options.in_process)
    seconds = options.days * 86400
    found = rows(cluster, compared, seconds, options.seeds)
    return f"{table(found, cluster)}\n\n{nodes_table(cluster, compared[3], seconds, options.seeds)}"


if __name__ == "__main__":
    print(report(make_parser().parse_args()))
