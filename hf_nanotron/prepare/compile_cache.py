"""Compiled code that processes take from each other, in torch's own cache folder and nowhere else.

Torch keeps what it has compiled in `TORCHINDUCTOR_CACHE_DIR` (by default `torchinductor_USER` in the folder for
temporary files), and a later run finds it there. Ranks that start at once would all compile the same graph at once. So
the first that comes to a graph compiles it while the others wait, and take it from the cache. They wait for a lock of
the operating system, which ends with the process that holds it, and `PATIENCE` at most: who has waited in vain once
does not wait any more. A folder in which nothing can be written costs the compiled code, not the run.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._dynamo import lookup_backend
from torch._dynamo.exc import BackendCompilerFailed
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
    patience = PATIENCE

    def compile(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        nonlocal patience
        if inductor_config.force_disable_caches or not inductor_config.fx_graph_cache:
            return backend(graph_module, inputs)  # there is nothing to take
        # The backward is compiled with its forward, so that both are in the cache when the turn ends.
        at_once = functorch_config.patch(force_non_lazy_backward_lowering=True)
        with turn(f"{program}-{name_of(graph_module, inputs)}", patience) as came, at_once:
            patience = patience if came else 0.0
            return backend(graph_module, inputs)

    return compile


def has_folder() -> bool:
    """Whether torch's cache folder is there or can be made, without which `torch.compile` fails; else a warning says
    what happens.
    """
    try:
        cache_dir()
    except OSError as error:
        _warn_of(error)
        return False
    return True


def where_files_can_be_written(backend: Backend) -> Backend:
    """`backend`; where it cannot write its code, the operators of a graph run one by one, and a warning says so."""

    def compile(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        try:
            return backend(graph_module, inputs)
        except (OSError, BackendCompilerFailed) as error:
            cause = getattr(error, "inner_exception", error)
            if not isinstance(cause, OSError):  # a program that it calls fails in its own words
                cause = _error_of_writing()
            if cause is None:
                raise
            _warn_of(cause)
        return lookup_backend("eager")(graph_module, list(inputs))

    return compile


def _error_of_writing() -> OSError | None:
    """What a MiB in a folder of the compiler fails with, if it does."""
    try:
        for folder in (cache_dir(), tempfile.gettempdir()):
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(2**20))
    except OSError as error:
        return error
    return None


def _warn_of(error: OSError) -> None:
    logger.warning_once(
        f"torch_compile: blocks are not compiled, since the compiler's files cannot be written ({error}). Their "
        "operators run one by one, which is slower. TORCHINDUCTOR_CACHE_DIR says where the files go."
    )


@contextlib.contextmanager
def turn(name: str, patience: float = PATIENCE) -> Iterator[bool]:
    """Hold the lock called `name`, the first time that anything of that name is done in this cache folder.

    Yields False if `patience`, in seconds, has ended: then several do it at once.
    """
    done: Path | None = None
    handle: int | None = None
    came = True
    try:
        folder = Path(cache_dir()) / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        done = folder / f"{name}.done"
        if not done.exists():
            handle = os.open(folder / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            came = _lock(handle, patience)
            if came and done.exists():  # by now; the others need not wait for us
                os.close(handle)
                handle = None
    except OSError as error:  # a folder of another user, a full disk, a file system without locks
        logger.warning_once(f"compiling without waiting for other ranks: {type(error).__name__}: {error}")
    try:
        yield came
        if handle is not None and done is not None:
            with contextlib.suppress(OSError):
                done.touch()
    finally:
        if handle is not None:
            with contextlib.suppress(OSError):
                os.close(handle)  # which ends the lock


def _lock(handle: int, patience: float) -> bool:
    """Whether the lock on an open file came in time. A forked process has no part in it, as it would with `flock`."""
    end = time.monotonic() + patience
    while True:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
        if time.monotonic() >= end:
            if patience:
                logger.warning(f"compiling without other ranks from now on: one holds the turn for {patience:.0f} s")
            return False
        time.sleep(LOOK_SECONDS)


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
