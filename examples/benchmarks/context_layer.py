"""What one context-parallel rank does in attention of a layer, on one GPU: nothing is sent.

    python examples/benchmarks/context_layer.py --ranks 8 --tokens 32768
    python examples/benchmarks/context_layer.py --ranks 8 --tokens 131072 --documents 1024:4096

Prints one JSON object a line: for forward and backward of the operator that `cp_mode="gather"` runs, the bytes that its
copies read and write and their number (counted without a device), and on a GPU milliseconds, those of its kernel calls
alone, and what is left: `copies_ms`, beside `copies_floor_ms`, the bytes at the bandwidth of a large copy. In
`whole_row_ms` is one call over all tokens divided by the ranks, the floor of both. `by_heads_ms` is what
`cp_mode="heads"` takes, with its copies. Tokens that others would send are memory of the right size. Heads are those of
Llama-3.1-8B, bf16.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from timing import measure
from torch.utils._python_dispatch import TorchDispatchMode

from hf_nanotron.ops.attention import attention
from hf_nanotron.ops.kernels.attention import KERNELS, Kernel, flash_attention_4
from hf_nanotron.parallel.cp import exchange, gather, heads
from hf_nanotron.parallel.cp.attention import DeviceLayout, device_layout
from hf_nanotron.parallel.cp.layout import Layout, plan
from hf_nanotron.parallel.mesh import Group

HEADS, KV_HEADS, DIM = 32, 8, 128
OTHER_WORK = 26_000  # keys that a token sees, for the matrix products of a layer of an 8B


def packing(tokens: int, shortest: int, longest: int, seed: int = 0) -> list[int]:
    """Bounds of documents, their lengths even on a logarithmic scale."""
    generator, ends = np.random.default_rng(seed), [0]
    while ends[-1] < tokens:
        size = int(np.exp(generator.uniform(np.log(shortest), np.log(longest))))
        ends.append(min(tokens, ends[-1] + size))
    return ends


# ---- copies, counted ----

# Bytes of an operator, of its arguments and its result.
BYTES: dict[str, Callable[[tuple[Any, ...], Any], int]] = {
    "index_select": lambda args, out: 2 * out.nbytes,
    "index_copy_": lambda args, out: 2 * args[3].nbytes,
    "index_add_": lambda args, out: 3 * args[3].nbytes,
    "cat": lambda args, out: 2 * out.nbytes,
    "copy_": lambda args, out: args[0].nbytes + args[1].nbytes,
    "_to_copy": lambda args, out: args[0].nbytes + out.nbytes,
    "clone": lambda args, out: 2 * out.nbytes,
    "add": lambda args, out: args[0].nbytes + args[1].nbytes + out.nbytes,
    "add_": lambda args, out: 2 * args[0].nbytes + args[1].nbytes,
    "sum": lambda args, out: args[0].nbytes + out.nbytes,
    "new_zeros": lambda args, out: out.nbytes,
    "constant_pad_nd": lambda args, out: args[0].nbytes + out.nbytes,
}
FREE = ("empty", "new_empty", "empty_like", "normal_")  # the last stands for what others send


class Copies(TorchDispatchMode):
    """Counts what operators on big tensors read and write. Raises KeyError for one that it does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.launches = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.is_view or name in FREE or not isinstance(out, torch.Tensor) or out.device.type != "meta":
            return out
        size = BYTES[name](args, out)
        if size:
            self.bytes, self.launches = self.bytes + size, self.launches + 1
        return out


