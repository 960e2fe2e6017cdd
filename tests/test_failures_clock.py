"""The simulated clock of failures, beside the closed forms of Daly and Young, and the table that a page shows of it."""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from benchmark_scripts import scripts

PAGE = Path(__file__).parent.parent / "docs" / "faults.md"


@pytest.fixture(scope="module")
def clock() -> Iterator[argparse.Namespace]:
    with scripts(["failures"]) as modules:
        yield modules.failures


@pytest.mark.parametrize(
    ("step", "every", "standstill", "restart", "mean"),
    [(0.1, 1000, 5.0, 30.0, 600.0), (0.5, 400, 20.0, 0.0, 3600.0), (0.1, 300, 0.0, 60.0, 300.0)],
)
def test_mean_is_daly(
    clock: argparse.Namespace, step: float, every: int, standstill: float, restart: float, mean: float
) -> None:
    """Many failures a run; steps are short, so that a part of one is nothing."""
    cluster = clock.Cluster(step, mean)
    strategy = clock.Strategy("simple", every, standstill, restart)
    values = [clock.goodput(cluster, strategy, 400 * mean, seed) for seed in range(60)]
    error = statistics.stdev(values) / math.sqrt(len(values))
    expected = clock.closed_form(cluster, strategy)
    assert 0 < expected < 1 and error < 0.004
    assert abs(statistics.mean(values) - expected) < 4 * error + 1e-3, (statistics.mean(values), expected, error)


def test_best_interval_is_youngs(clock: argparse.Namespace) -> None:
    """Both ways from it goodput falls, in the closed form and on the clock."""
    cluster = clock.Cluster(1.0, 3600.0)
    best = clock.best_steps(cluster, clock.Strategy("x", 1, 10.0, 30.0))
    assert best.every == 269  # sqrt(2 * 10 * 3600) = 268.3
    for other in (best.every // 3, best.every * 3):
        worse = replace(best, every=other)
        assert clock.closed_form(cluster, worse) < clock.closed_form(cluster, best)
        mean = [statistics.mean(clock.goodput(cluster, each, 2e6, seed) for seed in range(8)) for each in (worse, best)]
        assert mean[0] < mean[1]


def test_without_failures_only_snapshots_cost(clock: argparse.Namespace) -> None:
    cluster = clock.Cluster(2.0, 1e15)
    assert clock.goodput(cluster, clock.Strategy("x", 50, 25.0, 60.0), 1e6, 0) == pytest.approx(0.8, abs=1e-3)


def test_what_is_not_whole_does_not_count(clock: argparse.Namespace) -> None:
    """By hand: cycles of 4 steps of 2 s and a standstill of 1 s, whole 3 s later."""
    strategy = clock.Strategy("x", 4, 1.0, 0.0, lag=3.0)
    for seconds, expected in [
        (7.9, (3.95, 0)),
        (9.0, (4, 0)),
        (11.9, (5.45, 0)),
        (12.0, (5.5, 4)),
        (20.9, (8 + 1.45, 4)),
    ]:
        assert clock.progress(seconds, strategy, 2.0) == pytest.approx(expected)
    with pytest.raises(
        ValueError, match="x: a snapshot takes 9.0 s to be whole, but the next one begins after 4 steps"
    ):
        clock.goodput(clock.Cluster(2.0, 100.0), replace(strategy, lag=9.0), 1e3, 0)


def test_lost_nodes(clock: argparse.Namespace) -> None:
    """Where each failure takes one of two nodes for long, a shrunk job has half its speed, one with spares all."""
    cluster = clock.Cluster(1.0, 1e6, nodes=2, nodes_lost=1.0, repair=1e12)
    shrunk = clock.Strategy("x", 10, 0.0, 0.0)
    spared = replace(shrunk, spares=10**6)
    for seed in range(3):
        assert clock.goodput(cluster, spared, 1e8, seed) == pytest.approx(1.0, abs=1e-3)
        assert clock.goodput(cluster, shrunk, 1e8, seed) == pytest.approx(0.5, abs=0.03)
        assert clock.goodput(replace(cluster, repair=1e6), replace(shrunk, shrinks=False), 1e8, seed) < 0.62


def test_table_of_the_page(clock: argparse.Namespace) -> None:
    """Seeds are fixed: the page has what the script prints, and memory snapshots reach 97 %."""
    options = clock.make_parser().parse_args([])
    printed = clock.report(options)
    assert printed in PAGE.read_text(encoding="utf-8"), printed
    cluster = clock.Cluster(options.step, 3600.0)
    memory = clock.strategies(cluster, options.parameters, options.gpus, options.start, options.in_process)[3]
    assert memory.name == "memory snapshots"
    assert clock.rows(cluster, [memory], 30 * 86400.0, 50)[0].median >= 0.97
