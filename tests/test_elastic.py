"""Jobs with spare processes, and jobs that go on with fewer: who trains, and that a step keeps its samples."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import yaml
from pool import WorkerPool
from test_batch_warmup import Sizes
from test_cli import command, one_line
from test_ordered_training import StopAt, token_set, write_corpus
from tiny import History, checkpoint, message, pad_batch, random_dataset, train_stock, training_arguments

from hf_nanotron import AutoModelForCausalLM as ParallelAuto, NanotronTrainer, NanotronTrainingArguments, ParallelConfig
from hf_nanotron.data import Mixture, Stage, Stages
from hf_nanotron.data.cursor import rounds_of
from hf_nanotron.data.dealing import Filler, deal
from hf_nanotron.parallel.meeting import Meeting, meet, meets
from hf_nanotron.parallel.own_device import why_unfit
from hf_nanotron.parallel.seats import Process, seats_for, training_size

ROOT = Path(__file__).parent.parent

# ---- who trains ----


def processes(*nodes: str) -> list[Process]:
    """A node for each text: `.` is a process that is fit, `x` one that is not."""
    found: list[Process] = []
    for node, text in enumerate(nodes):
        for local, mark in enumerate(text):
            unfit = None if mark == "." else "cuda:0 fails: the GPU has fallen off the bus"
            found.append(Process(len(found), node, f"node{node}", local, unfit))
    return found


@pytest.mark.parametrize(
    ("sizes", "max_dp", "nodes", "seats"),
    [
        ({}, None, ("..", ".."), [0, 1, 2, 3]),
        ({}, 3, ("....",), [0, 1, 2]),
        ({}, 3, ("x...",), [1, 2, 3]),
        ({}, 8, ("...", ".x."), [0, 1, 2, 3, 5]),
        # Tensor-parallel ranks stay on a node: the node with a broken GPU is the spare one, or gives one pair.
        ({"tp_size": 4}, 2, ("....", "..x.", "...."), [0, 1, 2, 3, 8, 9, 10, 11]),
        ({"tp_size": 2}, 3, ("...x", "...."), [0, 1, 4, 5, 6, 7]),
        ({"tp_size": 2, "pp_size": 2}, 2, ("....", "...x"), [0, 1, 2, 3]),
        # dp shrinks rather than that they leave it; where no replica fits in that way, any will do.
        ({"tp_size": 4}, 2, ("...x", "....", ".x.x"), [4, 5, 6, 7]),
        ({"tp_size": 4}, 2, ("...x", "..x."), [0, 1, 2, 4]),
        ({"tp_size": 3}, 2, ("....", ".x.."), [0, 1, 2, 3, 4, 6]),
        ({"dp_replicate_size": 2}, 4, ("...",), [0, 1]),
    ],
)
def test_seats(sizes: dict[str, int], max_dp: int | None, nodes: tuple[str, ...], seats: list[int]) -> None:
    assert seats_for(ParallelConfig(**sizes), max_dp, processes(*nodes)) == seats


def test_too_few_seats() -> None:
    layout = ParallelConfig(tp_size=2, pp_size=2)
    with pytest.raises(ValueError, match=r"tp_size=2 x pp_size=2 x cp_size=1 = 4 processes, but only 3 can train"):
        training_size(layout, 2, 3)
    with pytest.raises(ValueError, match=r"only 3 can train.*Unfit: process 1 \(node0, local rank 1\): cuda:0 fails"):
        seats_for(layout, 2, processes(".x.."))


def test_a_device_that_fails_or_hangs_is_unfit(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    assert why_unfit(torch.device("cpu")) is None
    assert (why_unfit(torch.device("cuda:63")) or "").startswith("cuda:63 fails: ")
    from hf_nanotron.parallel import own_device

    gate, ends = threading.Event(), list[Callable[[], None]]()
    monkeypatch.setattr(own_device.atexit, "register", lambda end, thread: ends.append(partial(end, thread)))
    monkeypatch.setattr(own_device, "_compare", lambda device: gate.wait())
    assert why_unfit(torch.device("cpu"), 0.05) == "cpu has not answered for 0.05 s"
    # Python's own end might wait for the device, too, or abort when it comes back.
    codes = list[int]()
    monkeypatch.setattr(own_device.os, "_exit", codes.append)
    ends[0]()
    gate.set()
    assert codes == [1]


# ---- how they find each other ----


def at_once(actions: list[Callable[[], Any]]) -> list[Any]:
    """What each returns or raises, of threads that run side by side."""
    found: list[Any] = [None] * len(actions)

    def run(place: int) -> None:
        try:
            found[place] = actions[place]()
        except Exception as error:
            found[place] = error

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(actions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def torchruns(port: int, rank: int, size: int, count: int = 0) -> dict[str, str]:
    return {
        "TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_MAX_RESTARTS": "3",
        "TORCHELASTIC_RESTART_COUNT": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "GROUP_RANK": "0",
    }  # fmt: skip


def test_an_attempt_does_not_meet_those_before() -> None:
    """One store for all attempts, of which one was broken off: each has a name of its own, though counts are equal."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    names: set[bytes] = set()
    limit = timedelta(seconds=300)

    def attend(size: int, rank: int) -> Meeting:
        return meet(torchruns(server.port, rank, size), limit, "broken" if rank == 1 else None)

    for attempt, size in enumerate((3, 3, 2)):
        if attempt == 1:  # two of three come, and are killed before the last
            broken = at_once([lambda: meet(torchruns(server.port, 2, 3), timedelta(seconds=1))])
            assert "process 2 has waited for the other processes" in str(broken[0])
        meetings = at_once([partial(attend, size, rank) for rank in range(size)])
        assert all(isinstance(each, Meeting) for each in meetings), meetings
        assert all(each.processes == meetings[0].processes for each in meetings)
        assert [each.unfit for each in meetings[0].processes] == [None, "broken", None][:size]
        assert not meetings[0].store.check(["left"])
        meetings[1].store.set("left", str(attempt))
        names.add(meetings[0].store.get("left"))
    assert names == {b"0", b"1", b"2"}
    late = at_once([lambda: meet(torchruns(server.port, 0, 4), timedelta(seconds=0.3))])
    assert "processes 1, 2, 3 of 4 that torchrun has started have not come" in str(late[0])


