"""Whether the ranks of a job would wait for each other for ever, from what one rank of each role says to others.

As NCCL works, ranks that share a communicator must start the same collectives of the same sizes in the same order, and
what one sends, another must receive, in one order for each pair. If all do, the roles are run against each other:
messages of a batch start together, and a rank goes on when they have arrived; in a collective it waits until all ranks
of the group have come, or goes on at once where it is launched ahead, and each group executes in order. The ranks of a
role take the same steps at the same time.
"""

from __future__ import annotations

import functools
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .trace import MESSAGES, Event, RoleTrace

MOST_FAULTS = 8  # that are told
SHOWN_RANKS = 8
OWN_SIZES = ("all_to_all",)  # of which each rank sends as many bytes as it likes


def find_faults(traces: Sequence[RoleTrace]) -> list[str]:
    """What is wrong with the communication of a job; nothing if it cannot hang.

    Args:
        traces: one of each role, which together have all ranks.

    Returns:
        Sentences that name ranks, group and operation, at most `MOST_FAULTS`.
    """
    job = _Job(traces)
    faults = [*_unequal_collectives(job), *_unmatched_messages(job)]
    return faults[:MOST_FAULTS] if faults else _waits_for_ever(job)


class _Job:
    """All ranks, each with the events of its role."""

    def __init__(self, traces: Sequence[RoleTrace]) -> None:
        self.traces = traces
        self.role_of = {rank: index for index, trace in enumerate(traces) for rank in trace.role.ranks}
        self.groups: dict[str, tuple[tuple[int, ...], ...]] = {}
        for trace in traces:
            self.groups.update(trace.groups)

    def kinds(self, name: str) -> Iterator[tuple[tuple[int, ...], dict[int, int]]]:
        """Groups of one name that differ in the roles they have: their ranks, and the first rank of each role."""
        known: set[frozenset[int]] = set()
        for ranks in self.groups[name]:
            roles = {self.role_of[rank]: rank for rank in reversed(ranks)}
            if frozenset(roles) not in known:
                known.add(frozenset(roles))
                yield ranks, roles

    @functools.cached_property
    def together(self) -> dict[str, dict[int, frozenset[int]]]:
        """By group and role: roles that go on together, since ranks of them meet, or meet those who do."""
        found: dict[str, dict[int, frozenset[int]]] = {}
        for name in self.groups:
            of_name = found.setdefault(name, {})
            for _, roles in self.kinds(name):
                joined = frozenset(roles).union(*(of_name.get(role, ()) for role in roles))
                of_name.update(dict.fromkeys(joined, joined))
        return found

    @functools.cached_property
    def _places(self) -> dict[str, dict[int, tuple[tuple[int, ...], int]]]:
        return {
            name: {rank: (ranks, index) for ranks in partition for index, rank in enumerate(ranks)}
            for name, partition in self.groups.items()
        }

    def far_ends(self, role: int, group: str, offset: int) -> dict[int, tuple[int, int]]:
        """Roles of the ranks `offset` places after those of `role` in their groups; of each, one pair of ranks."""
        key = role, group, offset
        if key not in self._far_ends:
            found: dict[int, tuple[int, int]] = {}
            for rank in self.traces[role].role.ranks:
                ranks, index = self._places[group][rank]
                peer = ranks[(index + offset) % len(ranks)]
                found.setdefault(self.role_of[peer], (rank, peer))
            self._far_ends[key] = found
        return self._far_ends[key]

    @functools.cached_property
    def _far_ends(self) -> dict[tuple[int, str, int], dict[int, tuple[int, int]]]:
        return {}

    def offset(self, role: int, event: Event) -> int:
        """How many places after a rank of `role` its peer is in the group: the same for all of them."""
        assert event.peer is not None
        return (event.ranks.index(event.peer) - event.ranks.index(self.traces[role].role.rank)) % len(event.ranks)


# ---- the same collectives on all ranks of a group ----


def _unequal_collectives(job: _Job) -> Iterator[str]:
    sequences: list[dict[str, list[Event]]] = []
    for trace in job.traces:
        by_group: dict[str, list[Event]] = {}
        for event in trace.events:
            if event.op not in MESSAGES:
                by_group.setdefault(event.group, []).append(event)
        sequences.append(by_group)
    for name in job.groups:
        for ranks, roles in job.kinds(name):
            told = {role: sequences[role].get(name, []) for role in roles}
            if fault := _first_difference(name, ranks, {roles[role]: events for role, events in told.items()}, job):
                yield fault


