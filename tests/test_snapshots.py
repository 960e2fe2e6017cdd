"""Snapshots in the memory of hosts: a restart goes on from them with the same samples, and losses equal bit for bit."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from pool import JobError, WorkerPool
from test_gradients import stock_model
from test_ordered_training import token_set
from test_stream_training import stream
from test_token_stream import write_shards
from tiny import message, pad_batch, random_dataset, training_arguments
from token_files import documents, write_ds
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from hf_nanotron import AutoModelForCausalLM as ParallelAuto, NanotronTrainer, NanotronTrainingArguments
from hf_nanotron.arguments.snapshots import SHARED_MEMORY
from hf_nanotron.checkpoint.directory.runs import begin_run
from hf_nanotron.checkpoint.directory.verify import MARKER
from hf_nanotron.checkpoint.files.disk import CHUNK_BYTES
from hf_nanotron.checkpoint.memory import threads as threads_module
from hf_nanotron.checkpoint.memory.folder import MemoryFolder, part_name, snapshot_name, write_part
from hf_nanotron.checkpoint.memory.hosts import Hosts
from hf_nanotron.checkpoint.memory.transfer import receive_files, send_files
from hf_nanotron.data import Mixture

STEPS = 7
UNBROKEN = {"memory_snapshot_steps": None, "memory_snapshot_dir": SHARED_MEMORY}


def await_snapshots() -> None:
    """On all ranks: until the snapshot that is being written is whole, and with the neighbour, or it might be lost."""
    for thread in threading.enumerate():
        if thread.name.startswith("memory snapshot "):
            thread.join()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


class Counts(TrainerCallback, ExportableState):
    """A callback with a state, which counts steps; the run breaks off at the beginning of step `dies_at`, from 1."""

    # Of the last run of this process; a callback that is restored is another one.
    began = -1
    dies_at: int | None = None

    def __init__(self) -> None:
        self.count = 0

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"count": self.count}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        Counts.began = state.global_step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.dies_at:
            await_snapshots()
            raise RuntimeError("the cable was pulled")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.count += 1


def data_of(folder: Path, kind: str) -> dict[str, Any]:
    if kind == "rows":
        return {"train_dataset": random_dataset(64), "data_collator": pad_batch}
    if kind == "stream":
        return {"train_dataset": stream(str(folder))}
    sets = {name: token_set(str(folder), name, 16, documents="cross", seed=5) for name in ("web", "code")}
    return {"train_dataset": Mixture(sets, {"web": 0.7, "code": 0.3}, max_epochs=4, when_exhausted="redistribute")}


def train(output: str, overrides: dict[str, Any], dies_at: int | None = None, kind: str = "rows") -> Any:
    """Losses by step, the step after which `train` began, steps that the callback counted, and the best checkpoint."""
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # has data workers
    folder = Path(output).parent
    values = {"save_strategy": "steps", "save_steps": 100, "max_steps": STEPS, "memory_snapshot_steps": 2, **overrides}
    values = {"memory_snapshot_dir": str(folder / "memory"), "restore_callback_states_from_checkpoint": True, **values}
    args = NanotronTrainingArguments(**training_arguments(output_dir=output, **values))
    model = ParallelAuto.from_pretrained(str(folder / "start"), parallel=args.parallel)
    Counts.dies_at = dies_at
    trainer = NanotronTrainer(
        model=model, args=args, eval_dataset=random_dataset(8, seed=1), callbacks=[Counts()], **data_of(folder, kind),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint="auto")
    losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    counted = next(each for each in trainer.callback_handler.callbacks if isinstance(each, Counts)).count
    best = trainer.state.best_model_checkpoint
    trainer.mesh.close()
    return losses, Counts.began, counted, best


def break_off(
    pool: WorkerPool, world: int, output: Path, overrides: dict[str, Any], step: int, run: Any = train
) -> None:
    with pytest.raises(JobError, match="the cable was pulled"):
        pool.run(world, run, str(output), overrides, step)


@pytest.fixture
def start(tmp_path: Path) -> Path:
    stock_model("llama").save_pretrained(tmp_path / "start")
    (tmp_path / "memory").mkdir()
    return tmp_path


def snapshots(folder: Path) -> list[int]:
    """The steps of the snapshots that lie in a memory, whole or not."""
    found = (folder / "memory").glob("hf_nanotron-*/*-*/")
    return sorted(int(path.name.rpartition("-")[2]) for path in found if not path.name.startswith("resumed"))


def train_and_die(output: str, overrides: dict[str, Any], step: int) -> None:
    """Rank 1 is killed when its part of the snapshot of a step lacks its marker alone."""
    write_part = threads_module.write_part

    def die(directory: Path, part: Any, *rest: Any) -> None:
        if part[1:3] == (step, 1):
            os.kill(os.getpid(), signal.SIGKILL)
        write_part(directory, part, *rest)

    threads_module.write_part = die  # of a process that does not live on
    train(output, overrides)


def test_a_restart_goes_on_from_memory(pool: WorkerPool, start: Path) -> None:
    """With the average, the callback's state and the log; fewer ranks go on from the same parts."""
    sizes = {"ema_decay": 0.9, "gradient_accumulation_steps": 2}
    expected = pool.run(2, train, str(start / "whole"), {**sizes, **UNBROKEN})[0]
    with pytest.raises(JobError, match="the process died|Connection closed by peer|Connection reset by peer"):
        pool.run(2, train_and_die, str(start / "out"), sizes, 6)
    assert snapshots(start) == [4, 6] and not list((start / "out").glob("checkpoint-*"))
    (folder,) = (start / "memory").iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    shutil.copytree(start / "memory", start / "kept")
    shutil.copytree(start / "out", start / "kept-out")
    losses, began, counted, _ = pool.run(2, train, str(start / "out"), sizes)[0]
    assert (losses, began, counted) == (expected[0], 4, expected[2])
    assert not list((start / "memory").iterdir()), "the run ended well"
    shutil.rmtree(start / "memory")
    shutil.rmtree(start / "out")
    (start / "kept").rename(start / "memory")
    (start / "kept-out").rename(start / "out")
    losses, began, *_ = pool.run(1, train, str(start / "out"), {**sizes, "gradient_accumulation_steps": 4})[0]
    assert began == 4 and losses == pytest.approx(expected[0], rel=1e-5)


