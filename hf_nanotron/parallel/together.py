"""Actions that all ranks do together, and that fail on all of them if they fail on one."""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from .collectives import all_reduce
from .mesh import ParallelMesh

T = TypeVar("T")
LOOK_SECONDS = 0.5  # between two looks whether all ranks are done
END_SECONDS = 5.0  # that the end of a process waits for an action which it has left


def together(mesh: ParallelMesh, what: str, action: Callable[[], T]) -> T:
    """Do `action` on every rank, and fail on all of them if one fails, so that none is left waiting.

    Raises:
        RuntimeError: if another rank has failed. Where `action` fails, its own error.
    """
    failure: Exception | None = None
    try:
        result = action()
    except Exception as error:
        failure = error
    failed = all_reduce(torch.tensor(float(failure is not None), device=mesh.device), mesh.world)
    if failure is not None:
        raise failure
    if failed:
        raise RuntimeError(f"{what} failed on {int(failed)} other ranks; see their error messages.")
    return result


def refuse_together(mesh: ParallelMesh, message: str | None) -> None:
    """Raise the first rank's `message` on every rank, if any rank has one. All ranks together."""
    if not all_reduce(torch.tensor(float(message is not None), device=mesh.device), mesh.world):
        return
    messages: list[str | None] = [message]
    if mesh.world.size > 1:
        messages = [None] * mesh.world.size
        dist.all_gather_object(messages, message, group=mesh.world.handle)
    raise ValueError(next(found for found in messages if found is not None))


def all_or_none(mesh: ParallelMesh, what: str, action: Callable[[], T]) -> T:
    """`together`, but all ranks raise the ValueError of the first rank that has one, which says what is wrong."""
    message: str | None = None

    def attempt() -> T | None:
        nonlocal message
        try:
            return action()
        except ValueError as error:
            message = str(error)
            return None

    result = together(mesh, what, attempt)
    refuse_together(mesh, message)
    return cast(T, result)


def from_rank_0(mesh: ParallelMesh, value: T) -> T:
    """The `value` of rank 0, on every rank. All ranks together."""
    values = [value]
    if mesh.world.size > 1:
        dist.broadcast_object_list(values, src=mesh.world.ranks[0], group=mesh.world.handle)
    return values[0]


def on_first_rank(mesh: ParallelMesh, what: str, action: Callable[[], T]) -> T:
    """What `action` returns on rank 0, on every rank; it may take long. All ranks together.

    Raises:
        ValueError: on every rank, if `action` does. For other errors as `together`.
    """
    if mesh.world_size == 1:
        return action()

    def attempt() -> T | ValueError | None:
        try:
            return action() if mesh.rank == 0 else None
        except ValueError as error:
            return ValueError(str(error))

    result = [together_for_long(mesh, what, attempt)]
    dist.broadcast_object_list(result, src=0, group=mesh.world.handle)
    if isinstance(result[0], ValueError):
        raise result[0]
    return cast(T, result[0])


def together_for_long(mesh: ParallelMesh, what: str, action: Callable[[], T]) -> T:
    """`together`, for an `action` that may take longer than the timeout of the process group.

    It runs in a thread of each rank, while the ranks poll until all are done.
    """
    results: list[T] = []
    errors: list[Exception] = []
    done = threading.Event()

    def work() -> None:
        try:
            results.append(action())
        except Exception as error:
            errors.append(error)
        done.set()

    thread = threading.Thread(target=work, name="long-action", daemon=True)
    thread.start()
    try:
        done.wait(LOOK_SECONDS / 10)  # most are soon done
        while int(all_reduce(torch.tensor(float(not done.is_set()), device=mesh.device), mesh.world)):
            time.sleep(LOOK_SECONDS)
    except BaseException:  # another rank is gone, or this one is interrupted
        # A thread that comes back from C++ or Rust in the midst of Python's end aborts the process.
        atexit.register(thread.join, END_SECONDS)
        raise

    def result() -> T:
        if errors:
            raise errors[0]
        return results[0]

    return together(mesh, what, result)
