"""Which collectives this process has begun and finished, as torch's own flight recorder has noted them.

torch notes every collective of gloo and NCCL in a ring of 2,000 (`TORCH_FR_BUFFER_SIZE`, on by default). Reading it
takes neither the thread that trains nor the device, so that it works while both wait.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

# One recorder for host collectives, one for those of NCCL; builds without CUDA, or of another version, may lack some.
_DUMPS: tuple[Callable[..., Any], ...] = tuple(
    found
    for name in ("_dump_fr_trace_json", "_dump_nccl_trace_json")
    if (found := getattr(getattr(torch._C, "_distributed_c10d", None), name, None)) is not None
)


@dataclass(frozen=True)
class Call:
    """Where this process is among the collectives of a process group: the first that has not ended, or the last.

    Args:
        number: among those of the group, from 1; the same on all its ranks.
        op: such as `"all_reduce"`.
        size: elements of the inputs.
        is_pending: whether it has not ended.
        begun: number of the last one that the host has begun; those after `number` wait for it on the device.
    """

    number: int
    op: str
    size: int
    is_pending: bool
    begun: int


def counts() -> tuple[int, ...]:
    """Numbers that change whenever a collective begins or ends. 0.1 ms."""
    found: list[int] = []
    for dump in _DUMPS:
        for status in _read(dump, False).get("pg_status", {}).values():
            found += (int(status["last_enqueued_collective"]), int(status["last_completed_collective"]))
    return tuple(found)


def last_calls() -> dict[str, Call]:
    """By the name of the process group (`ProcessGroup.group_name`); of groups that had one lately."""
    found: dict[str, Call] = {}
    made: dict[str, Any] = {}  # of groups of one name, which of those that this process has had
    for dump in _DUMPS:
        for entry in _read(dump, True).get("entries", ()):
            if entry.get("is_p2p"):
                continue
            name, number = str(entry["process_group"][0]), int(entry["collective_seq_id"])
            is_pending = not entry.get("retired") and entry.get("state") != "completed"
            if made.setdefault(name, entry.get("pg_id")) != entry.get("pg_id"):
                made[name] = entry.get("pg_id")
                found.pop(name, None)
            known = found.get(name)
            begun = number if known is None else max(number, known.begun)
            if known is not None and (known.is_pending or number < known.number):
                found[name] = replace(known, begun=begun)
                continue
            op = str(entry["profiling_name"]).rpartition(":")[2].lower()
            size = sum(_elements(sizes) for sizes in entry.get("input_sizes", ()))
            found[name] = Call(number, op, size, is_pending, begun)
    return found


def _read(dump: Callable[..., Any], with_calls: bool) -> dict[str, Any]:
    try:
        told: dict[str, Any] = json.loads(dump(with_calls, False))
    except (RuntimeError, TypeError, ValueError):  # switched off, or another version's
        return {}
    return told


def _elements(sizes: Any) -> int:
    count = 1
    for size in sizes:
        count *= int(size)
    return count
