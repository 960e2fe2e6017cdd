"""Experts computed in parts, while tokens travel: against stock code, and in what order things are started."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pool import WorkerPool
from test_experts import (
    CASES,
    EXPERTS,
    GPT_OSS,
    HIDDEN,
    QWEN,
    TOLERANCE,
    TOP_K,
    Sink,
    assert_same,
    batch,
    build,
    drop,
    gradients,
    joined,
    own_experts,
    parallel,
    rank_and_size,
    whole_group,
    without_sentinels,
)
from test_experts_parity import ALL_TO_ONE, ONCE, check
from test_mixture import start, train

from hf_nanotron.parallel.config import ParallelConfig
from hf_nanotron.parallel.ep.experts import ParallelExperts, capacity_of
from hf_nanotron.parallel.ep.parts import (
    BYTES_PER_SECOND,
    MOST_PARTS,
    SECONDS_PER_PART,
    Route,
    run_in_parts,
    start_all_to_all,
    suitable_parts,
)
from hf_nanotron.parallel.mesh import Group, ParallelMesh

PARTS = (2, 3, 100)  # 100: one expert a part


def experts_of(family: tuple[str, str], parts: int, **attributes: Any) -> ParallelExperts:
    rank, size = rank_and_size()
    group = whole_group(rank, size)
    return parallel(own_experts(family, rank, size), group=group, parts=parts, **attributes)


def own_tokens(tokens: list[int], kind: str) -> list[torch.Tensor]:
    first = sum(tokens[: rank_and_size()[0]])
    return [part[first : first + tokens[rank_and_size()[0]]] for part in batch(sum(tokens), kind=kind)]


def run_parts(
    family: tuple[str, str], tokens: list[int], kind: str, factor: float | None, recompute: bool
) -> list[dict[str, torch.Tensor]]:
    """Of each number of parts, and of none."""
    mine, found = own_tokens(tokens, kind), []
    for parts in (*PARTS, 1):
        ours = experts_of(family, parts, capacity_factor=factor)
        result = gradients(ours, *mine, recompute=recompute)
        if ours.dropped is not None:
            result["dropped"] = ours.dropped[None]
        found.append(result)
    return found


def by_parts(results: list[list[dict[str, torch.Tensor]]]) -> list[dict[str, torch.Tensor]]:
    return [joined(list(of_ranks)) for of_ranks in zip(*results, strict=True)]


@pytest.mark.parametrize(("family", "tokens", "kind", "recompute"), CASES)
def test_parts(pool: WorkerPool, family: tuple[str, str], tokens: list[int], kind: str, recompute: bool) -> None:
    """Among the cases: ranks without tokens, pairs of no expert, and all tokens for one expert of one part."""
    reference = without_sentinels(build(*family), *batch(sum(tokens), kind=kind))
    *found, plain = by_parts(pool.run(len(tokens), run_parts, family, tokens, kind, None, recompute))
    for result in (*found, plain):
        assert_same(result, reference, TOLERANCE)
    for result in found[1:]:
        assert_same(result, found[0], 1e-15)  # the very same products and sums


@pytest.mark.parametrize("factor", [0.75, 100.0])
def test_parts_with_a_capacity(pool: WorkerPool, factor: float) -> None:
    x, index, weights = batch(24)
    capacity = capacity_of(factor, 12 * TOP_K, EXPERTS)
    kept = torch.cat([drop(part, capacity) for part in index.chunk(2)])
    reference = without_sentinels(build(*GPT_OSS), x, kept, weights)
    for result in by_parts(pool.run(2, run_parts, GPT_OSS, [12, 12], "random", factor, True)):
        assert int(result.pop("dropped").sum()) == int((kept != index).sum())
        assert_same(result, reference, TOLERANCE)


class Journal:
    """What happens, in order: `exchange` for the experts."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def exchange(
        self, into: torch.Tensor, rows: torch.Tensor, received: list[int], sent: list[int], group: Group
    ) -> Any:
        self.lines.append("send")
        work = start_all_to_all(into, rows, received, sent, group)
        journal = self

        class Started:
            def wait(self) -> None:
                journal.lines.append("wait")
                work.wait()

        return Started()

    def take(self) -> str:
        lines, self.lines = self.lines, []
        return " ".join(lines)


