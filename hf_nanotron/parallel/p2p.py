"""Messages between pairs of ranks that start together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

BATCH = "exchange of messages"  # what profiles and records call a batch


def start_together(operations: Sequence[dist.P2POp]) -> list[dist.Work]:
    """Start all sends and receives at once. NCCL returns one handle for all of them, gloo one for each."""
    if not operations:
        return []
    with torch.autograd.profiler.record_function(BATCH):
        return dist.batch_isend_irecv(list(operations))
