"""Context parallelism on GPUs: kernels with bounds of their own for keys, all ranks in turn on one GPU, and over NCCL
on two, with ranks and streams that are late at random.
"""

from __future__ import annotations

import itertools
import os
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from test_cp_attention import bounds_of, own_tokens, plain
from test_gpu_attention import BF16, DEVICE, GRADIENT, HOPPER, OUTPUT, error, needs
from test_gpu_tp_overlap import be_late, launch

from hf_nanotron.ops.attention import attention
from hf_nanotron.ops.kernels.attention import KERNELS, Problem, Saved, flash_attention_4
from hf_nanotron.parallel.config import ParallelConfig
from hf_nanotron.parallel.cp import exchange, gather
from hf_nanotron.parallel.cp.attention import cp_attention, device_layout
from hf_nanotron.parallel.cp.layout import plan
from hf_nanotron.parallel.mesh import Group
from hf_nanotron.training.step import context

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# Ends of queries and of keys. One without queries between others, as keys between two chunks; one of a token.
SEGMENTS = ([0, 140, 140, 141, 300, 333], [0, 300, 377, 378, 537, 700])


@pytest.mark.parametrize("kernel", ["fa4", "flash"])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(8, 2, 128), (4, 4, 128), (8, 2, 64)])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("whole", [False, True])
def test_bounds_of_their_own(kernel: str, heads: int, kv_heads: int, dim: int, window: int | None, whole: bool) -> None:
    """Output and gradients, against float64."""
    needs(kernel)
    queries, keys = ([0, 200], [0, 555]) if whole else SEGMENTS
    generator = torch.Generator().manual_seed(dim + heads)
    sizes = ((queries[-1], heads, dim), (keys[-1], kv_heads, dim), (keys[-1], kv_heads, dim))
    inputs = [torch.randn(size, generator=generator).to(BF16) for size in sizes]
    weight = torch.randn(sizes[0], generator=generator).to(BF16)
    exact = [x.double().requires_grad_() for x in inputs]
    expected = plain(*exact, queries, keys, window, dim**-0.5)
    gradients = torch.autograd.grad(expected, exact, weight.double())

    bounds = [torch.tensor(each, dtype=torch.int32) for each in (queries, keys)]
    longest = [int(each.diff().max()) for each in bounds]
    q, k, v, w = (x.to(DEVICE)[None] for x in (*inputs, weight))
    on_device = [None, None] if whole else [each.to(DEVICE) for each in bounds]
    problem = Problem(on_device[0], longest[0], dim**-0.5, window, on_device[1], longest[1])
    found, sums = KERNELS[kernel].forward(q, k, v, problem)
    assert error(found[0], expected) < OUTPUT
    results = KERNELS[kernel].backward(w, Saved(q, k, v, found, sums.contiguous()), problem)
    for mine, theirs in zip(results, gradients, strict=True):
        assert mine.isfinite().all() and error(mine[0], theirs) < GRADIENT