class HeldSink(Sink):
    """Writes its products down, and counts those that are to come."""

    def __init__(self, parameter: torch.nn.Parameter, journal: Journal) -> None:
        super().__init__(parameter)
        self.journal, self.held = journal, 0

    def hold(self) -> None:
        self.held += 1

    def add_held_grouped_product(self, left: torch.Tensor, right: torch.Tensor, offsets: torch.Tensor) -> None:
        self.held -= 1
        self.add_grouped_product(left, right, offsets)

    def add_grouped_product(self, left: torch.Tensor, right: torch.Tensor, offsets: torch.Tensor) -> None:
        self.journal.lines.append("weights")
        super().add_grouped_product(left, right, offsets)


class Activation(torch.nn.Module):
    def __init__(self, journal: Journal) -> None:
        super().__init__()
        self.journal = journal

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.journal.lines.append("compute")
        out = torch.nn.functional.silu(x)
        out.register_hook(lambda grad: self.journal.lines.append("gradient"))
        return out


def write_journal(takes_gradient: bool) -> tuple[str, str, dict[str, torch.Tensor]]:
    journal = Journal()
    ours = experts_of(QWEN, 2, exchange=journal.exchange)
    ours.act_fn = Activation(journal)
    sinks = {name: HeldSink(parameter, journal) for name, parameter in ours.named_parameters()}
    ours.weight_gradients = sinks
    x, index, weights = own_tokens([6, 9], "random")
    out = ours(x.clone().requires_grad_(takes_gradient), index, weights)
    forward = journal.take()
    out.square().sum().backward()
    assert all(sink.held == 0 for sink in sinks.values())
    return forward, journal.take(), {name: sink.total for name, sink in sinks.items()}


def test_order(pool: WorkerPool) -> None:
    """All tokens leave before the first product; outputs of a part leave before the next product. And so back.

    Two waits end what has nothing to hide behind.
    """
    forward = "send send wait compute send wait compute send wait wait"
    backward = 2 * "wait gradient send weights weights "
    totals = []
    for ahead, back, found in pool.run(2, write_journal, True):
        assert ahead == forward
        assert back == "send send " + backward + "wait wait"
        totals.append(found)
    reference = gradients(build(*QWEN), *batch(15))
    for name, total in joined(totals).items():
        torch.testing.assert_close(total, reference[name], rtol=1e-11, atol=1e-12)


def test_order_without_a_gradient_for_the_tokens(pool: WorkerPool) -> None:
    """Then nothing leaves for home that weight gradients could wait for."""
    for ahead, back, _ in pool.run(2, write_journal, False):
        assert ahead.startswith("send send wait compute")
        assert back == "send send" + 2 * " wait weights gradient weights"


def write_journal_of_frozen_experts() -> tuple[str, torch.Tensor]:
    journal = Journal()
    ours = experts_of(QWEN, 2, exchange=journal.exchange).requires_grad_(False)
    x, index, weights = own_tokens([6, 9], "random")
    out = ours(x, index, weights.requires_grad_())
    journal.take()
    out.square().sum().backward()
    assert weights.grad is not None
    return journal.take(), weights.grad


def test_nothing_leaves_for_frozen_experts(pool: WorkerPool) -> None:
    """Where the tokens have no gradient either, only the routing weights do, and those are at home."""
    x, index, weights = batch(15)
    build(*QWEN).requires_grad_(False)(x, index, weights.requires_grad_()).square().sum().backward()
    ranks = pool.run(2, write_journal_of_frozen_experts)
    assert [back for back, _ in ranks] == ["", ""]
    torch.testing.assert_close(torch.cat([grad for _, grad in ranks]), weights.grad, rtol=1e-11, atol=1e-12)


