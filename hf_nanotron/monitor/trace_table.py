"""Where a step goes, from a trace of `torch.profiler`: matrix products, attention, communication, waiting.

Each moment of the profiled steps counts once. Where several kernels run at once, the first of `PARTS` that runs has it;
so communication counts as far as nothing is computed meanwhile (exposed), and idle is what is left: the device waits
for the host, or, without a GPU, Python runs or another rank is waited for.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..parallel.pipeline.action_names import action_of

PARTS = ("matmul", "attention", "optimizer", "memory_bound", "copies", "communication", "idle")
PHASES = ("forward", "backward", "optimizer", "other")
LABELS = {
    "matmul": "matrix products",
    "attention": "attention",
    "optimizer": "optimizer",
    "memory_bound": "memory-bound kernels",
    "copies": "copies between host and device",
    "communication": "communication, exposed",
    "idle": "idle: waiting for the host",
}
# By the name of a kernel or an operator; the first pattern that is found counts, else it is memory-bound.
KINDS = (
    ("communication", re.compile(r"nccl|^gloo|c10d|all_?reduce|all_?gather|reduce_?scatter|sendrecv|nvshmem", re.I)),
    ("attention", re.compile(r"flash|fmha|attention|attn|sdpa", re.I)),
    (
        "matmul",
        re.compile(
            r"gemm|cutlass|cublas|nvjet|xmma|wgmma|matmul|_product_kernel|::\w*mm(_out|_v2)?$|mkldnn.*linear"
            r"|hf_nanotron::(fp8_)?linear",
            re.I,
        ),
    ),
)
DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")
# Names of annotations: torch's of an optimizer's step, and the profiler's of a step.
OPTIMIZER, STEP = "Optimizer.step#", "ProfilerStep#"
KERNELS = 25  # named in the table
MICRO = 1e-6

Interval = tuple[float, float, str, str]  # start, end, part, phase


@dataclass(frozen=True)
class Work:
    """What ran: on the device, or on the processor where there is none."""

    intervals: list[Interval]
    seconds: defaultdict[str, float]  # by name
    calls: Counter[str]


def table_of(events: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Seconds of one step, as `PARTS`, `PHASES` and the kernels that take most; of the mean over the steps.

    Args:
        events: `traceEvents` of a trace in Chrome's format.

    Raises:
        ValueError: if no step is in it.
    """
    spans = [event for event in events if event.get("ph") == "X" and event.get("dur") is not None]
    steps = [event for event in spans if str(event["name"]).startswith(STEP) and event.get("cat") == "user_annotation"]
    if not steps:
        raise ValueError("the trace has no profiled step.")
    phases = _phases(spans)
    on_device = any(event.get("cat") in DEVICE for event in spans)
    work = _device_work(spans, phases) if on_device else _host_work(spans, phases)
    start, end = min(step["ts"] for step in steps), max(step["ts"] + step["dur"] for step in steps)
    if on_device:
        end = max(end, *(stop for _, stop, _, _ in work.intervals))
    clipped = [(max(low, start), min(high, end), part, phase) for low, high, part, phase in work.intervals]
    exclusive = sweep(clipped)
    each = MICRO / len(steps)
    parts = {part: sum(exclusive.get((part, phase), 0.0) for phase in PHASES) * each for part in PARTS[:-1]}
    whole = (end - start) * each
    parts["idle"] = max(0.0, whole - sum(parts.values()))
    communicating = union([(low, high) for low, high, part, _ in clipped if part == "communication"]) * each
    kinds = {name: kind_of(name) for name in work.seconds}
    return {
        "device": "cuda" if on_device else "cpu",
        "steps": len(steps),
        "seconds": whole,
        "parts": parts,
        "communication": {
            "total": communicating,
            "exposed": parts["communication"],
            "overlapped": max(0.0, communicating - parts["communication"]),
        },
        "phases": {phase: sum(exclusive.get((part, phase), 0.0) for part in PARTS) * each for phase in PHASES},
        "kernels": [
            {
                "name": name,
                "part": kinds[name],
                "seconds": seconds * each,
                "calls": work.calls[name] / len(steps),
            }
            for name, seconds in sorted(work.seconds.items(), key=lambda entry: -entry[1])[:KERNELS]
        ],
    }


def kind_of(name: str) -> str:
    """The part that a kernel or an operator of this name is, outside of an optimizer."""
    return next((kind for kind, pattern in KINDS if pattern.search(name)), "memory_bound")


def _phases(spans: Sequence[Mapping[str, Any]]) -> list[tuple[float, float, str]]:
    """When the host was in which phase, in order."""
    found = []
    for event in spans:
        if event.get("cat") == "user_annotation":
            name = str(event["name"])
            action = action_of(name)
            if action is not None or name.startswith(OPTIMIZER):
                phase = "optimizer" if action is None else "forward" if action.kind == "F" else "backward"
                found.append((event["ts"], event["ts"] + event["dur"], phase))
    return sorted(found)


def _phase_at(phases: Sequence[tuple[float, float, str]], starts: Sequence[float], time: float) -> str:
    place = bisect_right(starts, time) - 1
    return phases[place][2] if place >= 0 and time <= phases[place][1] else "other"


