"""Random combinations of what a run can have, each compared with one process.

    python tests/fuzz.py --seed 0 --cases 50 --seconds 200
    python tests/fuzz.py --seed 0 --case 17           # one of them again
    python tests/fuzz.py --seed 0 --case 17 --set rows=1 --set "data='rows'"   # with other values
    python tests/fuzz.py --seed 0 --cases 200 --where cp=2 --where "data='packed'"   # cases that all have these

A case (`fuzz_axes.py`) is trained on its layout; it may break off, and go on from its checkpoint on another layout.
Losses, gradient norms, evaluations, predictions, generated ids and the weights that plain transformers loads are then
those of the same run in one process: of stock Trainer where it has all of it, otherwise of ours. A combination that is
refused says so in one ValueError or NotImplementedError, the same on every rank, before the first step. A rank that
does not come back within the limit is a failure, with the stacks of all ranks.

Each case is one line of JSON; a failed one ends with how to run it again. The exit status is 1 if any has failed.
"""

from __future__ import annotations

import argparse
import ast
import faulthandler
import json
import os
import pickle
import re
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

import fuzz_runs
import fuzz_stock
import preloaded  # noqa: F401
import torch.distributed as dist
from fuzz_axes import AXES, REFUSED, Case, Design, is_stock, layouts, pairs, world
from fuzz_compare import Failed, differences

LIMIT = 60.0  # seconds of a leg


# ---- processes ----


def ranks_of(job: Callable[[list[Any]], None], ranks: int, folder: Path, limit: float = LIMIT) -> list[dict[str, Any]]:
    """What became of each rank: `kind` of its exception, `text`, `trace`, and whether a step had begun.

    `job` is given a list, in which it leaves its callback. A rank that is killed is of kind "killed", one that does not
    come back of kind "hang".
    """
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(64)
    found: list[dict[str, Any]] = [{"kind": "killed", "text": "", "trace": "", "began": True} for _ in range(ranks)]
    running: dict[Connection, tuple[int, int]] = {}
    sys.stdout.flush()
    for rank in range(ranks):
        ours, theirs = Pipe(duplex=False)
        process = os.fork()
        if process == 0:
            ours.close()
            _run_rank(job, rank, ranks, listener, folder, theirs, limit)
        theirs.close()
        running[ours] = rank, process
    listener.close()
    started = dict(running.values())
    deadline = time.monotonic() + limit + 3
    while running:
        for connection in wait(list(running), timeout=max(0.0, deadline - time.monotonic())):
            rank, _ = running.pop(connection)  # type: ignore[index]
            try:
                found[rank] = pickle.loads(connection.recv_bytes())  # type: ignore[union-attr]
            except (EOFError, ConnectionResetError):
                pass
        if time.monotonic() >= deadline:
            for rank, _ in running.values():
                stack = folder / f"stack-{rank}"
                found[rank] = {"kind": "hang", "text": "", "trace": stack.read_text() if stack.exists() else ""}
            break
    for process in started.values():
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            pass
        os.waitpid(process, 0)
    return found


def _run_rank(
    job: Callable[[list[Any]], None], rank: int, ranks: int, listener: socket.socket, folder: Path,
    answer: Connection, limit: float,
) -> None:  # fmt: skip
    """In the copy of this process that is a rank; does not return."""
    log = os.open(folder / f"output-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    faulthandler.dump_traceback_later(limit, file=open(folder / f"stack-{rank}", "w"))  # noqa: SIM115
    watch: list[Any] = []
    try:
        os.environ.update(CUDA_VISIBLE_DEVICES="", TOKENIZERS_PARALLELISM="false")
        if ranks > 1:
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks)
            )  # fmt: skip
            port = listener.getsockname()[1]
            store = dist.TCPStore(
                "127.0.0.1", port, is_master=rank == 0, wait_for_workers=False,
                master_listen_fd=listener.detach() if rank == 0 else None,
            )  # fmt: skip
            dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=120))
        if rank:
            listener.close()
        job(watch)
        result = {"kind": "", "text": "", "trace": ""}
    except BaseException as error:
        result = {"kind": type(error).__name__, "text": str(error), "trace": traceback.format_exc()}
    result["began"] = bool(watch) and watch[0].began
    answer.send_bytes(pickle.dumps(result))
    if not result["kind"] and ranks > 1:
        dist.barrier()  # the first rank has the store
    elif ranks > 1 and rank == 0:
        time.sleep(3)  # others are heard, too
    os._exit(0)


# ---- one case ----


class Refused(Exception):
    """The sentence with which it was refused."""


def verdict(found: list[dict[str, Any]], case: Case, breaks: bool) -> None:
    """
    Raises:
        Refused, Failed: unless all ranks have ended as they should.
    """
    kinds = {each["kind"] for each in found}
    if "hang" in kinds:
        stuck = [rank for rank, each in enumerate(found) if each["kind"] == "hang"]
        traces = "\n".join(
            f"rank {rank}: {each['kind']} {each['text']}\n{each['trace']}" for rank, each in enumerate(found)
        )
        raise Failed(f"ranks {stuck} did not come back\n{traces}")
    if breaks:
        ended = {"killed"} if case["end"] == "kill" else {"Broken"}
        if all(each["began"] for each in found) and kinds & ended:
            return
    if kinds == {""}:
        return
    first = next(each for each in found if each["kind"])
    if kinds <= {"ValueError", "NotImplementedError"} and "" not in kinds:
        texts = {each["text"] for each in found}
        if len(texts) == 1 and not any(each["began"] for each in found):
            raise Refused(texts.pop())
        if len(texts) > 1:
            raise Failed("ranks are refused with different sentences:\n" + "\n".join(sorted(texts)) + first["trace"])
    said = [f"{rank}: {each['kind']}" for rank, each in enumerate(found)]
    raise Failed(f"ranks ended with {', '.join(said)}: {first['text']}\n{first['trace']}")


