"""CPU processes for the ranks of a small job, all on this machine, and gone when the job is over in whatever way.

They are forks of a server that has imported what they need, so that a rank starts within milliseconds. They meet in a
store of this process, at a port that the system chooses. A rank whose starter is gone ends by itself.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

from ..errors import is_for_the_user

PRELOADED = "hf_nanotron.cli.checking.job"
GRACE = 3.0  # seconds for the other ranks to say what they have to say, after one has failed
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


class Begun(Exception):
    """Around an error that came when the work of a job had begun: it is a failure, and no refusal."""


class RankError(Exception):
    """A rank has failed.

    Attributes:
        is_refusal: whether the message alone says what to do, before the work of the job had begun.
    """

    def __init__(self, message: str, is_refusal: bool) -> None:
        super().__init__(message)
        self.is_refusal = is_refusal


Failure = tuple[str, bool, bool]  # the message, whether it is for the user, whether the work had begun


class Ranks:
    """Runs functions on the ranks of jobs, one job after another. Close it in the end: it is a context manager."""

    def __init__(self, timeout: float) -> None:
        from torch.distributed import TCPStore

        self.timeout = timeout
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([PRELOADED])
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._jobs = 0

    def run(self, world_size: int, function: Callable[[Any], Any], argument: Any) -> list[Any]:
        """Results of `function(argument)` by rank. Both are importable, and go through a pipe.

        Raises:
            RankError: what the first rank that failed has raised; after `timeout` seconds, where each rank stands.
        """
        self._jobs += 1
        ranks: dict[Connection, int] = {}
        processes = []
        try:
            for rank in range(world_size):
                ours, theirs = self._context.Pipe(duplex=False)
                job = theirs, (self._store.port, f"job{self._jobs}"), rank, world_size, self.timeout, function, argument
                process = self._context.Process(target=_serve, args=job, daemon=True)
                process.start()
                theirs.close()
                processes.append(process)
                ranks[ours] = rank
            return self._collect(ranks)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
            for process in processes:
                process.join()
            for connection in ranks:
                connection.close()

    def _collect(self, ranks: dict[Connection, int]) -> list[Any]:
        results: dict[int, Any] = {}
        failures: dict[int, Failure] = {}
        waiting, deadline = dict(ranks), time.monotonic() + self.timeout
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                try:
                    good, value = connection.recv()
                except (EOFError, ConnectionResetError):
                    good, value = False, ("the process died", False, True)
                if good:
                    results[rank] = value
                elif not failures:
                    failures[rank], deadline = value, min(deadline, time.monotonic() + GRACE)
                else:
                    failures[rank] = value
        if failures:
            speaker = _speaker(failures)
            message, speaks, has_begun = failures[speaker]
            raise RankError(f"rank {speaker}: {message}" if has_begun else message, speaks and not has_begun)
        if waiting:
            late = ", ".join(map(str, sorted(waiting.values())))
            raise RankError(f"rank {late} did not finish within {self.timeout:.0f} s (--timeout)", False)
        return [results[rank] for rank in range(len(ranks))]

    def close(self) -> None:
        del self._store

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _speaker(failures: dict[int, Failure]) -> int:
    """The rank whose error is told: one that is written for the user, before those that follow from it."""
    return min(failures, key=lambda rank: (not failures[rank][1], rank))


@contextlib.contextmanager
def ending_on_signals() -> Iterator[None]:
    """Have SIGTERM and SIGHUP raise SystemExit in the main thread, so that processes and folders are cleaned up.

    One that is ignored stays so: `nohup` ignores SIGHUP.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _serve(
    connection: Connection,
    store: tuple[int, str],
    rank: int,
    world_size: int,
    timeout: float,
    function: Callable[[Any], Any],
    argument: Any,
) -> None:
    """One rank, from its start to its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the starter ends its ranks
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.dup2(2, 1)  # what a rank prints is not part of the result
    threading.Thread(target=_end_with_the_starter, daemon=True).start()
    try:
        _enter(store, rank, world_size, timeout)
        message = True, function(argument)
    except BaseException as error:
        cause = error.__cause__ if isinstance(error, Begun) and error.__cause__ is not None else error
        speaks = is_for_the_user(cause)
        said = " ".join(str(cause).split()) if speaks else _told(cause)
        message = False, (said or type(cause).__name__, speaks, cause is not error)
    connection.send(message)
    connection.close()
    sys.stdout.flush()
    sys.stderr.flush()
    if not message[0]:
        time.sleep(2 * GRACE)  # a rank that ends takes its connections away, and others would tell of that
    os._exit(0)  # process groups have threads that wait for ranks which are gone by now


def _enter(store: tuple[int, str], rank: int, world_size: int, timeout: float) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    for name in LAUNCHED:
        os.environ.pop(name, None)
    import torch
    import torch.distributed as dist
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())  # its own lock is shared by processes, and nobody would give it back
    torch.set_num_threads(1)
    if world_size == 1:
        return
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size)
    )
    port, prefix = store
    client = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    limit = timedelta(seconds=timeout)
    dist.init_process_group(
        "gloo", store=dist.PrefixStore(prefix, client), rank=rank, world_size=world_size, timeout=limit
    )


def _end_with_the_starter() -> None:
    starter = multiprocessing.parent_process()
    if starter is not None:
        wait([starter.sentinel])
        os._exit(1)


def _told(error: BaseException) -> str:
    """The error with the last places that it came through."""
    frames = traceback.format_tb(error.__traceback__)[-3:]
    return f"{type(error).__name__}: {error}\n{''.join(frames)}".rstrip()