def _device_work(spans: Sequence[Mapping[str, Any]], phases: Sequence[tuple[float, float, str]]) -> Work:
    """Kernels and copies, in the phase in which the host has launched them."""
    starts = [start for start, _, _ in phases]
    launched = {
        event["args"]["correlation"]: event["ts"]
        for event in spans
        if event.get("cat") in LAUNCHES and "correlation" in event.get("args", {})
    }
    work = Work([], defaultdict(float), Counter())
    for event in spans:
        if event.get("cat") not in DEVICE:
            continue
        name, start = str(event["name"]), event["ts"]
        phase = _phase_at(phases, starts, launched.get(event.get("args", {}).get("correlation"), start))
        part = "copies" if event["cat"] != "kernel" else kind_of(name)
        if phase == "optimizer" and part not in ("communication", "copies"):
            part = "optimizer"
        work.intervals.append((start, start + event["dur"], part, phase))
        work.seconds[name] += event["dur"]
        work.calls[name] += 1
    return work


def _host_work(spans: Sequence[Mapping[str, Any]], phases: Sequence[tuple[float, float, str]]) -> Work:
    """Operators without those that they call, and collectives, which run in threads of their own."""
    starts = [start for start, _, _ in phases]
    work = Work([], defaultdict(float), Counter())
    communicating = [
        e for e in spans if e.get("cat") == "user_annotation" and kind_of(str(e["name"])) == "communication"
    ]
    for event in communicating:
        phase = _phase_at(phases, starts, event["ts"])
        work.intervals.append((event["ts"], event["ts"] + event["dur"], "communication", phase))
        work.seconds[str(event["name"])] += event["dur"]
        work.calls[str(event["name"])] += 1
    # Messages are noted in the thread that sends them, which computes as well: the one of the steps.
    aside = {event["tid"] for event in communicating} - {
        event["tid"] for event in spans if str(event["name"]).startswith(STEP)
    }
    threads: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for event in spans:
        if event.get("cat") == "cpu_op" and event["tid"] not in aside:
            threads[event["tid"]].append(event)
    for ops in threads.values():
        for name, start, end in own_times(ops):
            if "::" not in name or name.startswith(("autograd::", "c10d::", "torch::autograd")):
                continue  # Python, or waiting
            phase = _phase_at(phases, starts, start)
            part = "optimizer" if phase == "optimizer" else kind_of(name)
            work.intervals.append((start, end, part, phase))
            work.seconds[name] += end - start
        for event in ops:
            work.calls[str(event["name"])] += 1
    return work


def own_times(ops: Iterable[Mapping[str, Any]]) -> list[tuple[str, float, float]]:
    """When each operator of a thread ran itself, and not one that it called: name, start, end."""
    found: list[tuple[str, float, float]] = []
    stack: list[tuple[str, float]] = []  # name and end of those that run
    at = 0.0

    def run_until(time: float) -> None:
        nonlocal at
        while stack and stack[-1][1] <= time:
            name, end = stack.pop()
            if end > at:
                found.append((name, at, end))
                at = end
        if stack and time > at:
            found.append((stack[-1][0], at, time))
        at = max(at, time)

    for event in sorted(ops, key=lambda e: (e["ts"], -e["dur"])):
        run_until(event["ts"])
        stack.append((str(event["name"]), event["ts"] + event["dur"]))
    run_until(float("inf"))
    return found


def sweep(intervals: Iterable[Interval]) -> dict[tuple[str, str], float]:
    """Length of time by part and phase, each moment counted once: for the first of `PARTS` that is there."""
    order = {part: place for place, part in enumerate(PARTS)}
    edges: list[tuple[float, int, tuple[int, str, str]]] = []
    for start, end, part, phase in intervals:
        if end > start:
            key = (order[part], part, phase)
            edges += [(start, 1, key), (end, -1, key)]
    edges.sort(key=lambda edge: edge[0])
    active: Counter[tuple[int, str, str]] = Counter()
    found: dict[tuple[str, str], float] = defaultdict(float)
    at = 0.0
    for time, change, key in edges:
        if active and time > at:
            _, part, phase = min(active)
            found[part, phase] += time - at
        at = time
        active[key] += change
        if not active[key]:
            del active[key]
    return dict(found)


def union(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of time that at least one interval covers."""
    return sum(sweep((low, high, "communication", "other") for low, high in intervals).values())


def text_of(table: Mapping[str, Any]) -> str:
    """The table for people."""
    whole = table["seconds"] or 1.0
    labels = dict(LABELS)
    if table["device"] == "cpu":
        labels["idle"] = "Python, and waiting for others"
    lines = [f"{'one step, mean of ' + str(table['steps']):<36}{'ms':>10}{'share':>9}"]

    def row(label: str, seconds: float) -> str:
        return f"{label:<36}{1e3 * seconds:>10.2f}{100 * seconds / whole:>7.1f} %"

    lines += [row(labels[part], table["parts"][part]) for part in PARTS]
    lines += [row("all", table["seconds"]), "", row("communication, overlapped", table["communication"]["overlapped"])]
    lines += [
        "",
        *(row(phase, table["phases"][phase]) for phase in PHASES),
        "",
        f"{'ms':>10}{'calls':>8}  part          name",
    ]
    lines += [
        f"{1e3 * kernel['seconds']:>10.3f}{kernel['calls']:>8.0f}  {kernel['part']:<14}{kernel['name'][:120]}"
        for kernel in table["kernels"]
    ]
    return "\n".join(lines) + "\n"
