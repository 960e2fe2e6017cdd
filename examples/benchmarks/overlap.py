"""How much of the communication is hidden behind computation, from a trace of `torch.profiler`."""

import json
from pathlib import Path
from typing import Any

Interval = tuple[float, float]


def kernels(trace: Path) -> tuple[list[Interval], dict[str, list[Interval]]]:
    """Intervals in which computing kernels ran, and those of each kind of collective, in microseconds."""
    computing: list[Interval] = []
    collectives: dict[str, list[Interval]] = {}
    for event in json.loads(trace.read_text())["traceEvents"]:
        if event.get("cat") not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        interval = (float(event["ts"]), float(event["ts"]) + float(event["dur"]))
        name = event["name"]
        if "signal_kernel" in name:
            continue  # waits for another GPU, or tells it something
        if "nccl" in name.lower():
            kind = name.removeprefix("ncclDevKernel_").split("_")[0].split("(")[0]
            collectives.setdefault(kind, []).append(interval)
        else:
            computing.append(interval)
    return merge(computing), {kind: merge(intervals) for kind, intervals in collectives.items()}


def merge(intervals: list[Interval]) -> list[Interval]:
    """The union, as disjoint intervals in order."""
    merged: list[Interval] = []
    for start, stop in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        else:
            merged.append((start, stop))
    return merged


def length(intervals: list[Interval]) -> float:
    return sum(stop - start for start, stop in intervals)


def common(first: list[Interval], second: list[Interval]) -> float:
    """Length of the intersection of two lists of disjoint intervals in order."""
    total, i, j = 0.0, 0, 0
    while i < len(first) and j < len(second):
        total += max(0.0, min(first[i][1], second[j][1]) - max(first[i][0], second[j][0]))
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1
    return total


def overlap_table(trace: Path) -> dict[str, Any]:
    """Milliseconds of the whole trace, of computing, of each collective, and of each that nothing hid."""
    computing, collectives = kernels(trace)
    every = [*computing, *(interval for intervals in collectives.values() for interval in intervals)]
    span = (max(stop for _, stop in every) - min(start for start, _ in every)) if every else 0.0
    return {
        "span_ms": span / 1e3,
        "computing_ms": length(computing) / 1e3,
        "idle_ms": (span - length(merge(every))) / 1e3,
        "collectives": {
            kind: {
                "kernels_ms": length(intervals) / 1e3,
                "exposed_ms": (length(intervals) - common(intervals, computing)) / 1e3,
            }
            for kind, intervals in sorted(collectives.items())
        },
    }
