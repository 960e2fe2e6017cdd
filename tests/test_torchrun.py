"""Ranks that are copies of a process that has imported modules: they are what torchrun's processes are."""

from __future__ import annotations

import importlib
import json
import os
import selectors
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from kills import environment

from hf_nanotron.cli.torchrun import MODULES, server_environment
from hf_nanotron.launch.preloaded import ForkServer, serve

# Without a path that depends on where a process starts.
VARIABLES = {**{name: value for name, value in os.environ.items() if name != "PYTHONPATH"}, "OMP_NUM_THREADS": "1"}
# Says all that a program can know of how it was started, then does what its arguments say.
PROGRAM = """\
import json, multiprocessing, os, random, signal, sys, time
import helper

def work(queue):
    queue.put([os.getpid() != MAIN, __name__, helper.VALUE])

MAIN = os.getpid()

if __name__ == "__main__":
    import numpy
    seen = {"argv": sys.argv, "path": sys.path, "file": __file__, "package": __package__, "cached": __cached__}
    seen |= {"spec": getattr(__spec__, "name", None), "loader": type(__loader__).__name__, "names": sorted(globals())}
    seen |= {"original": sys.orig_argv, "environment": dict(os.environ), "folder": os.getcwd()}
    seen |= {"main": sys.modules["__main__"].__dict__ is globals(), "builtins": type(__builtins__).__name__}
    seen |= {"signals": {int(n): str(signal.getsignal(n)) for n in signal.valid_signals()}, "mask": str(os.umask(0o22))}
    seen |= {"cores": sorted(os.sched_getaffinity(0)), "leader": os.getsid(0) == os.getpid(), "stdin": sys.stdin.read()}
    seen |= {"open": sorted(os.listdir("/proc/self/fd"))[:3], "many": len(os.listdir("/proc/self/fd"))}
    for method in ("fork", "spawn", "forkserver"):
        context = multiprocessing.get_context(method)
        queue = context.SimpleQueue()
        process = context.Process(target=work, args=(queue,))
        process.start()
        process.join()
        seen[method] = [process.exitcode, queue.get()]
    chance = [random.random(), float(numpy.random.rand())]
    with open(sys.argv[1], "w") as file:
        json.dump({"seen": seen, "chance": chance, "was_there": "numpy" in sys.modules}, file)
    print("said")
    print("complained", file=sys.stderr)
    if sys.argv[2] == "wait":
        signal.signal(signal.SIGUSR1, lambda *_: sys.exit(5))
        with open(sys.argv[1] + ".pid", "w") as file:
            file.write(str(os.getpid()))
        while True:
            time.sleep(60)
    if sys.argv[2] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if sys.argv[2] == "raise":
        raise KeyError("lost")
    sys.exit(int(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("program")
    (folder / "program.py").write_text(PROGRAM)
    (folder / "helper.py").write_text("VALUE = 3\n")
    return folder


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with ForkServer(sys.executable, ["numpy"], VARIABLES) as server:
        yield server


def start(arguments: Sequence[str], folder: Path, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *arguments], cwd=folder, env={**VARIABLES, "RANK": "0", **variables},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN),  # as after `trap '' USR2`
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate()
    return process.returncode, out, err


def wait_for(path: Path, process: subprocess.Popen[str]) -> str:
    while not path.exists() or not path.read_text():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    return path.read_text()


@pytest.mark.parametrize("name", ["program.py", "-m program"])
def test_a_copy_is_what_python_would_start(server: ForkServer, folder: Path, name: str) -> None:
    """Also its data workers, of each kind; what must differ between processes does."""
    told = []
    for where in ("plain", "copied"):
        program = ["-u", *name.split(), str(folder / "told"), "3"]
        arguments = program if where == "plain" else server.stand_in(program)
        code, out, err = finish(start(arguments, folder))
        assert (code, out, err) == (3, "said\n", "complained\n")
        told.append(json.loads((folder / "told").read_text()))
    plain, copied = told
    assert copied["seen"] == plain["seen"]
    assert plain["seen"]["spawn"] == [0, [False, "__mp_main__", 3]]
    assert len({*plain["chance"], *copied["chance"]}) == 4


@pytest.mark.parametrize(("what", "code"), [("die", -signal.SIGKILL), ("raise", 1), ("0", 0)])
def test_it_ends_as_its_rank_ends(server: ForkServer, folder: Path, what: str, code: int) -> None:
    found, _, err = finish(start(server.stand_in(["-u", "program.py", str(folder / "end"), what]), folder))
    assert found == code and ("KeyError: 'lost'" in err) == (what == "raise")


def test_signals_reach_the_rank_and_a_killed_stand_in_takes_it_along(server: ForkServer, folder: Path) -> None:
    for number, code in ((signal.SIGUSR1, 5), (signal.SIGTERM, -signal.SIGTERM), (signal.SIGKILL, -signal.SIGKILL)):
        path = folder / f"signal-{number}"
        process = start(server.stand_in(["-u", "program.py", str(path), "wait"]), folder)
        pid = int(wait_for(path.with_name(f"{path.name}.pid"), process))
        os.killpg(process.pid, number)  # as torchrun does
        assert finish(process)[0] == code
        while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes():
            time.sleep(0.01)  # for ever, if it stays


def test_the_server_waits_for_ranks_that_were_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchrun does for its own: ports, locks and a GPU's memory are free when the next ones start."""
    rank = subprocess.Popen(["sleep", "1000"])
    here, there = socket.socketpair()
    server: Any = serve.Server.__new__(serve.Server)
    server.ranks, server.killed, server._selector = {rank.pid: here}, {rank.pid}, selectors.DefaultSelector()
    # It dies while it is waited for.
    clock = SimpleNamespace(monotonic=lambda: 0.0, sleep=lambda _: os.kill(rank.pid, signal.SIGKILL))
    monkeypatch.setattr(serve, "time", clock)
    server._wait_for_killed()
    assert not server.ranks and not server.killed and not Path(f"/proc/{rank.pid}").exists()
    assert struct.unpack("!i", there.recv(4)) == (signal.SIGKILL,)
    rank.wait()