def train_and_damage(output: str) -> list[Any]:
    """One process breaks off and starts again, each time after something has happened to its snapshots."""
    told: list[Any] = []

    def broken(step: int, **overrides: Any) -> None:
        with pytest.raises(RuntimeError, match="the cable was pulled"):
            train(output, {"save_steps": 3, **overrides}, step)

    broken(4)  # a snapshot of step 2, a checkpoint of step 3
    broken(6)  # and a snapshot of step 4
    told.append(Counts.began)
    (newest,) = (Path(output).parent / "memory").glob("*/*-4/training_state/rank-00000.safetensors")
    data = bytearray(newest.read_bytes())
    data[-5] ^= 1
    newest.write_bytes(data)
    broken(5)  # the snapshot of step 4 is damaged, and is made again
    told.append(Counts.began)
    broken(7)  # after a snapshot and a checkpoint of step 6
    told.append(Counts.began)
    return [*told, train(output, {"save_steps": 3})[:2]]


def test_what_is_newest_and_whole_is_taken(pool: WorkerPool, start: Path) -> None:
    expected = pool.run(1, train, str(start / "whole"), UNBROKEN)[0][0]
    (told,) = pool.run(1, train_and_damage, str(start / "out"))
    assert told == [3, 3, 4, (expected, 6)]


GROWS = {"batch_size_warmup_tokens": 16 * 16, "batch_size_warmup_start": 4, "batch_size_warmup_increment": 2}
BEST = {"eval_strategy": "steps", "eval_steps": 3, "save_steps": 3, "load_best_model_at_end": True, "async_save": True}
EPOCHS = {"max_steps": -1, "num_train_epochs": 3, "eval_strategy": "epoch", "gradient_accumulation_steps": 8}


