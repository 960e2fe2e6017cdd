"""Whether the device of a process answers, before the process takes a place among others that would wait for it."""

from __future__ import annotations

import atexit
import os
import sys
import threading

import torch

ANSWER_SECONDS = 60.0  # for a context, a copy and a small product; a cold driver takes some of them
SIZE = 256


def own_device() -> torch.device:
    """The one that the launcher's local rank says."""
    return torch.device(torch.accelerator.current_accelerator().type, int(os.environ.get("LOCAL_RANK", 0)))  # type: ignore[union-attr]


def why_unfit(device: torch.device, seconds: float = ANSWER_SECONDS) -> str | None:
    """Why this process cannot compute on `device`; None if it can.

    A product of small whole numbers is compared with the host's, bit by bit. A device that hangs is given up after
    `seconds`; the thread that waits for it stays.
    """
    found: list[str | None] = []
    thread = threading.Thread(target=lambda: found.append(_compare(device)), daemon=True)
    thread.start()
    thread.join(seconds)
    if found:
        return found[0]
    atexit.register(_end, thread)
    return f"{device} has not answered for {seconds:g} s"


def _end(thread: threading.Thread) -> None:
    """The end of a process whose device still hangs, and which has therefore failed.

    Python's own end might wait for the device, too, or abort when the thread comes back from torch in the midst of it.
    """
    if thread.is_alive():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _compare(device: torch.device) -> str | None:
    numbers = torch.arange(SIZE * SIZE, dtype=torch.float32).reshape(SIZE, SIZE) % 7
    try:
        product = (numbers.to(device) @ numbers.to(device)).cpu()
    except (RuntimeError, AssertionError) as error:
        return f"{device} fails: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return None if torch.equal(product, numbers @ numbers) else f"{device} computes wrong products"
