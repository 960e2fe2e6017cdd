"""Tokens, time and memory between two log lines."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import torch
from transformers import TrainerCallback

from ..parallel.collectives import all_reduce
from ..parallel.mesh import ParallelMesh
from .flops import flops_per_token, peak_flops


class Throughput(TrainerCallback):
    """Measures whole optimizer steps, from the end of one to the end of the next, without evaluations and saves.

    On CUDA the times come from device events, read only when a line is logged, so that no step waits for the host.
    """

    def __init__(self, mesh: ParallelMesh, shapes: dict[str, tuple[int, ...]], config: Any) -> None:
        self.mesh, self.shapes, self.config = mesh, shapes, config
        self.peak = peak_flops(mesh.device)
        self._cuda = mesh.device.type == "cuda"
        self._clear()
        self._last: Any = None

    def _clear(self) -> None:
        self._intervals: list[tuple[Any, Any]] = []  # one for all steps between two pauses
        self._steps = 0
        self._counts: torch.Tensor | None = None  # tokens and `squared_lengths` of all steps, `[2]`

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add_tokens(self, tokens: torch.Tensor, squares: torch.Tensor) -> None:
        """Count a step: its tokens, and the sum of `squared_lengths`, over all data-parallel ranks, on the device."""
        counts = torch.stack([tokens, squares])
        self._counts = counts if self._counts is None else self._counts + counts

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if self._last is None:
            self._last = self._now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        begin = self._last
        if self._intervals and self._intervals[-1][1] == begin:
            begin, _ = self._intervals.pop()
        self._last = self._now()
        self._intervals.append((begin, self._last))
        self._steps += 1

    def _pause(self, *args: Any, **kwargs: Any) -> None:
        self._last = None

    on_train_begin = on_evaluate = on_predict = on_save = _pause

    def report(self) -> dict[str, float]:
        """Figures since the last report; empty if no step ended since. All ranks call it together."""
        if not self._intervals:
            return {}
        if self._cuda:
            self._intervals[-1][1].synchronize()
            seconds = sum(start.elapsed_time(end) for start, end in self._intervals) / 1e3
        else:
            seconds = sum(end - start for start, end in self._intervals)
        steps = self._steps
        tokens, squares = (0.0, 0.0) if self._counts is None else self._counts.tolist()
        self._clear()
        per_device = tokens / seconds / self.mesh.world_size
        figures = {
            "step_time": seconds / steps,
            "tokens_per_second": tokens / seconds,
            "tokens_per_second_per_device": per_device,
            "peak_memory_gib": self._peak_memory() / 2**30,
        }
        if self.peak is not None:
            flops = flops_per_token(self.shapes, self.config, squares / max(tokens, 1))
            figures["mfu"] = flops * per_device / self.peak
        return figures

    def _peak_memory(self) -> float:
        """Bytes on the fullest rank: allocated device memory, or resident host memory without a GPU."""
        if self._cuda:
            own = torch.cuda.max_memory_allocated(self.mesh.device)
        else:
            own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        most = torch.tensor(float(own), dtype=torch.float64, device=self.mesh.device)
        return all_reduce(most, self.mesh.world, torch.distributed.ReduceOp.MAX).item()