@dataclass
class Rank:
    """The tensors of one rank, and the operator's tables."""

    layout: Layout
    rank: int
    device: torch.device
    kernel: str
    heads_at_once: int | None = None

    def __post_init__(self) -> None:
        own = self.layout.rows * self.layout.length // self.layout.size
        self.made: DeviceLayout = device_layout(self.layout, self.rank, torch.device("cpu"))
        tables = [*self.made.calls[None], *self.made.exchanges[None]]
        on_device = [x.to(self.device) if index in (0, 3, 4) else x for index, x in enumerate(tables)]
        self.tables = *on_device, DIM**-0.5, None, self.kernel, self.heads_at_once, ""
        self.inputs = [
            torch.empty(1, own, count, DIM, dtype=torch.bfloat16, device=self.device)
            for count in (HEADS, KV_HEADS, KV_HEADS)
        ]
        if self.device.type != "meta":
            for x in self.inputs:
                x.normal_()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Others send memory as it is."""
        group = Group(tuple(range(self.layout.size)), self.rank, None)
        sizes: dict[tuple[int, ...], torch.Tensor] = {}

        def all_gather(x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
            return arrived((group.size * x.shape[0], *x.shape[1:]), x)

        def all_to_all(x: torch.Tensor, group: Group, send: Any = None, receive: Any = None) -> torch.Tensor:
            return arrived((len(x) if receive is None else sum(receive), *x.shape[1:]), x)

        def arrived(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
            if shape not in sizes:
                sizes[shape] = like.new_empty(shape).normal_()
            return sizes[shape]

        with (
            mock.patch.object(exchange, "all_gather", all_gather),
            mock.patch.object(exchange, "all_to_all", all_to_all),
            mock.patch.object(gather, "group_of", lambda name: group),
            mock.patch.object(heads, "all_to_all", all_to_all),
            mock.patch.object(heads, "group_of", lambda name: group),
        ):
            yield

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        return gather.forward(*self.inputs, *self.tables)

    def backward(self, output: torch.Tensor, sums: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return gather.backward(output, *self.inputs, output, sums, *self.tables)


def nothing() -> Kernel:
    """A kernel that computes nothing, for tensors without memory."""

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Any) -> tuple[torch.Tensor, torch.Tensor]:
        sums = q.new_empty(q.shape[2], q.shape[1], dtype=torch.float32)
        return torch.empty_like(q, memory_format=torch.contiguous_format), sums

    def backward(grad: torch.Tensor, saved: Any, problem: Any) -> tuple[torch.Tensor, ...]:
        return tuple(x.new_empty(x.shape) for x in saved[:3])

    return Kernel(forward, backward)  # type: ignore[arg-type]


def count(layout: Layout, rank: int, heads_at_once: int | None = None) -> dict[str, dict[str, Any]]:
    """Copies of a forward and of a backward."""
    one = Rank(layout, rank, torch.device("meta"), "by_document", heads_at_once)
    found = {}
    with one.alone(), mock.patch.dict(KERNELS, {"by_document": nothing()}):
        with Copies() as copies:
            results = one.forward()
        found["forward"] = {"copied_mb": round(copies.bytes / 1e6, 1), "copies": copies.launches}
        with Copies() as copies:
            one.backward(*results)
        found["backward"] = {"copied_mb": round(copies.bytes / 1e6, 1), "copies": copies.launches}
    return found


# ---- time, on a GPU ----


def recorded(one: Rank, run: Callable[[], Any]) -> list[Callable[[], Any]]:
    """The kernel calls of `run`, to be made again."""
    kernel, calls = KERNELS[one.kernel], list[Callable[[], Any]]()

    def recording(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            calls.append(lambda: function(*args))
            return function(*args)

        return call

    wrapped = Kernel(recording(kernel.forward), recording(kernel.backward), kernel.dense)
    with mock.patch.dict(KERNELS, {one.kernel: wrapped}):
        run()
    return calls


def bandwidth(repeats: int) -> float:
    """Bytes that a large copy reads and writes in a millisecond."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / measure(lambda: target.copy_(source), repeats)[0]


