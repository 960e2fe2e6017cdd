"""Pipeline schedules as tables: pure functions of the sizes, checked before anything runs.

A schedule has two halves. `compute_order` says in which order each rank runs forwards and backwards (which may leave
weight gradients to an action of their own); `build_table` plays that order tick by tick, proves that it ends, and says
after which tick each boundary tensor travels. A tensor travels in the same tick for its sender and its receiver, so
both issue their transfers in one global order: no rank can wait for a peer that waits for it.
"""

from __future__ import annotations

import functools
import itertools
from collections import deque
from dataclasses import dataclass
from typing import Literal

Kind = Literal["F", "B", "W"]


@dataclass(frozen=True, order=True)
class Action:
    """One forward (`F`) or backward (`B`) of one micro-batch through one stage (global index, model order).

    In an order with weight gradients (`W`) of their own, `B` goes on to the stage before without them.
    """

    kind: Kind
    stage: int
    micro_batch: int


@dataclass(frozen=True, order=True)
class Transfer:
    """The result of `action` on its way from rank `source` to rank `target` of the pipeline group."""

    action: Action
    source: int
    target: int


@dataclass(frozen=True)
class Tick:
    """What one rank does in one tick: at most one action, then its transfers, all at once."""

    action: Action | None
    transfers: tuple[Transfer, ...]


def rank_of_stage(stage: int, pp_size: int) -> int:
    return stage % pp_size


@functools.lru_cache(maxsize=256)
def compute_order(
    schedule: str, pp_size: int, virtual_stages: int, num_micro_batches: int
) -> tuple[tuple[Action, ...], ...]:
    """The actions of each rank, in order.

    `afab`: GPipe (Huang et al. 2019, arXiv:1811.06965). `1f1b` and `interleaved_1f1b`: Narayanan et al. 2021
    (arXiv:2104.04473). `zb`: one of the latter two, with every backward split (`split_backwards`). Any
    number of micro-batches works, also one that `pp_size` does not divide.
    """
    if schedule == "zb":
        unsplit = "1f1b" if virtual_stages == 1 else "interleaved_1f1b"
        whole = compute_order(unsplit, pp_size, virtual_stages, num_micro_batches)
        return split_backwards(whole, pp_size * virtual_stages)
    groups = _micro_batch_groups(pp_size, virtual_stages, num_micro_batches)
    orders = []
    for rank in range(pp_size):
        forwards = _sequence("F", rank, pp_size, virtual_stages, groups)
        backwards = _sequence("B", rank, pp_size, virtual_stages, groups)
        warm_up = {
            "afab": len(forwards),
            "1f1b": pp_size - rank - 1,
            "interleaved_1f1b": (virtual_stages - 1) * len(groups[0]) + 2 * (pp_size - rank - 1),
        }[schedule]
        first = min(len(forwards), warm_up)
        steady = [action for pair in zip(forwards[first:], backwards, strict=False) for action in pair]
        orders.append((*forwards[:first], *steady, *backwards[len(forwards) - first :]))
    return tuple(orders)


def forward_order(pp_size: int, virtual_stages: int, num_micro_batches: int) -> tuple[tuple[Action, ...], ...]:
    """The actions of each rank for evaluation: forwards only."""
    groups = _micro_batch_groups(pp_size, virtual_stages, num_micro_batches)
    return tuple(tuple(_sequence("F", rank, pp_size, virtual_stages, groups)) for rank in range(pp_size))


