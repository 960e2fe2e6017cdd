"""Which kernels the time of a step goes to, and how long the GPU waited, from a trace of `torch.profiler`."""

import json
from collections import defaultdict
from pathlib import Path

from overlap import Interval, length, merge

ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


def kernel_table(trace: Path, steps: int, rows: int = 40, name_width: int = 110) -> str:
    """A table of kernels by name, the most expensive first, under what the GPU did with its time.

    Args:
        trace: as `export_chrome_trace` writes it.
        steps: how many optimizer steps it holds; the figures are of one.
        rows: kernels to list; the rest is one line.
    """
    intervals: dict[str, list[Interval]] = defaultdict(list)
    for event in json.loads(trace.read_text())["traceEvents"]:
        if event.get("cat") in ON_DEVICE:
            intervals[event["name"]].append((float(event["ts"]), float(event["ts"]) + float(event["dur"])))
    if not intervals:
        return "no kernel ran on a GPU\n"
    every = [interval for found in intervals.values() for interval in found]
    span = max(stop for _, stop in every) - min(start for start, _ in every)
    busy, total = length(merge(every)), length(every)
    per_step = 1e3 * steps  # microseconds of the trace to milliseconds of a step
    lines = [
        f"one step of {steps}: {span / per_step:.2f} ms from the first kernel to the end of the last",
        f"  busy {busy / per_step:.2f} ms ({busy / span:.1%}), waiting for the host {(span - busy) / per_step:.2f} ms",
        f"  {len(every) / steps:.0f} kernels, {total / per_step:.2f} ms in sum over all streams",
        "",
        f"{'ms':>10} {'share':>7} {'count':>9} {'us each':>9}  kernel",
    ]
    ordered = sorted(intervals.items(), key=lambda item: -length(item[1]))
    for name, found in ordered[:rows]:
        lines.append(_line(name[:name_width], found, total, per_step, steps))
    if ordered[rows:]:
        rest = [interval for _, found in ordered[rows:] for interval in found]
        lines.append(_line(f"({len(ordered) - rows} others)", rest, total, per_step, steps))
    return "\n".join(lines) + "\n"


def _line(name: str, found: list[Interval], total: float, per_step: float, steps: int) -> str:
    time = length(found)
    return f"{time / per_step:>10.3f} {time / total:>7.1%} {len(found) / steps:>9.1f} {time / len(found):>9.1f}  {name}"
