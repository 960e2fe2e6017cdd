"""Measure rates on this machine: what `hf-nanotron bench --rates` writes.

Each process measures products, attention, memory and launches of its own device, and those of the slowest count. Under
torchrun all processes measure collectives: of the first 2, 4, 8, ... ranks of the first host, and of one rank of each
host. On a CPU the same runs in fp32 over gloo with small sizes, for plans of runs on CPUs.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F

from ..monitor.gpus import gpu_of_driver
from ..ops.attention import Case, attention, pick
from ..ops.fp8 import DTYPE as FP8
from ..ops.kernels.attention import flash_attention_4
from ..ops.linear import add_product
from ..parallel.mesh import ParallelMesh
from ..parallel.together import together
from .measure_links import measure_links
from .rates import PRODUCT_KINDS, AttentionRate, ProductRate, Rates, check_rates
from .seconds import seconds_of, wait

PACKAGES = ("hf-nanotron", "torch", "transformers", "triton", "flash-attn-4")
FP8_CAPABILITY = (8, 9)


@dataclass(frozen=True)
class Sizes:
    """What is measured on one kind of device.

    Args:
        products: tokens, inner, outer.
        heads: query heads, and key-value heads.
        attention: features of a head, tokens of a row, rows.
        copied: bytes of a copy on the device.
        sent: bytes of a collective's whole tensor, ascending.
        seconds: for which one product runs without a pause; what counts is its second half, when power limits it.
    """

    products: tuple[tuple[int, int, int], ...]
    heads: tuple[int, int]
    attention: tuple[tuple[int, int, int], ...]
    copied: int
    sent: tuple[int, ...]
    seconds: float


GPU_SIZES = Sizes(
    products=(
        *((16384, 4096, 14336), (16384, 14336, 4096), (32768, 2048, 8192), (16384, 4096, 4096)),
        *((8192, 1024, 4096), (2048, 2048, 768), (4096, 4096, 65536)),
    ),
    heads=(32, 8),
    attention=((64, 2048, 8), (64, 8192, 2), (128, 2048, 8), (128, 8192, 2), (128, 32768, 1)),
    copied=2**30,
    sent=(2**16, 2**24, 2**28),
    seconds=0.8,
)
CPU_SIZES = Sizes(
    products=((256, 128, 512), (512, 256, 256)),
    heads=(4, 2),
    attention=((32, 128, 2), (32, 256, 1)),
    copied=2**22,
    sent=(2**12, 2**20),
    seconds=0.02,
)


def measure_rates(mesh: ParallelMesh, say: Callable[[str], None] = lambda line: None) -> Rates:
    """Rates of this machine. All processes of the job together; takes half a minute on GPUs.

    Args:
        say: is told what is measured next.

    Raises:
        RuntimeError: if a device cannot do what is measured, such as for memory that others take.
        ValueError: if the job has GPUs of several kinds.
    """
    rates = _slowest(together(mesh, "measuring the device", lambda: _device_rates(mesh, say)), mesh)
    if mesh.world_size > 1:
        say("collectives")
        rates = replace(
            rates, links=tuple(measure_links(mesh, (GPU_SIZES if mesh.device.type == "cuda" else CPU_SIZES).sent))
        )
    check_rates(rates)
    return rates


def _device_rates(mesh: ParallelMesh, say: Callable[[str], None]) -> Rates:
    """All but links, of this process alone."""
    device = mesh.device
    is_gpu = device.type == "cuda"
    sizes, dtype = (GPU_SIZES, torch.bfloat16) if is_gpu else (CPU_SIZES, torch.float32)
    say("matrix products")
    products = [rate for size in sizes.products for rate in _products(size, device, dtype, sizes.seconds)]
    fp8 = _fp8(sizes.products[0], device, sizes.seconds) if is_gpu else None
    say("attention")
    kernels = [_attention(*case, sizes.heads, device, dtype) for case in sizes.attention]
    say("memory, launches and copies to the host")
    return Rates(
        gpu=_name(device),
        source=f"measured on {_device_name(device)}",
        measured=True,
        products=tuple(products),
        fp8=fp8,
        attention=tuple(kernels),
        memory=_memory(sizes.copied, device),
        launch=_launch(device),
        host_copy=_host_copy(sizes.copied // 4, device),
        links=(),
        made={**_made(device), "dtype": str(dtype).removeprefix("torch."), "processes": mesh.world_size},
    )


def _name(device: torch.device) -> str:
    if device.type != "cuda":
        return "cpu"
    row = gpu_of_driver(torch.cuda.get_device_name(device))
    return torch.cuda.get_device_name(device) if row is None else row.name


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"


def _made(device: torch.device) -> dict[str, Any]:
    """What a figure depends on: date, device and versions. Nothing that names the machine."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    found = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": _device_name(device),
        "device_type": device.type,
        "versions": versions,
    }
    return {**found, "cuda": torch.version.cuda} if device.type == "cuda" else found


