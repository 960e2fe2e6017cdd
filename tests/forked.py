"""Run a program on several ranks, as torchrun does, but without the seconds that each of them needs to import torch and
transformers: this process imports them once, and the ranks are copies of it.

    python tests/forked.py 2 script.py argument ...
    python tests/forked.py 2 -m module argument ...

What ends with `_apart` is for `WorkerPool.run_alone`: a process that has imported them for all tests.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

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


def end_as_script(main: Callable[[], None]) -> None:
    """End this process as a script of its own would, whatever it is a copy of."""
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1 if end.code else 0
        if code and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def main(ranks: int, program: list[str]) -> None:
    """The first rank that fails takes the others down, and its exit code is ours."""
    with reserved_port() as port:
        run_ranks(ranks, port, program)


def run_ranks(ranks: int, port: int, program: list[str]) -> None:
    running: dict[int, int] = {}
    for rank in range(ranks):
        process = os.fork()
        if process == 0:
            end_as_script(lambda rank=rank: run_rank(rank, ranks, port, program))
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


def apart(main: Callable[[], None], folder: Path) -> tuple[int, str, str]:
    """Exit code, output and errors of `main` in a copy of this process; files for them are in `folder`."""
    paths = folder / "forked.out", folder / "forked.err"
    process = os.fork()
    if process == 0:
        for path, handle in zip(paths, (1, 2), strict=True):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), handle)
        multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # may start others
        end_as_script(main)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    out, err = (path.read_text(errors="replace") for path in paths)
    return code, out, err


def run_apart(ranks: int, program: list[str], folder: Path) -> tuple[int, str, str]:
    """As this file does as a program."""
    return apart(lambda: main(ranks, program), folder)


def python_apart(text: str, arguments: list[str], folder: Path) -> tuple[int, str, str]:
    """As `python -c TEXT ARGUMENT ...`."""

    def main() -> None:
        sys.argv = ["-c", *arguments]
        exec(compile(text, "<string>", "exec"), {"__name__": "__main__"})

    return apart(main, folder)


def torchrun_apart(ranks: int, script: str, folder: Path) -> tuple[int, str, str]:
    """As `torchrun --standalone --nproc-per-node RANKS SCRIPT`: its agent, whose ranks are copies of this process."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=ranks, run_id="forked", rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", start_method="fork", max_restarts=0,
    )  # fmt: skip

    def main() -> None:
        try:
            elastic_launch(config, _script)(script)
        except ChildFailedError as error:
            raise SystemExit(str(error)) from error

    return apart(main, folder)


def _script(path: str) -> None:
    sys.argv = [path]
    end_as_script(lambda: runpy.run_path(path, run_name="__main__"))


if __name__ == "__main__":
    import hf_nanotron.trainer  # noqa: F401

    main(int(sys.argv[1]), sys.argv[2:])
