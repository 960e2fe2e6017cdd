"""Which rank is slow: what each rank does alone, measured, and compared in the gather of a log line.

The time of a whole step is the same on all ranks, since they wait for each other in collectives. So what is compared
is what a rank does without the others: read its samples, run Python, multiply matrices.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ..parallel.collectives import all_gather
from ..parallel.mesh import ParallelMesh

# Side of the matrices of the probe, by type of device: about a millisecond or less.
PROBE_SIZES = {"cuda": 2048, "cpu": 160}
REPEATS = 3
FIGURES = ("data_time", "host_time", "probe_time")  # of `OwnTimes`


class OwnTimes:
    """Seconds that this rank has spent alone since the last log line.

    Attributes:
        steps: optimizer steps that they cover.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._matrices: torch.Tensor | None = None
        self.clear()
        self._began: float | None = None

    def clear(self) -> None:
        self._data, self._host, self.steps = 0.0, 0.0, 0

    def reading(self, batches: Iterable[Any]) -> Iterator[Any]:
        """`batches`, with the time that it takes to get each."""
        iterator = iter(batches)
        while True:
            begin = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            finally:
                self._data += time.perf_counter() - begin
            yield batch

    def begin(self) -> None:
        """A step begins, or the clock starts again after a pause."""
        if self._began is None:
            self._began = time.process_time()

    def end(self) -> None:
        """A step has ended, and the next one begins."""
        now = time.process_time()
        if self._began is not None:
            self._host += now - self._began
        self._began = now
        self.steps += 1

    def pause(self) -> None:
        self._began = None

    def figures(self) -> list[float]:
        """`FIGURES` of this rank, in seconds: of a step, of a step, and of one product."""
        steps = max(1, self.steps)
        return [self._data / steps, self._host / steps, self.probe()]

    def probe(self) -> float:
        """Seconds of one product of two matrices on this rank's device: the fastest of a few. No collective."""
        size = PROBE_SIZES.get(self.device.type)
        if size is None:
            return 0.0
        if self._matrices is None:
            dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
            self._matrices = torch.ones(size, size, dtype=dtype, device=self.device)
        return min(self._time_product(self._matrices) for _ in range(REPEATS))

    def _time_product(self, matrices: torch.Tensor) -> float:
        if self.device.type != "cuda":
            begin = time.perf_counter()
            torch.mm(matrices, matrices)
            return time.perf_counter() - begin
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        torch.mm(matrices, matrices)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


def exchange(mesh: ParallelMesh, figures: Mapping[str, float | torch.Tensor]) -> dict[str, list[float]]:
    """The figures of all ranks by name, each in the order of the ranks, in one gather. All ranks together.

    Args:
        figures: numbers, or tensors of one element, which may still be under way on the device; the same names
            everywhere. They travel in fp64.
    """
    numbers = torch.tensor(
        [0.0 if isinstance(value, torch.Tensor) else value for value in figures.values()], dtype=torch.float64
    ).to(mesh.device)
    for index, value in enumerate(figures.values()):
        if isinstance(value, torch.Tensor):
            numbers[index] = value.detach().reshape(())
    columns = all_gather(numbers[None], mesh.world, 0).T.tolist()
    return dict(zip(figures, columns, strict=True))


def spread(by_rank: Sequence[float]) -> dict[str, float]:
    """Least, median and largest value of all ranks, and the rank that has the largest."""
    most = max(by_rank)
    median = statistics.median(by_rank)
    return {"min": min(by_rank), "median": median, "max": most, "rank": list(by_rank).index(most)}
