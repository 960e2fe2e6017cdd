"""How much memory a host still has, and pages that are really there before somebody counts on them."""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

CHUNK = 2**28  # bytes that are made at once
KEPT = 2**31  # bytes that others on the host may need while a chunk is made
GROWTH_SECONDS = 10.0  # a virtual machine may get memory while it asks for it
THREADS = 8

MEMINFO, GROUPS, GROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def available_bytes() -> int | None:
    """What this process can still get: of the host, or of the control group (version 2) that limits it; None where
    neither is told.
    """
    found = []
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = MEMINFO.read_text().splitlines()
        found.append(1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))))
    with contextlib.suppress(OSError, StopIteration):
        path = next(line[3:] for line in GROUP.read_text().splitlines() if line.startswith("0::"))
        folder = GROUPS / path.strip("/")
        for each in (folder, *folder.parents):
            if each == GROUPS.parent:
                break
            with contextlib.suppress(OSError, ValueError):  # "max", or no such file at the root
                limit, used = (int((each / f"memory.{name}").read_text()) for name in ("max", "current"))
                found.append(max(0, limit - used + _cached(each)))
    return min(found, default=None)


def _cached(group: Path) -> int:
    """Bytes of files in memory that the kernel gives up when it is asked for more."""
    with contextlib.suppress(OSError, ValueError):
        for line in (group / "memory.stat").read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == "inactive_file":
                return int(value)
    return 0


def make_pages(memory: mmap.mmap) -> torch.Tensor:
    """`[bytes]`, uint8, of zeros: every page of new anonymous `memory` is there afterwards.

    A page that is first written is made by then, at 2 or 3 GB/s by one thread, and one page of 2 MiB as fast as few of
    4 KiB. And a host without memory ends processes without a word, so it is asked before.

    Raises:
        MemoryError: the host does not have so much.
    """
    with contextlib.suppress(AttributeError, OSError, ValueError):  # not of every kernel
        memory.madvise(mmap.MADV_HUGEPAGE)
    pages = torch.frombuffer(memory, dtype=torch.uint8)
    if len(pages) < CHUNK:
        _wait_for(len(pages), len(pages))
        return pages.zero_()
    threads = min(THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        left = len(pages)
        for chunk in pages.split(CHUNK):
            _wait_for(len(chunk), left)
            list(pool.map(torch.Tensor.zero_, chunk.chunk(threads)))
            left -= len(chunk)
    return pages


def _wait_for(size: int, left: int) -> None:
    end = time.monotonic() + GROWTH_SECONDS
    while (free := available_bytes()) is not None and free < size + KEPT * (size >= CHUNK):
        if time.monotonic() > end:
            raise MemoryError(f"the host has {free / 2**30:.2f} GiB left, and {left / 2**30:.2f} GiB more are needed")
        time.sleep(0.1)