def _products(
    size: tuple[int, int, int], device: torch.device, dtype: torch.dtype, lasting: float
) -> list[ProductRate]:
    """Forward, input gradient, and weight gradient added to fp32 memory, of random numbers."""
    tokens, inner, outer = size
    x = torch.randn(tokens, inner, device=device, dtype=dtype)
    weight = torch.randn(outer, inner, device=device, dtype=dtype)
    grad = torch.randn(tokens, outer, device=device, dtype=dtype)
    total = torch.zeros(outer, inner, device=device)
    calls: tuple[Callable[[], Any], ...] = (
        lambda: F.linear(x, weight),
        lambda: grad @ weight,
        lambda: add_product(total, grad, x, overwrite=False),
    )
    # An input gradient sums over what the forward puts out.
    shapes = ((inner, outer), (outer, inner), (inner, outer))
    return [
        ProductRate(tokens, *shape, kind, seconds_of(call, device, lasting))
        for kind, shape, call in zip(PRODUCT_KINDS, shapes, calls, strict=True)
    ]


def _fp8(size: tuple[int, int, int], device: torch.device, lasting: float) -> float | None:
    """FLOP/s of FP8 products; None for a device without them."""
    if torch.version.cuda is None or torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        return None
    tokens, inner, outer = size
    a = torch.randn(tokens, inner, device=device).to(FP8)
    b = torch.randn(outer, inner, device=device).to(FP8).t()
    one = torch.ones((), device=device)

    def product(fast: bool) -> float:
        return seconds_of(
            lambda: torch._scaled_mm(a, b, one, one, out_dtype=torch.bfloat16, use_fast_accum=fast), device, lasting
        )

    # Two of three products sum fast, and the weight gradient exactly.
    return 3 * 2.0 * tokens * inner * outer / (2 * product(True) + product(False))


def _attention(
    head_dim: int, tokens: int, rows: int, heads: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> AttentionRate:
    """Causal attention as a training step runs it."""
    q, k, v = (
        torch.randn(rows, tokens, count, head_dim, device=device, dtype=dtype, requires_grad=True)
        for count in (heads[0], heads[1], heads[1])
    )
    kernels = ("fa4",) if device.type == "cuda" and flash_attention_4()[0] is not None else ()
    kernel = pick(kernels, Case(device.type == "cuda", dtype, head_dim, False, None))

    def forward() -> torch.Tensor:
        if kernel is not None:
            return attention(q, k, v, kernel, head_dim**-0.5)
        query, key, value = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    grad = torch.randn_like(forward())

    def both() -> Any:
        return torch.autograd.grad(forward(), (q, k, v), grad)

    def alone() -> Any:
        with torch.no_grad():
            return forward()

    lasting = 0.2 if device.type == "cuda" else 0.01
    first, whole = seconds_of(alone, device, lasting), seconds_of(both, device, lasting)
    flops = 2.0 * heads[0] * 2 * head_dim * rows * tokens * tokens / 2
    return AttentionRate(head_dim, tokens, flops / first, 2.5 * flops / max(whole - first, 0.2 * whole))


def _memory(nbytes: int, device: torch.device) -> float:
    source = torch.empty(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2.0 * nbytes / seconds_of(lambda: target.copy_(source), device, 0.2 if device.type == "cuda" else 0.01)


def _launch(device: torch.device) -> float:
    """Seconds of the host for one small operation: the median of ten rounds."""
    x = torch.zeros(16, device=device)
    rounds = []
    for _ in range(10):
        wait(device)
        began = time.perf_counter()
        for _ in range(200):
            torch.add(x, x, out=x)
        rounds.append((time.perf_counter() - began) / 200)
    wait(device)
    return statistics.median(rounds)


def _host_copy(nbytes: int, device: torch.device) -> float:
    """Bytes/s there and back at once, on two streams; of a copy of the host's memory on a CPU."""
    if device.type != "cuda":
        return _memory(nbytes, device)
    on_host = [torch.empty(nbytes, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    on_device = [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(2)]
    streams = [torch.cuda.Stream(device) for _ in range(2)]

    def both() -> None:
        with torch.cuda.stream(streams[0]):
            on_device[0].copy_(on_host[0], non_blocking=True)
        with torch.cuda.stream(streams[1]):
            on_host[1].copy_(on_device[1], non_blocking=True)

    return 2.0 * nbytes / seconds_of(both, device, 0.2)


def _slowest(rates: Rates, mesh: ParallelMesh) -> Rates:
    """The rates of the slowest process, figure by figure; the same on all."""
    if mesh.world_size == 1:
        return rates
    everyone: list[Any] = [None] * mesh.world_size
    dist.all_gather_object(everyone, rates)
    names = {each.gpu for each in everyone}
    if len(names) > 1:
        raise ValueError(f"the GPUs of this job differ ({', '.join(sorted(names))}): measure one kind at a time.")
    products = tuple(
        replace(same[0], seconds=max(each.seconds for each in same))
        for same in zip(*(each.products for each in everyone), strict=True)
    )
    kernels = tuple(
        replace(same[0], forward=min(x.forward for x in same), backward=min(x.backward for x in same))
        for same in zip(*(each.attention for each in everyone), strict=True)
    )
    return replace(
        rates,
        products=products,
        attention=kernels,
        fp8=None if rates.fp8 is None else min(each.fp8 for each in everyone),
        memory=min(each.memory for each in everyone),
        launch=max(each.launch for each in everyone),
        host_copy=min(each.host_copy for each in everyone),
    )
