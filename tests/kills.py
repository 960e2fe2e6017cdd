"""Jobs with `--max-restarts` whose ranks are killed: their losses, and how long a restart took.

    python tests/kills.py [--ranks 8] [--random 50] [--all] [--schedules zero3 zb] [--plain 3] [--jobs 1]

runs the matrix of phases and schedules, then so many kills of a random rank at a random moment, then a few kills under
plain torchrun, and prints a table: a row as soon as its job is over. `--schedules` goes on where another call stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ports import reserved_port

HERE = Path(__file__).parent
STEPS = 48
PHASES = ("start", "forward", "resume", "backward", "reduce", "step", "snapshot", "marker", "save", "evaluation")
# Of 8 ranks: schedule -> arguments. With other numbers of ranks dp grows or shrinks.
SCHEDULES: dict[str, dict[str, Any]] = {
    "zero1": {"zero_stage": 1, "gradient_accumulation_steps": 1},
    "zero3": {"zero_stage": 3, "gradient_accumulation_steps": 1},
    "1f1b": {"pp_size": 2, "tp_size": 2, "gradient_accumulation_steps": 2},
    "afab": {"pp_size": 2, "pp_schedule": "afab", "zero_stage": 2, "gradient_accumulation_steps": 2},
    "interleaved": {
        "pp_size": 2, "pp_schedule": "interleaved_1f1b", "pp_virtual_stages": 2, "gradient_accumulation_steps": 2,
    },
    "zb": {"pp_size": 2, "tp_size": 2, "pp_schedule": "zb", "gradient_accumulation_steps": 2},
}  # fmt: skip


LAUNCHERS = {
    "preloaded": [
        "hf_nanotron.cli", "torchrun", "--preload", "tiny", "--preload", "transformers.models.llama.modeling_llama",
    ],
    "torchrun": ["torch.distributed.run"],
}  # fmt: skip


LIBC = ctypes.CDLL(None)


def end_with_starter() -> None:
    """For a process that is started: at the end of the thread that starts it, however it ends, it gets SIGTERM."""
    LIBC.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


@dataclass
class Job:
    """A run of so many steps that is killed as `kills` says, and `random_kills` times at random moments."""

    folder: Path
    ranks: int
    training: dict[str, Any]
    steps: int
    kills: list[tuple[int, str, int]] = field(default_factory=list)
    random_kills: int = 0
    pause: float = 0.0
    seed: int = 0
    config: dict[str, Any] | None = None  # of a model on GPUs; None for the tiny one on the CPU
    length: int = 16  # tokens of a sample
    memory: str | None = None  # for the snapshots; None for a folder of the job
    launcher: str = "preloaded"
    nodes: int = 1  # agents of torchrun, all on this host

    @property
    def most_restarts(self) -> int:
        return len(self.kills) + 2 * self.random_kills

    def run(self, timeout: float = 600.0) -> Outcome:
        """Start it, kill ranks, wait for its end."""
        self.folder.mkdir(parents=True)
        memory = Path(self.memory or self.folder / "memory")
        memory.mkdir(exist_ok=True)
        training = {
            "output_dir": str(self.folder / "out"), "save_strategy": "steps", "save_steps": 10, "save_total_limit": 2,
            "memory_snapshot_steps": 2, "memory_snapshot_dir": str(memory), "eval_strategy": "steps", "eval_steps": 7,
            "max_steps": self.steps, "logging_strategy": "steps", **self.training,
        }  # fmt: skip
        job = self.folder / "job.json"
        job.write_text(
            json.dumps(
                {
                    "start": None if self.config else start_model(self.folder.parent), "training": training,
                    "folder": str(self.folder), "kills": self.kills, "pause": self.pause, "config": self.config,
                    "samples": 2 * self.ranks * self.steps, "length": self.length,
                }
            )
        )  # fmt: skip
        with contextlib.ExitStack() as stack:
            processes = self._start(stack, job)
            killed, code = list[float](), None
            try:
                if self.random_kills:
                    killed = self._kill_at_random(processes[0], time.monotonic() + timeout)
                    (self.folder / "calm").touch()
                code = self._wait(processes, time.monotonic() + timeout)
            except subprocess.TimeoutExpired:
                pass
        named = [(at, "random") for at in killed]
        for path in self.folder.glob("killed-*"):
            named.append((float(path.read_text()), self.kills[int(path.name.partition("-")[2])][1]))
        return Outcome(self, code, sorted(named))

    def _start(self, stack: contextlib.ExitStack, job: Path) -> list[subprocess.Popen[bytes]]:
        """The launcher of each node. What is left of them is ended with `stack`."""
        log = stack.enter_context(open(self.folder / "log", "wb"))
        options = ["--nproc-per-node", self.ranks // self.nodes, "--max-restarts", self.most_restarts]
        options += ["--monitor-interval", 0.1]
        if self.nodes == 1:
            options += ["--standalone"]
        else:
            options += ["--nnodes", self.nodes, "--rdzv-backend", "c10d", "--rdzv-id", "job", "--rdzv-endpoint"]
            options += [f"127.0.0.1:{stack.enter_context(reserved_port())}"]
        words = [sys.executable, "-m", *LAUNCHERS[self.launcher], *map(str, options)]
        processes = []
        for _ in range(self.nodes):
            process = subprocess.Popen(
                [*words, str(HERE / "killed_run.py"), str(job)],
                stdout=log, stderr=log, env=environment(self.config is not None), start_new_session=True,
                preexec_fn=end_with_starter,
            )  # fmt: skip
            stack.callback(_end, process)
            processes.append(process)
        return processes

    def _wait(self, processes: Sequence[subprocess.Popen[bytes]], deadline: float) -> int:
        """Their exit code, the first that is not 0; says meanwhile which kills there were."""
        told = set[Path]()
        while True:
            for path in sorted(set(self.folder.glob("killed-*")) - told):
                told.add(path)
                rank, phase, step = self.kills[int(path.name.partition("-")[2])]
                print(f"{self.folder.name}: kill {len(told)} of {len(self.kills)}: rank {rank}, {phase}, step {step}",
                      file=sys.stderr, flush=True)  # fmt: skip
            try:
                codes = [process.wait(1.0) for process in processes]
                return next(filter(None, codes), 0)
            except subprocess.TimeoutExpired:
                if time.monotonic() > deadline:
                    raise

    def _kill_at_random(self, process: subprocess.Popen[bytes], deadline: float) -> list[float]:
        """Kill one rank after the other, whatever they do: also while they start."""
        chance, killed = random.Random(self.seed), list[float]()
        longest, before = 6.0, -1
        while len(killed) < self.random_kills and process.poll() is None and time.monotonic() < deadline:
            began = time.monotonic()
            until = began + chance.random() * longest
            # Progress between some kills: else the run would never end.
            while time.monotonic() < until or (len(killed) % 3 == 2 and self._last_step() <= before):
                time.sleep(0.02)
                if process.poll() is not None or time.monotonic() > deadline:
                    return killed
            before = self._last_step()
            pid_file = self.folder / f"pid-{chance.randrange(self.ranks)}"
            try:
                pid = int(pid_file.read_text())
                os.kill(pid, signal.SIGKILL)
            except (FileNotFoundError, ValueError, ProcessLookupError):
                continue
            killed.append(time.time())
            while pid_file.exists() and pid_file.read_text() == str(pid) and process.poll() is None:
                time.sleep(0.05)  # until the rank is started anew
            longest = max(longest, 1.3 * (time.monotonic() - began))
        return killed

    def _last_step(self) -> int:
        return max(self.steps_logged(), default=-1)

    def steps_logged(self) -> dict[int, list[tuple[float, float]]]:
        """Step -> (time, loss) of each time that it was logged."""
        found: dict[int, list[tuple[float, float]]] = {}
        path = self.folder / "out" / "_metrics.jsonl"
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                entry = json.loads(line)
            except ValueError:  # the line that was being written at a kill
                continue
            if entry["event"] == "log" and "loss" in entry["metrics"]:
                found.setdefault(entry["step"], []).append((entry["time"], entry["metrics"]["loss"]))
        return found


@dataclass
class Outcome:
    """What came of a job."""

    job: Job
    code: int | None  # None for one that took too long
    kills: list[tuple[float, str]]  # seconds since 1970, and the phase

    @property
    def killed_at(self) -> list[float]:
        return [at for at, _ in self.kills]

    @property
    def losses(self) -> dict[int, float]:
        return {step: logged[-1][1] for step, logged in sorted(self.job.steps_logged().items())}

    @property
    def all_losses(self) -> dict[int, set[float]]:
        """Also of steps that were made again after a restart."""
        return {step: {loss for _, loss in logged} for step, logged in sorted(self.job.steps_logged().items())}

    @property
    def waits(self) -> list[tuple[str, float]]:
        """Phase, and seconds from a kill to the end of the next step; of kills before that step, the last counts."""
        times = sorted(time for logged in self.job.steps_logged().values() for time, _ in logged)
        found = []
        for number, (killed, phase) in enumerate(self.kills):
            later = self.killed_at[number + 1] if number + 1 < len(self.kills) else float("inf")
            after = [each for each in times if each > killed + 0.1]
            if after and after[0] < later:
                found.append((phase, after[0] - killed))
        return found

    @property
    def seconds(self) -> list[float]:
        return [seconds for _, seconds in self.waits]

    @property
    def from_memory(self) -> int:
        """How often a start went on from a snapshot."""
        return (self.job.folder / "log").read_text(errors="replace").count("Going on from the memory snapshot")


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:  # torchrun ends its ranks
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(40)


def start_model(folder: Path) -> str:
    path = folder / "start"
    if not path.exists():
        sys.path.insert(0, str(HERE))
        from test_gradients import stock_model

        stock_model("llama").save_pretrained(path)
    return str(path)


def environment(on_gpus: bool = False) -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH"))))
    own = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    dropped = (
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE",
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    )
    devices = {} if on_gpus else {"CUDA_VISIBLE_DEVICES": ""}
    return {**{k: v for k, v in os.environ.items() if k not in dropped}, **own, **devices}


def matrix(
    folder: Path,
    ranks: int,
    everything: bool,
    schedules: Sequence[str] = tuple(SCHEDULES),
    phases: Sequence[str] = PHASES,
) -> list[tuple[str, Job]]:
    """Every phase in every schedule; each time another rank, or all ranks one after the other."""
    jobs = []
    for number, name in enumerate(schedules):
        kills = [
            (rank, phase, 3 + 4 * i)
            for i, phase in enumerate(phases)
            for rank in (range(ranks) if everything else [(i + 3 * number) % ranks])
        ]
        kills = [(rank, phase, 0 if phase in ("start", "resume") else step) for rank, phase, step in kills]
        jobs.append((name, Job(folder / f"matrix-{name}", ranks, SCHEDULES[name], STEPS, kills)))
    return jobs


LLAMA_1B = {
    "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
    "tie_word_embeddings": True, "max_position_embeddings": 4096,
}  # fmt: skip


def on_gpus(folder: Path, ranks: int, memory: str) -> int:
    """One process of a Llama-3.2-1B on GPUs dies: seconds to the next step, and what a snapshot costs a step."""
    training = {
        "use_cpu": False, "bf16": True, "zero_stage": 1, "per_device_train_batch_size": 2, "save_steps": 1000,
        "memory_snapshot_steps": 10, "eval_strategy": "no", "gradient_accumulation_steps": 1,
    }  # fmt: skip
    job = Job(folder / "gpus", ranks, training, 40, [(ranks - 1, "forward", 27)], config=LLAMA_1B, length=2048,
              memory=memory)  # fmt: skip
    outcome = job.run()
    if outcome.code != 0:
        print((job.folder / "log").read_text(errors="replace")[-3000:])
        return 1
    print(f"seconds from the kill to the parts of the next start: {parts_of_start(job, outcome.killed_at[-1])}")
    logged = job.steps_logged()
    times = sorted((time, step) for step, each in logged.items() for time, _ in each)
    took = [(step, time - before) for (before, _), (time, step) in zip(times, times[1:], strict=False)]
    plain = [seconds for step, seconds in took if step % 10 not in (0, 1) and step > 3]
    # A snapshot is taken after a step's log line: what it takes is in the next one's time.
    first, later = [s for step, s in took if step == 11], [s for step, s in took if step in (21, 31)]
    repeated = [step for step, each in logged.items() if len(each) > 1]
    spread = max((abs(each[0][1] - each[-1][1]) for each in logged.values()), default=0.0)
    print(f"exit code {outcome.code}; starts from memory: {outcome.from_memory}; steps made again: {repeated}")
    print(f"losses of steps made again differ by at most {spread:.2e}")
    print(f"seconds from the kill to the end of the next step: {[round(each, 1) for each in outcome.seconds]}")
    print(
        f"seconds of a step: median {statistics.median(plain):.3f}; with a first snapshot {first}, with others {later}"
    )
    return 0


def parts_of_start(job: Job, killed: float) -> dict[str, float]:
    """Of rank 0, after its first restart, up to the third step."""
    found: dict[str, float] = {}
    for line in (job.folder / "marks-0-1").read_text().splitlines():
        name, at = line.split()
        if name == "step":
            name = f"step {1 + sum(each.startswith('step') for each in found)}"
        found.setdefault(name, round(float(at) - killed, 1))
        if name == "step 3":
            break
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--random", type=int, default=50)
    parser.add_argument("--all", action="store_true", help="every rank in every phase of every schedule")
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=list(SCHEDULES))
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--plain", type=int, default=3, help="kills under plain torchrun")
    parser.add_argument("--jobs", type=int, default=1, help="jobs at a time")
    parser.add_argument("--seconds", type=float, default=1200, help="for a job; one that takes longer is ended")
    parser.add_argument("--gpus", type=int, default=0, help="the restart of a Llama-3.2-1B on so many GPUs alone")
    parser.add_argument("--memory", help="with --gpus: a folder in memory with room for 50 GB")
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends the program at once, and the jobs with it
    if args.gpus:
        sys.exit(on_gpus(Path(tempfile.mkdtemp()), args.gpus, args.memory or "/dev/shm"))
    folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
    print(f"The folder of the jobs: {folder}", file=sys.stderr)
    start_model(folder)
    names, expected = args.schedules, dict[str, dict[int, float]]()
    print(
        "| job | kills | starts from memory | seconds to the next step: median, most | losses |\n|---|---|---|---|---|"
    )
    with ThreadPoolExecutor(args.jobs) as executor:
        running = []
        for name, job in all_jobs(folder, args):
            if name not in expected:
                whole = executor.submit(unbroken, folder, args.ranks, name).result()
                if whole.code != 0:
                    sys.exit((whole.job.folder / "log").read_text(errors="replace")[-3000:])
                expected[name] = whole.losses
            running.append(executor.submit(lambda name, job: tell(job.run(args.seconds), expected[name]), name, job))
        failed = sum(not run.result() for run in running)
    if not failed:
        shutil.rmtree(folder)
    print(f"{len(running)} jobs of the schedules {', '.join(names)}; {failed} failed.")
    sys.exit(int(failed > 0))


def unbroken(folder: Path, ranks: int, name: str) -> Outcome:
    plain = {"memory_snapshot_steps": None, "memory_snapshot_dir": "/dev/shm"}
    return Job(folder / f"whole-{name}", ranks, {**SCHEDULES[name], **plain}, STEPS).run()


def all_jobs(folder: Path, args: argparse.Namespace) -> Iterator[tuple[str, Job]]:
    """Schedules and jobs: the matrix, random kills in turns of ten, and those under plain torchrun."""
    yield from matrix(folder, args.ranks, args.all, args.schedules, args.phases)
    for i, first in enumerate(range(0, args.random, 10)):
        name, kills = args.schedules[i % len(args.schedules)], min(10, args.random - first)
        job = Job(folder / f"random-{i}-{name}", args.ranks, SCHEDULES[name], STEPS, [], kills, pause=0.6, seed=i)
        yield name, job
    if args.plain:
        name = args.schedules[0]
        kills = [(i % args.ranks, phase, 3 + 2 * i) for i, phase in enumerate(("forward", "step", "snapshot"))]
        yield name, Job(folder / f"plain-{name}", args.ranks, SCHEDULES[name], STEPS, kills[: args.plain],
                        launcher="torchrun")  # fmt: skip


def tell(outcome: Outcome, expected: dict[int, float]) -> bool:
    """Print a job's rows; whether its losses are those of the unbroken run, also of steps that were made again.

    The folder of a job that failed stays, but for what it had in memory.
    """
    job, name = outcome.job, outcome.job.folder.name
    is_same = outcome.code == 0 and outcome.all_losses == {step: {loss} for step, loss in expected.items()}
    is_same = is_same and len(outcome.kills) == len(job.kills) + job.random_kills
    so_far = all(each == {expected[step]} for step, each in outcome.all_losses.items())
    said = "equal, bit for bit" if is_same else f"{len(outcome.losses)} of {job.steps} steps, equal: {so_far}"
    said += "" if is_same else f", exit code {outcome.code}, {job.folder}"
    rows = [f"| {name} | {len(outcome.kills)} | {outcome.from_memory} | {_spread(outcome.seconds)} | {said} |"]
    for phase in PHASES:
        times = [seconds for at, seconds in outcome.waits if at == phase]
        if times:
            rows.append(f"| {name}, {phase} | {sum(at == phase for _, at in outcome.kills)} | | {_spread(times)} | |")
    print("\n".join(rows), flush=True)
    shutil.rmtree(job.folder / "memory", ignore_errors=True)
    if is_same:
        shutil.rmtree(job.folder)
    return is_same


def _spread(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.1f}, {max(seconds):.1f}" if seconds else "none"


if __name__ == "__main__":
    main()