def _first_difference(name: str, ranks: tuple[int, ...], told: dict[int, list[Event]], job: _Job) -> str | None:
    """Where the sequences of `told`, by rank, differ first."""
    keys = {rank: [_sameness(event) for event in events] for rank, events in told.items()}
    if len({tuple(key) for key in keys.values()}) == 1:
        return None
    length = max(map(len, keys.values()))
    place = next(i for i in range(length) if len({tuple(key[i : i + 1]) for key in keys.values()}) > 1)
    at = {rank: key[place : place + 1] for rank, key in keys.items()}
    usual = _usual(at, ranks, job)
    one = next(rank for rank in told if at[rank] == usual)
    other = next(rank for rank in told if at[rank] != usual)
    return (
        f"group {name} of {_say_ranks(ranks)}: as collective {place + 1} of the group, rank {one} "
        f"{_starts(told[one], place)}, but rank {other} {_starts(told[other], place)}."
    )


def _usual(at: dict[int, list[tuple[object, ...]]], ranks: tuple[int, ...], job: _Job) -> list[tuple[object, ...]]:
    """What most ranks of the group do."""
    first = {job.role_of[rank]: rank for rank in at}
    counts = Counter(str(at[first[job.role_of[rank]]]) for rank in ranks)
    most = counts.most_common(1)[0][0]
    return next(key for key in at.values() if str(key) == most)


def _sameness(event: Event) -> tuple[object, ...]:
    """What must be the same on all ranks of a group."""
    return (event.op, event.dtype, None if event.op in OWN_SIZES else event.bytes)


def _starts(events: list[Event], place: int) -> str:
    return f"starts {events[place]}" if place < len(events) else f"starts only {len(events)}"


# ---- what is sent is received ----


def _unmatched_messages(job: _Job) -> Iterator[str]:
    lines: dict[tuple[int, str, int, str], list[Event]] = {}
    for role, trace in enumerate(job.traces):
        for event in trace.events:
            if event.op in MESSAGES:
                lines.setdefault((role, event.group, job.offset(role, event), event.op), []).append(event)
    seen: set[tuple[int, int, str, int]] = set()
    for role, group, offset, op in lines:
        size = len(job.groups[group][0])
        back = (size - offset) % size
        for peer_role, (rank, peer) in job.far_ends(role, group, offset).items():
            source, target, forth = (role, peer_role, offset) if op == "send" else (peer_role, role, back)
            if (source, target, group, forth) in seen:
                continue
            seen.add((source, target, group, forth))
            sent = lines.get((source, group, forth, "send"), [])
            received = lines.get((target, group, (size - forth) % size, "recv"), [])
            here, there = (rank, peer) if op == "send" else (peer, rank)
            if fault := _first_unmatched(group, here, there, sent, received):
                yield fault


def _first_unmatched(group: str, source: int, target: int, sent: list[Event], received: list[Event]) -> str | None:
    for number in range(max(len(sent), len(received))):
        out, into = sent[number : number + 1], received[number : number + 1]
        where = f"group {group}: message {number + 1} from rank {source} to rank {target}"
        if not into:
            return f"{where}: rank {source} starts {out[0].described(target)}, which rank {target} never receives."
        if not out:
            return f"{where}: rank {target} starts {into[0].described(source)}, which rank {source} never sends."
        if (out[0].bytes, out[0].dtype) != (into[0].bytes, into[0].dtype):
            there = into[0].described(source)
            return f"{where}: rank {source} starts {out[0].described(target)}, but rank {target} starts {there}."
    return None


# ---- ranks that wait for each other ----


@dataclass
class _Step:
    """What a role starts at once: a collective, or messages of a batch.

    `open`: for each message, the roles whose ranks have not sent or received theirs yet.
    """

    events: list[Event]
    open: list[set[int]]

    @property
    def is_collective(self) -> bool:
        return self.events[0].op not in MESSAGES


