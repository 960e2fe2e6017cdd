"""Compiled code that processes take from each other, in torch's own cache folder and nowhere else.

Torch keeps what it has compiled in `TORCHINDUCTOR_CACHE_DIR` (by default `torchinductor_USER` in the folder for
temporary files), and a later run finds it there. Ranks that start at once would all compile the same graph at once. So
the first that comes to a graph compiles it while the others wait, and take it from the cache. They wait for a lock of
the operating system, which ends with the process that holds it, and not longer than `PATIENCE`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import fx
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor.runtime.cache_dir_utils import cache_dir
from transformers.utils import logging

from .compile_passes import Backend

logger = logging.get_logger(__name__)

PATIENCE = 240.0  # seconds; what takes longer is compiled twice. Far below the timeout of collectives
LOOK_SECONDS = 0.05
FOLDER = "hf_nanotron_turns"  # in torch's cache folder


def one_at_a_time(backend: Backend, program: str) -> Backend:
    """`backend`, which the processes of a cache folder run for a graph one after another, until one has compiled it.

    `program`: the same for ranks that come to a graph in the same place of a step. Others must not wait for each other:
    loading a kernel may wait for the device, and so for what another rank is to send.
    """

    def compile(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        if inductor_config.force_disable_caches or not inductor_config.fx_graph_cache:
            return backend(graph_module, inputs)  # there is nothing to take
        # The backward is compiled with its forward, so that both are in the cache when the turn ends.
        at_once = functorch_config.patch(force_non_lazy_backward_lowering=True)
        with turn(f"{program}-{name_of(graph_module, inputs)}"), at_once:
            return backend(graph_module, inputs)

    return compile


@contextlib.contextmanager
def turn(name: str, patience: float = PATIENCE) -> Iterator[None]:
    """Hold the lock called `name`, the first time that anything of that name is done in this cache folder."""
    try:
        folder = Path(cache_dir()) / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        done, lock = folder / f"{name}.done", FileLock(folder / f"{name}.lock", fallback_to_soft=False)
        if not done.exists():
            lock.acquire(timeout=patience, poll_interval=LOOK_SECONDS)
            if done.exists():
                lock.release()
    except (OSError, Timeout, NotImplementedError) as error:
        logger.warning(f"compiling without waiting for other ranks: {type(error).__name__}: {error}")
        yield
        return
    try:
        yield
        if lock.is_locked:
            with contextlib.suppress(OSError):
                done.touch()
    finally:
        lock.release(force=True)


def name_of(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> str:
    """Of a graph with its shapes on its device: torch's cache has a place of its own for each device of a node."""
    graphs = [module for module in graph_module.modules() if isinstance(module, fx.GraphModule)]
    parts = [torch.__version__, *(module.code for module in graphs), *map(_describe, inputs)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {tuple(value.shape)} {value.stride()} {value.device} {value.requires_grad}"
    return f"{type(value).__name__} {value}"


def share_threads(local_ranks: int, cpus: int | None = None) -> None:
    """Divide the CPUs among the ranks of a node: each would start as many compiling processes as if it were alone.

    Args:
        cpus: of this process, if not those that it may run on. `TORCHINDUCTOR_COMPILE_THREADS` goes before.
    """
    if local_ranks == 1 or "TORCHINDUCTOR_COMPILE_THREADS" in os.environ:
        return
    cpus = len(os.sched_getaffinity(0)) if cpus is None else cpus
    inductor_config.compile_threads = max(1, min(inductor_config.compile_threads or 1, cpus // local_ranks))