def in_turn(rows: list[list[int]], length: int, size: int, window: int | None, kernel: str, heads: int) -> list[float]:
    """Errors of output and of gradients of queries, keys and values: `size` ranks, one after another, on this GPU."""
    bounds = bounds_of(rows)
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(len(rows), length, h, 128, generator=generator).to(BF16) for h in (8, 4, 4, 8)]
    exact = [x.double().requires_grad_() for x in whole[:3]]
    ends = bounds.tolist()
    expected = plain(*(x.flatten(0, 1) for x in exact), ends, ends, window, 128**-0.5).view(whole[3].shape)
    gradients = torch.autograd.grad(expected, exact, whole[3].double())
    layout = plan(bounds, len(rows), length, size, (window,))
    shards = [[own_tokens(x, layout.tokens(rank)).to(DEVICE) for x in whole] for rank in range(size)]
    tables = [device_layout(layout, rank, torch.device("cpu"), (window,)).exchanges[window] for rank in range(size)]
    sent: list[list[torch.Tensor]] = []
    errors = [0.0] * 4

    def joined() -> list[torch.Tensor]:
        """Keys and values of all ranks, of the heads whose turn it is."""
        first = turns[0] * heads
        turns[0] = (turns[0] + 1) % (4 // heads)
        parts = [
            torch.cat([k[:, :, first : first + heads], v[:, :, first : first + heads]], -1) for _, k, v, _ in shards
        ]
        return [part.flatten(0, 1) for part in parts]

    def all_gather(x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
        parts = joined()
        assert torch.equal(parts[group.rank], x)
        return torch.cat(parts)

    def all_to_all(x: torch.Tensor, group: Group, send: Any = None, receive: Any = None) -> torch.Tensor:
        """Keys and values of all ranks come; what goes home is kept, and something of its size comes."""
        if gathers[0]:
            for_me = [each.send.split(each.sent)[group.rank] for each in tables]
            return torch.cat([part[to.to(DEVICE)] for part, to in zip(joined(), for_me, strict=True)])
        sent[-1].append(x.clone())
        return x if receive is None else x.new_zeros((sum(receive), *x.shape[1:]))

    def arrive(*args: Any) -> torch.Tensor:
        gathers[0] = True
        found = original(*args)
        gathers[0] = False
        return found

    def worst(index: int, found: torch.Tensor, reference: torch.Tensor) -> None:
        errors[index] = max(errors[index], error(found, reference))

    def arrived(rank: int, turn: int) -> torch.Tensor:
        """What all ranks sent to `rank`, summed."""
        total = torch.zeros_like(shards[rank][1].flatten(0, 1)[:, :1].repeat(1, heads, 2), dtype=torch.float32)
        for place, (source, ours) in enumerate(zip(tables, sent, strict=True)):
            part = ours[turn].split(source.got)[rank].float()
            if tables[rank].is_all:
                total += part
            else:
                total.index_add_(0, tables[rank].send.split(tables[rank].sent)[place].to(DEVICE), part)
        return total

    original, gathers = exchange.arrive, [False]
    for rank in range(size):
        turns = [0]
        sent.append([])
        q, k, v = (x.clone().requires_grad_() for x in shards[rank][:3])
        made = device_layout(layout, rank, torch.device(DEVICE), (window,))
        group = Group(tuple(range(size)), rank, None)
        with (
            mock.patch.object(gather, "group_of", lambda name, group=group: group),
            mock.patch.object(gather, "arrive", arrive),
            mock.patch.object(exchange, "all_gather", all_gather),
            mock.patch.object(exchange, "all_to_all", all_to_all),
        ):
            found = cp_attention(q, k, v, made, group, kernel, 128**-0.5, window, kv_heads_per_gather=heads)
            (dq, *_) = torch.autograd.grad(found, (q, k, v), shards[rank][3])
            torch.cuda.synchronize()
        tokens = layout.tokens(rank)
        worst(0, found, own_tokens(expected.detach(), tokens))
        worst(1, dq, own_tokens(gradients[0], tokens))
    for rank in range(size):
        own = torch.cat([arrived(rank, turn) for turn in range(4 // heads)], 1)
        for index in (0, 1):
            reference = own_tokens(gradients[1 + index], layout.tokens(rank)).flatten(0, 1)
            worst(2 + index, own[..., index * 128 : (index + 1) * 128], reference)
    return errors


CASES: dict[str, Any] = {
    "whole": [[1024]],
    "packed": [[300, 1, 1, 522, 200]],
    "two rows": [[1024], [100, 924]],
    "short": [[100] * 10 + [24]],
}


@pytest.mark.parametrize("kernel", ["fa4", "flash"])
@pytest.mark.parametrize("window", [None, 100])
def test_ranks_in_turn(kernel: str, window: int | None) -> None:
    needs(kernel)
    for rows, heads in itertools.product(CASES.values(), (1, 4)):
        output, *gradients = in_turn(rows, 1024, 4, window, kernel, heads)
        assert output < OUTPUT and max(gradients) < GRADIENT, (rows, heads)


def test_batches_that_are_on_the_device_already() -> None:
    """Those of an evaluation; what they lack (`position_ids`) is made where they are."""
    ids = torch.arange(24, device=DEVICE).view(2, 12)
    with mock.patch.object(context, "check_batch"):  # which is told by the attention that a model has
        group = Group((0, 1), 1, None)
        mesh: Any = SimpleNamespace(cp=group, cp_size=2, cp_rank=1, device=torch.device(DEVICE), tp_size=1)
        mesh.parallel = ParallelConfig(cp_size=2)
        attention: Any = SimpleNamespace(windows=(None,), other_work=0.0)
        dealt = context.deal({"input_ids": ids, "labels": ids}, mesh, attention)
    assert all(x.device.type == "cuda" for x in dealt.values() if isinstance(x, torch.Tensor))
    positions, own = dealt["position_ids"], dealt["input_ids"]
    real = dealt[context.COUNTED].bool() if context.COUNTED in dealt else torch.ones_like(own, dtype=torch.bool)
    assert torch.equal(positions[real], (own % 12)[real])


def over_nccl() -> None:
    """What torchrun starts."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    group = Group(tuple(range(size)), rank, dist.new_group(list(range(size))))
    delays, numbers = torch.Generator().manual_seed(rank), torch.Generator(device).manual_seed(0)
    kernel = "fa4" if HOPPER and flash_attention_4()[0] is not None else "flash"
    length = 4096
    cases = list(
        itertools.product(("gather", "heads"), ([[4096]], [[1500, 1, 2000, 595], [4096]]), (None, 300), (1, 2, None))
    )
    for mode, rows, window, heads in cases:
        whole = [
            torch.randn(len(rows), length, h, 128, generator=numbers, device=device).to(BF16) for h in (8, 4, 4, 8)
        ]
        bounds = bounds_of(rows)
        for x in whole[:3]:
            x.requires_grad_()
        expected = attention(*whole[:3], kernel, 0.1, window, bounds.to(device), bounds.diff().max())
        gradients = torch.autograd.grad(expected, whole[:3], whole[3])
        layout = plan(bounds, len(rows), length, size, (window,))
        tokens = layout.tokens(rank)
        q, k, v, weight = (own_tokens(x.detach(), tokens.to(device)) for x in whole)
        inputs = [x.requires_grad_() for x in (q, k, v)]
        made = device_layout(layout, rank, device, (window,))
        results = []
        for _ in range(3):  # memory of one is used again by the next
            be_late(delays)
            found = cp_attention(*inputs, made, group, kernel, 0.1, window, mode, heads)
            be_late(delays)
            results.append((found, *torch.autograd.grad(found, inputs, weight)))
        for result in results:
            for mine, theirs, limit in zip(result, (expected, *gradients), (OUTPUT, *[GRADIENT] * 3), strict=True):
                reference = own_tokens(theirs.detach(), tokens.to(device)).double().cpu()
                assert error(mine, reference) < limit, (mode, rows, window, heads)
    dist.destroy_process_group()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_over_nccl() -> None:
    launch(2, file=__file__)


if __name__ == "__main__":
    over_nccl()
