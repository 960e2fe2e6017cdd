"""A job in which this process is one rank and the others are imagined."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState

PORT = "29500"  # nothing listens or connects


@contextlib.contextmanager
def fake_world(rank: int, world_size: int, gpus_per_node: int) -> Iterator[None]:
    """Be `rank` of a job of `world_size` imagined ranks, as torchrun would say it. The process is to have no job.

    Raises:
        RuntimeError: if this process is part of a job.
    """
    if dist.is_initialized():
        raise RuntimeError("a plan is made by a process that is no rank of a job; start it without torchrun.")
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

    said = {
        "RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank % gpus_per_node, "LOCAL_WORLD_SIZE": gpus_per_node,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": PORT,
    }  # fmt: skip
    before = {name: os.environ.get(name) for name in said}
    state = dict(PartialState._shared_state)
    PartialState._reset_state()
    os.environ.update({name: str(value) for name, value in said.items()})
    try:
        dist.init_process_group("cpu:fake,meta:fake", rank=rank, world_size=world_size, store=FakeStore())
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        PartialState._shared_state.update(state)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