def test_who_meets() -> None:
    torchrun = torchruns(1, 0, 2)
    assert meets(torchrun, False) and meets({**torchrun, "TORCHELASTIC_MAX_RESTARTS": "0"}, True)
    assert not meets({**torchrun, "TORCHELASTIC_MAX_RESTARTS": "0"}, False)
    assert not meets({**torchrun, "WORLD_SIZE": "1"}, True) and not meets({"RANK": "0", "WORLD_SIZE": "2"}, True)


# ---- the samples of a step ----


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8])
@pytest.mark.parametrize("batches", [1, 7, 8, 20, 24])
def test_rounds_end_with_the_step(size: int, batches: int) -> None:
    step = 8
    ranks = [list(deal(iter([[k] for k in range(batches)]), rank, size, step)) for rank in range(size)]
    assert {len(rank) for rank in ranks} == {rounds_of(batches, size, step)}
    dealt = [share[0] for round_ in zip(*ranks, strict=True) for share in round_ if not isinstance(share, Filler)]
    assert dealt == list(range(batches))
    window = -(-step // size)
    for first in range(0, len(ranks[0]), window):  # of a window, what one process reads in a step
        shares = [rank[first : first + window] for rank in ranks]
        real = [share[0] for rank in shares for share in rank if not isinstance(share, Filler)]
        begin = step * (first // window)
        assert sorted(real) == list(range(begin, min(begin + step, batches)))


SAMPLES, STEPS = 20, 5  # an epoch is two and a half steps of 8


def run(start: str, output: str, data: Any, resume: str | None, until: int, sizes: dict[str, Any]) -> tuple[Any, ...]:
    values = training_arguments(output_dir=output, max_steps=STEPS, gradient_accumulation_steps=2, max_dp_size=4)
    args = NanotronTrainingArguments(**{**values, "save_strategy": "steps", "save_steps": until, **sizes})
    model = ParallelAuto.from_pretrained(start, parallel=args.parallel)
    history, told = History(), Sizes()
    collate = {} if callable(data) else {"data_collator": pad_batch}
    callbacks = [history, StopAt(until), *([told] if args.batch_size_warmup_tokens else [])]
    trainer = NanotronTrainer(
        model=model, args=args, train_dataset=data() if callable(data) else random_dataset(SAMPLES),
        callbacks=callbacks, **collate,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    assert args.gradient_accumulation_steps == 2 and trainer.get_total_train_batch_size(args) == 8
    cursor = trainer.data_cursor()
    model.mesh.close()
    return history.losses, told.sizes, (cursor["epoch"], cursor["samples"])


class OfFolder:
    """Token data of a folder, made on each rank."""

    def __init__(self, folder: str, staged: bool) -> None:
        self.folder, self.staged = folder, staged

    def __call__(self) -> Any:
        sets = {name: token_set(self.folder, name, 16, documents="cross", seed=5) for name in ("web", "code")}
        data = Mixture(sets, {"web": 0.7, "code": 0.3}, max_epochs=4, when_exhausted="redistribute")
        if not self.staged:
            return data
        return Stages([Stage(data, global_batch_size=4), Stage(data, start_step=2, global_batch_size=8)])


def close(found: list[float], expected: list[float]) -> bool:
    return len(found) == len(expected) and all(
        abs(a - b) <= 1e-5 * abs(b) for a, b in zip(found, expected, strict=True)
    )


def test_a_step_has_the_same_samples_at_any_size(pool: WorkerPool, tmp_path: Path) -> None:
    """Of stock Trainer in one process: at first on four ranks, then on three, which do not divide the step, on one."""
    expected = train_stock(checkpoint(), random_dataset(SAMPLES), max_steps=STEPS, gradient_accumulation_steps=8).losses
    output = str(tmp_path / "out")
    losses: list[float] = []
    for until, world in ((1, 4), (3, 3), (STEPS, 2)):
        source = f"{output}/checkpoint-{len(losses)}" if losses else None
        (found, _, cursor), *_ = pool.run(world, run, checkpoint(), output, None, source, until, {})
        losses += found
        assert cursor == (until // 3, {1: 8, 3: 0, 5: 16}[until])
    assert close(losses, expected), (losses, expected)


WIDE = {
    "pp": {"pp_size": 2},
    "zb": {"pp_size": 2, "pp_schedule": "zb"},
    "tp": {"tp_size": 2},
    "cp": {"cp_size": 2},
    "zero3": {"zero_stage": 3},
    "epochs": {"max_steps": -1, "num_train_epochs": 1.6},
}  # fmt: skip


@pytest.mark.full_matrix
@pytest.mark.parametrize("name", WIDE)
def test_every_layout_shrinks(pool: WorkerPool, tmp_path: Path, name: str) -> None:
    """On three of four replicas as on four, where fillers are in each step."""
    layout = ParallelConfig(**{key: value for key, value in WIDE[name].items() if key.endswith(("_size", "_schedule"))})
    results = []
    for dp in (4, 3):
        world = dp * layout.model_parallel_size
        results.append(pool.run(world, run, checkpoint(), str(tmp_path / str(dp)), None, None, STEPS, WIDE[name])[0])
    assert close(results[1][0], results[0][0]), results
    assert results[1][2] == results[0][2]


@pytest.mark.parametrize("kind", ["warmup", "stages"])
def test_stages_shrink(pool: WorkerPool, tmp_path: Path, kind: str) -> None:
    """A batch that grows, and stages with their own: on three of four ranks as on four."""
    write_corpus(tmp_path)
    data = OfFolder(str(tmp_path), kind == "stages")
    warmup = {"batch_size_warmup_tokens": 12 * 16, "batch_size_warmup_start": 4}
    results = []
    for world in (4, 3):
        output = str(tmp_path / f"out{world}")
        results.append(
            pool.run(world, run, checkpoint(), output, data, None, STEPS, warmup if kind == "warmup" else {})[0]
        )
    assert close(results[1][0], results[0][0]) and results[0][1:] == results[1][1:]
    if kind == "warmup":
        assert results[0][1] == [4, 4, 4, 8, 8]


def refused(**values: Any) -> str:
    return message(lambda: NanotronTrainingArguments(**training_arguments(**values)))


def test_refusals(pool: WorkerPool) -> None:
    assert "max_dp_size=0 must be at least 1, or None." in refused(max_dp_size=0)
    said = refused(max_dp_size=2, average_tokens_across_devices=False)
    assert "max_dp_size=2 with average_tokens_across_devices=False: the loss of a step would depend" in said
    for said in pool.run(3, refused_two):
        assert "max_dp_size=2 leaves 1 of 3 processes without a place" in said and "Start 2 processes" in said
    args = NanotronTrainingArguments.of_job(
        72, **training_arguments(max_dp_size=8, tp_size=8, gradient_accumulation_steps=4)
    )
    assert args.processes_that_train(72) == 64 and args.processes_that_train(60) == 56
    with pytest.raises(ValueError, match="but only 7 can train"):
        NanotronTrainingArguments.of_job(7, **training_arguments(max_dp_size=8, tp_size=8))


def test_launch_and_plan(tmp_path: Path) -> None:
    """Jobs with restarts, and a plan that is told the processes that train."""
    sections = yaml.safe_load((ROOT / "examples" / "faults" / "run.yaml").read_text(encoding="utf-8"))
    sections["training"] |= {"output_dir": str(tmp_path / "out"), "max_dp_size": 8}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(sections), encoding="utf-8")
    slurm = ("launch", "--slurm", str(path), "--nodes", "5", "--gpus-per-node", "2", "--overwrite")
    code, _, err = command(*slurm, "--max-restarts", "9", "--min-nodes", "3")
    assert code == 0, err
    script = (tmp_path / "out" / "launch" / "job.sh").read_text(encoding="utf-8")
    assert "--nnodes 3:5 --nproc-per-node 2 --max-restarts 9 " in script and "#SBATCH --no-kill" in script
    assert "--kill-on-bad-exit=0 --no-kill" in script and "--resume_from_checkpoint auto" in script
    assert subprocess.run(["bash", "-n", tmp_path / "out" / "launch" / "job.sh"], check=False).returncode == 0
    assert command(*slurm)[0] == 0
    script = (tmp_path / "out" / "launch" / "job.sh").read_text(encoding="utf-8")
    assert "--nnodes 5 --nproc-per-node 2 \\\n" in script and "no-kill" not in script
    for words, said in (
        (("--min-nodes", "3"), "--min-nodes 3 needs --max-restarts"),
        (("--min-nodes", "6", "--max-restarts", "1"), "--min-nodes 6 is more than --nodes 5"),
        (("--max-restarts", "-1"), "--max-restarts -1 must be at least 0"),
        (("--min-nodes", "1", "--max-restarts", "1", "--tp_size", "4"), "but only 2 can train"),
    ):
        assert said in one_line(command(*slurm, *words)), words
    plan = ("plan", str(path), "--gpu", "h100", "--gpus", "10", "--sequence-length", "16")
    assert "max_dp_size=8 trains on 8 GPUs, not 10: plan with --gpus 8" in one_line(command(*plan))
    assert "leave it out" in one_line(command(*plan, "--search"))


def refused_two() -> str:
    return refused(max_dp_size=2)


# ---- real jobs ----


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts agents of torchrun with the run of `examples/faults`; what is left of them is killed."""
    sections = yaml.safe_load((ROOT / "examples" / "faults" / "run.yaml").read_text(encoding="utf-8"))
    sections["dataset"]["path"] = str(ROOT / sections["dataset"]["path"])
    sections["training"]["output_dir"] = str(tmp_path / "out")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(sections), encoding="utf-8")
    agents: list[subprocess.Popen[bytes]] = []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["TMPDIR"] = str(tmp_path)  # what a lost node leaves

    def start(*options: str, launcher: str = "torch.distributed.run") -> subprocess.Popen[bytes]:
        words = [sys.executable, "-m", *launcher.split(), *options, "-m", "hf_nanotron.cli", "train", "run.yaml"]
        log = open(tmp_path / f"log-{len(agents)}", "wb")  # noqa: SIM115
        agents.append(subprocess.Popen(words, cwd=tmp_path, env=environment, stdout=log, stderr=subprocess.STDOUT))
        return agents[-1]

    yield start
    for agent in agents:
        kill_all(agent)


def kill_all(agent: subprocess.Popen[bytes]) -> None:
    """An agent with all that it has started, as when a node is lost."""
    processes = [agent.pid] if agent.poll() is None else []
    for process in processes:  # also those that are added
        path = Path(f"/proc/{process}/task/{process}/children")
        with contextlib.suppress(OSError):
            processes += map(int, path.read_text().split())
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    agent.wait()


def workers(agent: subprocess.Popen[bytes]) -> list[int]:
    path = Path(f"/proc/{agent.pid}/task/{agent.pid}/children")
    return [int(each) for each in path.read_text().split()] if agent.poll() is None and path.exists() else []


def logged(folder: Path) -> list[dict[str, Any]]:
    path = folder / "out" / "_metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(condition: Callable[[], Any], seconds: float = 600.0) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "too late"
        time.sleep(0.05)


def check_run(folder: Path, steps: int = 300) -> list[int]:
    """Every step is there, once it was made again; the sizes of the attempts."""
    lines = logged(folder)
    losses = {line["step"]: line["metrics"]["loss"] for line in lines if "loss" in line.get("metrics", {})}
    assert sorted(losses) == list(range(1, steps + 1))
    return [line["sizes"]["dp"] for line in lines if line["event"] == "begin"]


@pytest.mark.full_matrix
def test_a_spare_takes_the_place(job: Callable[..., subprocess.Popen[bytes]], tmp_path: Path) -> None:
    """Four processes, of which three train: one of these dies. All are started again, and three train on."""
    agent = job("--standalone", "--max-restarts", "2", "--nproc-per-node", "4")
    wait_for(lambda: len(logged(tmp_path)) > 30)
    assert len(workers(agent)) == 4
    os.kill(workers(agent)[1], signal.SIGKILL)
    assert agent.wait(600) == 0, (tmp_path / "log-0").read_text()[-3000:]
    assert check_run(tmp_path) == [3, 3]
    assert "Going on from the memory snapshot of step" in (tmp_path / "log-0").read_text()
    assert "3 of 4 processes train; 1 are spares." in (tmp_path / "log-0").read_text()


@pytest.mark.full_matrix
def test_the_whole_job_is_killed_and_started_again(job: Callable[..., subprocess.Popen[bytes]], tmp_path: Path) -> None:
    """torchrun and all that it has started: the next start goes on from the memory of the host."""
    options = ("--standalone", "--nproc-per-node", "3")
    agent = job(*options)
    wait_for(lambda: len(logged(tmp_path)) > 30)
    kill_all(agent)
    assert job(*options).wait(600) == 0, (tmp_path / "log-1").read_text()[-3000:]
    assert check_run(tmp_path) == [3, 3]
    assert "Going on from the memory snapshot of step" in (tmp_path / "log-1").read_text()


@pytest.mark.full_matrix
@pytest.mark.parametrize("launcher", ["torch.distributed.run", "hf_nanotron.cli torchrun"])
def test_a_lost_node_shrinks_dp(
    job: Callable[..., subprocess.Popen[bytes]], tmp_path: Path, port: int, launcher: str
) -> None:
    """Two nodes with two processes each; one is gone for good. The other goes on alone with the same batches."""
    rendezvous = ("--rdzv-backend", "c10d", "--rdzv-id", "x", "--rdzv-endpoint", f"127.0.0.1:{port}")
    conf = "last_call_timeout=5,keep_alive_interval=1,keep_alive_max_attempt=2"
    options = ("--nnodes", "1:2", "--nproc-per-node", "2", "--max-restarts", "3", *rendezvous)
    confs = [f"{conf},is_host={host}" for host in ("true", "false")]
    first, second = (job(*options, "--rdzv-conf", each, launcher=launcher) for each in confs)
    wait_for(lambda: len(logged(tmp_path)) > 30)
    kill_all(second)
    assert first.wait(200) == 0, (tmp_path / "log-0").read_text()[-3000:]
    assert check_run(tmp_path) == [3, 2]
    assert "Going on from the memory snapshot of step" in (tmp_path / "log-0").read_text()
    assert "the data-parallel size is 2 instead of max_dp_size=3" in (tmp_path / "log-0").read_text()
