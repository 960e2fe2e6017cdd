"""The shards of a corpus on this machine: in this process, or in several, with a progress bar."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from .plan import Counts
from .shards import Job

POLL_SECONDS = 0.2
QUIET_SECONDS = 10.0  # between lines of a bar that goes to a file


class Stopped(Exception):
    """Another worker has failed, or the user has stopped the command."""


class Bar:
    """Documents, tokens and shards so far."""

    def __init__(self, shards: int, finished: Mapping[int, Counts], disable: bool) -> None:
        from tqdm.auto import tqdm

        self._shards, self._done = shards, len(finished)
        self._total = Counts()
        self._bar: Any = tqdm(
            desc="tokenizing",
            unit=" documents",
            unit_scale=True,
            disable=disable,
            mininterval=0.5 if sys.stderr.isatty() else QUIET_SECONDS,
        )

    def add(self, counts: Counts) -> None:
        self._total += counts
        self._bar.update(counts.documents)
        self._postfix()

    def shard_done(self) -> None:
        self._done += 1
        self._postfix()

    def _postfix(self) -> None:
        elapsed = self._bar.format_dict["elapsed"] or 1e-9
        speed = self._bar.format_sizeof(self._total.tokens / elapsed)
        tokens = self._bar.format_sizeof(self._total.tokens)
        text = f"{tokens} tokens, {speed} tokens/s, shards {self._done}/{self._shards}"
        self._bar.set_postfix_str(text, refresh=False)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._postfix()
        self._bar.close()


def run_here(job: Job, numbers: Sequence[int], workers: int, bar: Bar) -> None:
    """Write these shards with so many processes; with one, in this process.

    The first error ends all: shards that are complete stay, and nothing else does.
    """
    if workers == 1 or len(numbers) <= 1:
        for number in numbers:
            job.run(number, bar.add)
            bar.shard_done()
        return
    workers = min(workers, len(numbers))
    context = multiprocessing.get_context("spawn")  # a fork of a process whose tokenizer has threads would hang
    told: Any = context.Queue()
    stop = context.Event()
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    pool = ProcessPoolExecutor(workers, context, _begin, (job, told, stop, threads))
    with _stopping(pool, stop):
        waiting = {pool.submit(_run, number) for number in numbers}
        while waiting:
            done, waiting = wait(waiting, POLL_SECONDS, FIRST_EXCEPTION)
            _drain(told, bar)
            for future in done:
                _checked(future)
                bar.shard_done()


@contextlib.contextmanager
def _stopping(pool: ProcessPoolExecutor, stop: Any) -> Iterator[None]:
    try:
        yield
    except BaseException:
        stop.set()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _drain(told: Any, bar: Bar) -> None:
    with contextlib.suppress(queue.Empty):
        while True:
            bar.add(told.get_nowait())


def _checked(future: Future[None]) -> None:
    try:
        future.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a worker has ended without a word, perhaps because the machine ran out of memory. Complete shards are "
            "kept: run it again to go on, with fewer workers."
        ) from error
    except (ValueError, OSError) as error:  # raised here again, it is one of this package
        raise (OSError if isinstance(error, OSError) else ValueError)(str(error)) from error  # subclasses take more


# ---- in a worker ----

_worker: dict[str, Any] = {}  # what `_begin` was given, of this process


def _begin(job: Job, told: Any, stop: Any, threads: int) -> None:
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # tokenizers has no other way to be told, before its first call
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process is told, and stops the others
    _worker.update(job=job, told=told, stop=stop)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run(number: int) -> None:
    def tell(counts: Counts) -> None:
        if _worker["stop"].is_set():
            raise Stopped
        _worker["told"].put(counts)

    _worker["job"].run(number, tell)
