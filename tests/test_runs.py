"""Which run a checkpoint is of: a resume, a rotation and an upload keep to the run at hand, and a folder to one run."""

from __future__ import annotations

import json
import os
import shutil
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from pool import WorkerPool
from test_checkpoint_manager import names
from tiny import History, message, pad_batch, random_dataset, tiny_config, training_arguments
from transformers import TrainerCallback, TrainerState

from hf_nanotron import AutoModelForCausalLM as ParallelAuto, NanotronTrainer, NanotronTrainingArguments
from hf_nanotron.checkpoint.directory import retention as manager, runs, verify
from hf_nanotron.checkpoint.directory.commit import begin, commit, describe
from hf_nanotron.checkpoint.directory.retention import candidates, choose, newest, rotate, run_at_hand
from hf_nanotron.checkpoint.directory.run_lock import LOCK, RunLock, this_process
from hf_nanotron.checkpoint.directory.runs import (
    RECORD,
    Run,
    begin_run,
    latest,
    marked_run,
    read_record,
    run_of,
    write_record,
)
from hf_nanotron.checkpoint.directory.verify import MARKER, check, read_marker
from hf_nanotron.checkpoint.files.checked import read_checked, write_checked
from hf_nanotron.checkpoint.remote import run_start, runs as remote_runs
from hf_nanotron.checkpoint.remote.fetch import fetch_newest, newest_remote
from hf_nanotron.checkpoint.remote.run_start import start_run
from hf_nanotron.checkpoint.remote.store import RemoteStore
from hf_nanotron.checkpoint.remote.upload import Uploader
from hf_nanotron.parallel.config import ParallelConfig
from hf_nanotron.parallel.mesh import ParallelMesh
from hf_nanotron.training.checkpointer import Checkpointer
from hf_nanotron.training.remote import RemoteUploads
from hf_nanotron.training.snapshots import MemorySnapshots

X, Y = Run("x", "x", 100.0), Run("y", "y", 200.0)


