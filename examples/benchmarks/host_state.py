"""What `optim_offload` costs: rates of the link and of pinning memory, and AdamW's steps with its state on the host.

    python host_state.py --elements 1000000000 --out host_state.jsonl

A JSON line each: GB/s of a large copy each way and both at once; GB/s of getting pinned memory (`HostBuffer`, and the
same by one thread in pages of 4 KiB); and seconds of AdamW steps over so many elements with fp32 moments, on the device
and with all of the state on the host, one by one: the first makes the state. Bytes over the link are 12 an element each
way. Without a GPU the numbers are those of host memory, for a dry run.
"""

import argparse
import json
import mmap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hf_nanotron.ops.host_buffers import HostBuffer
from hf_nanotron.optim.adamw import AdamW
from hf_nanotron.optim.offload import StateOnHost
from hf_nanotron.optim.optimizer_link import OptimizerLink
from hf_nanotron.parallel.shard_spec import ShardSpec
from hf_nanotron.parallel.zero.segment import Segment

SEGMENT = 2**25  # elements


class Weights:
    """A `ShardedWeights` that has segments alone."""

    def __init__(self, segments: list[Segment]) -> None:
        self.segments = segments

    def take_written(self, compare: bool) -> None: ...

    def wait(self) -> None: ...

    def publish(self, rounded: bool) -> None: ...


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(function: Callable[[], Any]) -> float:
    synchronize()
    began = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - began


def link(device: torch.device, size: int) -> dict[str, float]:
    """GB/s of copies: to the device, from it, and both at once, of what goes one way."""
    host = [HostBuffer(size, device).bytes for _ in range(2)]
    there = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
    streams = [torch.cuda.Stream(device) for _ in range(2)] if device.type == "cuda" else []

    def copies(*ways: int) -> None:
        for _ in range(4):
            for way in ways:
                target, source = (there[0], host[0]) if way == 0 else (host[1], there[1])
                if streams:
                    with torch.cuda.stream(streams[way]):
                        target.copy_(source, non_blocking=True)
                else:
                    target.copy_(source)

    found = {}
    for name, ways in {"to_device": (0,), "from_device": (1,), "both": (0, 1)}.items():
        copies(*ways)
        found[name] = round(4 * size / seconds(lambda ways=ways: copies(*ways)) / 1e9, 2)  # type: ignore[misc]
    return found


def pinning(device: torch.device, size: int) -> dict[str, float]:
    """GB/s of new pinned memory."""
    found = {}
    for name, make in {
        "host_buffer": lambda: HostBuffer(size, device),
        "small_pages": lambda: in_small_pages(size, device),
    }.items():
        kept: list[Any] = []
        found[name] = round(size / seconds(lambda make=make, kept=kept: kept.append(make())) / 1e9, 2)  # type: ignore[misc]
    return found


def in_small_pages(size: int, device: torch.device) -> mmap.mmap:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    data = torch.frombuffer(memory, dtype=torch.uint8)
    if device.type == "cuda":
        runtime: Any = torch.cuda.cudart()
        runtime.cudaHostRegister(data.data_ptr(), size, 0)
        runtime.cudaHostUnregister(data.data_ptr())
    else:
        data.zero_()
    return memory


def steps(device: torch.device, elements: int, fraction: float) -> dict[str, Any]:
    """Seconds of four steps."""
    segments, left = [], elements
    while left > 0:
        size = min(SEGMENT, left)
        left -= size
        master = torch.nn.Parameter(torch.randn(size, device=device))
        weight, name = master.detach().bfloat16(), f"w{len(segments)}"
        segments.append(
            Segment(name, ShardSpec(name, (size,)), 0, size, master, torch.randn(size, device=device), weight)
        )
    rounded = {segment.master: segment.weight for segment in segments if segment.weight is not None}
    found: dict[str, Any] = {"fraction": fraction}
    host = None
    if fraction:
        made: list[StateOnHost] = []
        found["masters_s"] = round(seconds(lambda: made.append(StateOnHost(segments, device, fraction))), 3)
        host = made[0]
        found["reserve_s"] = round(seconds(lambda: host.reserve(2, torch.float32)), 3)
    optimizer = AdamW([segment.master for segment in segments], lr=1e-4, rounded=rounded)
    OptimizerLink(optimizer, Weights(segments), host)  # type: ignore[arg-type]
    found["steps_s"] = [round(seconds(optimizer.step), 3) for _ in range(4)]
    found["gb_each_way"] = round(12 * elements * fraction / 1e9, 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=10**9)
    parser.add_argument("--bytes", type=int, default=2**31, help="of a copy, and of the memory that is pinned")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    cli = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def write(line: dict[str, Any]) -> None:
        print(text := json.dumps(line), flush=True)
        if cli.out is not None:
            with cli.out.open("a") as file:
                file.write(text + "\n")

    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    write({"device": name, "torch": torch.__version__, "link_gb_s": link(device, cli.bytes)})
    write({"pinning_gb_s": pinning(device, 4 * cli.bytes)})
    for fraction in (0.0, 1.0):
        write(steps(device, cli.elements, fraction))


if __name__ == "__main__":
    main()
