"""What runs beside attention: on a side stream of a GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Generic, TypeVar, cast

import torch

T = TypeVar("T")


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)


class Aside(Generic[T]):
    """`make()`, run on a side stream of a GPU after all that was launched before; elsewhere at once.

    What it reads must be held until `get`, for the memory goes back to another stream. Its own memory is used again
    only by later ones, which wait for what was launched before them.
    """

    def __init__(self, make: Callable[[], T], device: torch.device) -> None:
        self._device, self._done = device, cast(torch.cuda.Event | None, None)
        if device.type != "cuda":
            self._value = make()
            return
        side = _side_stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            self._value = make()
        self._done = side.record_event()

    def get(self) -> T:
        """The result, for the current stream."""
        if self._done is not None:
            torch.cuda.current_stream(self._device).wait_event(self._done)
        return self._value