PARITY: list[dict[str, Any]] = [
    {"ep_size": 2, "ep_parts": 2},
    {"ep_size": 4, "ep_parts": 2, **ONCE},
    {"ep_size": 2, "ep_parts": 3, "tp_size": 2, **ONCE},
    {"ep_size": 4, "ep_parts": 2, "tp_size": 2, "sequence_parallel": False, **ONCE},
    {"ep_size": 2, "ep_parts": 2, "pp_size": 2, "pp_schedule": "zb", **ONCE},
    {"ep_size": 2, "ep_parts": 2, "zero_stage": 2, "checkpointing": True, **ONCE},
    {"ep_size": 2, "ep_parts": 4, "zero_stage": 3, **ONCE},
    {"ep_size": 2, "ep_parts": 4, "zero_stage": 3, "checkpointing": True, **ONCE},
]


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_parity(pool: WorkerPool, family: str) -> None:
    check(pool, family, PARITY, {})


def test_parity_where_all_tokens_go_to_one_expert(pool: WorkerPool) -> None:
    check(pool, "mixtral", [PARITY[0], PARITY[2], PARITY[4]], ALL_TO_ONE)


def test_capacity_and_recomputation_through_the_trainer(pool: WorkerPool) -> None:
    """What is dropped is the same, so losses are those of experts that wait for all tokens."""
    run = {"max_steps": 3, "ep_size": 2, "moe_capacity_factor": 1.0, "activation_checkpointing": True}
    run["activation_checkpointing_policy"] = "selective"
    directory = start()
    expected = pool.run(2, train, directory, {**run, "ep_parts": 1})
    found = pool.run(2, train, directory, {**run, "ep_parts": 2})
    for ours, theirs in zip(found, expected, strict=True):
        assert len(ours[0]) == 3 and ours[0] == pytest.approx(theirs[0], rel=1e-6)


def agree() -> tuple[list[int], bool]:
    """How many parts a rank comes to that has no tokens or all; and whether the mesh gives experts a communicator."""
    mean = 1.5 * TOP_K * HIDDEN * 8  # bytes
    routes: list[Route] = []
    ours = experts_of(QWEN, 1)
    mesh = ParallelMesh(ParallelConfig(ep_size=2, ep_parts=None))
    try:
        own = mesh.ep.handle is not mesh.dp.handle and mesh.ep.ranks == mesh.dp.ranks
        tokens = 0 if rank_and_size()[0] == 0 else 3
        for number in (3, suitable_parts, lambda nbytes, ranks: 2 if (nbytes, ranks) == (mean, 2) else 1):
            x, index, weights = (part[:tokens] for part in batch(3))
            _, route = run_in_parts(x, index, weights, ours.compute, EXPERTS, mesh.ep, parts=number)
            routes.append(route)
        return [len(route.parts) for route in routes], own
    finally:
        mesh.close()


def test_ranks_agree(pool: WorkerPool) -> None:
    assert pool.run(2, agree) == [([3, 1, 2], True)] * 2


def test_suitable_parts() -> None:
    """The number with the smallest cost, by trying all."""

    def cost(parts: int, nbytes: float, ranks: int) -> float:
        return 2 * nbytes * (ranks - 1) / ranks / BYTES_PER_SECOND / parts + parts * SECONDS_PER_PART

    for ranks in (2, 4, 8):
        for megabytes in (0, 1, 30, 90, 200, 400, 600, 2000):
            nbytes = megabytes * 1e6
            best = min(range(1, MOST_PARTS + 1), key=lambda parts: cost(parts, nbytes, ranks))  # noqa: B023
            found = suitable_parts(nbytes, ranks)
            assert found <= best <= found + 1
    assert suitable_parts(79e6, 2) == 1 and suitable_parts(161e6, 2) == 2
    assert suitable_parts(16384 * 8 * 2048 * 2, 2) == MOST_PARTS


@pytest.mark.parametrize("parts", [0, -1, True, 1.5])
def test_bad_parts(parts: Any) -> None:
    with pytest.raises(ValueError, match="must be an integer of at least 1"):
        ParallelConfig(ep_size=2, ep_parts=parts)


def test_parts_need_ranks() -> None:
    with pytest.raises(ValueError, match="ep_parts=2 with ep_size=1"):
        ParallelConfig(ep_parts=2)
    assert ParallelConfig(ep_parts=1).ep_parts == 1
