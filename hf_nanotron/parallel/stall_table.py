"""Where all ranks of a job that does not go on are, as a table, and which of them the others wait for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .flight_record import Call

LINES = 12  # of a table
NAMED = 8  # ranks in a sentence


@dataclass(frozen=True)
class RankState:
    """What a rank says of itself.

    Args:
        step: optimizer step, from 1.
        phase, place, waits: see `Whereabouts`.
        quiet: seconds since it last moved.
        calls: its collectives, by name of the group.
    """

    step: int
    phase: str
    place: str
    waits: bool
    quiet: float
    calls: Mapping[str, Call] = field(default_factory=dict)

    @property
    def pending(self) -> tuple[str, Call] | None:
        """The group and the collective that has not ended, if there is one."""
        return next(((name, call) for name, call in self.calls.items() if call.is_pending), None)

    @property
    def is_waiting(self) -> bool:
        return self.waits or self.pending is not None


def table(states: Mapping[int, RankState | None]) -> str:
    """A line for all ranks at the same place. A rank without a state does not answer."""
    rows: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for rank, state in sorted(states.items()):
        rows[_row(state)].append(rank)

    def order(row: tuple[tuple[str, ...], list[int]]) -> tuple[bool, int, list[int]]:
        """First those that do not wait, then the odd ones."""
        state = states[row[1][0]]
        return state is not None and state.is_waiting, len(row[1]), row[1]

    shown = sorted(rows.items(), key=order)[:LINES]
    cells = [("ranks", "step", "phase", "collective", "place"), *((in_short(who), *row) for row, who in shown)]
    widths = [max(len(row[column]) for row in cells) for column in range(4)]
    lines = ["  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[4]]).rstrip() for row in cells]
    if len(rows) > LINES:
        lines.append(f"... and {len(rows) - LINES} more places")
    return "\n".join(f"  {line}" for line in lines)


def _row(state: RankState | None) -> tuple[str, str, str, str]:
    if state is None:
        return "?", "?", "?", "does not answer: it is stopped, or a library does not let Python run"
    pending = state.pending
    what = "none" if pending is None else told(*pending)
    if pending is None and state.waits:
        what = "a message, or one that is being set up"
    return str(state.step), state.phase or "-", what, state.place


def told(group: str, call: Call) -> str:
    """A collective in words."""
    return f"{call.op} number {call.number} of {group} ({call.size:,} elements)"


def verdict(states: Mapping[int, RankState | None]) -> str:
    """Which ranks the others wait for."""
    silent = [rank for rank, state in states.items() if state is None]
    working = [rank for rank, state in states.items() if state is not None and not state.is_waiting]
    parts = []
    if silent:
        parts.append(f"{_ranks(silent)} not answer")
    for rank in working[:NAMED]:
        state = states[rank]
        assert state is not None
        missed = _missed(rank, state, states)
        came = f" and has not come to {missed}" if missed else ""
        parts.append(f"rank {rank} is in {state.place}, {state.phase or 'outside'} of step {state.step},{came}")
    if len(working) > NAMED:
        parts.append(f"{len(working) - NAMED} more ranks are at work")
    if len(working) == len(states):
        return "No rank waits for another; all are at work: " + "; ".join(part.rstrip(",") for part in parts) + "."
    if parts:
        return "The others wait: " + "; ".join(part.rstrip(",") for part in parts) + "."
    return _crossed(states)


def _missed(rank: int, state: RankState, states: Mapping[int, RankState | None]) -> str:
    """The collective in which others wait and that this rank has not begun."""
    for other in states.values():
        pending = None if other is None else other.pending
        if pending is not None:
            group, call = pending
            own = state.calls.get(group)
            if own is not None and own.begun < call.number:
                return told(group, call)
    return ""


def _crossed(states: Mapping[int, RankState | None]) -> str:
    """All ranks wait: for each other, or for their devices."""
    ops: dict[tuple[str, int], dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank, state in states.items():
        pending = None if state is None else state.pending
        if pending is not None:
            ops[pending[0], pending[1].number][pending[1].op].append(rank)
    for (group, number), by_op in ops.items():
        if len(by_op) > 1:
            who = "; ".join(f"{op} on rank {in_short(ranks)}" for op, ranks in by_op.items())
            return f"Ranks make different calls as number {number} of {group}: {who}."
    behind = [
        (rank, missed)
        for rank, state in states.items()
        if state is not None and (missed := _missed(rank, state, states))
    ]
    if behind:
        who = "; ".join(f"rank {rank} has not come to {missed}" for rank, missed in behind[:NAMED])
        return f"All ranks wait, some for each other: {who}."
    return "All ranks wait in what they have begun: for a device, for the network, or for a message of another rank."


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {in_short(ranks)} do{'' if len(ranks) > 1 else 'es'}"


def in_short(ranks: Sequence[int]) -> str:
    """Ranks in words: `0-3,6`."""
    ranges: list[list[int]] = []
    for rank in sorted(ranks):
        if ranges and rank == ranges[-1][1] + 1:
            ranges[-1][1] = rank
        else:
            ranges.append([rank, rank])
    parts = [str(first) if first == last else f"{first}-{last}" for first, last in ranges[:NAMED]]
    return ",".join(parts) + (",..." if len(ranges) > NAMED else "")
