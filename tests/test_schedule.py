"""Pipeline schedules: complete, free of deadlock, thrifty with memory, and in the order torch gives them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.pipelining import schedules as torch_schedules

from hf_nanotron.models.sharding.stage_split import split_layers
from hf_nanotron.parallel.pipeline.schedule import Action, Kind, Tick, build_table, compute_order, forward_order

SIZES = [("afab", pp, 1) for pp in (1, 2, 3, 4, 8)]
SIZES += [("1f1b", pp, 1) for pp in (1, 2, 3, 4, 8)]
SIZES += [("interleaved_1f1b", pp, v) for pp in (2, 3, 4, 8) for v in (2, 3, 4)]

SIZES += [("zb", pp, v) for pp in (2, 3, 4, 8) for v in (1, 2, 3)]


@pytest.mark.parametrize(("schedule", "pp_size", "virtual_stages"), SIZES)
def test_every_action_runs_once_and_the_table_ends(schedule: str, pp_size: int, virtual_stages: int) -> None:
    stages = pp_size * virtual_stages
    for micro_batches in range(1, 4 * pp_size + 2):
        orders = compute_order(schedule, pp_size, virtual_stages, micro_batches)
        table = build_table(orders, stages)
        ran = [tick.action for ticks in table for tick in ticks if tick.action]
        kinds: tuple[Kind, ...] = ("F", "B", "W") if schedule == "zb" else ("F", "B")
        expected = {Action(kind, s, m) for kind in kinds for s in range(stages) for m in range(micro_batches)}
        assert len(ran) == len(expected) and set(ran) == expected
        for rank, ticks in enumerate(table):
            assert [tick.action for tick in ticks if tick.action] == list(orders[rank])
            assert all(action.stage % pp_size == rank for action in orders[rank])


@pytest.mark.parametrize(("schedule", "pp_size", "virtual_stages"), SIZES)
def test_transfers_are_issued_in_one_global_order(schedule: str, pp_size: int, virtual_stages: int) -> None:
    """Two ranks list what passes between them in the same order; each boundary tensor passes once."""
    stages = pp_size * virtual_stages
    micro_batches = 2 * pp_size + 1
    table = build_table(compute_order(schedule, pp_size, virtual_stages, micro_batches), stages)

    def between(ticks: tuple[Tick, ...], one: int, other: int) -> list[Any]:
        return [t for tick in ticks for t in tick.transfers if {t.source, t.target} == {one, other}]

    for one in range(pp_size):
        for other in range(one):
            assert between(table[one], one, other) == between(table[other], one, other)
    sent = [t.action for rank, ticks in enumerate(table) for tick in ticks for t in tick.transfers if t.source == rank]
    assert len(sent) == len(set(sent)) == (2 * (stages - 1) * micro_batches if pp_size > 1 else 0)


def test_1f1b_holds_no_more_micro_batches_than_its_depth() -> None:
    for pp_size in (2, 4, 8):
        for rank, order in enumerate(compute_order("1f1b", pp_size, 1, 32)):
            held = most = 0
            for action in order:
                held += 1 if action.kind == "F" else -1
                most = max(most, held)
            assert most == pp_size - rank


def busy_ticks(table: tuple[tuple[Tick, ...], ...], pp_size: int, virtual_stages: int) -> list[tuple[int, int]]:
    """First and last tick + 1 of each rank's work, where each action starts as early as it can: F and W take one tick,
    B one if the table has W, else two."""
    stages = pp_size * virtual_stages
    orders = [[tick.action for tick in ticks if tick.action] for ticks in table]
    whole = 2 if all(action.kind != "W" for order in orders for action in order) else 1
    end: dict[Action, int] = {}
    clock, position, spans = [0] * pp_size, [0] * pp_size, [(10**9, 0)] * pp_size
    while any(position[rank] < len(order) for rank, order in enumerate(orders)):
        for rank, order in enumerate(orders):
            while position[rank] < len(order):
                action = order[position[rank]]
                kind, stage, m = action.kind, action.stage, action.micro_batch
                needed = [Action("F", stage - 1, m)] * (stage > 0) if kind == "F" else [Action("F", stage, m)]
                needed += [Action("B", stage + 1, m)] * (kind == "B" and stage + 1 < stages)
                needed += [Action("B", stage, m)] * (kind == "W")
                if not all(other in end for other in needed):
                    break
                start = max([clock[rank], *(end[other] for other in needed)])
                end[action] = clock[rank] = start + (whole if kind == "B" else 1)
                spans[rank] = (min(spans[rank][0], start), clock[rank])
                position[rank] += 1
    return spans


@pytest.mark.parametrize(("pp_size", "virtual_stages"), [(2, 1), (4, 1), (8, 1), (2, 2), (4, 2)])
def test_zero_bubble_idles_for_a_third_of_the_time(pp_size: int, virtual_stages: int) -> None:
    """Of a rank's step; and the fullest rank holds no more micro-batches."""
    plain = "1f1b" if virtual_stages == 1 else "interleaved_1f1b"
    for micro_batches in (pp_size, 2 * pp_size, 3 * pp_size + 1):
        idle, held = {}, {}
        for schedule in (plain, "zb"):
            orders = compute_order(schedule, pp_size, virtual_stages, micro_batches)
            spans = busy_ticks(build_table(orders, pp_size * virtual_stages), pp_size, virtual_stages)
            idle[schedule] = max(stop for _, stop in spans) - 3 * micro_batches * virtual_stages
            frees = "W" if schedule == "zb" else "B"
            held[schedule] = max(
                sum((action.kind == "F") - (action.kind == frees) for action in order[:count])
                for order in orders
                for count in range(len(order) + 1)
            )
        assert held["zb"] == held[plain]
        if micro_batches % pp_size == 0:
            assert 3 * idle["zb"] == 3 * (pp_size - 1) <= idle[plain]
        assert idle["zb"] < idle[plain]