@pytest.fixture(autouse=True)
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The warnings. Nothing is brought to stable storage, which takes long."""
    texts: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    for module in (manager, remote_runs, run_start):
        monkeypatch.setattr(module.logger, "warning", texts.append)
    return texts


def write(output_dir: Path, run: Run | None, *steps: int) -> None:
    """Checkpoints of a run; of none, as they were before there were ids."""
    for step in steps:
        directory = output_dir / f"checkpoint-{step}"
        begin(directory)
        (directory / "config.json").write_text("{}")
        describe(directory, 0)
        commit(directory, 1, step, 1.0, None if run is None else run.to_dict())


def chosen(output_dir: Path) -> str | None:
    path = choose(output_dir)
    return None if path is None else path.name


# ---- pure functions ----


def test_a_run_keeps_its_id_and_a_branch_knows_what_it_goes_on_from() -> None:
    first = begin_run([])
    second = begin_run([first], first, 10)
    third = begin_run([first, second], second, 14)
    back = begin_run([first, second, third], first, 4)
    assert len({first.id, second.id, third.id, back.id}) == 1 and first.id
    assert len({run.branch for run in (first, second, third, back)}) == 4
    assert first.began < second.began < third.began < back.began
    assert third.before == ((first.branch, 10), (second.branch, 14)) and back.before == ((first.branch, 4),)
    table = {
        (third, first, 10): True, (third, first, 11): False, (third, second, 14): True, (third, second, 15): False,
        (third, third, 99): True, (third, back, 5): False, (back, first, 4): True, (back, first, 5): False,
        (back, second, 11): False, (first, second, 11): False,
    }  # fmt: skip
    assert {key: key[0].has(*key[1:]) for key in table} == table
    other = begin_run([back])
    assert other.id != first.id and not other.has(first, 1)


def test_a_clock_that_goes_back_does_not_turn_runs_around(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [begin_run([])]
    for now in (5e8, 4e8, 4e8):
        monkeypatch.setattr("time.time", lambda now=now: now)
        runs.append(begin_run(runs))
        runs.append(begin_run(runs, runs[-1], 3))
    assert latest(runs) == runs[-1] and all(one.began < other.began for one, other in pairwise(runs))


@pytest.mark.parametrize(
    "value",
    [
        None, 3, "x", [], {}, *({**Y.to_dict(), **change} for change in (
            {"id": 1}, {"branch": None}, {"began": "1"}, {"began": float("nan")}, {"began": float("inf")},
            {"began": True}, {"began": 1e300}, {"began": 2.0**41}, {"began": 10**400},
            {"before": 7}, {"before": [["a"]]}, {"before": [[1, 2]]},
            {"before": [["a", "2"]]},
        )),
    ],
)  # fmt: skip
def test_a_forged_run_is_none(value: Any, tmp_path: Path) -> None:
    assert "does not name a run" in message(lambda: run_of({"run": value}))
    write(tmp_path, X, 1, 2)
    body = {key: entry for key, entry in read_marker(tmp_path / "checkpoint-2").items() if key != "crc32"}
    (tmp_path / "checkpoint-2" / MARKER).unlink()
    if value is None or json.dumps(value).find("NaN") + json.dumps(value).find("Infinity") == -2:
        write_checked(tmp_path / "checkpoint-2" / MARKER, {**body, "run": value})
        assert marked_run(tmp_path / "checkpoint-2") is None and newest(tmp_path) == [tmp_path / "checkpoint-1"]
    assert run_at_hand(tmp_path) == X


def test_a_run_is_what_was_written() -> None:
    run = begin_run([], begin_run([]), 7)
    assert Run.from_dict(json.loads(json.dumps(run.to_dict()))) == run and run_of({}) == Run()


# ---- a used folder ----


def test_resume_takes_the_newest_of_the_run_that_started_last(tmp_path: Path) -> None:
    write(tmp_path, X, 80, 100)
    assert chosen(tmp_path) == "checkpoint-100"
    write(tmp_path, Y, 10, 20)
    assert chosen(tmp_path) == "checkpoint-20" and run_at_hand(tmp_path) == Y
    (tmp_path / "checkpoint-20" / "config.json").unlink()
    assert chosen(tmp_path) == "checkpoint-10"
    (tmp_path / "checkpoint-10" / "config.json").unlink()
    assert chosen(tmp_path) is None, "another run's is no way out"


def test_a_run_that_was_killed_before_its_first_checkpoint_is_at_hand(tmp_path: Path) -> None:
    write(tmp_path, X, 100)
    write_record(tmp_path, Y, this_process())
    assert run_at_hand(tmp_path) == read_record(tmp_path) == Y and chosen(tmp_path) is None
    (tmp_path / RECORD).write_text("torn")
    assert chosen(tmp_path) == "checkpoint-100"
    write_record(tmp_path, X, {})
    write(tmp_path, Y, 10)  # fetched or copied from where the run went on
    assert chosen(tmp_path) == "checkpoint-10"


def test_a_run_that_went_back(tmp_path: Path) -> None:
    """The checkpoints after the step that it went back to are no part of it, until it saves those steps itself."""
    write(tmp_path, X, 10, 15, 20, 30)
    back = begin_run([X], X, 10)
    write_record(tmp_path, back, {})
    assert chosen(tmp_path) == "checkpoint-10"
    write(tmp_path, back, 12)
    assert chosen(tmp_path) == "checkpoint-12"
    assert [path.name for path in newest(tmp_path, back)] == ["checkpoint-12", "checkpoint-10"]
    assert [path.name for path in rotate(tmp_path, 1)] == ["checkpoint-10"]
    write(tmp_path, back, 20)
    assert chosen(tmp_path) == "checkpoint-20"
    rotate(tmp_path, 1)
    assert sorted(path.name for path in newest(tmp_path)) == ["checkpoint-15", "checkpoint-20", "checkpoint-30"]
    further = begin_run([X, back], back, 20)
    write(tmp_path, further, 30)
    rotate(tmp_path, 1)
    assert sorted(path.name for path in newest(tmp_path)) == ["checkpoint-15", "checkpoint-30"]


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_each_run_keeps_its_own_number(limit: int, tmp_path: Path) -> None:
    write(tmp_path, X, 80, 90, 100)
    for step in (5, 10, 15, 20):
        write(tmp_path, Y, step)
        rotate(tmp_path, limit)
    mine = [20, 15, 10][:limit]
    assert [int(path.name[11:]) for path in newest(tmp_path)] == [100, 90, 80, *mine]
    rotate(tmp_path, 1, run=X)
    assert [int(path.name[11:]) for path in newest(tmp_path)] == [100, *mine]


def test_a_save_reads_no_marker_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for one that is another file now."""
    read: list[str] = []
    for module in (runs, verify):
        monkeypatch.setattr(module, "read_marker", lambda path: read.append(Path(path).name) or read_marker(path))
    write(tmp_path, X, 1, 2, 3)
    rotate(tmp_path, None)
    read.clear()
    write(tmp_path, X, 4)
    rotate(tmp_path, None)
    assert read == ["checkpoint-4"]
    write(tmp_path, Y, 2)
    assert run_at_hand(tmp_path) == Y and read == ["checkpoint-4", "checkpoint-2"]


