"""What one rank does for longer than the others may wait in one collective: downloading, waiting for a store."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

import torch

from ..checkpoint.state.training_state import together
from .collectives import all_reduce
from .mesh import ParallelMesh

T = TypeVar("T")
LOOK_SECONDS = 0.5  # between two looks whether all ranks are done


def together_for_long(mesh: ParallelMesh, what: str, action: Callable[[], T]) -> T:
    """As `together`, for an `action` that may take longer than the timeout of the process group. It runs in a thread
    of each rank, while the ranks look again and again whether all are done.

    Raises:
        RuntimeError: if another rank has failed. Where `action` fails, its own error.
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

    threading.Thread(target=work, name="long-action", daemon=True).start()
    done.wait(LOOK_SECONDS / 10)  # most are soon done
    while int(all_reduce(torch.tensor(float(not done.is_set()), device=mesh.device), mesh.world)):
        time.sleep(LOOK_SECONDS)

    def result() -> T:
        if errors:
            raise errors[0]
        return results[0]

    return together(mesh, what, result)
