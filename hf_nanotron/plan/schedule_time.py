"""When each action of a pipeline's schedule runs: the product's own table, played with seconds."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..parallel.pipeline.schedule import Action, Tick, Transfer


@dataclass(frozen=True)
class Played:
    """A table with times.

    Args:
        actions: by rank, what runs from when to when, seconds after the begin of the step.
        ends: by rank, when its last action and its last transfer have ended.
    """

    actions: tuple[tuple[tuple[Action, float, float], ...], ...]
    ends: tuple[float, ...]

    @property
    def end(self) -> float:
        """When all have ended."""
        return max(self.ends)

    def busy(self, rank: int) -> float:
        """Seconds in which a rank computes."""
        return sum(stop - start for _, start, stop in self.actions[rank])


def play(
    table: Sequence[Sequence[Tick]],
    seconds: Callable[[Action], float],
    travel: Callable[[Transfer], float],
    begins: Sequence[float] = (),
) -> Played:
    """Play the ticks of all ranks as the executor runs them.

    A rank computes one action after the other. The transfers of a tick go out together, after its action and after
    those of the tick before; a transfer begins when both of its ranks have come to it, and takes `travel`. An action
    waits for what it needs and for nothing else.

    Args:
        begins: by rank, when its first action may begin.

    Raises:
        RuntimeError: if the table does not end, which `build_table` rules out.
    """
    size, stages = len(table), _stages(table)
    clock = [begins[rank] if begins else 0.0 for rank in range(size)]
    wire = [0.0] * size  # when a rank's transfers so far have ended
    place = [0] * size
    arrived: dict[Action, float] = {}
    posted: list[deque[tuple[float, list[Transfer]]]] = [deque() for _ in range(size)]
    ended: dict[tuple[int, Transfer], float] = {}
    actions: list[list[tuple[Action, float, float]]] = [[] for _ in range(size)]
    while any(place[rank] < len(table[rank]) for rank in range(size)) or any(posted):
        moved = False
        for rank in range(size):
            while place[rank] < len(table[rank]):
                tick = table[rank][place[rank]]
                if tick.action is not None:
                    needed = _comes_from(tick.action, size, stages)
                    if needed is not None and needed not in arrived:
                        break
                    start = max(clock[rank], arrived[needed] if needed is not None else 0.0)
                    clock[rank] = start + seconds(tick.action)
                    actions[rank].append((tick.action, start, clock[rank]))
                if tick.transfers:
                    posted[rank].append((clock[rank], list(tick.transfers)))
                place[rank] += 1
                moved = True
            moved |= _exchange(rank, posted, wire, ended, arrived, travel)
        if not moved:
            raise RuntimeError("deadlock in the pipeline schedule: no rank can go on")
    ends = tuple(max(clock[rank], wire[rank]) for rank in range(size))
    return Played(tuple(tuple(each) for each in actions), ends)


def _comes_from(action: Action, size: int, stages: int) -> Action | None:
    """The action of another rank whose result an action needs."""
    if size == 1 or action.kind == "W":
        return None
    if action.kind == "F":
        return Action("F", action.stage - 1, action.micro_batch) if action.stage else None
    after = action.stage + 1
    return Action("B", after, action.micro_batch) if after < stages else None


def _stages(table: Sequence[Sequence[Tick]]) -> int:
    """Stages of the whole model: those that run a forward of the first micro-batch at any rank."""
    return len(table) * sum(
        tick.action is not None and tick.action.kind == "F" and tick.action.micro_batch == 0 for tick in table[0]
    )


def _exchange(
    rank: int,
    posted: list[deque[tuple[float, list[Transfer]]]],
    wire: list[float],
    ended: dict[tuple[int, Transfer], float],
    arrived: dict[Action, float],
    travel: Callable[[Transfer], float],
) -> bool:
    """Carry out what a rank and its peers have both come to. Whether anything was."""
    moved = False
    while posted[rank]:
        came, transfers = posted[rank][0]
        for transfer in transfers:
            if (rank, transfer) in ended:
                continue
            peer = transfer.target if transfer.source == rank else transfer.source
            if not posted[peer] or transfer not in posted[peer][0][1]:
                continue
            start = max(came, wire[rank], posted[peer][0][0], wire[peer])
            stop = start + travel(transfer)
            ended[rank, transfer] = ended[peer, transfer] = stop
            moved = True
        if any((rank, transfer) not in ended for transfer in transfers):
            return moved
        wire[rank] = max([wire[rank], *(ended.pop((rank, transfer)) for transfer in transfers)])
        # NCCL has one handle for all transfers of a tick: an action waits for all of them.
        arrived.update((transfer.action, wire[rank]) for transfer in transfers if transfer.target == rank)
        posted[rank].popleft()
        moved = True
    return moved