def test_weight_gradients_follow_their_backwards() -> None:
    for order in compute_order("zb", 4, 2, 9):
        backwards = [(a.stage, a.micro_batch) for a in order if a.kind == "B"]
        assert [(a.stage, a.micro_batch) for a in order if a.kind == "W"] == backwards
        for stage, micro_batch in backwards:
            assert order.index(Action("W", stage, micro_batch)) > order.index(Action("B", stage, micro_batch))


def test_an_order_that_cannot_end_is_refused() -> None:
    backward_first = ((Action("B", 0, 0), Action("F", 0, 0)),)
    with pytest.raises(RuntimeError, match="deadlock"):
        build_table(backward_first, 1)


def test_evaluation_runs_forwards_only() -> None:
    table = build_table(forward_order(2, 2, 3), 4)
    assert {tick.action.kind for ticks in table for tick in ticks if tick.action} == {"F"}


class _FakeStage(SimpleNamespace):
    """What torch's schedules read of a stage while they lay out their order."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None


def _torch_order(name: str, pp_size: int, virtual_stages: int, micro_batches: int) -> dict[int, list[str]]:
    cls = {"afab": "ScheduleGPipe", "1f1b": "Schedule1F1B", "interleaved_1f1b": "ScheduleInterleaved1F1B"}[name]
    count = pp_size * virtual_stages
    stages = [
        _FakeStage(
            group_rank=0,
            group_size=pp_size,
            num_stages=count,
            stage_index=index,
            is_first=index == 0,
            is_last=index == count - 1,
            has_backward=False,
            submod=None,
            stage_index_to_group_rank={i: i % pp_size for i in range(count)},
        )
        for index in range(0, count, pp_size)
    ]
    argument = stages if virtual_stages > 1 else stages[0]
    schedule = getattr(torch_schedules, cls)(argument, micro_batches)
    order = getattr(schedule, "pipeline_order", None) or schedule._get_pipeline_order()
    return {r: [str(a) for a in actions if a and "REDUCE" not in str(a)] for r, actions in order.items()}


@pytest.mark.parametrize(
    ("schedule", "pp_size", "virtual_stages", "micro_batches"),
    [("afab", 4, 1, 6), ("1f1b", 2, 1, 5), ("1f1b", 4, 1, 9)]
    + [("interleaved_1f1b", pp, v, m * pp) for pp, v, m in ((2, 2, 2), (4, 2, 2), (4, 3, 3), (3, 4, 1))],
)
def test_the_order_is_that_of_torch(schedule: str, pp_size: int, virtual_stages: int, micro_batches: int) -> None:
    if schedule != "interleaved_1f1b" and not hasattr(torch_schedules.ScheduleGPipe, "_get_pipeline_order"):
        pytest.skip("this torch does not tell the order of its single-stage schedules")
    theirs = _torch_order(schedule, pp_size, virtual_stages, micro_batches)
    for rank, order in enumerate(compute_order(schedule, pp_size, virtual_stages, micro_batches)):
        ours = [f"{action.stage}{action.kind}{action.micro_batch}" for action in order]
        if schedule == "1f1b" and rank == pp_size - 1:
            # torch numbers the forwards of the last rank from 1 in this listing, so only their places can be compared.
            assert [a.lstrip("0123456789")[0] for a in theirs[rank]] == [action.kind for action in order]
        else:
            assert ours == theirs[rank]


def test_stages_are_balanced_by_cost() -> None:
    assert [len(r) for r in split_layers([1.0] * 8, 4)] == [2, 2, 2, 2]
    # a head as heavy as four layers leaves its stage with fewer of them
    assert [len(r) for r in split_layers([1.0] * 16, 2, last_cost=4.0)] == [10, 6]
    assert [len(r) for r in split_layers([1.0] * 6, 3, layers_per_stage=[1, 2, 3])] == [1, 2, 3]
    assert [list(r) for r in split_layers([5.0, 1.0, 1.0, 1.0], 2)] == [[0], [1, 2, 3]]


@pytest.mark.parametrize("count", [4, 7, 12])
def test_the_balance_is_optimal(count: int) -> None:
    """Against every possible split."""
    costs = [1.0 + (7 * i) % 5 for i in range(count)]
    splits = [(a, b, count - a - b) for a in range(1, count - 1) for b in range(1, count - a) if count - a - b >= 1]

    def worst(lengths: tuple[int, ...]) -> float:
        start, sums = 0, []
        for length in lengths:
            sums.append(sum(costs[start : start + length]))
            start += length
        return max(sums[0] + 0.5, sums[1], sums[2] + 2.0)

    chosen = tuple(len(r) for r in split_layers(costs, 3, 0.5, 2.0))
    assert worst(chosen) == min(worst(split) for split in splits)
