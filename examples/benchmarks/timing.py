"""Time a function on a GPU."""

import statistics
from collections.abc import Callable

import torch


def measure(function: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median and spread (half of the range between the quartiles) in ms."""
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    quarters = statistics.quantiles(times, n=4)
    return statistics.median(times), (quarters[2] - quarters[0]) / 2
