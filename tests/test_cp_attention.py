"""Context-parallel attention on gloo ranks: outputs and gradients of plain attention with a whole mask, in one process.

The kernel is the one that runs anywhere (`by_document`); `test_gpu_attention.py` has the others.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from benchmark_scripts import scripts
from pool import WorkerPool
from test_attention import masked
from test_operators import FORMS, check
from torch._dynamo.utils import counters

from hf_nanotron.ops.kernels.attention import KERNELS, Problem, Saved
from hf_nanotron.parallel import collectives
from hf_nanotron.parallel.cp.attention import DeviceLayout, cp_attention, device_layout
from hf_nanotron.parallel.cp.choice import HeadShape, cheaper
from hf_nanotron.parallel.cp.exchange import Exchange
from hf_nanotron.parallel.cp.gather import groups_of_heads
from hf_nanotron.parallel.cp.layout import plan
from hf_nanotron.parallel.mesh import Group

CPU = torch.device("cpu")
LIMIT = {torch.float32: 2e-6, torch.float64: 1e-12}
LENGTH = 64
ROWS: dict[str, list[list[int]]] = {
    "whole": [[64]],
    "two whole rows": [[64], [64]],
    "packed": [[5, 23, 1, 1, 14, 20]],
    "two packed rows": [[3, 61], [1] * 10 + [30, 24]],
}


def bounds_of(rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(size for row in rows for size in row)], dtype=torch.int32)


# ---- kernels with separate bounds ----


def plain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    queries: list[int],
    keys: list[int],
    window: int | None,
    scale: float,
) -> torch.Tensor:
    """Attention of `[tokens, heads, D]` with a mask that is made pair by pair."""
    seen = torch.zeros(len(q), len(k), dtype=torch.bool)
    for (a, b), (c, d) in zip(itertools.pairwise(queries), itertools.pairwise(keys), strict=True):
        for i in range(a, b):
            last = d - (b - i)
            seen[i, max(c, last - (window or d) + 1) : last + 1] = True
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("block", [2, 256, None])
@pytest.mark.parametrize(
    ("queries", "keys"),
    [
        ([0, 5], [0, 9]),  # one document: rows, without bounds
        ([0, 5, 5, 6, 12], [0, 9, 13, 14, 20]),  # one without queries, one of a token
        ([0, 1, 2, 2, 2], [0, 7, 8, 8, 12]),  # one without either
    ],
)
def test_bounds_of_their_own(
    queries: list[int],
    keys: list[int],
    window: int | None,
    dtype: torch.dtype,
    block: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`block`: queries at once of `by_document`; None: torch's kernel on a CPU, which has no windows."""
    monkeypatch.setattr("hf_nanotron.ops.kernels.attention.QUERIES_AT_ONCE", block or 256)
    generator = torch.Generator().manual_seed(0)
    sizes = ((queries[-1], 4), (keys[-1], 2), (keys[-1], 2))
    inputs = [torch.randn(*size, 8, generator=generator, dtype=dtype, requires_grad=True) for size in sizes]
    expected = plain(*inputs, queries, keys, window, 0.3)
    weight = torch.randn(expected.shape, generator=generator, dtype=dtype)
    gradients = torch.autograd.grad((expected * weight).sum(), inputs)
    problem = Problem(torch.tensor(queries, dtype=torch.int32), 6, 0.3, window, torch.tensor(keys).int(), 9)
    if len(queries) == 2:
        problem = Problem(None, queries[-1], 0.3, window, None, keys[-1])
    name = "by_document" if block is not None or window is not None else "cpu_flash"
    kernel, (q, k, v) = KERNELS[name], (x.detach()[None] for x in inputs)
    found, sums = kernel.forward(q, k, v, problem)
    results = kernel.backward(weight[None], Saved(q, k, v, found, sums), problem)
    for ours, theirs in zip((found, *results), (expected, *gradients), strict=True):
        assert error(ours[0], theirs) < LIMIT[dtype]


# ---- ranks ----


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape and found.dtype == expected.dtype
    return float((found - expected).detach().norm() / expected.detach().norm())