def test_torn_ones_of_any_run_go_when_they_are_older(tmp_path: Path) -> None:
    write(tmp_path, X, 100)
    for step in (5, 50):
        begin(tmp_path / f"checkpoint-{step}")
    write(tmp_path, Y, 10)
    assert [path.name for path in rotate(tmp_path, 1)] == ["checkpoint-5"]
    assert [path.name for path in candidates(tmp_path)] == ["checkpoint-50", "checkpoint-10"]


def test_checkpoints_without_ids_are_one_run_that_can_go_on(tmp_path: Path) -> None:
    write(tmp_path, None, 5, 10)
    assert "run" not in read_marker(tmp_path / "checkpoint-5") and run_at_hand(tmp_path) == Run()
    assert chosen(tmp_path) == "checkpoint-10"
    run = begin_run([Run()], Run(), 10)
    assert run.id and run.before == (("", 10),)
    write(tmp_path, run, 15)
    rotate(tmp_path, 2)
    assert chosen(tmp_path) == "checkpoint-15" and names(tmp_path) == ["checkpoint-10", "checkpoint-15"]


def test_start_of_a_run(tmp_path: Path, told: list[str]) -> None:
    """Fresh, resumed, from elsewhere; in a folder that is empty, the run's own, or another's."""
    mesh, here = ParallelMesh(ParallelConfig()), tmp_path / "here"
    here.mkdir()

    def start_noted(*args: Any, **kwargs: Any) -> Run:
        run = start_run(*args, **kwargs)
        write_record(here, run, this_process())
        return run

    first = start_noted(mesh, here, None, False)
    assert not told and first.before == ()
    write(here, first, 10, 20, 30)
    same = start_noted(mesh, here, str(here / "checkpoint-30"), False)
    assert not told and same.id == first.id and same.before == ((first.branch, 30),)
    back = start_noted(mesh, here, f"{here}/checkpoint-10/", False)
    assert "resumes from step 10: checkpoint-30, checkpoint-20 in" in told.pop() and read_record(here) == back
    said = message(lambda: start_run(mesh, here, None, False))
    assert "contains checkpoints of another run (checkpoint-30, checkpoint-20, checkpoint-10), and this run" in said
    assert str(here) in said and "overwrite_output_dir=False refuses" in said and read_record(here) == back
    assert start_noted(mesh, here, None, True).id != first.id and not told
    fresh = start_noted(mesh, here, None, None)
    assert (
        "starts from scratch. resume_from_checkpoint=True does not resume them" in told.pop()
        and read_record(here) == fresh
    )
    write(tmp_path / "there", X, 7)
    said = message(lambda: start_run(mesh, here, str(tmp_path / "there" / "checkpoint-7"), False))
    assert "resumes from a checkpoint that is not there, which overwrite_output_dir=False refuses" in said
    assert start_run(mesh, tmp_path / "there", None, False, is_noted=False).id  # a run that saves nothing by itself
    assert not (tmp_path / "there" / RECORD).exists()


def make_checkpointer(output_dir: Path) -> Checkpointer:
    """Without a trainer."""
    args = NanotronTrainingArguments(output_dir=str(output_dir), use_cpu=True)
    uploads, snapshots = RemoteUploads(args), MemorySnapshots(args)
    checkpointer = Checkpointer(args, uploads, snapshots, on_committed=lambda directory: None)
    checkpointer.mesh = uploads.mesh = snapshots.mesh = ParallelMesh(ParallelConfig())
    return checkpointer


def test_the_checkpoint_to_resume_is_one_of_the_run(tmp_path: Path) -> None:
    """Also what a message advises, of a folder in which another run has saved later steps."""
    write(tmp_path, X, 90)
    write(tmp_path, Y, 10, 20)
    checkpointer = make_checkpointer(tmp_path)
    assert checkpointer.where_to_resume() == f"Resume from {tmp_path / 'checkpoint-20'}"  # of the run at hand
    for source, own in ((None, None), (str(tmp_path / "checkpoint-10"), "checkpoint-10")):
        with checkpointer.running(source) as resumed:
            assert resumed == source
            advice = f"Resume from {tmp_path / own}" if own else "There is no checkpoint before it: start again"
            assert checkpointer.where_to_resume() == advice
    assert checkpointer.where_to_resume(besides=source).startswith("There is no checkpoint before it")


