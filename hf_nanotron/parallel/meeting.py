"""The processes of one attempt of torchrun find each other, and agree on a name for what they write into its store.

torchrun keeps one store for all attempts of a job (`--max-restarts`), in which addresses and keys of earlier attempts
are still found; a process group that reads them waits for processes that are gone. Numbers of attempts do not help:
after a node is lost, torchrun's agents count them differently. So process 0 draws a name, and hands it to those that
have drawn a number in this attempt: each finds its own number beside the name, which no earlier process 0 can have
written.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch.distributed as dist
from transformers.utils import logging

from .seats import Process

logger = logging.get_logger(__name__)

LOOK_SECONDS = 0.05
SPARE_SECONDS = 0.5  # between two looks of a spare whether the run has ended
FIRST_LINES = 8  # processes that are named in a message


@dataclass(frozen=True)
class Meeting:
    """What the processes of this attempt know of each other.

    Attributes:
        store: of this attempt alone.
        number: of this process.
        processes: all of them.
    """

    store: Any
    number: int
    processes: list[Process]


def meets(environment: Mapping[str, str], takes_seats: bool) -> bool:
    """Whether this is a job of torchrun in which processes have to find each other: one that may be started again, or
    that has spares. Not once there is a process group.
    """
    if dist.is_initialized() or "TORCHELASTIC_RUN_ID" not in environment or int(environment.get("WORLD_SIZE", 1)) < 2:
        return False
    return takes_seats or int(environment.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0


def meet(environment: Mapping[str, str], timeout: timedelta, unfit: str | None = None) -> Meeting:
    """Wait for all processes that torchrun has started in this attempt.

    Args:
        unfit: why this process cannot train.

    Raises:
        RuntimeError: after `timeout`, naming processes that have not come.
    """
    number, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    is_master = environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and number == 0
    store = dist.TCPStore(
        environment["MASTER_ADDR"],
        int(environment["MASTER_PORT"]),
        is_master=is_master,
        timeout=timeout,
        wait_for_workers=False,
        multi_tenant=True,
    )
    own = {
        "node": int(environment.get("GROUP_RANK", 0)),
        "local_rank": int(environment.get("LOCAL_RANK", 0)),
        "host": socket.gethostname(),
        "unfit": unfit,
    }
    store_of_all = dist.PrefixStore("hf_nanotron/meeting", store)
    until = time.monotonic() + timeout.total_seconds()
    if number == 0:
        name, found = _invite(store_of_all, size, own, until)
    else:
        name, found = _come(store_of_all, number, own, until)
    processes = [Process(each, **entry) for each, entry in enumerate(found)]
    return Meeting(dist.PrefixStore(f"hf_nanotron/{name}", store), number, processes)


def _invite(store: Any, size: int, own: dict[str, Any], until: float) -> tuple[str, list[dict[str, Any]]]:
    """Process 0: hand a new name to every process that asks, until each has said that it has it."""
    name = secrets.token_hex(8)
    missing, answered = set(range(1, size)), dict[int, str]()
    found: dict[int, dict[str, Any]] = {0: own}
    while missing:
        for number in sorted(missing):
            if not store.check([f"ask/{number}"]):
                continue
            text = store.get(f"ask/{number}").decode()  # of an earlier attempt, until the process has come
            if answered.get(number) != text:
                asked = json.loads(text)
                store.set(f"answer/{asked.pop('ticket')}", name)
                answered[number], found[number] = text, asked
            if store.check([f"{name}/has/{number}"]):
                missing.discard(number)
        if time.monotonic() > until:
            who = ", ".join(str(number) for number in sorted(missing)[:FIRST_LINES])
            raise RuntimeError(f"processes {who} of {size} that torchrun has started have not come before ddp_timeout.")
        if missing:
            time.sleep(LOOK_SECONDS)
    entries = [found[number] for number in range(size)]
    store.set(f"{name}/processes", json.dumps(entries))
    return name, entries


def _come(store: Any, number: int, own: dict[str, Any], until: float) -> tuple[str, list[dict[str, Any]]]:
    """Any other process: ask with a ticket that nobody had before."""
    ticket = secrets.token_hex(8)
    store.set(f"ask/{number}", json.dumps({"ticket": ticket, **own}))
    try:
        store.wait([f"answer/{ticket}"], timedelta(seconds=max(until - time.monotonic(), 1.0)))
        name = store.get(f"answer/{ticket}").decode()
        store.set(f"{name}/has/{number}", "1")
        store.wait([f"{name}/processes"], timedelta(seconds=max(until - time.monotonic(), 1.0)))
    except dist.DistNetworkError:
        raise
    except RuntimeError as error:  # the store's word for "not yet"
        raise RuntimeError(
            f"process {number} has waited for the other processes of the job until ddp_timeout."
        ) from error
    return name, json.loads(store.get(f"{name}/processes"))


# ---- after it ----


def take(seats: Sequence[int], meeting: Meeting, environment: MutableMapping[str, str]) -> int | None:
    """The rank of this process among those with a seat, as the environment then says, too; None for a spare."""
    if meeting.number not in seats:
        return None
    rank = list(seats).index(meeting.number)
    environment.update(RANK=str(rank), WORLD_SIZE=str(len(seats)))
    return rank


def open_group(meeting: Meeting, rank: int, size: int, backend: str, timeout: timedelta) -> None:
    """The default process group, of the processes with a seat."""
    dist.init_process_group(
        backend, store=dist.PrefixStore("job", meeting.store), rank=rank, world_size=size, timeout=timeout
    )
    if size < len(meeting.processes):
        atexit.register(_leave, meeting.store, size)


def _leave(store: Any, size: int) -> None:
    """At the end of a process that has trained: the last one lets the spares go."""
    with contextlib.suppress(RuntimeError):  # the store is gone, and they with it
        if store.add("left", 1) == size:
            store.set("ended", "1")


def wait_as_spare(meeting: Meeting, grace: float) -> NoReturn:
    """Wait until all who train have ended, and leave this process; it ends with torchrun's attempt, too.

    Args:
        grace: seconds for which it outlives a signal that tells those who train to save (`save_on_signal`).

    Raises:
        SystemExit: always.
    """
    told: list[float] = []
    if grace and threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda *_: told.append(time.monotonic()))
    logger.info(f"process {meeting.number} is a spare.")
    with contextlib.suppress(RuntimeError):  # the process that holds the store has ended: well, or torchrun ends all
        while not meeting.store.check(["ended"]):
            if told and time.monotonic() > told[0] + grace:
                sys.exit(128 + signal.SIGTERM)
            time.sleep(SPARE_SECONDS)
    if meeting.processes[meeting.number].unfit is not None:
        os._exit(0)  # its device may keep it from ending in any other way
    sys.exit(0)
