"""How long a call takes on a device."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def seconds_of(call: Callable[[], Any], device: torch.device, lasting: float, least: int = 3) -> float:
    """Seconds of one call in the second half of `lasting` seconds of calls without a pause."""
    call()
    wait(device)
    began = time.perf_counter()
    call()
    wait(device)
    one = max(time.perf_counter() - began, 1e-6)
    repeats = max(least, round(lasting / one / 2))
    found = []
    for _ in range(2):
        began = time.perf_counter()
        for _ in range(repeats):
            call()
        wait(device)
        found.append((time.perf_counter() - began) / repeats)
    return found[-1]


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
