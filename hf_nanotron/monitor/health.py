"""Is a GPU slow or wrong, or a link slow? Measured before the first step, and compared with the median of the job.

Each rank multiplies matrices, copies memory, and exchanges messages with its neighbours: with the ranks beside it on
its host, and with the rank of its place on the hosts before and after. Products are of small integers, so that every
device must get the same numbers.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from transformers.utils import logging

from ..parallel.mesh import ParallelMesh
from ..parallel.node import host_number, rank_on_node
from ..parallel.p2p import start_together
from .ranks import exchange

logger = logging.get_logger(__name__)

SLOW = {"products": 0.85, "memory": 0.85, "inside": 0.7, "between": 0.7}  # of the median: less is named
NAMED = 8


@dataclass(frozen=True)
class Sizes:
    """
    Args:
        side: of the matrices.
        seconds: for which products, and copies, run.
        copied: bytes of a copy.
        sent: bytes of a message.
    """

    side: int
    seconds: float
    copied: int
    sent: int


SIZES = {"cuda": Sizes(8192, 0.3, 2**29, 2**26), "cpu": Sizes(256, 0.02, 2**22, 2**18)}
REPEATS = 5  # of a message


@dataclass(frozen=True)
class Odd:
    """What is not as it is elsewhere.

    Args:
        figure: of `SLOW`, or "numbers".
        ranks: one, or the two ends of a link; all, where no number is that of most.
        rate, median: bytes/s or FLOP/s; 0 for numbers.
    """

    figure: str
    ranks: tuple[int, ...]
    rate: float = 0.0
    median: float = 0.0

    def __str__(self) -> str:
        if self.figure == "numbers" and len(self.ranks) > 1:
            return "ranks multiply matrices with different results, and none is that of most: test their devices"
        if self.figure == "numbers":
            return f"rank {self.ranks[0]} multiplies matrices with another result than most: take its device out"
        if self.figure in ("products", "memory"):
            unit, what = (1e12, "TFLOP/s") if self.figure == "products" else (1e9, "GB/s")
            name = "products" if self.figure == "products" else "copies on the device"
            who = f"rank {self.ranks[0]}: {name} at"
        else:
            unit, what = 1e9, "GB/s"
            who = f"the link of ranks {self.ranks[0]} and {self.ranks[1]} ({self.figure} hosts):"
        return f"{who} {self.rate / unit:.3g} {what}, the median is {self.median / unit:.3g}"


def check_health(mesh: ParallelMesh) -> list[Odd]:
    """Measure, and have rank 0 log what is found: a line, and a warning for what is odd. All ranks together.

    Nothing is odd in a job of one process, which has nothing to compare.

    Returns:
        What is odd, the same on every rank.
    """
    began = time.perf_counter()
    sizes = SIZES.get(mesh.device.type, SIZES["cpu"])
    own = _device_figures(mesh.device, sizes)
    own["host"], own["local"] = float(host_number()), float(rank_on_node())
    of_ranks = exchange(mesh, own)
    places = list(zip(of_ranks["host"], of_ranks["local"], strict=True))
    links: dict[tuple[str, int, int], float] = {}
    for kind, pairs in rounds(places):
        mine = next((pair for pair in pairs if mesh.rank in pair), None)
        seconds = 0.0
        if mine is not None:
            seconds = _message_seconds(mesh, sum(mine) - mesh.rank, sizes.sent)
        told = exchange(mesh, {"seconds": seconds})["seconds"]
        links |= {(kind, *pair): sizes.sent / max(told[rank] for rank in pair) for pair in pairs}
    odd = find_odd(of_ranks, links)
    if mesh.rank == 0:
        logger.info(_summary(of_ranks, links, time.perf_counter() - began))
        if odd:
            more = f"; and {len(odd) - NAMED} more" if len(odd) > NAMED else ""
            logger.warning(f"health check: {'; '.join(map(str, odd[:NAMED]))}{more}.")
    return odd


def rounds(places: Sequence[tuple[float, float]]) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    """Pairs of ranks that exchange messages at the same time, so that each is in one pair at most: neighbours on each
    host, then ranks of the same place on hosts that follow each other.

    Args:
        places: host and local rank of each rank.
    """
    hosts: dict[float, list[int]] = {}
    for rank, (host, _) in enumerate(places):
        hosts.setdefault(host, []).append(rank)
    columns: dict[float, list[int]] = {}
    for members in hosts.values():
        for rank in members:
            columns.setdefault(places[rank][1], []).append(rank)
    for kind, lines in (("inside", hosts.values()), ("between", columns.values())):
        for first in (0, 1, 2):
            pairs = [pair for line in lines for pair in _pairs(line, first)]
            if pairs:
                yield kind, pairs


def _pairs(line: Sequence[int], first: int) -> list[tuple[int, int]]:
    """Of the ranks of a ring: those that begin at even places, at odd ones, and the last with the first."""
    if first == 2:
        return [(line[0], line[-1])] if len(line) > 2 else []
    return [(line[at], line[at + 1]) for at in range(first, len(line) - 1, 2)]


def find_odd(of_ranks: Mapping[str, Sequence[float]], links: Mapping[tuple[str, int, int], float]) -> list[Odd]:
    """Who is slower than most of its kind, and who computes other numbers; the worst first."""
    numbers = of_ranks["checksum"]
    usual, count = Counter(numbers).most_common(1)[0]
    found = [Odd("numbers", (rank,)) for rank, value in enumerate(numbers) if value != usual]
    if count * 2 <= len(numbers) and found:
        found = [Odd("numbers", tuple(range(len(numbers))))]
    slow = []
    for figure in ("products", "memory"):
        slow += _slow(figure, {(rank,): rate for rank, rate in enumerate(of_ranks[figure])})
    for kind in ("inside", "between"):
        slow += _slow(kind, {tuple(pair): rate for (name, *pair), rate in links.items() if name == kind})
    return found + sorted(slow, key=lambda odd: odd.rate / odd.median)


def _slow(figure: str, rates: Mapping[tuple[int, ...], float]) -> list[Odd]:
    if len(rates) < 2:
        return []
    # Of two the faster one is what the other should be.
    median = statistics.median_high(rates.values())
    return [Odd(figure, ranks, rate, median) for ranks, rate in rates.items() if rate < SLOW[figure] * median]


def _device_figures(device: torch.device, sizes: Sizes) -> dict[str, float]:
    """FLOP/s of products, bytes/s of copies (read and written), and a sum that is the same on every sound device."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    side = sizes.side
    row = torch.arange(side, device=device, dtype=torch.int32)[:, None]
    column = row.T
    a = (((row % 101) * (column % 97) + 3 * (row % 7) + 5 * (column % 11)) % 3 - 1).to(dtype)
    b = a.T.contiguous()
    # Sums of 256 numbers from -1 to 1 are exact in bf16, and the sum of their squares in 64 bits.
    checksum = float((a[:, :256] @ b[:256]).to(torch.int64).square().sum())
    products = 2.0 * side**3 / _seconds_of(lambda: a @ b, device, sizes.seconds)
    source = torch.zeros(sizes.copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    memory = 2.0 * sizes.copied / _seconds_of(lambda: target.copy_(source), device, sizes.seconds / 3)
    return {"products": products, "memory": memory, "checksum": checksum}


def _seconds_of(call: Callable[[], Any], device: torch.device, lasting: float) -> float:
    """Of one call, in the second half of so many seconds of calls: a GPU that is hot slows down under load."""
    call()
    halves = []
    for _ in range(2):
        _wait(device)
        began, calls = time.perf_counter(), 0
        while calls < 3 or time.perf_counter() - began < lasting / 2:
            call()
            calls += 1
            if calls % 4 == 0:
                _wait(device)
        _wait(device)
        halves.append((time.perf_counter() - began) / calls)
    return halves[-1]


def _message_seconds(mesh: ParallelMesh, peer: int, nbytes: int) -> float:
    """Of an exchange of messages with another rank, both ways at once."""
    out, into = (torch.zeros(nbytes, dtype=torch.uint8, device=mesh.device) for _ in range(2))
    handle = mesh.world.handle

    def both() -> None:
        operations = [dist.P2POp(dist.isend, out, peer, handle), dist.P2POp(dist.irecv, into, peer, handle)]
        if mesh.rank > peer:
            operations.reverse()
        for work in start_together(operations):
            work.wait()
        _wait(mesh.device)

    both()
    best = float("inf")
    for _ in range(REPEATS):
        began = time.perf_counter()
        both()
        best = min(best, time.perf_counter() - began)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _summary(
    of_ranks: Mapping[str, Sequence[float]], links: Mapping[tuple[str, int, int], float], seconds: float
) -> str:
    def said(rates: Sequence[float], unit: float, what: str) -> str:
        least, median, most = (value / unit for value in (min(rates), statistics.median(rates), max(rates)))
        return f"{least:.3g} to {most:.3g} {what} (median {median:.3g})"

    parts = [
        f"products {said(of_ranks['products'], 1e12, 'TFLOP/s')}",
        f"memory {said(of_ranks['memory'], 1e9, 'GB/s')}",
    ]
    for kind in ("inside", "between"):
        if rates := [rate for (name, _, _), rate in links.items() if name == kind]:
            parts.append(f"links {kind} hosts {said(rates, 1e9, 'GB/s')}")
    return f"health check in {seconds:.1f} s: {'; '.join(parts)}"
