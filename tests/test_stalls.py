"""A rank that stalls in any phase is named, with the collective that others wait in; one that dies ends the others."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import stalled
import torch.distributed as dist
from pool import WorkerPool

from hf_nanotron.parallel import flight_record, run_watch
from hf_nanotron.parallel.flight_record import Call
from hf_nanotron.parallel.neighbours import Neighbours
from hf_nanotron.parallel.stall_table import RankState, in_short, table, verdict
from hf_nanotron.training.phases import IN_STEP, PHASES

# ---- the table ----


def test_what_a_table_says() -> None:
    """Waiting ranks are one line, the odd one comes first; the sentence names it and what it has not come to."""
    waits = Call(41, "all_reduce", 1024, True, 44)
    ranks: dict[int, RankState | None] = {
        rank: RankState(7, "reduce", "finish (gradients.py:233)", False, 60.0, {"dp (ranks 0,1,2,3)": waits})
        for rank in range(4)
    }
    done = Call(40, "all_reduce", 1024, False, 40)
    ranks[2] = RankState(7, "data", "read (mine.py:3)", False, 61.0, {"dp (ranks 0,1,2,3)": done})
    lines = table(ranks).splitlines()
    assert lines[1].split() == ["2", "7", "data", "none", "read", "(mine.py:3)"]
    assert lines[2].split()[:3] == ["0-1,3", "7", "reduce"] and len(lines) == 3
    assert "all_reduce number 41 of dp (ranks 0,1,2,3) (1,024 elements)" in lines[2]
    assert verdict(ranks) == (
        "The others wait: rank 2 is in read (mine.py:3), data of step 7, and has not come to all_reduce number 41 of "
        "dp (ranks 0,1,2,3) (1,024 elements)."
    )
    ranks[2] = None
    assert verdict(ranks) == "The others wait: rank 2 does not answer."
    gathers = Call(41, "all_gather", 8, True, 41)
    ranks[2] = RankState(7, "evaluation", "loss (x.py:1)", False, 1.0, {"dp (ranks 0,1,2,3)": gathers})
    assert verdict(ranks) == (
        "Ranks make different calls as number 41 of dp (ranks 0,1,2,3): all_reduce on rank 0-1,3; all_gather on rank 2."
    )
    ranks[2] = RankState(7, "forward", "x", False, 1.0, {"dp (ranks 0,1,2,3)": done, "tp": gathers})
    assert verdict(ranks).startswith("All ranks wait, some for each other: rank 2 has not come to all_reduce number 41")
    working = RankState(7, "evaluation", "loss (x.py:1)", False, 1.0)
    assert verdict({0: working, 1: working}).startswith("No rank waits for another; all are at work: rank 0 is in")
    many = {rank: RankState(rank, "", "x", False, 0.0) for rank in range(40)}
    assert table(many).endswith("... and 28 more places") and len(table(many).splitlines()) == 14
    assert in_short([5, 0, 1, 2, 9]) == "0-2,5,9"


def test_phases_are_functions() -> None:
    """A function that is renamed would no longer be found on a stack."""
    import ast
    import importlib

    for module, name in PHASES:
        source = Path(str(importlib.import_module(module).__file__)).read_text()
        names = {node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)}
        assert name in names, (module, name)
    assert set(PHASES.values()) > IN_STEP


# ---- stalls ----


def stall(directory: str, scenarios: list[dict[str, Any]]) -> list[tuple[list[str], int]]:
    """What this rank warns of in each run, and how many collectives torch has noted."""
    found = []
    for number, scenario in enumerate(scenarios):
        lines: list[str] = []

        def hear(record: logging.LogRecord, lines: list[str] = lines, waits_at: str = scenario["how"]) -> None:
            lines.append(record.getMessage())
            if "is in strike" in lines[-1]:
                os.close(os.open(waits_at, os.O_WRONLY))  # and rank 1 goes on

        handler = logging.Handler()
        handler.emit = hear  # type: ignore[method-assign]
        run_watch.logger.addHandler(handler)
        stalled.train({"sizes": {}, **scenario}, int(stalled.os.environ["RANK"]), f"{directory}/{number}")
        run_watch.logger.removeHandler(handler)
        found.append((lines, len(flight_record.last_calls())))
    return found


STALLS: list[tuple[str, str, dict[str, Any]]] = [
    ("forward", "all_reduce", {}),
    ("data", "all_gather|all_reduce", {}),  # of the second step
    ("save", "all_reduce", {}),
    ("backward", "all_reduce|reduce_scatter", {"zero_stage": 2}),
    ("reduce", "all_reduce|reduce_scatter", {}),
    ("evaluation", "all_reduce|all_gather", {}),
    ("forward", "all_gather|all_reduce", {"zero_stage": 3}),
    ("forward", "message", {"pp_size": 2}),
    ("forward", "all_reduce|all_gather|reduce_scatter", {"tp_size": 2}),
]
DEFAULT = 1


def test_a_stall_names_rank_and_collective(pool: WorkerPool, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """In each phase, by rank 0 alone, which waits in it; then the run goes on to its end."""
    import re

    chosen = STALLS if pytestconfig.getoption("full_matrix") else STALLS[:DEFAULT]
    after = {"data": 4, "save": 1}  # in the second step
    scenarios = [
        {"phase": phase, "rank": 1, "how": f"{tmp_path}/{number}.fifo", "after": after.get(phase, 2), "sizes": sizes}
        for number, (phase, _, sizes) in enumerate(chosen)
    ]
    for scenario in scenarios:
        os.mkfifo(scenario["how"])
    first, second = pool.run(2, stall, str(tmp_path), scenarios)
    for (phase, op, sizes), (lines, groups), (others, _) in zip(chosen, first, second, strict=True):
        told = next((line for line in lines if "has not moved" in line and "is in strike" in line), "")
        line = line_of("os.open(how")
        assert f"The others wait: rank 1 is in strike (stalled.py:{line})" in told, (phase, lines)
        rows = [row.split() for row in told.splitlines()[1:]]
        assert ["1", phase] == [rows[1][0], rows[1][2]], told
        waits = next(row for row in rows[1:] if row[0] == "0")
        assert re.search(op, " ".join(waits)), (phase, told)
        if op != "message":
            assert "and has not come to" in told, (phase, sizes, told)
        assert any(line.startswith("The run goes on, after a pause of") for line in lines), lines
        assert groups and not others, "rank 0 alone says it"


def line_of(text: str) -> int:
    lines = Path(stalled.__file__).read_text().splitlines()
    return 1 + next(number for number, line in enumerate(lines) if text in line)


# ---- ranks that die ----


def test_strangers_at_the_door() -> None:
    """Whoever connects without the token is sent away, whatever it says; the neighbour's goodbye is heard."""
    store, wake = dist.HashStore(), socket.socketpair()
    first, second = (Neighbours(store, rank, 2, one_host=True) for rank in (0, 1))
    words = ["", "1", "1 é", "é", "x " + "0" * 32, "1 " + "0" * 32, "1 " * 200]
    strangers = [socket.create_connection(("127.0.0.1", first._door(0)["port"])) for _ in words]
    for stranger, said in zip(strangers, words, strict=True):
        stranger.sendall(said.encode("utf-8"))
    for _ in range(len(words) + 2):
        assert not list(first.wait(0.02, wake[0])) and not list(second.wait(0.02, wake[0]))
    assert len(first._lines) == len(second._lines) == 2 and len(first._strangers) <= 1
    second.close("ValueError: a fault")
    heard = {lost.reason for _ in range(4) for lost in first.wait(0.1, wake[0])}  # its words, and then its end
    assert heard == {"ValueError: a fault"}
    first.close("")
    for each in (*strangers, *wake):
        each.close()