def time_of(layout: Layout, rank: int, repeats: int, heads_at_once: int | None) -> dict[str, dict[str, Any]]:
    device = torch.device("cuda")
    kernel = (
        "fa4" if torch.cuda.get_device_capability()[0] in (9, 10) and flash_attention_4()[0] is not None else "flash"
    )
    one = Rank(layout, rank, device, kernel, heads_at_once)
    rate, found = bandwidth(repeats), count(layout, rank, heads_at_once)
    with one.alone():
        results = one.forward()
        runs: dict[str, Callable[[], Any]] = {"forward": one.forward, "backward": lambda: one.backward(*results)}
        for name, run in runs.items():
            calls = recorded(one, run)
            whole, spread = measure(run, repeats)
            kernels, _ = measure(lambda calls=calls: [call() for call in calls], repeats)  # type: ignore[misc]
            line = {"ms": whole, "spread_ms": spread, "kernels_ms": kernels, "copies_ms": whole - kernels}
            line["copies_floor_ms"] = found[name]["copied_mb"] * 1e6 / rate
            found[name] |= {key: round(value, 3) for key, value in line.items()}
        names = ("forward", "backward")
        found["by_heads_ms"] = {
            name: round(measure(run, repeats)[0], 3) for name, run in zip(names, by_heads(one), strict=True)
        }
    found["whole_row_ms"] = whole_row(layout, kernel, repeats)
    return found


def by_heads(one: Rank) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Forward and backward of `cp_mode="heads"`, to be called inside of `one.alone()`."""
    made = device_layout(one.layout, one.rank, one.device)
    inputs = [x.detach().requires_grad_() for x in one.inputs]
    group = Group(tuple(range(one.layout.size)), one.rank, None)

    def forward() -> torch.Tensor:
        tables = made.places, made.bounds, made.longest
        return heads.attend_by_heads(*inputs, *tables, group, one.kernel, DIM**-0.5, None)

    output = forward()
    return forward, lambda: torch.autograd.grad(output, inputs, output.detach(), retain_graph=True)


def whole_row(layout: Layout, kernel: str, repeats: int) -> dict[str, Any]:
    """One call over all tokens, divided by the ranks."""
    q, k, v = (
        torch.randn(1, layout.length, count, DIM, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        for count in (HEADS, KV_HEADS, KV_HEADS)
    )
    packed = len(layout.bounds) > 2
    bounds = torch.from_numpy(layout.bounds).to("cuda", torch.int32) if packed else None
    longest = torch.tensor(int(np.diff(layout.bounds).max())) if packed else None
    output = attention(q, k, v, kernel, DIM**-0.5, None, bounds, longest)
    grad = torch.randn_like(output)

    def again() -> None:
        with torch.no_grad():
            attention(q, k, v, kernel, DIM**-0.5, None, bounds, longest)

    forward = measure(again, repeats)[0]
    backward = measure(lambda: torch.autograd.grad(output, (q, k, v), grad, retain_graph=True), repeats)[0]
    return {"forward": round(forward / layout.size, 3), "backward": round(backward / layout.size, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--documents", help="SHORTEST:LONGEST tokens of a document; whole rows if unset")
    parser.add_argument("--heads-at-once", type=int, nargs="*", help="of cp_kv_heads_per_gather; its default if unset")
    parser.add_argument("--repeats", type=int, default=12)
    args = parser.parse_args()
    lengths = [int(x) for x in args.documents.split(":")] if args.documents else None
    bounds = packing(args.tokens, *lengths) if lengths else [0, args.tokens]
    layout = plan(bounds, 1, args.tokens, args.ranks, other_work=OTHER_WORK)
    for at_once in args.heads_at_once or [None]:
        one = Rank(layout, args.rank, torch.device("meta"), "by_document", at_once)
        calls, most, is_all, *_ = one.made.exchanges[None].counts.tolist()
        groups = gather.groups_of_heads(*one.inputs, one.made.exchanges[None], at_once)
        line: dict[str, Any] = {
            "tokens": args.tokens, "ranks": args.ranks, "rank": args.rank, "documents": len(bounds) - 1,
            "calls": len(one.made.calls[None].calls) // 6, "most_calls": calls, "groups_of_heads": len(groups),
            "received_mb": round(most * KV_HEADS * 2 * DIM * 2 / 1e6, 1), "all_gather": bool(is_all),
        }  # fmt: skip
        if torch.cuda.is_available():
            line |= {"device": torch.cuda.get_device_name()}
            line |= time_of(layout, args.rank, args.repeats, at_once)
        else:
            line |= count(layout, args.rank, at_once)
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