def test_the_best_checkpoint_is_one_of_the_run(tmp_path: Path) -> None:
    """A step that this run has not saved may be there from another."""
    state, checkpointer = TrainerState(best_global_step=10), make_checkpointer(tmp_path)
    checkpointer.run = Y
    write(tmp_path, X, 10)
    checkpointer.note_best(state, tmp_path)
    assert state.best_model_checkpoint is None
    checkpointer.run = begin_run([X, Y], X, 10)
    checkpointer.note_best(state, tmp_path)
    assert state.best_model_checkpoint == str(tmp_path / "checkpoint-10")


# ---- a used store ----


def upload(store: RemoteStore, output_dir: Path, run: Run | None = None, **options: Any) -> Uploader:
    uploader = Uploader(store, output_dir, **options)
    uploader.run = run
    uploader.submit_existing()
    uploader.wait(600)
    uploader.close()
    return uploader


@pytest.mark.parametrize("is_known", [False, True])
def test_a_store_with_another_run(is_known: bool, tmp_path: Path) -> None:
    """Uploads, limits and downloads keep to the run at hand, whether the uploader was told of it or sees it itself."""
    store, here = RemoteStore(f"memory://{tmp_path}"), tmp_path / "here"
    write(tmp_path / "old", X, 90, 100)
    upload(store, tmp_path / "old", keep_local=5)
    assert newest_remote(store) == "checkpoint-100"
    write(here, Y, 10, 20, 30)
    upload(store, here, Y if is_known else None, keep_local=1, save_total_limit=2)
    assert list(store.checkpoints()) == ["checkpoint-100", "checkpoint-90", "checkpoint-30", "checkpoint-20"]
    assert names(here) == ["checkpoint-30"]
    assert newest_remote(store) == "checkpoint-30" and newest_remote(store, X) == "checkpoint-100"
    fetched = fetch_newest(store, tmp_path / "new")
    assert fetched is not None and fetched.name == "checkpoint-30" and chosen(tmp_path / "new") == "checkpoint-30"
    # A folder of the old run, a step of which is in the way.
    write(tmp_path / "old", X, 30)
    fetched = fetch_newest(store, tmp_path / "old")
    assert fetched is not None and marked_run(fetched) == Y and chosen(tmp_path / "old") == "checkpoint-30"
    check(fetched)
    assert fetch_newest(store, tmp_path / "old") is None


def test_a_store_whose_last_run_has_no_checkpoint(tmp_path: Path, told: list[str]) -> None:
    store, here = RemoteStore(f"memory://{tmp_path}"), tmp_path / "here"
    write(here, X, 10, 20)
    upload(store, here, keep_local=5)
    uploader = Uploader(store, here)
    back = begin_run([X], X, 10)
    write_record(here, back, this_process())
    uploader.note_run()
    assert newest_remote(store) == "checkpoint-10"
    fetched = fetch_newest(store, tmp_path / "there")
    assert fetched is not None and fetched.name == chosen(tmp_path / "there") == "checkpoint-10"
    write(tmp_path / "full", X, 10, 20)
    assert fetch_newest(store, tmp_path / "full") is None and chosen(tmp_path / "full") == "checkpoint-10"
    fresh = begin_run([back])
    write_record(here, fresh, this_process())
    uploader.note_run()
    assert newest_remote(store) is None and fetch_newest(store, tmp_path / "full") is None
    assert chosen(tmp_path / "full") is None
    said = message(lambda: start_run(ParallelMesh(ParallelConfig()), tmp_path / "other", None, False, store))
    assert (
        f"remote_checkpoints='{store.url}' contains checkpoints of another run (checkpoint-20, checkpoint-10)" in said
    )
    # Two runs that go on with one store: the first is told, once, who has come later.
    old = Uploader(store, here)
    old.run = X
    for step in (10, 20):
        old.submit(here / f"checkpoint-{step}")
        old.wait(600)
    assert len(told) == 1 and f"process {os.getpid()}, started" in told[0] and "started later" in told[0]


# ---- one run at a time ----