@pytest.mark.full_matrix
@pytest.mark.parametrize(
    ("world", "kind", "overrides", "began"),
    [
        (4, "rows", {"zero_stage": 3}, 4),
        (4, "rows", {"zero_stage": 2, "dp_replicate_size": 2}, 4),
        (4, "rows", {"pp_size": 2, "tp_size": 2, "gradient_accumulation_steps": 2, "bf16": True}, 4),
        (2, "rows", {"optim": "muon", "muon_dtype": "float32", "ema_decay": 0.9}, 4),
        (2, "rows", {"optim_offload": 0.5, "optim_state_dtype": "bfloat16"}, 4),
        (2, "rows", BEST, 4),
        (2, "rows", EPOCHS, 4),
        (2, "rows", {"dataloader_num_workers": 1, "dataloader_multiprocessing_context": "fork"}, 4),
        (2, "tokens", {"gradient_accumulation_steps": 4, **GROWS}, 4),
        (2, "stream", {"gradient_accumulation_steps": 2}, 4),
    ],
)
def test_every_kind_of_run_goes_on(
    pool: WorkerPool, start: Path, world: int, kind: str, overrides: dict[str, Any], began: int
) -> None:
    for seed, name in enumerate(("web", "code")):
        write_ds(start / f"{name}.ds", documents(40, seed))
    write_shards(start)
    expected = pool.run(world, train, str(start / "whole"), {**overrides, **UNBROKEN}, None, kind)[0]
    with pytest.raises(JobError, match="the cable was pulled"):
        pool.run(world, train, str(start / "out"), overrides, 6, kind)
    found = pool.run(world, train, str(start / "out"), overrides, None, kind)[0]
    assert found[:3] == (expected[0], began, expected[2])
    assert (found[3] or "").rpartition("/")[2] == (expected[3] or "").rpartition("/")[2]


def test_a_best_checkpoint_that_was_not_complete(pool: WorkerPool, start: Path) -> None:
    """The run would load it in the end, so an older snapshot is taken."""
    overrides = {**BEST, "async_save": False}
    expected = pool.run(1, train, str(start / "whole"), {**overrides, **UNBROKEN})[0]
    break_off(pool, 1, start / "out", overrides, 6)
    assert snapshots(start) == [2, 4]
    (start / "out" / "checkpoint-3" / MARKER).unlink()
    losses, began, _, best = pool.run(1, train, str(start / "out"), overrides)[0]
    assert (losses, began) == (expected[0], 2) and Path(best).name == Path(expected[3]).name


# ---- hosts ----


def train_on_hosts(output: str, overrides: dict[str, Any], dies_at: int | None = None, size: int = 2) -> Any:
    """Each `size` ranks have a memory of their own."""
    before = os.getcwd()
    host = Path(output).parent / f"host-{int(os.environ['RANK']) // size}"
    (host / "memory").mkdir(parents=True, exist_ok=True)
    os.chdir(host)
    try:
        return train(output, {"memory_snapshot_dir": "memory", **overrides}, dies_at)
    finally:
        os.chdir(before)


def test_a_host_that_is_gone_is_restored_by_its_neighbour(pool: WorkerPool, start: Path) -> None:
    sizes = {"tp_size": 2}
    expected = pool.run(4, train, str(start / "whole"), {**sizes, **UNBROKEN})[0][0]
    break_off(pool, 4, start / "out", sizes, 6, train_on_hosts)
    shutil.rmtree(start / "host-1")  # and comes back with nothing
    losses, began, *_ = pool.run(4, train_on_hosts, str(start / "out"), sizes)[0]
    assert (losses, began) == (expected, 4)


def test_fewer_hosts_go_on_from_what_is_left(pool: WorkerPool, start: Path) -> None:
    """The parts of a host that is gone for good are those that the one before it, here the only other, has."""
    expected = pool.run(4, train, str(start / "whole"), UNBROKEN)[0][0]
    break_off(pool, 4, start / "out", {}, 6, train_on_hosts)
    shutil.rmtree(start / "host-0")
    (start / "host-1").rename(start / "host-0")  # the ranks that are left count from 0
    fewer = {"gradient_accumulation_steps": 2}
    losses, began, *_ = pool.run(2, train_on_hosts, str(start / "out"), fewer)[0]
    assert began == 4 and losses == pytest.approx(expected, rel=1e-5)


def test_every_host_has_a_neighbour_and_pairs_meet_in_one_order() -> None:
    for sizes in [(2, 2), (3, 1, 2), (1, 1, 1, 1, 1), (4,)]:
        bounds = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
        ranks = tuple(tuple(range(a, b)) for a, b in zip(bounds, bounds[1:], strict=False))
        hosts = Hosts(ranks, 0)
        kept = hosts.neighbours()
        host_of = {rank: number for number, each in enumerate(ranks) for rank in each}
        assert [rank for rank, _ in kept] == ([] if len(sizes) == 1 else list(range(bounds[-1])))
        assert all(host_of[target] == (host_of[rank] + 1) % len(sizes) for rank, target in kept)
        assert {frozenset(pair) for pair in kept} == {frozenset(pair) for pair in hosts.pairs()}


