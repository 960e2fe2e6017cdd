"""Worker processes that are started once and run many distributed jobs.

Importing torch and transformers costs seconds a process. A fork server pays it once (`preloaded.py`); each worker then
runs any number of jobs of any size up to the pool's, with a fresh gloo process group for each. A job that fails or
takes too long ends its workers, so that no later job meets a half-finished one. What a job changes of its process, like
log levels or the environment, is put back after it.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any
from unittest import mock

import process_state
import psutil
from torch.distributed import TCPStore

FOLDER = os.path.dirname(os.path.abspath(__file__))
# These bound what hangs, on any machine.
TIMEOUT = 600.0
TIMEOUT_OF_COLLECTIVES = timedelta(seconds=300)
AFTER_A_FAILURE = 60.0
IDLE = 5.0  # seconds in which ranks that wait for a failed one compute nothing


class JobError(Exception):
    """What a rank raised, with its traceback. `kinds` maps each failed rank to the name of its exception."""

    def __init__(self, message: str, kinds: dict[int, str]) -> None:
        super().__init__(message)
        self.kinds = kinds


class WorkerPool:
    """Runs `function(*args)` on every rank of a process group. `function` is importable by name."""

    def __init__(self, size: int = 8) -> None:
        self.size = size
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["preloaded"])
        self._workers: list[tuple[Any, Connection]] = []
        # Ranks that wait at it are called; at a file they would look again and again, with pauses.
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._jobs = 0

    def run(self, world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Results by rank.

        Raises:
            JobError: with the traceback of the first rank that failed.
        """
        while len(self._workers) < world_size:
            ours, theirs = self._context.Pipe()
            _start_server()
            process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()  # so that a worker that dies ends its pipe
            self._workers.append((process, ours))
        self._jobs += 1
        connections = {self._workers[rank][1]: rank for rank in range(world_size)}
        for connection, rank in connections.items():
            connection.send((function, args, rank, world_size, (self._store.port, f"job{self._jobs}")))
        return self._collect(connections)

    def run_alone(self, function: Callable[..., Any], *args: Any) -> Any:
        """The result of one process that has done nothing before, and ends with it: for what starts copies of it.

        Copies of a worker would have what jobs before have left to it; torch refuses a backward in some of them.
        """
        others, self._workers = self._workers, []
        try:
            return self.run(1, function, *args)[0]
        finally:
            self.close()
            self._workers = others

    def _collect(self, connections: dict[Connection, int]) -> list[Any]:
        results: dict[int, Any] = {}
        failures: dict[int, tuple[str, str]] = {}
        waiting = dict(connections)
        patience = TIMEOUT
        while waiting:
            # Ranks that fail together are all heard, however late; ranks that wait for a failed one are not waited for.
            before = self._seconds_of(waiting) if failures else 0.0
            ready = wait(list(waiting), timeout=IDLE if failures else TIMEOUT)
            if not ready:
                patience = min(patience, AFTER_A_FAILURE) - IDLE
                if failures and patience > 0 and self._seconds_of(waiting) - before > IDLE / 50:
                    continue
                break
            for connection in ready:
                rank = waiting.pop(connection)
                try:
                    ok, value = connection.recv()
                except (EOFError, ConnectionResetError):
                    ok, value = False, ("EOFError", "the process died")
                (results if ok else failures)[rank] = value
        if failures or waiting:
            self.close(len(connections))
            if not failures:
                raise JobError(f"ranks {sorted(waiting.values())} did not finish in {TIMEOUT:.0f} s", {})
            rank = min(failures)
            kinds = {rank: kind for rank, (kind, _) in failures.items()}
            raise JobError(f"rank {rank} failed:\n{failures[rank][1]}", kinds)
        return [results[rank] for rank in range(len(connections))]

    def _seconds_of(self, waiting: dict[Connection, int]) -> float:
        """What these workers have computed since they were started."""
        seconds = 0.0
        for rank in waiting.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = psutil.Process(self._workers[rank][0].pid).cpu_times()
                seconds += times.user + times.system
        return seconds

    def close(self, count: int | None = None) -> None:
        """End the first `count` workers, or all."""
        ended, self._workers = self._workers[:count], self._workers[count:] if count is not None else []
        for process, connection in ended:
            connection.close()
            process.kill()
        for process, _ in ended:
            process.join()


def _start_server() -> None:
    """Start the fork server, if it does not run, where it finds `preloaded.py`; workers have this process's path."""
    path = os.pathsep.join(filter(None, (FOLDER, os.environ.get("PYTHONPATH"))))
    with mock.patch.dict(os.environ, PYTHONPATH=path):
        forkserver.ensure_running()


def _serve(connection: Connection) -> None:
    """The loop of a worker."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # gloo between processes, also where there are GPUs
    import torch

    torch.set_num_threads(1)
    gc.disable()  # jobs are short, and `_leave` collects after each
    put_back = process_state.remember()
    while True:
        try:
            function, args, rank, world_size, store = connection.recv()
        except (EOFError, ConnectionResetError):
            return
        try:
            _enter(rank, world_size, store)
            message = (True, function(*args))
        except BaseException as error:
            message = (False, (type(error).__name__, traceback.format_exc()))
        if message[0]:
            _leave()
            put_back()
        connection.send(message)


def _enter(rank: int, world_size: int, store: tuple[int, str]) -> None:
    import torch.distributed as dist
    from datasets import enable_progress_bars
    from transformers.utils.logging import enable_progress_bar

    enable_progress_bar()  # a job before may have switched them off
    enable_progress_bars()
    process_state.begin(rank)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
        OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false",
    )  # fmt: skip
    if world_size == 1:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            del os.environ[name]
        return
    port, prefix = store
    client = dist.PrefixStore(prefix, dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False))
    dist.init_process_group("gloo", store=client, rank=rank, world_size=world_size, timeout=TIMEOUT_OF_COLLECTIVES)


def _leave() -> None:
    import torch.distributed as dist
    from accelerate.state import AcceleratorState, GradientState

    # Models and trainers are reference cycles that hold process groups. A group that outlives its peers keeps its
    # threads, and those spin on the closed connections.
    gc.collect()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