def own_group() -> Group:
    return Group(tuple(range(dist.get_world_size())), dist.get_rank(), dist.group.WORLD)


def errors(
    mode: str, rows: list[list[int]], window: int | None, heads: tuple[int, int], dtype: torch.dtype, value_dim: int = 8
) -> float:
    """The largest of output, and gradients of queries, keys and values, of this rank."""
    group, bounds = own_group(), bounds_of(rows)
    generator = torch.Generator().manual_seed(0)
    sizes = ((heads[0], 8), (heads[1], 8), (heads[1], value_dim))
    whole = [torch.randn(len(rows), LENGTH, h, d, generator=generator, dtype=dtype) for h, d in sizes]
    weight = torch.randn(len(rows), LENGTH, heads[0], value_dim, generator=generator, dtype=dtype)
    for x in whole:
        x.requires_grad_()
    expected = masked(*whole, bounds, window, 0.3)
    gradients = torch.autograd.grad((expected * weight).sum(), whole)

    layout = plan(bounds, len(rows), LENGTH, group.size, (window,))
    tokens = layout.tokens(group.rank)
    take = functools.partial(own_tokens, tokens=tokens)
    mine = [take(x.detach()).requires_grad_() for x in whole]
    made = device_layout(layout, group.rank, CPU, (window, None))
    found = cp_attention(*mine, made, group, "by_document", 0.3, window, mode, 1)
    assert found.is_contiguous()
    results = torch.autograd.grad((found * take(weight)).sum(), mine)
    pairs = zip((found, *results), (expected, *gradients), strict=True)
    return max(error(ours, take(theirs)) for ours, theirs in pairs)


