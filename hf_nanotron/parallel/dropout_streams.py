"""Dropout streams that do not depend on the layout.

Every decoder layer draws from a stream seeded by (seed, step, micro-batch, layer), so masks are the same for every
pipeline layout, schedule and data-parallel size and after a resume. Where tensors are sharded over tensor- or
context-parallel ranks, each rank has its own stream. Activation recomputation replays the draws:
`torch.utils.checkpoint` restores the generators, from which every seed here is derived.
"""

from __future__ import annotations

import functools
import hashlib
import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from .mesh import Group


def seed_from(*parts: object) -> int:
    """A 62-bit seed that depends on every part, the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 2


class GeneratorState:
    """The default generators of the CPU and of the current CUDA device, as they were when this was made."""

    def __init__(self) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda)


def seed_generators(seed: int) -> None:
    """Seed the CPU generator and that of the current CUDA device."""
    torch.random.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


def share_host_generators(group: Group) -> None:
    """Let the host's generators (torch's, NumPy's, Python's) on all ranks continue from those of the group's first."""
    if group.size == 1:
        return
    states = [(torch.get_rng_state(), np.random.get_state(), random.getstate())]
    dist.broadcast_object_list(states, group.ranks[0], group=group.handle)
    torch.set_rng_state(states[0][0])
    np.random.set_state(states[0][1])
    random.setstate(states[0][2])


class dropout_stream:  # noqa: N801 - used like a function
    """Context: draw from a stream of rank `tp_rank`'s own; afterwards the default stream has moved by one number."""

    def __init__(self, tp_rank: int) -> None:
        self.tp_rank = tp_rank

    def __enter__(self) -> None:
        draw = int(torch.randint(2**62, ()).item())  # CPU generator: no device synchronisation
        self._state = GeneratorState()
        seed_generators(seed_from(draw, self.tp_rank))

    def __exit__(self, *_: object) -> None:
        self._state.restore()


class LayerStreams:
    """Seeds the stream of each decoder layer from where the run stands.

    `begin` is told the position before a micro-batch's forward; `end` puts the generators back to where the first
    `begin` found them.

    Args:
        part: which part of a tensor between the layers this rank has; each has a stream of its own.
        part_before: the same of what comes before the layers.
    """

    def __init__(self, seed: int, part: int, part_before: int = 0) -> None:
        self.seed, self.part, self.part_before = seed, part, part_before
        self._position: tuple[int, int] | None = None
        self._before: GeneratorState | None = None

    def attach(self, layer: nn.Module, index: int) -> None:
        layer.register_forward_pre_hook(functools.partial(self._seed, index))

    def _seed(self, index: int, module: nn.Module, args: tuple[Any, ...]) -> None:
        if module.training and self._position is not None:
            seed_generators(seed_from(self.seed, *self._position, index, self.part))

    def begin(self, step: int, micro_batch: int) -> None:
        self._position = (step, micro_batch)
        self._before = self._before or GeneratorState()
        # For what comes before the layers: whole rows, but for context parallelism.
        before = (self.part_before,) if self.part_before else ()
        seed_generators(seed_from(self.seed, step, micro_batch, *before))

    def end(self) -> None:
        self._position = None
        if self._before is not None:
            self._before.restore()
            self._before = None


def has_dropout(config: Any) -> bool:
    """Whether any dropout probability, or jitter of routers, of a transformers config is above zero."""
    return bool(fields_of_chance(config))


def fields_of_chance(config: Any) -> dict[str, float]:
    """The dropout probabilities and jitters of routers of a transformers config that are above zero, by name."""
    return {
        name: value
        for name, value in config.to_dict().items()
        if ("drop" in name or "jitter" in name)
        and isinstance(value, int | float)
        and not isinstance(value, bool)
        and value > 0
    }