def run_case(case: Case, folder: Path, limit: float = LIMIT) -> dict[str, Any]:
    """Train it in both ways. Returns the largest errors by name.

    Raises:
        Refused: with the sentence.
        Failed: with what differs, or how it ended.
    """

    def alone(job: Callable[..., None], *arguments: Any) -> None:
        verdict(ranks_of(lambda watch: job(*arguments), 1, folder, limit), case, False)

    def prepare() -> None:
        fuzz_runs.write_data(case, folder)
        fuzz_runs.make_checkpoint(case, folder)

    alone(prepare)
    names = []
    for prefix, layout in layouts(case):
        names.append("second" if prefix else "first")
        job = lambda watch: fuzz_runs.leg(case, prefix, layout, folder, names[-1], watch)  # noqa: B023, E731
        breaks = not prefix and case["end"] in ("raise", "kill")
        verdict(ranks_of(job, world(layout), folder, limit), case, breaks)
    if is_stock(case):
        alone(fuzz_stock.stock, case, folder, "whole")
    else:
        verdict(
            ranks_of(lambda watch: fuzz_runs.leg(case, "", None, folder, "whole", watch), 1, folder, limit), case, False
        )
    return differences(case, folder, names)


# ---- the tool ----


def named(case: Case) -> dict[str, Any]:
    """What of a case is not the default."""
    return {axis: value for axis, value in case.items() if axis not in AXES or value != AXES[axis][0]}


def try_case(design: Design, number: int, changes: dict[str, Any], drawn: str, keep: bool = False) -> dict[str, Any]:
    """One line of the report; `drawn`: the options with which this case was."""
    case = {**design.case(number), **changes}
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    limit = LIMIT * (4 if case.get("compile") else 1)  # compilers of all ranks share the processors
    began = time.monotonic()
    line: dict[str, Any] = {"case": number, "result": "ok", "reference": "stock" if is_stock(case) else "ours"}
    try:
        errors = run_case(case, folder, limit)
        line["errors"] = {name: float(f"{error:.1e}") for name, error in errors.items()}
        if case["refused"] is not None:
            line |= {"result": "failed", "why": f"not refused: {REFUSED[case['refused']][2]}"}
    except Refused as error:
        line |= {"result": "refused", "why": str(error)}
        known = case["refused"] is not None and re.search(REFUSED[case["refused"]][2], str(error))
        if not known:
            line["result"] = "refused, which fuzz_axes.py does not expect"
    except Failed as error:
        line |= {"result": "failed", "why": str(error)}
    line["seconds"] = round(time.monotonic() - began, 1)
    line |= {"values": named(case)}
    if line["result"] not in ("ok", "refused"):
        line["again"] = f"python tests/fuzz.py {drawn} --case {number}"
    if keep:
        line["folder"] = str(folder)
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return line


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=50)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--case", type=int, help="run this one alone, and keep its folder")
    parser.add_argument("--seconds", type=float, default=200.0, help="begin no case after so many")
    parser.add_argument("--set", action="append", default=[], metavar="AXIS=VALUE", help="another value, with --case")
    parser.add_argument("--until-failure", action="store_true", help="end with the first case that fails")
    parser.add_argument("--refusals", action="store_true", help="run one case of each combination that is refused")
    parser.add_argument("--plain", action="store_true", help="with --case: all other axes have their defaults")
    parser.add_argument("--where", action="append", default=[], metavar="AXIS=VALUE", help="of all cases")
    options = parser.parse_args()
    changes, where = ({k: ast.literal_eval(v) for k, v in (each.split("=", 1) for each in given)} for given in
                      (options.set, options.where))  # fmt: skip
    if unknown := [axis for axis in (*changes, *where) if axis not in AXES and (axis in where or axis != "compile")]:
        parser.error(f"{unknown[0]!r} is not one of {', '.join(AXES)}")
    design, began = Design(options.seed, where=where), time.monotonic()
    drawn = " ".join([f"--seed {options.seed}", *(f"--where {shlex.quote(each)}" for each in options.where)])
    if options.refusals:
        design.cases, options.cases = [design.refused(row) for row in range(len(REFUSED))], len(REFUSED)
        drawn += " --refusals"
    if options.case is not None:
        if options.plain:
            changes = {**{axis: values[0] for axis, values in AXES.items()}, "refused": None, **changes}
        line = try_case(design, options.case, changes, drawn, keep=True)
        print(json.dumps({name: value for name, value in line.items() if name != "why"}))
        print(line.get("why", ""))
        return 0 if line["result"] in ("ok", "refused") else 1
    results: Counter[str] = Counter()
    covered: set[tuple[Any, ...]] = set()
    for number in range(options.first, options.first + options.cases):
        if time.monotonic() - began > options.seconds:
            break
        line = try_case(design, number, {}, drawn)
        results[line["result"]] += 1
        if line["result"] == "ok":
            covered |= pairs(design.case(number))
        print(json.dumps(line), flush=True)
        if options.until_failure and line["result"] not in ("ok", "refused"):
            break
    print(json.dumps({"results": results, "pairs": len(covered)}))
    return 0 if set(results) <= {"ok", "refused"} else 1


if __name__ == "__main__":
    sys.exit(main())