class _Rehearsed:
    """A role that runs: what it starts next, and what it has started by group, the oldest first."""

    def __init__(self, steps: list[_Step]) -> None:
        self.steps = steps
        self.next = 0
        self.queues: dict[str, deque[_Step]] = {}
        self.waits_for: _Step | None = None

    def start(self) -> bool:
        """Start all that comes before the next wait. Whether that was anything."""
        before = self.next
        while self.waits_for is None and self.next < len(self.steps):
            step = self.steps[self.next]
            self.next += 1
            self.queues.setdefault(step.events[0].group, deque()).append(step)
            self.waits_for = step if step.events[0].waits else None
        return self.next > before

    def finish(self, group: str) -> None:
        """The oldest step of a group is over."""
        step = self.queues[group].popleft()
        if step is self.waits_for:
            self.waits_for = None

    def oldest(self, group: str) -> _Step | None:
        """What runs in a group now."""
        queue = self.queues.get(group)
        return queue[0] if queue else None


def _steps(job: _Job, role: int) -> list[_Step]:
    steps: list[_Step] = []
    for event in job.traces[role].events:
        ends = set(job.far_ends(role, event.group, job.offset(role, event))) if event.op in MESSAGES else set()
        last = steps[-1].events[-1] if steps else None
        together = last is not None and last.op in MESSAGES and event.op in MESSAGES and event.batch is not None
        if together and last is not None and (last.batch, last.group) == (event.batch, event.group):
            steps[-1].events.append(event)
            steps[-1].open.append(ends)
        else:
            steps.append(_Step([event], [ends] if ends else []))
    return steps


def _waits_for_ever(job: _Job) -> list[str]:
    """Run all roles against each other."""
    roles = [_Rehearsed(_steps(job, index)) for index in range(len(job.traces))]
    moved = True
    while moved:
        moved = False
        for index, role in enumerate(roles):
            moved |= role.start()
            for group in list(role.queues):
                moved |= _proceed(job, roles, index, group)
    stuck = [index for index, role in enumerate(roles) if role.waits_for is not None or any(role.queues.values())]
    return [_who_waits(job, roles, stuck)] if stuck else []


def _proceed(job: _Job, roles: list[_Rehearsed], index: int, group: str) -> bool:
    """Let what a role runs in a group go on, with those it meets. Whether anything did."""
    step = roles[index].oldest(group)
    if step is None:
        return False
    if step.is_collective:
        met = job.together[group][index]
        running = [roles[other].oldest(group) for other in met]
        if not all(each is not None and each.is_collective for each in running):
            return False
        for other in met:
            roles[other].finish(group)
        return True
    moved = False
    for event, far in zip(step.events, step.open, strict=True):
        for other in list(far):
            theirs = roles[other].oldest(group)
            if theirs is not None and _transfer(job, index, event, other, theirs):
                far.discard(other)
                moved = True
                if not any(theirs.open):
                    roles[other].finish(group)
    if not any(step.open) and roles[index].oldest(group) is step:
        roles[index].finish(group)
    return moved


def _transfer(job: _Job, index: int, event: Event, other: int, theirs: _Step) -> bool:
    """Hand over a message of role `index`, if what role `other` runs is its other end."""
    size = len(event.ranks)
    back = (size - job.offset(index, event)) % size
    wanted = "recv" if event.op == "send" else "send"
    for each, far in zip(theirs.events, theirs.open, strict=True):
        if each.op == wanted and index in far and job.offset(other, each) == back:
            far.discard(index)
            return True
    return False


def _who_waits(job: _Job, roles: list[_Rehearsed], stuck: list[int]) -> str:
    said = []
    for index in stuck[:SHOWN_RANKS]:
        role, rank = roles[index], job.traces[index].role.rank
        step = role.waits_for or next(queue[0] for queue in role.queues.values() if queue)
        event = step.events[next((i for i, far in enumerate(step.open) if far), 0)]
        said.append(f"rank {rank} waits in {event} with {_say_ranks(event.ranks)} (group {event.group})")
    more = f"; and {len(stuck) - SHOWN_RANKS} more" if len(stuck) > SHOWN_RANKS else ""
    return f"ranks wait for each other for ever: {'; '.join(said)}{more}."


def _say_ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:SHOWN_RANKS])) + (f", ... {ranks[-1]}" if len(ranks) > SHOWN_RANKS else "")
    return f"ranks {shown}"