def hold(folder: str) -> tuple[int, int]:
    """A process that holds the lock, and a child of it, such as the worker of a data loader."""
    ours, theirs = os.pipe()
    holder = os.fork()
    if holder == 0:
        try:
            said = RunLock().acquire(folder) or ""
            child = os.fork()
            if child:
                os.write(theirs, f"{child} {said}".encode())
            signal.pause()
        finally:
            os._exit(1)
    child, _, said = os.read(ours, 1000).decode().partition(" ")
    os.close(ours)
    os.close(theirs)
    assert not said
    return holder, int(child)


def lock_after_another(folder: str) -> dict[str, Any]:
    holder, child = hold(folder)
    try:
        lock, said = RunLock(), json.loads(Path(folder, LOCK).read_text())
        found = {"refused": lock.acquire(folder) or "", "said": said, "holder": holder}
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        os.kill(child, 0)  # it lives
        found["then"] = [lock.acquire(folder), lock.acquire(folder)]
        found["ours"] = json.loads(Path(folder, LOCK).read_text())["pid"] == os.getpid()
        lock.release()
        lock.release()
        return {**found, "later": RunLock().acquire(folder)}
    finally:
        os.kill(child, signal.SIGKILL)


def test_the_lock_of_a_folder(pool: WorkerPool, tmp_path: Path) -> None:
    """Names its holder; ends with the process, although a child outlives it; may be taken again."""
    (found,) = pool.run(1, lock_after_another, str(tmp_path))
    texts = (found["said"]["host"], f"process {found['holder']}", found["said"]["start"], str(tmp_path))
    assert found["said"]["pid"] == found["holder"] and all(text in found["refused"] for text in texts)
    assert found["then"] == [None, None] and found["ours"] and found["later"] is None


