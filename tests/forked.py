"""Run a program on several ranks, as torchrun does, but without the seconds that each of them needs to import torch and
transformers: this process imports them once, and the ranks are copies of it.

    python tests/forked.py 2 script.py argument ...
    python tests/forked.py 2 -m module argument ...
"""

from __future__ import annotations

import os
import runpy
import signal
import sys

import preloaded  # noqa: F401
from ports import reserved_port


def run_rank(rank: int, ranks: int, port: int, program: list[str]) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="forked", CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    if program[0] == "-m":
        sys.argv = program[1:]
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = program
        runpy.run_path(program[0], run_name="__main__")


def main(ranks: int, program: list[str]) -> None:
    """The first rank that fails takes the others down, and its exit code is ours."""
    with reserved_port() as port:
        run_ranks(ranks, port, program)


def run_ranks(ranks: int, port: int, program: list[str]) -> None:
    running: dict[int, int] = {}
    for rank in range(ranks):
        process = os.fork()
        if process == 0:
            run_rank(rank, ranks, port, program)
            return
        running[process] = rank
    failed = 0
    while running:
        process, status = os.wait()
        rank, code = running.pop(process), os.waitstatus_to_exitcode(status)
        if code != 0 and not failed:
            failed = code
            print(f"rank {rank}, exitcode: {code}", file=sys.stderr, flush=True)
            for other in running:
                os.kill(other, signal.SIGTERM)
    sys.exit(failed if failed >= 0 else 1)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