def strike(pool: WorkerPool, folder: Path, *scenarios: dict[str, Any]) -> list[tuple[dict[str, Any], list[str]]]:
    """What became of each of three ranks, and what it said, scenario by scenario."""
    found = []
    for number, scenario in enumerate(scenarios):
        result = pool.run_alone(stalled.run, {"sizes": {}, **scenario}, 3, folder, number)
        said = [(folder / f"{number}-{rank}.txt").read_text(errors="replace") for rank in range(3)]
        found.append((result, said))
    return found


LONG = {"ddp_timeout": 900}  # far longer than the scenario may take
KILLED = {"phase": "callback", "rank": 1, "how": "kill", "asleep": [0], "args": LONG}
STOPPED = {"phase": "forward", "rank": 1, "how": "stop", "timeout": 4}
FAILED = {"phase": "backward", "rank": 2, "how": "raise", "args": LONG}


def test_survivors_leave_and_say_who_died(pool: WorkerPool, tmp_path: Path) -> None:
    """Also one that is in no collective, and hears of nothing by itself."""
    ((result, said),) = strike(pool, tmp_path, KILLED)
    assert result["codes"] == {0: 1, 1: -9, 2: 1}, said
    for rank in (0, 2):
        assert "rank 1 (on " in said[rank] and "has died without a word (killed?)" in said[rank]
    assert "rank 0 leaves, in on_step_end (stalled.py:" in said[0]


@pytest.mark.full_matrix
def test_other_ends(pool: WorkerPool, tmp_path: Path) -> None:
    """An error is told to the others; a process that is stopped is waited for until the run may end."""
    (failed, said_of_failure), (stopped, said_of_stop) = strike(pool, tmp_path, FAILED, STOPPED)
    assert failed["codes"] == {0: 1, 1: 1, 2: 1}
    for rank in (0, 1):
        assert "has ended: RuntimeError: the user's code has a fault" in said_of_failure[rank]
    assert stopped["codes"] == {0: 1, 2: 1} and stopped["left"] == [1]
    assert "The others wait: rank 1 does not answer" in said_of_stop[0]
    assert "rank 2 leaves" in said_of_stop[2] and "no rank has moved for" in said_of_stop[2]
