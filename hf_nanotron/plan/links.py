"""Seconds of collectives, by where the ranks of a group are."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from .rates import LinkRate, Rates

# What a rank receives of a collective's whole tensor, for n ranks.
RECEIVED = {
    "all_gather": lambda n: (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "all_to_all": lambda n: (n - 1) / n,
    "send": lambda n: 1.0,
}


def group_ranks(start: int, stride: int, size: int) -> range:
    """The global ranks of a group: all groups of the mesh are evenly spaced."""
    return range(start, start + stride * size, stride)


def collective_seconds(rates: Rates, operation: str, nbytes: float, ranks: Sequence[int], gpus_per_node: int) -> float:
    """Seconds of one collective.

    `latency + received bytes / rate`. Inside a host the rate is that of the measured group of the nearest size. Between
    hosts each GPU has a network adapter of its own, so a group with k ranks on each host has k times the rate of one,
    as far as the links inside allow.

    Args:
        operation: of `RECEIVED`.
        nbytes: of the whole tensor: what an all-gather makes, what a reduce-scatter takes, what a rank sends to all
            (itself among them) of an all-to-all, what is sent.
        ranks: global ranks of the group.
        gpus_per_node: rank r is on host `r // gpus_per_node`.
    """
    size = len(ranks)
    if size < 2 or nbytes <= 0:
        return 0.0
    hosts = Counter(rank // gpus_per_node for rank in ranks)
    on_host = max(hosts.values())
    inside = _nearest(rates, operation, "inside", size if len(hosts) == 1 else on_host)
    if len(hosts) == 1:
        return inside.latency + RECEIVED[operation](size) * nbytes / inside.bytes_per_second
    between = _nearest(rates, operation, "between", len(hosts))
    rate = between.bytes_per_second * (1 if operation == "send" else on_host)
    if on_host > 1:
        rate = min(rate, inside.bytes_per_second)
    return between.latency * max(1.0, math.log2(len(hosts))) + RECEIVED[operation](size) * nbytes / rate


def _nearest(rates: Rates, operation: str, place: str, ranks: int) -> LinkRate:
    """The measured rate for an operation and the nearest number of ranks; of another one, where it was not measured.

    Raises:
        ValueError: if nothing was measured there.
    """
    there = [link for link in rates.links if link.place == place]
    if not there:
        where = {"inside": "between GPUs of a host", "between": "between hosts"}[place]
        raise ValueError(
            f"the rates of {rates.gpu!r} have no link {where}, which this layout needs: measure it with `torchrun "
            "--nproc-per-node N -m hf_nanotron.cli bench --rates OUT.json` (on two hosts, for those between them)."
        )
    own = [link for link in there if link.operation == operation] or there
    return min(own, key=lambda link: (abs(math.log2(link.ranks / max(2, ranks))), link.ranks))