@pytest.mark.parametrize("kind", ["link", "folder", "another user's"])
def test_a_lock_that_cannot_be_opened_is_told(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that can be written is not refused for its lock, and nothing is written through a link."""
    texts: list[str] = []
    monkeypatch.setattr("hf_nanotron.checkpoint.directory.run_lock.logger.warning", texts.append)
    path, outside = tmp_path / LOCK, tmp_path / "outside"
    outside.write_text("theirs")
    if kind == "link":
        path.symlink_to(outside)
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_text("{}")

        def refuse(*_: Any, **__: Any) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("hf_nanotron.checkpoint.directory.run_lock.os.open", refuse)
    assert RunLock().acquire(tmp_path) is None
    assert len(texts) == 1 and str(path) in texts[0] and outside.read_text() == "theirs"


def test_a_folder_that_cannot_be_locked_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(37, "No locks available")

    texts: list[str] = []
    monkeypatch.setattr("hf_nanotron.checkpoint.directory.run_lock.logger.warning", texts.append)
    monkeypatch.setattr("fcntl.lockf", refuse)
    assert RunLock().acquire(tmp_path) is None and "No locks available" in texts[0]


# ---- through the trainer ----


def trainer_of(output: str, callbacks: tuple[Any, ...] = (), **overrides: Any) -> tuple[NanotronTrainer, History]:
    values = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "save_total_limit": 2, **overrides}
    args = NanotronTrainingArguments(**training_arguments(output_dir=output, **values))
    history = History()
    trainer = NanotronTrainer(
        model=ParallelAuto.from_config(tiny_config(num_hidden_layers=1), parallel=args.parallel), args=args,
        train_dataset=random_dataset(64), data_collator=pad_batch, callbacks=[history, *callbacks],
    )  # fmt: skip
    return trainer, history


def runs_in_one_folder(output: str) -> dict[str, Any]:
    """An old run, a fresh one that is broken off, its resume, a way back, and another process in the folder."""
    found: dict[str, Any] = {}
    folder = Path(output)

    def steps() -> list[int]:
        return sorted(int(path.name[11:]) for path in newest(folder))

    def broken_off(**overrides: Any) -> None:
        from test_saving import At

        def stop() -> None:
            raise KeyboardInterrupt

        trainer, _ = trainer_of(output, (At(overrides.pop("at"), stop),), **overrides)
        with pytest.raises(KeyboardInterrupt):
            trainer.train(overrides.pop("resume", None))

    trainer, _ = trainer_of(output, max_steps=8)
    trainer.train()
    found["old"] = steps()
    old = marked_run(folder / "checkpoint-8")
    broken_off(at=1)
    found["nothing yet"] = message(lambda: trainer_of(output)[0].train(True))
    broken_off(at=3, save_steps=1)
    found["fresh"] = steps()
    fresh = marked_run(folder / "checkpoint-2")
    trainer, history = trainer_of(output, save_steps=1)
    trainer.train(resume_from_checkpoint=True)
    found["resumed"], found["taken"] = steps(), len(history.losses)
    found["same run"] = marked_run(folder / "checkpoint-4").id == fresh.id != old.id
    extra = read_checked(folder / "checkpoint-4" / "training_state" / "index.json")["values"]["extra"]
    found["in the state"] = extra["run"] == read_marker(folder / "checkpoint-4")["run"]
    trainer, _ = trainer_of(output, save_steps=1, max_steps=5)
    trainer.train(str(folder / "checkpoint-3"))
    found["again"] = steps()
    found["refused"] = message(lambda: trainer_of(output, overwrite_output_dir=False)[0].train())
    # No step is left: what is resumed is not written anew, by whatever path it was named. The folder has moved.
    moved = folder.with_name("moved")
    shutil.copytree(folder, moved)
    before = (moved / "checkpoint-5" / MARKER).stat().st_mtime_ns
    trainer, _ = trainer_of(str(moved), save_steps=1, max_steps=5)
    trainer.train(f"{moved}/../{moved.name}/checkpoint-5")
    found["rewritten"] = before != (moved / "checkpoint-5" / MARKER).stat().st_mtime_ns
    other = os.open(folder / LOCK, os.O_RDWR)
    os.close(other)
    child = os.fork()  # another process, which saves there
    if child == 0:
        os._exit(0 if RunLock().acquire(folder) is None else 1)
    found["released"] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return found


def test_runs_in_one_folder(pool: WorkerPool, tmp_path: Path) -> None:
    (found,) = pool.run(1, runs_in_one_folder, str(tmp_path / "run"))
    assert "of the run that was started last" in found["nothing yet"] and "checkpoint-8" in found["nothing yet"]
    assert found["old"] == [6, 8] and found["fresh"] == [2, 3, 6, 8] or found["fresh"] == [1, 2, 6, 8], found
    assert found["resumed"] == [3, 4, 6, 8] and found["taken"] == 4 - max(found["fresh"][:2])
    assert found["again"] == [4, 5, 6, 8] and not found["rewritten"]
    assert found["same run"] and found["in the state"] and found["released"] == 0
    assert "overwrite_output_dir=False refuses" in found["refused"]


class Leaves(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            os.chdir("elsewhere")


def run_that_leaves_its_folder(parent: str) -> str:
    before = os.getcwd()
    os.chdir(parent)
    try:
        trainer, _ = trainer_of("relative", save_steps=2, max_steps=4)
        trainer.add_callback(Leaves())
        return message(trainer.train)
    finally:
        os.chdir(before)


def test_a_run_whose_working_directory_changes(pool: WorkerPool, tmp_path: Path) -> None:
    """Its next checkpoints would be in another folder than its record and lock, where no resume looks."""
    (tmp_path / "elsewhere").mkdir()
    said, other = pool.run(2, run_that_leaves_its_folder, str(tmp_path))
    now = tmp_path / "elsewhere" / "relative"
    assert said == other and f"output_dir='relative' was {tmp_path / 'relative'} when train began, and is {now}" in said
    assert newest(tmp_path / "relative") == [tmp_path / "relative" / "checkpoint-2"]
    assert not list(now.glob("checkpoint-*"))


def start_in_a_locked_folder(output: str) -> tuple[str, str, int]:
    """What each rank is told, the text in the lock, and whether a run that saves nothing goes on."""
    import torch.distributed as dist

    holder, child = hold(output) if dist.get_rank() == 0 else (None, None)
    dist.barrier()
    try:
        said = message(trainer_of(output)[0].train)
        trainer, history = trainer_of(output, save_strategy="no", max_steps=1)
        trainer.train()
        return said, Path(output, LOCK).read_text(), len(history.losses)
    finally:
        if holder is not None and child is not None:
            os.kill(holder, signal.SIGKILL)
            os.kill(child, signal.SIGKILL)
            os.waitpid(holder, 0)


def test_a_second_run_is_refused_on_every_rank(pool: WorkerPool, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    one, other = pool.run(2, start_in_a_locked_folder, str(tmp_path / "run"))
    holder = json.loads(one[1])["pid"]
    assert one == other and f"process {holder}, started" in one[0] and str(tmp_path / "run") in one[0]
    assert "is in use" in one[0] and one[2] == 1
