"""The clock of a benchmark row: one mark a step, on the device's own time line, and a trace of steps after them."""

import time
from pathlib import Path
from typing import Any

import torch

PROFILED_STEPS = 2


class Clock:
    """Marks moments without waiting for the device: a CUDA event each, or the host's time without a GPU."""

    def __init__(self) -> None:
        self._gpu = torch.cuda.is_available()
        self._marks: list[Any] = []

    def __len__(self) -> int:
        return len(self._marks)

    def mark(self) -> None:
        if not self._gpu:
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def seconds(self, first: int, count: int) -> list[float]:
        """The `count` intervals from mark `first` on. Waits for the last mark."""
        marks = self._marks[first : first + count + 1]
        if len(marks) < count + 1:
            raise ValueError(f"{count} intervals from mark {first} on, but there are {len(self._marks)} marks")
        if not self._gpu:
            return [end - start for start, end in zip(marks, marks[1:], strict=False)]
        marks[-1].synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in zip(marks, marks[1:], strict=False)]


class Watch:
    """What is read of a row while it trains. Its trainer calls `mark` once a step, always at the same place.

    Args:
        warmup: steps before the first timed one.
        timed: steps that are timed.
        trace: where rank 0 writes a trace of `profiled` more steps; none is made without it.
    """

    def __init__(self, warmup: int, timed: int, trace: Path | None = None, profiled: int = PROFILED_STEPS) -> None:
        self.warmup, self.timed, self.trace, self.profiled = warmup, timed, trace, profiled
        self.clock = Clock()
        self.losses: list[float] = []
        self.state_bytes = 0
        self._profiler: Any = None

    @property
    def steps(self) -> int:
        """Steps of the whole run: the last one is never timed, so that it may log its loss."""
        return self.warmup + self.timed + (self.profiled if self.trace is not None else 0) + 1

    def mark(self, profile: bool = True) -> None:
        """Note the time, and between timed and last step begin and end the trace (if this rank is to `profile`)."""
        if torch.cuda.is_available() and len(self.clock):  # the first step makes the optimizer's state
            self.state_bytes = max(self.state_bytes, torch.cuda.memory_allocated())
        self.clock.mark()
        if self.trace is None or not profile:
            return
        if len(self.clock) == self.warmup + self.timed:
            kind = torch.profiler.ProfilerActivity
            self._profiler = torch.profiler.profile(activities=[kind.CUDA if torch.cuda.is_available() else kind.CPU])
            self._synchronize()
            self._profiler.__enter__()
        elif len(self.clock) == self.warmup + self.timed + self.profiled:
            self._synchronize()
            self._profiler.__exit__(None, None, None)
            self._profiler.export_chrome_trace(str(self.trace))
            self._profiler = None

    def seconds(self) -> list[float]:
        """Seconds of each timed step."""
        return self.clock.seconds(self.warmup - 1, self.timed)

    def _synchronize(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