def _micro_batch_groups(pp_size: int, virtual_stages: int, num_micro_batches: int) -> list[range]:
    """Micro-batches that pass a chunk together before the next chunk's turn: `pp_size` of them, or a few more so
    that no group is smaller (a smaller one could not fill the pipeline, and the schedule would stop)."""
    rounds = max(1, num_micro_batches // pp_size) if virtual_stages > 1 else 1
    size, larger = divmod(num_micro_batches, rounds)
    starts = [index * size + min(index, larger) for index in range(rounds + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(starts)]


def _sequence(kind: Kind, rank: int, pp_size: int, virtual_stages: int, groups: list[range]) -> list[Action]:
    """Each group of micro-batches through all chunks of the rank (last chunk first for backwards)."""
    chunks = range(virtual_stages) if kind == "F" else range(virtual_stages - 1, -1, -1)
    return [Action(kind, chunk * pp_size + rank, m) for group in groups for chunk in chunks for m in group]


def build_table(orders: tuple[tuple[Action, ...], ...], num_stages: int) -> tuple[tuple[Tick, ...], ...]:
    """Play `orders` tick by tick and return each rank's ticks."""
    pp_size = len(orders)
    position = [0] * pp_size
    done: set[Action] = set()
    ticks: list[list[Tick]] = [[] for _ in range(pp_size)]
    while any(position[rank] < len(orders[rank]) for rank in range(pp_size)):
        actions: list[Action | None] = []
        for rank in range(pp_size):
            action = orders[rank][position[rank]] if position[rank] < len(orders[rank]) else None
            ready = action is not None and _inputs(action, num_stages) <= done
            actions.append(action if ready else None)
        if not any(actions):
            raise RuntimeError(
                f"deadlock in the pipeline schedule: {[orders[r][position[r] :][:1] for r in range(pp_size)]}"
            )
        transfers = sorted(
            transfer for action in actions if action and (transfer := _transfer(action, pp_size, num_stages))
        )
        for rank, action in enumerate(actions):
            position[rank] += action is not None
            mine = tuple(t for t in transfers if rank in (t.source, t.target))
            if action or mine:
                ticks[rank].append(Tick(action, mine))
        done.update(action for action in actions if action)
    return tuple(tuple(rank_ticks) for rank_ticks in ticks)


def _inputs(action: Action, num_stages: int) -> set[Action]:
    """What must have run in an earlier tick."""
    if action.kind == "F":
        return {Action("F", action.stage - 1, action.micro_batch)} if action.stage else set()
    if action.kind == "W":
        return {Action("B", action.stage, action.micro_batch)}
    needed = {Action("F", action.stage, action.micro_batch)}
    if action.stage + 1 < num_stages:
        needed.add(Action("B", action.stage + 1, action.micro_batch))
    return needed


def _transfer(action: Action, pp_size: int, num_stages: int) -> Transfer | None:
    """Where the result of `action` goes: forwards to the next stage, backwards to the one before."""
    if action.kind == "W":
        return None
    to = action.stage + (1 if action.kind == "F" else -1)
    if not 0 <= to < num_stages or pp_size == 1:
        return None
    return Transfer(action, rank_of_stage(action.stage, pp_size), rank_of_stage(to, pp_size))


def split_backwards(orders: tuple[tuple[Action, ...], ...], num_stages: int) -> tuple[tuple[Action, ...], ...]:
    """Give every backward's weight gradients an action of their own, where the rank would wait: ZB-H1.

    Qi et al. 2023 (arXiv:2401.10241). Forwards and backwards keep their order; each of the three kinds takes one tick.
    A rank runs its oldest weight gradient when its next action has no input yet, or when one more forward would hold
    more micro-batches than the fullest rank of `orders`. So the peak of memory does not rise, and a rank idles for
    `pp_size - 1` ticks, a third of what it idles for in `orders`.
    """
    most = max(_most_held(order) for order in orders)
    position, held = [0] * len(orders), [0] * len(orders)
    waiting: list[deque[Action]] = [deque() for _ in orders]
    split: list[list[Action]] = [[] for _ in orders]
    done: set[Action] = set()
    while any(position[rank] < len(order) or waiting[rank] for rank, order in enumerate(orders)):
        now: list[Action] = []
        for rank, order in enumerate(orders):
            action = order[position[rank]] if position[rank] < len(order) else None
            if action is None or not _inputs(action, num_stages) <= done or (action.kind == "F" and held[rank] == most):
                if not waiting[rank]:
                    continue
                action = waiting[rank].popleft()
            else:
                position[rank] += 1
                if action.kind == "B":
                    waiting[rank].append(Action("W", action.stage, action.micro_batch))
            held[rank] += {"F": 1, "B": 0, "W": -1}[action.kind]
            split[rank].append(action)
            now.append(action)
        if not now:
            raise RuntimeError(
                f"deadlock in the pipeline schedule: {[o[position[r] :][:1] for r, o in enumerate(orders)]}"
            )
        done.update(now)
    return tuple(tuple(actions) for actions in split)


def _most_held(order: tuple[Action, ...]) -> int:
    """Micro-batches between their forward and their backward at the most."""
    return max(itertools.accumulate(1 if action.kind == "F" else -1 for action in order), default=0)
