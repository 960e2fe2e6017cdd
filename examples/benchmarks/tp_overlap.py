"""What it takes to let tensor-parallel communication travel beside matrix products, side by side in one run.

    torchrun --nproc-per-node 2 examples/benchmarks/tp_overlap.py

For the entry of a block (gather, then its first linears), its exit (last linear, then sum and scatter) and the two in a
backward (beside a weight gradient): the products alone, NCCL before or after them, and ours over both transports, with
the tokens of a rank in 1, 2 and 4 pieces. Milliseconds, median of the runs on the slowest rank; "exposed" is what a row
takes longer than its products, "hidden" the part of NCCL's time that this saves.
"""

import argparse
from collections.abc import Callable

import torch
import torch.distributed as dist

from hf_nanotron import ParallelConfig
from hf_nanotron.ops.linear import Linear, add_product
from hf_nanotron.parallel.collectives import all_gather, reduce_scatter
from hf_nanotron.parallel.mesh import ParallelMesh
from hf_nanotron.parallel.tp.overlap import Overlap, multiply
from hf_nanotron.parallel.tp.transport import Messages, SymmetricMemory, make_transport

# name: (hidden, samples, tokens of a sample, features of the first linears, features into the last) of a whole block
BLOCKS = {
    "1b attention": (2048, 8, 4096, (2048, 512, 512), 2048),
    "1b mlp": (2048, 8, 4096, (8192, 8192), 8192),
    "8b attention": (4096, 4, 8192, (4096, 1024, 1024), 4096),
    "8b mlp": (4096, 4, 8192, (14336, 14336), 14336),
}


def measure(function: Callable[[], object], warmup: int, runs: int) -> float:
    """Median milliseconds, of the slowest rank in each run."""
    times = []
    for run in range(warmup + runs):
        dist.barrier()
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(3_000_000)  # the host runs ahead, as in a training step
        start.record()
        function()
        stop.record()
        torch.cuda.synchronize()
        if run >= warmup:
            times.append(start.elapsed_time(stop))
    slowest = torch.tensor(times, device="cuda")
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest.median())


class Total:
    """A weight gradient that is added to when the queue runs it."""

    def __init__(self, rows: int, columns: int) -> None:
        self.total = torch.zeros(rows, columns, device="cuda")

    def hold(self) -> None:
        pass

    def add_held_product(self, grad_output: torch.Tensor, input: torch.Tensor) -> None:
        add_product(self.total, grad_output, input, overwrite=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--blocks", nargs="+", default=list(BLOCKS), choices=list(BLOCKS))
    options = parser.parse_args()
    dist.init_process_group("nccl")
    torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    mesh = ParallelMesh(ParallelConfig(tp_size=dist.get_world_size()))
    group, size, rank = mesh.tp, mesh.tp_size, mesh.rank
    memory = make_transport(group, mesh.device)
    transports = {"messages": Messages(group)}
    if isinstance(memory, SymmetricMemory):
        transports = {"memory": memory, **transports}
    elif rank == 0:
        print("no access to each other's memory: messages alone")
    if rank == 0:
        print(f"{torch.cuda.get_device_name()} x {size}, torch {torch.__version__}")

    def table(title: str, alone: Callable[[], object], rows: dict[str, Callable[[], object]]) -> None:
        base = measure(alone, options.warmup, options.runs)
        times = {name: measure(row, options.warmup, options.runs) for name, row in rows.items()}
        if rank == 0:
            print(f"\n{title}\n  {'products alone':28s} {base:7.3f}")
            nccl = times["nccl"] - base
            for name, time in times.items():
                print(f"  {name:28s} {time:7.3f}  exposed {time - base:7.3f}  hidden {1 - (time - base) / nccl:6.0%}")

    for name in options.blocks:
        hidden, samples, tokens, features, inner = BLOCKS[name]
        x = torch.randn(samples, tokens // size, hidden, device="cuda", dtype=torch.bfloat16)
        like = {"device": "cuda", "dtype": torch.bfloat16, "bias": False}
        layers = [Linear(hidden, n // size, **like).requires_grad_(False) for n in features]
        last = Linear(inner // size, hidden, **like).requires_grad_(False)
        whole = torch.randn(samples, tokens, hidden, device="cuda", dtype=torch.bfloat16)
        input = torch.randn(samples, tokens, inner // size, device="cuda", dtype=torch.bfloat16)
        ours = {
            f"{kind}, {pieces} piece{'s' * (pieces > 1)}": Overlap(group, transport, pieces)
            for kind, transport in transports.items()
            for pieces in (1, 2, 4)
        }

        def products(of: torch.Tensor, layers: list[Linear] = layers) -> None:
            for layer in layers:
                layer(of)

        def halves(layers: list[Linear] = layers, whole: torch.Tensor = whole) -> None:
            for layer in layers:
                out = whole.new_empty(*whole.shape[:2], layer.weight.shape[0])
                for part, target in zip(whole.chunk(size, 1), out.chunk(size, 1), strict=True):
                    multiply(part, layer.weight, None, target)

        def exit_of(overlap: Overlap, input: torch.Tensor = input, last: Linear = last) -> None:
            overlap.take(overlap.multiply_and_send(input, last.weight, None))

        table(
            f"{name}: entry",
            lambda whole=whole: products(whole),
            {
                "products of each rank's part": halves,
                "nccl": lambda x=x: products(all_gather(x, group, 1)),
                **{key: lambda o=o, x=x, layers=layers: o.gather(x, layers) for key, o in ours.items()},
            },
        )
        table(
            f"{name}: exit",
            lambda input=input, last=last: last(input),
            {
                "nccl": lambda input=input, last=last: reduce_scatter(last(input), group, 1),
                **{key: lambda o=o: exit_of(o) for key, o in ours.items()},
            },
        )
        total = Total(features[0] // size, hidden)
        grad = torch.randn(samples * tokens, features[0] // size, device="cuda", dtype=torch.bfloat16)
        rows = whole.flatten(0, 1)

        def beside(overlap: Overlap, call: Callable[[], object], held: tuple = (total, grad, rows)) -> None:
            overlap.queue._held.append(held)  # as `add` does in a backward
            call()
            overlap.queue.flush()

        def weight(total: Total = total, grad: torch.Tensor = grad, rows: torch.Tensor = rows) -> None:
            total.add_held_product(grad, rows)

        single = {key: o for key, o in ours.items() if "1 piece" in key}
        table(
            f"{name}: gradients gathered beside one weight gradient",
            weight,
            {
                "nccl": lambda x=x: (all_gather(x, group, 1), weight()),
                **{key: lambda o=o, x=x: beside(o, lambda: o.gather(x, [])) for key, o in single.items()},
            },
        )
        table(
            f"{name}: gradients summed beside one weight gradient",
            weight,
            {
                "nccl": lambda whole=whole: (reduce_scatter(whole, group, 1), weight()),
                **{key: lambda o=o, whole=whole: beside(o, lambda: o.reduce(whole)) for key, o in single.items()},
            },
        )
    memory.close()
    mesh.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