class Pipe:
    """A wire that holds what was sent until it is received."""

    def __init__(self) -> None:
        self.sent = bytearray()

    def send(self, data: bytes | bytearray) -> None:
        self.sent += data

    def receive(self, size: int) -> memoryview:
        data, self.sent = bytes(self.sent[:size]), self.sent[size:]
        return memoryview(data)


def test_files_are_sent_in_chunks_and_stay_in_their_folder(tmp_path: Path) -> None:
    source, target, pipe = tmp_path / "a", tmp_path / "b", Pipe()
    (source / "inner").mkdir(parents=True)
    target.mkdir()
    data = torch.arange((CHUNK_BYTES + 40) // 4, dtype=torch.int32).numpy().tobytes()
    (source / "inner" / "large").write_bytes(data)
    (source / "empty").touch()
    send_files(pipe, source, ["inner/large", "empty"], 3)
    assert receive_files(pipe, target) == (3, ["inner/large", "empty"]) and not pipe.sent
    assert (target / "inner" / "large").read_bytes() == data and (target / "empty").read_bytes() == b""
    send_files(pipe, source / "inner", ["../empty"], None)
    with pytest.raises(ValueError, match="another rank names '../empty'"):
        receive_files(pipe, target)


# ---- parts ----


def test_the_end_of_a_failed_run_waits_for_copies_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, threads = threading.Event(), threads_module.SnapshotThreads("x-2", 0, MemoryFolder(str(tmp_path), "out"))
    threads._begin(gate.wait, is_own=False)
    monkeypatch.setattr(threads_module, "END_SECONDS", 0.01)
    threads.leave()
    assert [thread.is_alive() for thread in threads._threads] == [True]
    gate.set()
    monkeypatch.setattr(threads_module, "END_SECONDS", 600.0)
    threads.leave()
    assert [thread.is_alive() for thread in threads._threads] == [False]


def test_a_torn_part_is_none(tmp_path: Path) -> None:
    folder, run = MemoryFolder(tmp_path, tmp_path / "out"), begin_run([])
    assert folder.acquire() is None and folder.parts() == []
    directory = folder.snapshot(snapshot_name(run, 4))
    for rank in range(3):
        (directory / "training_state").mkdir(parents=True, exist_ok=True)
        (directory / f"file-{rank}").write_bytes(b"some bytes")
        write_part(directory, (run, 4, rank, 3), [f"file-{rank}"], [])
    assert [part.rank for part in folder.parts()] == [0, 1, 2]
    (directory / "file-1").write_bytes(b"some")  # it was cut off
    marker = directory / part_name(2)
    marker.write_bytes(marker.read_bytes()[:-9])
    assert [(part.rank, part.step, part.world_size, part.run) for part in folder.parts()] == [(0, 4, 3, run)]
    folder.keep([])
    assert folder.names() == [] and folder.path.is_dir()
    folder.delete()
    assert not folder.path.exists()


def test_a_folder_of_someone_else_is_refused(tmp_path: Path) -> None:
    folder = MemoryFolder(tmp_path, tmp_path / "out")
    (tmp_path / "elsewhere").mkdir()
    folder.path.symlink_to(tmp_path / "elsewhere")
    assert "belongs to user" in message(folder.check)
    assert "is not a folder of this host" in message(MemoryFolder(tmp_path / "none", "out").check)


# ---- arguments and room ----


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"memory_snapshot_steps": 0}, "memory_snapshot_steps=0 must be at least 1"),
        ({"memory_snapshot_steps": 5, "save_strategy": "no"}, "memory_snapshot_steps=5 with save_strategy='no'"),
        ({"memory_snapshot_steps": 5, "save_only_model": True}, "memory_snapshot_steps=5 with save_only_model=True"),
        ({"memory_snapshot_dir": "/mnt/ram"}, "memory_snapshot_dir='/mnt/ram' needs memory_snapshot_steps"),
    ],
)
def test_arguments_that_do_not_go_together(values: dict[str, Any], says: str) -> None:
    values = {"save_strategy": "steps", **values}
    assert says in message(lambda: NanotronTrainingArguments(**training_arguments(**values)))


def train_without_room(output: str, available: int) -> str:
    with mock.patch("hf_nanotron.checkpoint.memory.room.available_bytes", return_value=available):
        return message(lambda: train(output, {"memory_snapshot_dir": output + "/../memory"}))


