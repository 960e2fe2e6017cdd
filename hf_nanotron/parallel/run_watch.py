"""While a run goes on: a rank that is gone ends the others, and a stall is told, with where each rank stands.

A thread of each process looks once a second whether its training thread has moved: in Python, or by the collectives
that torch has noted. Nothing is sent as long as it moves. If it does not for `warning` seconds, rank 0 asks all ranks
where they are, and writes a table. It ends the run, on every rank, only after `timeout`, and only if no rank has moved
and one waits for others: a rank that evaluates, writes, compiles or reads is waited for.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

import torch.distributed as dist
from transformers.utils import logging

from .flight_record import Call, counts, last_calls
from .mesh import ParallelMesh
from .neighbours import Lost
from .roll_call import RollCall, Watch, attend
from .stall_table import RankState, table, verdict
from .whereabouts import Phases, whereabouts

logger = logging.get_logger(__name__)

GRACE = 3.0  # seconds that a rank has to leave by an error of its own
ANSWER_SECONDS = 4.0
NEWS_SECONDS = 2.0  # until the neighbours of a rank that has died have told of it
DEPUTIES, DEPUTY_SECONDS = 3, 15.0  # ranks that ask in the place of one that cannot
UNREACHABLE_SECONDS = 30.0  # without a move, after which a rank that cannot be reached counts as gone
PATIENCE = 3  # times the longest pause that ended by itself


@dataclass(frozen=True)
class Limits:
    """Seconds.

    Args:
        warning: without a move of this rank, until the table is written; 0 for never.
        timeout: without a move of any rank while some wait for others, until the run ends.
    """

    warning: float
    timeout: float


class RunWatch:
    """Entered around what all ranks do together. Does nothing on one process, or where the other ranks are imagined.

    Args:
        step: the optimizer step at hand, from 1, by the phase.
        on_lost: called in the place of ending this process, in a thread, when a rank is gone.
    """

    def __init__(
        self,
        mesh: ParallelMesh,
        limits: Limits,
        phases: Phases,
        step: Callable[[str], int],
        on_lost: Callable[[Lost], None] | None = None,
    ) -> None:
        self.mesh, self.limits, self.phases, self.step, self.on_lost = mesh, limits, phases, step, on_lost
        presence = attend() if mesh.world_size > 1 else None
        self._presence = presence if isinstance(presence, RollCall) else None
        self._outer: Watch | None = None

    def __enter__(self) -> RunWatch:
        self._thread, self._over = threading.get_ident(), threading.Event()
        self._moved_at = time.monotonic()
        self._seen: tuple[int, tuple[int, ...]] = (0, ())
        self._leaves = False
        self._longest = 0.0  # pause that has ended by itself
        self._asked: tuple[int, float] | None = None  # number of the question, and when
        self._ask_at, self._told_at = 0.0, 0.0
        self._heard, self._heard_at = -1, time.monotonic()
        if self._presence is not None:
            self._outer, self._presence.watch = self._presence.watch, self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._presence is None:
            return
        self._presence.watch = self._outer
        if error is None:
            self._presence.failure = ""
            self._end_pause(time.monotonic())
            return
        if (lost := self._wait_for_news(trace)) is not None:
            error.add_note(f"{lost}.")
            if not self._leaves:
                logger.error(f"rank {self.mesh.rank}: {lost}.")
        self._presence.failure = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:300]

    def _wait_for_news(self, trace: TracebackType | None) -> Lost | None:
        """Which rank is gone, if an error comes from a collective: its neighbours tell."""
        assert self._presence is not None
        until = time.monotonic() + (NEWS_SECONDS if _is_of_collective(trace) else 0.0)
        while self._presence.lost is None and time.monotonic() < until:
            time.sleep(0.05)
        return self._presence.lost

    # ---- in the thread that answers, once a second ----

    def look(self, store: Any, question: int) -> None:
        """Has this rank moved, and is anybody to be told or asked? `question`: the number of the last one."""
        if self._over.is_set():
            return
        now = time.monotonic()
        here = whereabouts(self._thread, self.phases)
        seen = (hash((here.stamp, self.step(here.phase))), counts())
        if seen != self._seen:
            self._end_pause(now)
            self._seen, self._moved_at = seen, now
        if question != self._heard:
            self._heard, self._heard_at = question, now
        quiet, presence = now - self._moved_at, self._presence
        assert presence is not None
        if presence.lost is not None and (presence.lost.is_sure or quiet >= UNREACHABLE_SECONDS):
            self._leave(f"{presence.lost}.", presence.lost)
        elif presence.end is not None:
            self._leave(presence.end)
        elif self._asked is not None:
            self._collect(store, now)
        elif self._is_due(now, quiet):
            self._asked = store.add("asked", 1), now

    def _is_due(self, now: float, quiet: float) -> bool:
        rank = self.mesh.rank
        if rank >= DEPUTIES or rank and self._heard_at > self._moved_at:
            return False  # somebody asks already
        first = min(max(self.limits.warning, PATIENCE * self._longest) or math.inf, self.limits.timeout)
        return quiet >= (self._ask_at if self._told_at else first) + rank * DEPUTY_SECONDS

    def _end_pause(self, now: float) -> None:
        if self._told_at:
            logger.warning(f"The run goes on, after a pause of {now - self._moved_at:.0f} s.")
            self._longest = max(self._longest, now - self._moved_at)
        self._told_at, self._asked = 0.0, None

    def state(self) -> dict[str, Any]:
        """Where this rank is, for others."""
        here = whereabouts(self._thread, self.phases)
        calls = {name: asdict(call) for name, call in self._named(last_calls()).items()}
        told = RankState(self.step(here.phase), here.phase, here.place, here.waits, time.monotonic() - self._moved_at)
        return {**asdict(told), "calls": calls}

    def _named(self, calls: dict[str, Call]) -> dict[str, Call]:
        """By names that people know: the axis of the mesh, and the ranks."""
        known = {tuple(group.ranks): name for name, group in reversed(list(self.mesh.groups.items()))}
        ranks_of: dict[str, tuple[int, ...]] = {}
        # torch's own table, which another version may have elsewhere.
        with contextlib.suppress(AttributeError, RuntimeError, KeyError, ValueError):
            for group, known_as in list(dist.distributed_c10d._world.pg_names.items()):
                ranks_of[str(known_as)] = tuple(dist.get_process_group_ranks(group))
        labels: dict[str, str] = {}
        for name, ranks in sorted(ranks_of.items()):
            axis = "all ranks" if len(ranks) == self.mesh.world_size else known.get(ranks, "a group")
            label = axis if axis == "all ranks" else f"{axis} (ranks {_shortly(ranks)})"
            labels[name] = f"{label}, communicator {name}" if label in labels.values() else label
        # torch still has those of groups that were destroyed.
        return {labels.get(name, name): call for name, call in calls.items() if name in labels or not labels}

    def _collect(self, store: Any, now: float) -> None:
        assert self._asked is not None and self._presence is not None
        question, asked_at = self._asked
        answers = {rank: self._presence.answered(store, rank, question) for rank in range(self.mesh.world_size)}
        if None in answers.values() and now - asked_at < ANSWER_SECONDS:
            return
        self._asked = None
        states = {rank: _state_of(answer) for rank, answer in answers.items()}
        quiet = now - self._moved_at
        # A rank that does not answer does not move, as far as anybody can tell.
        least = min((state.quiet for state in states.values() if state is not None), default=quiet)
        waits = any(state is not None and state.is_waiting for state in states.values())
        ends = waits and least >= self.limits.timeout
        here = whereabouts(self._thread, self.phases)
        step = self.step(here.phase)
        text = f"This rank has not moved for {quiet:.0f} s, at step {step}. {verdict(states)} Where the ranks are:\n"
        text += table(states)
        if ends:
            text += f"\nNo rank has moved for {least:.0f} s, and some wait for others: the run ends on all of them."
        logger.warning(text)
        self._told_at = now
        # Later tables come less and less often, but one comes when the run is to end.
        self._ask_at = min(quiet * 2, quiet + max(ANSWER_SECONDS, self.limits.timeout - least))
        if ends:
            store.set("end", f"no rank has moved for {least:.0f} s at step {step}. {verdict(states)}")
            store.add("asked", 1)

    def _leave(self, why: str, lost: Lost | None = None) -> None:
        """End this process, after it had time to end by an error of its own: its collectives may never return."""
        here = whereabouts(self._thread, self.phases)
        if lost is not None and self.on_lost is not None:
            self._over.set()
            self.on_lost(lost)
            return
        self._leaves = True
        where = f"in {here.place} ({here.phase or 'outside'} of step {self.step(here.phase)})"
        logger.error(f"rank {self.mesh.rank} leaves, {where}: {why}")
        if self._over.wait(GRACE):
            return
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(1)


def _state_of(answer: dict[str, Any] | None) -> RankState | None:
    if answer is None:
        return None
    told = answer.get("state")
    if told is None:  # it is not in a run
        return RankState(0, "outside of the run", str(answer.get("place", "")), False, float(answer.get("seconds", 0)))
    calls = {name: Call(**call) for name, call in told.pop("calls").items()}
    return RankState(**told, calls=calls)


def _is_of_collective(trace: TracebackType | None) -> bool:
    """Whether an error was raised by torch's communication, or by what waits for it."""
    last = None
    while trace is not None:
        last, trace = trace.tb_frame, trace.tb_next
    module = "" if last is None else str(last.f_globals.get("__name__"))
    return module.startswith(("torch.distributed", "hf_nanotron.parallel"))


def _shortly(ranks: tuple[int, ...]) -> str:
    return ",".join(map(str, ranks)) if len(ranks) <= 8 else f"{ranks[0]}, {ranks[1]}, ..., {ranks[-1]}"
