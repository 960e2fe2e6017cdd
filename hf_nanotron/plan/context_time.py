"""What context parallelism sends and copies in a layer, in seconds; which of its two ways it takes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from ..parallel.config import ParallelConfig
from ..parallel.cp.attention import device_layout
from ..parallel.cp.choice import HeadShape, by_gathering, by_heads, cheaper
from ..parallel.cp.exchange import Exchange
from ..parallel.cp.layout import filled_length, plan
from .job import Job
from .layer_work import LayerWork, ModelWork
from .links import collective_seconds, group_ranks
from .rates import Rates

# `parallel/cp/choice.py` counts in bytes of a memory of 3 TB/s, measured beside a link that takes so long for a
# gigabyte of an all-to-all of two ranks.
COPIES = 3.0e12
MEASURED_LINK = 175e9
MEASURED_MEMORY = 4.15e12


@dataclass(frozen=True)
class ContextCost:
    """How the rows of a micro-batch are shared.

    Args:
        length: tokens of a row, filled up.
        attention_share: attention of the slowest rank over the mean.
        exchange: of each window, what gathering would send; empty without context parallelism.
        mode: `cp_mode`.
        tokens: of a rank.
        size: ranks of a row.
        memory: bytes/s of copies through an index.
        link: how much longer a byte takes than on the link that was measured.
    """

    length: int
    attention_share: float
    exchange: dict[int | None, Exchange]
    mode: str
    tokens: float
    size: int
    memory: float
    link: float

    def seconds(self, layer: LayerWork) -> tuple[dict[str, float], dict[str, float]]:
        """Of one layer, forward and backward: copies and what nothing hides."""
        if self.size == 1 or not layer.heads:
            return {}, {}
        exchange = self.exchange.get(layer.window) or self.exchange[None]
        shape = HeadShape(layer.heads, layer.kv_heads, layer.key_width, layer.value_width)
        mode = cheaper(shape, self.size, self.tokens, exchange) if self.mode == "auto" else self.mode
        if mode == "heads":
            traffic = by_heads(shape, self.size, self.tokens)
        else:
            traffic = by_gathering(shape, self.size, self.tokens, exchange)
        copies, shown = traffic.copied / self.memory, traffic.sent * self.link / COPIES
        third = {"copies": copies / 3, "cp": shown / 3}
        return third, {name: 2 * value for name, value in third.items()}


def context_cost(job: Job, parallel: ParallelConfig, work: ModelWork, rates: Rates) -> ContextCost:
    """The cost of sharing rows: nothing with `cp_size=1`."""
    split = parallel.tp_size if parallel.sequence_parallel else 1
    if parallel.cp_size == 1:
        length = -(-job.sequence_length // split) * split
        return ContextCost(length, 1.0, {}, parallel.cp_mode, job.samples * length, 1, rates.memory, 1.0)
    size = parallel.cp_size
    length = filled_length(job.sequence_length, size, split)
    documents = [*(job.documents or (job.sequence_length,))]
    documents += [length - job.sequence_length] if length > job.sequence_length else []
    bounds = np.cumsum([0, *(documents * job.samples)])
    windows: list[int | None] = [
        None if layer.window is None or layer.window >= length else layer.window for layer in work.layers
    ]
    weights = [
        sum(math.prod(shape) for shape in (*layer.mixing, *layer.mlp)) // max(1, 2 * layer.heads * layer.key_width)
        for layer in work.layers
        if layer.heads
    ]
    layout = plan(bounds, job.samples, length, size, windows, other_work=sum(weights))
    dealt = device_layout(layout, 0, torch.device("cpu"), tuple(dict.fromkeys((*windows, None))))
    share = float(layout.work.max() / max(1.0, layout.work.mean()))
    ranks = group_ranks(0, parallel.tp_size, size)
    nbytes = 1e9 * size / (size - 1)
    taken = collective_seconds(rates, "all_to_all", nbytes, ranks, job.gpus_per_node)
    memory = COPIES * rates.memory / MEASURED_MEMORY
    tokens = job.samples * length / size
    return ContextCost(
        length, share, dict(dealt.exchanges), parallel.cp_mode, tokens, size, memory, taken * MEASURED_LINK / 1e9
    )