def test_a_safe_path_keeps_all_of_its_folders(tmp_path: Path) -> None:
    """With PYTHONSAFEPATH no folder comes before those of PYTHONPATH."""
    (tmp_path / "main.py").write_text("import sys, told; print(told.__file__, 'told' in sys.modules, len(sys.path))")
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "told.py").touch()
    variables = {"PYTHONPATH": str(tmp_path / "beside"), "PYTHONSAFEPATH": "1"}
    with ForkServer(sys.executable, ["told"], {**VARIABLES, **variables}) as server:
        program = ["-u", "main.py"]
        plain, copied = (finish(start(each, tmp_path, **variables)) for each in (program, server.stand_in(program)))
    assert copied == plain and plain[0] == 0 and plain[2] == ""


def test_a_stand_in_starts_nothing_when_it_is_imported() -> None:
    """Tools import all modules of a package."""
    importlib.import_module("hf_nanotron.launch.preloaded.stand_in")


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (
            {"numpy.py": "X = 1", "main.py": "import numpy; print(numpy.X)"},
            "numpy.py would be imported in the place of",
        ),
        ({"main.py": "import os; os.environ['HF_HOME'] = '/x'; print(1)"}, "main.py sets HF_HOME, which is read"),
        ({"main.py": "import os; os.environ.setdefault('RANK', '/x'); print(1)"}, ""),
        ({"main.py/__main__.py": "print(1)"}, "main.py is not a file that ends in .py"),
    ],
    ids=["hidden", "environment", "late", "folder"],
)
def test_a_program_that_would_differ_is_started_anew(
    server: ForkServer, tmp_path: Path, files: dict[str, str], says: str
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    code, out, err = finish(start(server.stand_in(["-u", "main.py"]), tmp_path))
    assert (code, out) == (0, "1\n") and says in err and bool(err) == bool(says), err


def test_without_the_server_ranks_start_by_themselves(tmp_path: Path) -> None:
    """Also where a preloaded module has threads, which copies would lack."""
    (tmp_path / "main.py").write_text("print(1)")
    (tmp_path / "threaded.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
    )
    with ForkServer(sys.executable, ["threaded"], {**VARIABLES, "PYTHONPATH": str(tmp_path)}) as server:
        code, out, err = finish(start(server.stand_in(["-u", "main.py"]), tmp_path))
    assert (code, out) == (0, "1\n") and "this rank starts without it" in err
    assert not Path(server.folder).exists()


RESTARTED = """\
import os, signal, sys
sys.modules["torch"].cuda  # is there without an import
import torch
rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
assert not torch.cuda._is_in_bad_fork() and not torch.cuda.is_initialized()
assert torch.get_num_threads() == 1
assert {"transformers.trainer", "hf_nanotron.trainer", "datasets"} <= set(sys.modules)
if attempt == 0:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()  # until torchrun ends it
print(f"attempt {attempt}, local rank {sys.argv[1]}: {os.environ['WORLD_SIZE']} ranks", flush=True)
"""


@pytest.mark.full_matrix
def test_torchrun_restarts_copies(tmp_path: Path) -> None:
    """With its logs, its macros, its default of OMP_NUM_THREADS; the preloaded modules use no GPU."""
    (tmp_path / "main.py").write_text(RESTARTED)
    variables = {name: value for name, value in environment().items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-m", "hf_nanotron.cli", "torchrun", "--standalone", "--nproc-per-node", "2", "--max-restarts",
         "1", "--monitor-interval", "0.1", "--tee", "3", "--log-dir", str(tmp_path / "logs"), "main.py",
         "${local_rank}"],
        cwd=tmp_path, env=variables, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        line = f"attempt 1, local rank {rank}: 2 ranks"
        assert f"[default{rank}]:{line}\n" in done.stdout
        assert [path.read_text() for path in tmp_path.glob(f"logs/*/attempt_1/{rank}/stdout.log")] == [f"{line}\n"]


@pytest.mark.parametrize("count", ["1", "8"])
def test_modules_that_ask_for_a_gpu_start_no_cuda(count: str) -> None:
    """A process that has started CUDA has no copies that can use it; so torch is to ask the driver's library."""
    given = SimpleNamespace(nproc_per_node=count)
    found = server_environment(given, {"PATH": "/bin", "PYTORCH_NVML_BASED_CUDA_CHECK": "0"})
    assert found.pop("PYTORCH_NVML_BASED_CUDA_CHECK") == "1"
    assert found == {"PATH": "/bin"} | ({} if count == "1" else {"OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--no-python", "ls"], "--no-python: ls imports nothing that could be preloaded; use torchrun."),
        (["--run-path", "x.py"], "--run-path starts no Python of a rank's own"),
        (["--preload", "not_there", "x.py"], "--preload not_there: no module of this name can be found"),
    ],
)
def test_refusals(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    from hf_nanotron.cli import main

    with pytest.raises(SystemExit) as ended:
        main(["torchrun", *arguments])
    assert ended.value.code == 2 and says in capsys.readouterr().err


@pytest.mark.full_matrix
def test_no_module_reads_what_differs_between_ranks_when_it_is_imported() -> None:
    code = f"""
import importlib, os
read = set()
class Spy(type(os.environ)):
    def __getitem__(self, name):
        read.add(name)
        return super().__getitem__(name)
os.environ.__class__ = Spy
for name in {MODULES!r}:
    importlib.import_module(name)
print(*sorted(read))
"""
    # Variables that are not there: a copy of the whole environment reads none of them.
    variables = {name: value for name, value in environment().items() if name != "CUDA_VISIBLE_DEVICES"}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True)
    read = set(done.stdout.split())
    assert "HF_HOME" in read
    assert not {name for name in read if name.startswith(("LOCAL_", "MASTER_", "TORCHELASTIC_", "ROLE_", "GROUP_"))}
    assert not {"RANK", "WORLD_SIZE", "CUDA_VISIBLE_DEVICES"} & read
