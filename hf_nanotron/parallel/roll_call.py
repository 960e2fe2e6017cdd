"""Calls that every rank must make: ranks that do something else are detected within seconds, not at a timeout.

Before such a call communicates, each rank announces it in the job's rendezvous store and waits for the others. A rank
that announces another call ends both at once. A rank that does not arrive is asked where it is, which a thread of each
process answers once a second: one that has ended, or waits itself, will never arrive, and the call fails; one that is
busy (downloading, reading data, writing a file) is waited for.

The store holds one set of keys for the current call and one number per rank. A rank leaves asking to one that does,
so that the store has no more to do where thousands wait. Training steps are not announced.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from types import FrameType
from typing import Any, Protocol

import torch.distributed as dist
from transformers.utils import logging

from .neighbours import Lost, Neighbours
from .rehearsal import is_rehearsal

logger = logging.get_logger(__name__)

ASK_AFTER = 2.0  # seconds until the first rank that waits asks for the others; each of the next waits longer by as much
BLOCK = 128  # ranks whose arrivals are counted together, so that who asks reads few numbers
WARN_AFTER = 10.0
# A rank that stands at one place of these kinds for so many seconds waits for ranks that do not come. Outside of
# torch's collectives it may wait for its GPU, which waits for a collective.
STUCK_AFTER = {"collective": 1.5, "library": 8.0}
LIBRARIES = ("hf_nanotron", "accelerate", "transformers")


class Watch(Protocol):
    """What is looked at once a second while a run goes on (`RunWatch`)."""

    def look(self, store: Any, question: int) -> None: ...

    def state(self) -> dict[str, Any]: ...


class RollCall:
    """This process as the other ranks see it, by a prefix of the process group's store.

    Attributes:
        watch: of the run that goes on.
        lost: the first rank of the job that is gone.
        end: why the run is to end on all ranks.
        failure: what has ended the run of this rank.
    """

    def __init__(self, store: Any, rank: int) -> None:
        self.job = store
        self.rank = rank
        self._store: Any = dist.PrefixStore("roll_call", store)  # whose `clone` some versions' stubs leave out
        self._waits_for: str | None = None
        self._caller = threading.get_ident()
        self._stamp, self._since = 0, 0.0
        self._stop = threading.Event()
        self._pid = os.getpid()
        self._wake = socket.socketpair()
        self.watch: Watch | None = None
        self.lost: Lost | None = None
        self.end: str | None = None
        self.failure = ""
        # A connection of its own: the other may be held by a rendezvous that waits for ever.
        connection = self._store.clone()
        self._answering = threading.Thread(target=self._answer, args=(connection,), daemon=True)
        self._answering.start()
        atexit.register(self._leave)

    # ---- the call ----

    def call(self, name: str, detail: str, ranks: Sequence[int], timeout: timedelta) -> None:
        """Wait until all `ranks` have announced `name` with `detail` as their next call among them.

        Raises:
            ValueError: if one announces another call, or can never come. On every rank that waits.
            RuntimeError: after `timeout`, or if the process that holds the store has ended.
        """
        scope = f"{ranks[0]}-{ranks[-1]}-{len(ranks)}"
        self._caller, self._waits_for = threading.get_ident(), name
        try:
            self._call(name, detail, scope, ranks, timeout)
        except dist.DistNetworkError as error:
            raise RuntimeError(
                f"{name} must be called on every rank, but the process that holds the rendezvous store has ended: "
                f"{error}"
            ) from error
        finally:
            self._waits_for = None

    def _call(self, name: str, detail: str, scope: str, ranks: Sequence[int], timeout: timedelta) -> None:
        store, number = self._store, self._store.add(f"{scope}/at/{self.rank}", 1)
        key = f"{scope}/{number}"
        ours = f"{name}{detail}"
        first, _, theirs = store.compare_set(f"{key}/name", "", f"{self.rank}|{ours}").decode().partition("|")
        if theirs != ours:
            self._end(
                key,
                f"ranks make different calls: rank {first} calls {theirs}, rank {self.rank} calls {ours}. Each must "
                "be made on every rank, in the same order and with the same arguments.",
            )
        store.add(f"{key}/block {ranks.index(self.rank) // BLOCK}", 1)
        arrived = store.add(f"{key}/arrived", 1)
        if arrived == len(ranks):
            store.set(f"{key}/done", "1")
            # Nobody reads those of the call before any more.
            blocks = [f"block {block}" for block in range(-(-len(ranks) // BLOCK))]
            for leaf in ("name", "arrived", "done", "asked", *blocks):
                store.delete_key(f"{scope}/{number - 1}/{leaf}")
        limit, turn = timeout.total_seconds(), ASK_AFTER * arrived
        began, warned, ask_at, asked = time.monotonic(), False, min(turn, limit), 0
        while not self._is_there(f"{key}/done"):
            waited = time.monotonic() - began
            if waited < ask_at:
                continue
            if (questions := store.add(f"{key}/asked", 0)) != asked:  # of others
                if waited > limit:
                    came = f"{store.add(f'{key}/arrived', 0):,} of {len(ranks):,} ranks"
                    raise RuntimeError(f"{name} must be called on every rank; after {waited:.0f} s only {came} came.")
                asked, ask_at = questions, min(waited + turn, limit)
                continue
            asked = store.add(f"{key}/asked", 1)
            hopeless, working = self._ask(scope, number, ranks)
            missing = {**hopeless, **working}
            what = "; ".join(f"rank {rank} {where}" for rank, where in sorted(missing.items())[:8])
            here = [str(rank) for rank in ranks if rank not in missing]
            came = f"rank {', '.join(here)}" if len(here) <= 16 else f"{len(here):,} of {len(ranks):,} ranks"
            if missing and (not working or any(where == ENDED for where in hopeless.values())):
                self._end(key, f"{name} must be called on every rank; only {came} came: {what}.")
            if waited > limit:
                raise RuntimeError(f"{name} must be called on every rank; after {waited:.0f} s {what}.")
            if waited > WARN_AFTER and not warned:
                logger.warning(f"{name} waits for other ranks: {what}.")
                warned = True
            ask_at = time.monotonic() - began + ASK_AFTER
        if store.check([f"{key}/trouble"]):
            raise ValueError(store.get(f"{key}/trouble").decode())

    def _is_there(self, key: str) -> bool:
        """Whether `key` is set, within about a second."""
        if self._store.check([key]):
            return True
        try:
            self._store.wait([key], timedelta(seconds=1))
        except dist.DistNetworkError:
            raise
        except RuntimeError:  # the store's word for "not yet"
            return False
        return True

    def _end(self, key: str, message: str) -> None:
        """Fail, here and on all ranks that wait at `key` or come later: all with the message of the first."""
        first = self._store.compare_set(f"{key}/trouble", "", message).decode()
        self._store.set(f"{key}/done", "1")
        raise ValueError(first)

    # ---- where the others are ----

    def _ask(self, scope: str, number: int, ranks: Sequence[int]) -> tuple[dict[int, str], dict[int, str]]:
        """Ranks that have not come: those that never will, and those that are at work, with where they are."""
        store, question = self._store, self._store.add("asked", 1)
        blocks = [ranks[first : first + BLOCK] for first in range(0, len(ranks), BLOCK)]
        counts = [store.add(f"{scope}/{number}/block {at}", 0) for at in range(len(blocks))]
        open_ones = [block for block, count in zip(blocks, counts, strict=True) if count < len(block)]
        absent = [rank for block in open_ones for rank in block if store.add(f"{scope}/at/{rank}", 0) < number]
        until = time.monotonic() + 1.5  # a little more than the time between two looks of those who answer
        while time.monotonic() < until and any(self._answered(rank, question) is None for rank in absent):
            time.sleep(0.1)
        hopeless, working = dict[int, str](), dict[int, str]()
        for rank in absent:
            if store.add(f"{scope}/at/{rank}", 0) >= number:
                continue  # it has come meanwhile
            if store.check([f"left/{rank}"]):
                hopeless[rank] = ENDED
            elif (answer := self._answered(rank, question)) is None:
                working[rank] = "does not answer"
            elif answer["waits_for"] is not None:
                hopeless[rank] = f"waits in {answer['waits_for']}"
            else:
                stuck = answer["seconds"] >= STUCK_AFTER.get(answer["kind"], float("inf"))
                (hopeless if stuck else working)[rank] = f"is in {answer['place']}"
        return hopeless, working

    def _answered(self, rank: int, question: int) -> dict[str, Any] | None:
        return self.answered(self._store, rank, question)

    def answered(self, store: Any, rank: int, question: int) -> dict[str, Any] | None:
        """The answer of `rank` to this question or a later one; None if there is none yet."""
        if store.check([f"left/{rank}"]):
            return {"waits_for": ENDED}
        if not store.check([f"answer/{rank}"]):
            return None
        answer: dict[str, Any] = json.loads(store.get(f"answer/{rank}"))
        return answer if answer["question"] >= question else None

    # ---- where this one is ----

    def _answer(self, store: Any) -> None:
        """The thread that answers, and that hears when a neighbour is gone."""
        neighbours = None
        try:
            answered = store.add("asked", 0)
            size = dist.get_world_size()
            one_host = os.environ.get("LOCAL_WORLD_SIZE") == str(size)
            neighbours = Neighbours(store, self.rank, size, one_host) if size > 1 else None
            while not self._stop.is_set() and _job_store() is self.job:
                for lost in self._listen(neighbours):
                    if _job_store() is self.job:
                        self._tell_of(store, lost)
                if self._stop.is_set() or _job_store() is not self.job:
                    break
                question = store.add("asked", 0)
                if question != answered:
                    self._hear_news(store)
                    store.set(f"answer/{self.rank}", json.dumps({"question": question, **self._where()}))
                    answered = question
                self._watch_over(store, question)
        except (RuntimeError, OSError, ValueError) as error:  # the job is over, and its store gone
            logger.debug(f"rank {self.rank} no longer answers: {error}")
        finally:
            if neighbours is not None:
                neighbours.close(self.failure)
            for end in self._wake:
                end.close()

    def _watch_over(self, store: Any, question: int) -> None:
        """In a method of its own, so that the thread holds no run, with its mesh, between two looks."""
        if (watch := self.watch) is not None:
            watch.look(store, question)

    def _listen(self, neighbours: Neighbours | None) -> list[Lost]:
        if neighbours is None:
            self._stop.wait(1.0)
            return []
        return list(neighbours.wait(1.0, self._wake[0]))

    def _tell_of(self, store: Any, lost: Lost) -> None:
        """All ranks of one that is gone. The first that is told of counts."""
        if lost.is_sure:
            store.set(f"left/{lost.rank}", "1")
        key = "lost" if lost.is_sure else "unreachable"
        store.compare_set(key, "", json.dumps([lost.rank, lost.host, lost.reason, lost.is_sure]))
        store.add("asked", 1)
        self._hear_news(store)

    def _hear_news(self, store: Any) -> None:
        for key in ("lost", "unreachable"):
            if (self.lost is None or not self.lost.is_sure) and store.check([key]):
                self.lost = Lost(*json.loads(store.get(key)))
        if self.end is None and store.check(["end"]):
            self.end = store.get("end").decode()

    def _where(self) -> dict[str, Any]:
        """What the thread that calls us is doing, and for how many seconds it has been at that place."""
        frame = sys._current_frames().get(self._caller)
        kind, place, stamp = locate(frame)
        now = time.monotonic()
        if stamp != self._stamp:
            self._stamp, self._since = stamp, now
        state = {} if (watch := self.watch) is None else {"state": watch.state()}
        return {"waits_for": self._waits_for, "kind": kind, "place": place, "seconds": now - self._since, **state}

    def _leave(self) -> None:
        """At the end of the process."""
        if os.getpid() != self._pid:
            return  # one that was forked has not been at the roll call
        self._halt()
        # However long it takes. Python ends a thread that comes back when the interpreter is gone; torch's C++ below it
        # takes that for an exception, and the process aborts. What the thread waits for is woken, or answers at once;
        # where the store does not, the line below would wait as long.
        self._answering.join()
        with contextlib.suppress(RuntimeError):
            if _job_store() is self.job:
                self._store.set(f"left/{self.rank}", "1")

    def close(self) -> None:
        """For a process that goes on to another job."""
        self._halt()
        atexit.unregister(self._leave)

    def _halt(self) -> None:
        self._stop.set()
        with contextlib.suppress(OSError):
            self._wake[1].send(b".")


ENDED = "has ended"


def locate(frame: FrameType | None) -> tuple[str, str, int]:
    """Whether a thread is in a `collective` of torch, in a `library` that may wait for one, or in `other` code.

    Returns the kind, the place for people, and a number that stays the same as long as the thread does not move.
    """
    kind: str | None = None
    place, position = "", []
    while frame is not None:
        module, code = str(frame.f_globals.get("__name__")), frame.f_code
        root = module.partition(".")[0]
        position.append((code.co_filename, code.co_name, frame.f_lasti))
        named = f"{code.co_name} ({code.co_filename.rpartition('/')[2]}:{frame.f_lineno})"
        if module.startswith("torch.distributed") and kind is None:
            kind, place = "collective", named
        elif module.startswith("torch.utils.data") and kind is None:
            kind, place = "other", named  # the process may wait for workers that read
        elif root != "torch" and root not in sys.stdlib_module_names or root == "__main__":
            if kind is None:
                kind, place = ("library" if root in LIBRARIES else "other"), named
            if root not in LIBRARIES:
                place = named if place == named else f"{place}, called by {named}"
                break
        frame = frame.f_back
    while frame is not None:
        position.append((frame.f_code.co_filename, frame.f_code.co_name, frame.f_lasti))
        frame = frame.f_back
    return kind or "other", place, hash(tuple(position))


def _job_store() -> Any:
    return dist.distributed_c10d._get_default_store() if dist.is_initialized() else None


_present: RollCall | None = None  # of a process, whose end the others notice whatever objects it still holds


class AllPresent:
    """Where the other ranks are imagined, none is ever absent."""

    def call(self, name: str, detail: str, ranks: Sequence[int], timeout: timedelta) -> None:
        """Return at once."""


def attend() -> RollCall | AllPresent:
    """Be there for the others of the job, from the first call until the process ends. Needs a process group."""
    global _present
    if is_rehearsal():
        return AllPresent()
    if _present is None or _present.job is not _job_store():
        if _present is not None:
            _present.close()
        _present = RollCall(_job_store(), dist.get_rank())
    return _present
