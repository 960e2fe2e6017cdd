"""What it takes to let tokens travel beside the products of experts, side by side in one run.

    torchrun --nproc-per-node 2 examples/benchmarks/expert_parts.py

One layer of experts in bf16, forward and backward with fp32 weight gradients: the products alone (rows that stay where
they are), with all tokens waited for, and in parts, for several numbers of multiprocessors that the communicator may
take (0: as many as it likes) and that products leave to it. Milliseconds, median of the runs on the slowest rank;
"exposed" is what a row takes longer than the products alone, "hidden" the part of what the plain exchange exposes that
this saves.
"""

import argparse
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from tp_overlap import measure
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from hf_nanotron.ops.grouped_mm import add_grouped_product
from hf_nanotron.parallel.ep.experts import ParallelExperts, experts_class
from hf_nanotron.parallel.mesh import Group


class Total:
    """A weight gradient that is added to."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.total = torch.zeros_like(parameter, dtype=torch.float32)

    def takes_product(self, dtype: torch.dtype) -> bool:
        return True

    def hold(self) -> None:
        pass

    def add_grouped_product(self, left: torch.Tensor, right: torch.Tensor, offsets: torch.Tensor) -> None:
        add_grouped_product(self.total, left, right, offsets, overwrite=False)

    add_held_grouped_product = add_grouped_product


class Nothing:
    def wait(self) -> None:
        pass


def stay(into: torch.Tensor, rows: torch.Tensor, received: list[int], sent: list[int], group: Group) -> Nothing:
    """An exchange that takes no time: whatever is in memory has arrived."""
    return Nothing()


def communicator(multiprocessors: int) -> Group:
    """All ranks, with a communicator of their own."""
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    if multiprocessors:
        options.config.max_ctas = multiprocessors
    ranks = list(range(dist.get_world_size()))
    handle = dist.new_group(ranks, pg_options=options)
    dist.all_reduce(torch.zeros(1, device="cuda"), group=handle)
    return Group(tuple(ranks), dist.get_rank(), handle)


def layer(options: argparse.Namespace, ranks: int) -> ParallelExperts:
    config: Any = SimpleNamespace(
        num_experts=options.experts // ranks, num_local_experts=options.experts // ranks, hidden_size=options.hidden,
        moe_intermediate_size=options.inner, hidden_act="silu", _experts_implementation="eager",
    )  # fmt: skip
    with torch.device("cuda"):
        experts: Any = Qwen3MoeExperts(config).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=0.02)
    experts.__class__ = experts_class(Qwen3MoeExperts)
    experts.num_experts = options.experts
    experts.weight_gradients = {name: Total(parameter) for name, parameter in experts.named_parameters()}
    return experts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384, help="of a rank")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=768)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--parts", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--communicators", type=int, nargs="+", default=[0, 8, 16, 32], help="multiprocessors")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=4)
    options = parser.parse_args()
    dist.init_process_group("nccl")
    torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    experts = layer(options, dist.get_world_size())
    generator = torch.Generator("cuda").manual_seed(dist.get_rank())
    x = torch.randn(options.tokens, options.hidden, generator=generator, device="cuda").bfloat16().requires_grad_()
    scores = torch.rand(options.tokens, options.experts, generator=generator, device="cuda")
    weights, chosen = scores.topk(options.top_k)
    weights = (weights / weights.sum(1, keepdim=True)).requires_grad_()
    grad = torch.randn_like(x)

    def forward() -> None:
        with torch.no_grad():
            experts(x, chosen, weights)

    def step() -> None:
        experts(x, chosen, weights).backward(grad)

    def row(name: str, alone: list[float] | None = None, plain: list[float] | None = None) -> list[float]:
        times = [measure(function, options.warmup, options.runs) for function in (forward, step)]
        times[1] -= times[0]  # of the backward
        if dist.get_rank() == 0:
            cells = []
            for index, time in enumerate(times):
                exposed = "" if alone is None else f"{time - alone[index]:.2f}"
                hidden = ""
                if alone is not None and plain is not None:
                    hidden = f"{(plain[index] - time) / max(1e-9, plain[index] - alone[index]):.0%}"
                cells += [f"{time:.2f}", exposed, hidden]
            print("| " + " | ".join([name, *cells]) + " |", flush=True)
        return times

    if dist.get_rank() == 0:
        print("| | forward | exposed | hidden | backward | exposed | hidden |\n|---|---|---|---|---|---|---|")
    groups = {number: communicator(number) for number in options.communicators}
    stock, experts.group = experts.exchange, next(iter(groups.values()))
    experts.exchange, experts.parts, experts.spared = stay, 2, 0
    alone = row("rows that stay")
    experts.exchange, experts.parts = stock, 1
    plain = row("all waited for", alone)
    for parts in options.parts:
        experts.parts = parts
        for number, experts.group in groups.items():
            for experts.spared in sorted({0, number}):
                row(f"{parts} parts, communicator {number or 'free'}, spared {experts.spared}", alone, plain)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
