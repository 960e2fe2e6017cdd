"""Tokens, time and memory between two log lines."""

from __future__ import annotations

import gc
import resource
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import TrainerCallback

from ..parallel.mesh import ParallelMesh
from .flops import flops_per_token, peak_flops
from .ranks import FIGURES, OwnTimes, exchange, spread

FULL_COLLECTION = 2  # the generation that walks through all objects


class Throughput(TrainerCallback):
    """Measures whole optimizer steps, from the end of one to the end of the next, without evaluations, saves and full
    garbage collections.

    On CUDA the times come from device events, read only when a line is logged, so that no step waits for the host. A
    collection is then what the device has waited for it.

    Attributes:
        by_rank: of the last report, what ranks do alone (`monitor/ranks.py`), as `spread` says it.
    """

    def __init__(self, mesh: ParallelMesh, shapes: dict[str, tuple[int, ...]], config: Any) -> None:
        self.mesh, self.shapes, self.config = mesh, shapes, config
        self.peak = peak_flops(mesh.device)
        self._cuda = mesh.device.type == "cuda"
        self._own = OwnTimes(mesh.device)
        self.by_rank: dict[str, dict[str, float]] = {}
        self._collecting: Any = None
        self._clear()
        self._last: Any = None
        self._pending: torch.Tensor | None = None  # counts of the step that runs
        self._open_stalls: list[tuple[Any, Any]] = []

    def _clear(self) -> None:
        self._intervals: list[tuple[Any, Any]] = []  # one for all steps between two pauses
        self._stalls: list[tuple[Any, Any]] = []  # collections in them
        self._steps = 0
        self._counts: torch.Tensor | None = None  # tokens and `squared_lengths` of all steps, `[2]`
        self._own.clear()

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add_tokens(self, tokens: torch.Tensor, squares: torch.Tensor) -> None:
        """Count a step: its tokens, and the sum of `squared_lengths`, over all data-parallel ranks, on the device."""
        self._pending = torch.stack([tokens, squares])

    def reading(self, batches: Iterable[Any]) -> Iterator[Any]:
        """`batches`; the time that this rank takes to read them is compared with that of the others."""
        return self._own.reading(batches)

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._own.begin()
        if self._last is None:
            self._last = self._now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        begin, counts, self._pending = self._last, self._pending, None
        self._last = self._now()
        if begin is None:  # somebody evaluated or saved in the middle of it
            self._open_stalls = []
            return
        if counts is not None:
            self._counts = counts if self._counts is None else self._counts + counts
        if self._intervals and self._intervals[-1][1] == begin:
            begin, _ = self._intervals.pop()
        self._intervals.append((begin, self._last))
        self._steps += 1
        self._own.end()
        self._stalls += self._open_stalls
        self._open_stalls = []

    def pause(self, *args: Any, **kwargs: Any) -> None:
        """What was done since the last step ended is no part of the next one."""
        self._last = None
        self._open_stalls = []
        self._own.pause()

    on_evaluate = on_predict = on_save = pause

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.pause()
        self.release()
        gc.callbacks.append(self._on_collection)

    def release(self) -> None:
        """No longer watch the garbage collector."""
        self._collecting = None
        while self._on_collection in gc.callbacks:
            gc.callbacks.remove(self._on_collection)

    def _on_collection(self, phase: str, info: dict[str, int]) -> None:
        # Others threads' collections stop this one, too, but an event would be recorded in their stream.
        if info["generation"] != FULL_COLLECTION or threading.current_thread() is not threading.main_thread():
            return
        if self._last is None or (self._cuda and torch.cuda.is_current_stream_capturing()):
            self._collecting = None
        elif phase == "start":
            self._collecting = self._now()
        elif self._collecting is not None:
            self._open_stalls.append((self._collecting, self._now()))
            self._collecting = None

    def own_figures(self) -> dict[str, float]:
        """What this rank has measured since the last report, for `report`. The host waits for the last step."""
        if self._cuda and self._intervals:
            self._intervals[-1][1].synchronize()
        own = dict(zip(FIGURES, self._own.figures(), strict=True))
        seconds, stalls = self._seconds(self._intervals), self._seconds(self._stalls)
        return {"seconds": seconds, "stalls": stalls, "memory": self._memory(), **own}

    def report(self, of_ranks: Mapping[str, Sequence[float]] | None = None) -> dict[str, float]:
        """Figures since the last report; empty if no step ended since. All ranks call it together.

        Args:
            of_ranks: the `own_figures` of all ranks, by name; they are exchanged here if not given.
        """
        if not self._intervals:
            return {}
        if of_ranks is None:
            of_ranks = exchange(self.mesh, self.own_figures())
        steps, seconds, stalls = self._steps, of_ranks["seconds"][self.mesh.rank], max(of_ranks["stalls"])
        tokens, squares = (0.0, 0.0) if self._counts is None else self._counts.tolist()
        if stalls < seconds:  # all ranks wait for one that collects
            seconds -= stalls
        step_times = [of_rank / steps for of_rank in of_ranks["seconds"]]
        self.by_rank = {"step_time": spread(step_times), **{name: spread(of_ranks[name]) for name in FIGURES}}
        self._clear()
        per_device = tokens / seconds / self.mesh.world_size
        figures = {
            "step_time": seconds / steps,
            "tokens_per_second": tokens / seconds,
            "tokens_per_second_per_device": per_device,
            "peak_memory_gib": max(of_ranks["memory"]) / 2**30,
        }
        if self.peak is not None:
            flops = flops_per_token(self.shapes, self.config, squares / max(tokens, 1))
            figures["mfu"] = flops * per_device / self.peak
        return figures

    def _seconds(self, intervals: list[tuple[Any, Any]]) -> float:
        if self._cuda:
            return sum(start.elapsed_time(end) for start, end in intervals) / 1e3
        return float(sum(end - start for start, end in intervals))

    def _memory(self) -> float:
        """Bytes of this rank at most: allocated device memory, or resident host memory without a GPU."""
        if self._cuda:
            return float(torch.cuda.max_memory_allocated(self.mesh.device))
        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