def test_snapshots_that_do_not_fit_are_refused_before_the_first_step(pool: WorkerPool, start: Path) -> None:
    for told in pool.run(2, train_without_room, str(start / "out"), 1000):
        assert "of memory available, but two snapshots of its 2 ranks take" in told
    assert "_metrics.jsonl" not in os.listdir(start / "out")


def train_in_full_memory(output: str, what: str) -> Any:
    """Losses by step; in memory that is full, for `what` rank 0 writes of the snapshots of steps 4 and 6."""
    owner, name = {"state": (threads_module, "write_rank"), "random numbers": (torch, "save")}[what]
    write = getattr(owner, name)

    def fail(*given: Any) -> None:
        text = str(given[what != "state"])
        if "/memory/" in text and "-2/" not in f"{text}/" and os.environ["RANK"] == "0":
            if what == "state":
                raise OSError(28, "No space left on device")
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")  # torch's words
        write(*given)

    with mock.patch.object(owner, name, fail):
        return train(output, {}, STEPS)[0]


@pytest.mark.parametrize("what", ["state", "random numbers"])
def test_a_snapshot_that_cannot_be_written_does_not_end_the_run(pool: WorkerPool, start: Path, what: str) -> None:
    """The last one that could be written is kept, and gone on from."""
    expected = pool.run(2, train, str(start / "whole"), UNBROKEN)[0][0]
    with pytest.raises(JobError, match="the cable was pulled"):
        pool.run(2, train_in_full_memory, str(start / "out"), what)
    losses, began, *_ = pool.run(2, train, str(start / "out"), {})[0]
    assert (losses, began) == (expected, 2) and not list((start / "memory").iterdir())


def train_other(output: str) -> str:
    """What a start with another model says, which would go on from a snapshot of this one."""
    stock_model("llama", hidden_size=64).save_pretrained(Path(output).parent / "start")
    return message(lambda: train(output, {}))


def test_a_snapshot_of_another_model_is_refused(pool: WorkerPool, start: Path) -> None:
    break_off(pool, 1, start / "out", {}, 6)
    (told,) = pool.run(1, train_other, str(start / "out"))
    assert "/memory/hf_nanotron-" in told and "is of a model with" in told
    shutil.rmtree(start / "out")  # a fresh run then
    assert pool.run(1, train, str(start / "out"), {})[0][1] == 0


def train_beside(output: str) -> str:
    """What a second run of an output_dir says, and one with its own beside it does."""
    folder = MemoryFolder(Path(output).parent / "memory", output)
    pid = os.fork()
    if pid == 0:  # a lock excludes other processes
        folder.acquire()
        (folder.path / "held").touch()
        signal.pause()
    try:
        while not (folder.path / "held").exists():
            pass
        told = message(lambda: train(output, {}))
        train(f"{output}-of-its-own", {})
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return told


def test_two_runs_on_one_host(pool: WorkerPool, start: Path) -> None:
    (told,) = pool.run(1, train_beside, str(start / "out"))
    assert "the memory snapshots of this output_dir are in use: a run on host" in told
    assert len(list((start / "memory").iterdir())) == 1  # of the other run


def train_frozen(output: str, sizes: dict[str, Any]) -> str:
    load = ParallelAuto.from_pretrained

    def frozen(*args: Any, **kwargs: Any) -> Any:
        model = load(*args, **kwargs)
        for name, parameter in model.named_parameters():  # the first of two stages has it
            parameter.requires_grad_(name != "model.embed_tokens.weight")
        return model

    with mock.patch.object(ParallelAuto, "from_pretrained", frozen):
        return message(lambda: train(output, sizes))


def test_frozen_weights_are_refused(pool: WorkerPool, start: Path) -> None:
    sizes = {"pp_size": 2, "gradient_accumulation_steps": 2}
    told, others = pool.run(2, train_frozen, str(start / "out"), sizes)
    assert "memory_snapshot_steps=2 with 1 frozen parameters (model.embed_tokens.weight, ...)" in told == others
    last = {**sizes, "save_hub_weights": "last", **UNBROKEN}
    told, others = pool.run(2, train_frozen, str(start / "out"), last)
    assert "save_hub_weights='last' with 1 frozen parameters (model.embed_tokens.weight, ...)" in told == others