def own_tokens(x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return torch.stack([row[columns] for row, columns in zip(x, tokens, strict=True)])


def some_cases(every: bool) -> dict[str, float]:
    """Relative to their limits."""
    found = {}
    names = ROWS if every else ("whole", "two packed rows")
    shapes = ((4, 4), (4, 2), (4, 1)) if every else ((4, 2), (4, 1))
    dtypes = tuple(LIMIT) if every else (torch.float64,)
    for mode, name, window, heads, dtype in itertools.product(("gather", "heads"), names, (None, 5), shapes, dtypes):
        rows = ROWS[name]
        found[f"{mode}, {name}, {window=}, {heads=}, {dtype}"] = errors(mode, rows, window, heads, dtype) / LIMIT[dtype]
    for mode in ("gather", "heads"):
        fewer = errors(mode, ROWS["packed"], None, (4, 2), torch.float64, 6)
        found[f"{mode}, fewer features of values"] = fewer / LIMIT[torch.float64]
    found["fp32"] = errors("gather", ROWS["packed"], None, (4, 2), torch.float32) / LIMIT[torch.float32]
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_as_in_one_process(pool: WorkerPool, size: int, request: pytest.FixtureRequest) -> None:
    every = request.config.getoption("full_matrix")
    if size == 2 and not every:
        pytest.skip("runs with --full-matrix")
    for rank in pool.run(size, some_cases, every):
        assert len(rank) == (99 if every else 19)
        assert max(rank.values()) < 1, max(rank.items(), key=lambda item: item[1])


def traffic(mode: str, kv_heads_per_gather: int | None, rows: list[list[int]]) -> tuple[Counter[str], Counter[str]]:
    """Collectives, and numbers that this rank receives from others, of a forward and of a backward."""
    group = own_group()
    layout = plan(bounds_of(rows), len(rows), LENGTH, group.size)
    made = device_layout(layout, group.rank, CPU)
    q, k, v = (torch.randn(len(rows), LENGTH // group.size, h, 8, requires_grad=True) for h in (8, 4, 4))
    counts = Counter[str]()

    def counting(function: Any, name: str) -> Any:
        def call(out: torch.Tensor, x: torch.Tensor, receive: Any = None, *args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            own = out.numel() // group.size if receive is None else receive[group.rank] * out[0].numel()
            counts["received"] += out.numel() - own
            return function(out, x, *([] if receive is None else [receive]), *args, **kwargs)

        return call

    with (
        mock.patch.object(collectives, "_all_gather", counting(collectives._all_gather, "all-gather")),
        mock.patch.object(dist, "all_to_all_single", counting(dist.all_to_all_single, "all-to-all")),
    ):
        found = cp_attention(q, k, v, made, group, "by_document", 0.3, None, mode, kv_heads_per_gather)
        forward = counts.copy()
        found.sum().backward()
    return forward, counts - forward


def test_collectives_and_bytes(pool: WorkerPool) -> None:
    """They are those that the docstring says."""
    tokens, rows = 2 * LENGTH, ROWS["two whole rows"]
    once = tokens * 4 * (8 + 8) * 3 // 4  # (n - 1) / n * S * E
    for given, groups in ((1, 4), (3, 2), (4, 1), (None, 1)):
        for forward, backward in pool.run(4, traffic, "gather", given, rows):
            assert forward == {"all-gather": groups, "received": once}
            assert backward == {"all-gather": groups, "all-to-all": groups, "received": 2 * once}
    own = tokens // 4
    for forward, backward in pool.run(4, traffic, "heads", None, rows):
        sent = own * (8 + 4 + 4 + 8) * 8 * 3 // 4
        assert forward == backward == {"all-to-all": 2, "received": sent}


@pytest.mark.parametrize("rows", [[[9] * 7 + [1]], [[5, 9] * 4 + [8], [7] * 9 + [1]]])
def test_of_short_documents_a_rank_gets_what_it_needs(pool: WorkerPool, rows: list[list[int]]) -> None:
    """Keys from the starts of documents that others hold; their gradients go back."""
    bounds = bounds_of(rows)
    layout = plan(bounds, len(rows), LENGTH, 4)
    starts = np.repeat(bounds[:-1].numpy(), np.diff(bounds.numpy()))
    holder = np.empty(len(starts), np.int64)
    for rank in range(4):
        holder[(layout.tokens(rank) + torch.arange(len(rows))[:, None] * LENGTH).flatten()] = rank
    seen = [
        {key for query in np.nonzero(holder == rank)[0] for key in range(starts[query], query)} for rank in range(4)
    ]
    sent = np.array([[sum(holder[key] == owner for key in seen[rank]) for owner in range(4)] for rank in range(4)])
    np.fill_diagonal(sent, 0)
    for rank, (forward, backward) in enumerate(pool.run(4, traffic, "gather", 2, rows)):
        features = 4 * (8 + 8)
        assert forward == {"all-to-all": 2, "received": sent[rank].sum() * features}
        assert backward == {"all-to-all": 4, "received": (sent[rank].sum() + sent[:, rank].sum()) * features}


def test_bytes_that_copies_move() -> None:
    """Those of one rank with the heads of an 8B, against a formula: bf16, 2 bytes a number."""
    with scripts(["context_layer"]) as bench:
        size, tokens, heads, keys_and_values, queries = 8, 32768, 32, 8 * 256, 32 * 128
        layout = plan([0, tokens], 1, tokens, size)
        own, twice = tokens // size, tokens // size // 2  # keys that both calls of rank 0 have
        found = bench.context_layer.count(layout, 0)
        put = 4 * own * queries + 8 * own * heads
        gathered = 4 * (own + tokens) * keys_and_values
        assert found["forward"] == {"copied_mb": round((gathered + put) / 1e6, 1), "copies": 2 * (2 + 2 * 2)}
        home = (4 * tokens + 6 * twice + 2 * tokens + (4 + 6 + 4) * own) * keys_and_values
        back = round((gathered + home + 4 * own * queries) / 1e6, 1)
        assert found["backward"] == {"copied_mb": back, "copies": 2 * (2 + 3 * 2 + 2 + 2 + 2)}

        bounds = list(range(0, tokens + 1, 1024))  # which no rank shares with another
        layout = plan(bounds, 1, tokens, size)
        found = bench.context_layer.count(layout, 0)
        moved = 4 * own * keys_and_values
        assert found["forward"] == {"copied_mb": round(3 * moved / 1e6, 1), "copies": 3}
        # Put, to fp32, back and into two gradients; keys and values are put one after the other.
        assert found["backward"] == {"copied_mb": round(8 * moved / 1e6, 1), "copies": 9}


def test_heads_that_are_gathered_at_once() -> None:
    """A quarter, or what fills a call, or what is worth sending in parts; groups of one size."""

    def sizes(tokens: int, kv_heads: int, received: int, calls: int = 2, given: int | None = None) -> list[int]:
        q, k = (torch.empty(1, tokens, h, 128, device="meta", dtype=torch.bfloat16) for h in (4 * kv_heads, kv_heads))
        exchange = Exchange(k, k, torch.tensor([calls, received, 1]))
        groups = groups_of_heads(q, k, k, exchange, given)
        assert groups[-1].queries.stop == 4 * kv_heads
        return [group.keys.stop - group.keys.start for group in groups]

    assert sizes(16384, 8, 7 * 16384) == [2] * 4  # of an 8B: 128k over 8 ranks
    assert sizes(4096, 8, 7 * 4096) == [4, 4]  # 32k
    assert sizes(2048, 8, 7 * 2048) == [8]
    assert sizes(16384, 2, 7 * 16384) == [1, 1] and sizes(4096, 2, 7 * 4096) == [2]
    assert sizes(16384, 8, 4096) == [8] and sizes(16384, 8, 8192) == [4, 4]  # short documents: little is sent
    assert sizes(64, 8, 448, given=3) == [3, 3, 2]


def test_ranks_have_as_many_groups() -> None:
    """Though the last has one call of whole rows, and others two: each group is a collective."""
    layout = plan([0, 16384], 1, 16384, 8)
    q, k = (torch.empty(1, 2048, h, 128, device="meta", dtype=torch.bfloat16) for h in (32, 8))
    made = [device_layout(layout, rank, CPU) for rank in range(8)]
    assert [len(each.calls[None].calls) // 6 for each in made] == [2] * 7 + [1]
    assert len({len(groups_of_heads(q, k, k, each.exchanges[None], None)) for each in made}) == 1


EIGHT_B = HeadShape(32, 8, 128, 128)
CHOICES: list[tuple[int, int, list[int] | None, int | None, HeadShape, str]] = [
    (2, 32768, None, None, EIGHT_B, "heads"),  # measured, as the next two
    (2, 131072, None, None, EIGHT_B, "heads"),
    (2, 131072, [1024] * 8 + [98304, 24576], None, EIGHT_B, "heads"),
    (8, 131072, None, None, EIGHT_B, "heads"),
    (2, 131072, None, 4096, EIGHT_B, "gather"),
    (8, 131072, None, 4096, EIGHT_B, "gather"),
    (8, 131072, [2000] * 65 + [1072], None, EIGHT_B, "gather"),
    (8, 131072, [65536] * 2, None, EIGHT_B, "heads"),
    (8, 131072, None, None, HeadShape(12, 4, 128, 128), "gather"),  # 8 does not divide 12
    (8, 131072, None, None, HeadShape(24, 3, 128, 128), "gather"),  # nor one of 8 and 3 the other
]


@pytest.mark.parametrize(("size", "length", "documents", "window", "shape", "expected"), CHOICES)
def test_automatic_mode(
    size: int, length: int, documents: list[int] | None, window: int | None, shape: HeadShape, expected: str
) -> None:
    layout = plan(bounds_of([documents or [length]]), 1, length, size, other_work=26_000)
    exchanges = [device_layout(layout, rank, CPU, (window,)).exchanges[window] for rank in range(size)]
    assert {cheaper(shape, size, length // size, each) for each in exchanges} == {expected}


def refused(heads: tuple[int, int], mode: str, window: int | None, count: int | None) -> str:
    group = own_group()
    made = device_layout(plan([0, LENGTH], 1, LENGTH, group.size), group.rank, CPU)
    q, k, v = (torch.randn(1, LENGTH // group.size, h, 8) for h in (heads[0], heads[1], heads[1]))
    with pytest.raises(ValueError) as caught:
        cp_attention(q, k, v, made, group, "by_document", 0.3, window, mode, count)
    return str(caught.value)


def test_what_cannot_run_is_refused(pool: WorkerPool) -> None:
    messages = [
        (((3, 1), "heads", None, None), "cannot give 2 context-parallel ranks 3 heads and 1 key-value heads"),
        (((6, 3), "heads", None, None), "one of 2 and 3 the other. Use cp_mode='gather'"),
        (((4, 2), "ring", None, None), "cp_mode='ring' is not one of gather, heads"),
        (((4, 2), "gather", 7, None), "made for windows [None], not for 7"),
        (((4, 2), "gather", None, 0), "cp_kv_heads_per_gather=0"),
    ]
    for arguments, message in messages:
        for found in pool.run(2, refused, *arguments):
            assert message in found


def checked_operators(forms: list[str]) -> None:
    group = own_group()
    rows = ROWS["packed"]
    layout = device_layout(plan(bounds_of(rows), 1, LENGTH, group.size), group.rank, CPU)
    name, here = dist.group.WORLD.group_name, LENGTH // group.size
    for form in (FORMS[name] for name in forms):
        q, k, v, grad = (form(torch.randn(1, here, heads, 8)).requires_grad_() for heads in (4, 2, 2, 4))
        said = (*layout.calls[None], *layout.exchanges[None], 0.3, None, "by_document", 1, name)
        check(torch.ops.hf_nanotron.attention_cp, q, k, v, *said)
        given = [x.detach() for x in (grad, q, k, v)]
        found = torch.ops.hf_nanotron.attention_cp(*given[1:], *said)
        check(torch.ops.hf_nanotron.attention_cp_backward, *given, *found, *said)
        x, y = form(torch.randn(1, here, group.size, 6)), form(torch.randn(1, LENGTH, 6))
        for operator, value in ((torch.ops.hf_nanotron.cp_to_heads, x), (torch.ops.hf_nanotron.cp_to_tokens, y)):
            check(operator, value.requires_grad_(), layout.places, name)


def test_operators_are_what_they_say_to_a_compiler(pool: WorkerPool, pytestconfig: pytest.Config) -> None:
    pool.run(2, checked_operators, [*FORMS] if pytestconfig.getoption("full_matrix") else ["inner"])


def compiled_graphs(mode: str) -> tuple[float, list[int]]:
    """The largest difference from running eagerly, and graphs after each of several layouts."""
    group = own_group()

    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: DeviceLayout) -> torch.Tensor:
        return cp_attention(q * 1.5, k + 1, v, layout, group, "by_document", 0.3, None, mode, 1).sin()

    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    difference, graphs = 0.0, []
    for row in ([5, 59], [5, 23, 1, 1, 14, 20], [32, 32], [1] * 30 + [34], [63, 1], [10, 10, 44]):
        made = device_layout(plan(bounds_of([row]), 1, LENGTH, group.size), group.rank, CPU)
        inputs = [torch.randn(1, LENGTH // group.size, h, 8, requires_grad=True) for h in (4, 2, 2)]
        results = []
        for one in (function, compiled):
            output = one(*inputs, made)
            results.append((output.detach(), *torch.autograd.grad(output.sum(), inputs)))
        difference = max(difference, *(float((x - y).abs().max()) for x, y in zip(*results, strict=True)))
        graphs.append(counters["stats"]["unique_graphs"])
    return difference, graphs


@pytest.mark.parametrize("mode", ["gather", "heads"])
def test_compiled_once_for_all_layouts(pool: WorkerPool, pytestconfig: pytest.Config, mode: str) -> None:
    if mode == "heads" and not pytestconfig.getoption("full_matrix"):
        pytest.skip("runs with --full-matrix")
    for difference, graphs in pool.run(2, compiled_graphs, mode):
        assert difference == 0 and graphs == [1] * 6
