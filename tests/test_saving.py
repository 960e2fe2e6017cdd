"""Saving while training goes on, at a signal, and under a SIGKILL: what is committed is whole, and nothing is lost."""

from __future__ import annotations

import copy
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from pool import JobError, WorkerPool
from test_checkpoint import equal, stock_weights
from test_gradients import stock_model
from test_resume import contents
from tiny import History, pad_batch, random_dataset, training_arguments
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from hf_nanotron import AutoModelForCausalLM as ParallelAuto, NanotronTrainer, NanotronTrainingArguments
from hf_nanotron.checkpoint.directory import save as save_module
from hf_nanotron.checkpoint.directory.host_copies import HostCopies
from hf_nanotron.checkpoint.directory.retention import newest
from hf_nanotron.checkpoint.directory.runs import RECORD
from hf_nanotron.training import checkpointer, host_memory


class At(TrainerCallback):
    """Does something at the end of a step."""

    def __init__(self, step: int, action: Any) -> None:
        self.step, self.action = step, action

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.action()


def run(
    output: str, overrides: dict[str, Any], resume: bool | str = False, callbacks: tuple[Any, ...] = ()
) -> tuple[list[float], list[dict[str, float]]]:
    """Losses of this run, and the log of the whole one. The start is beside `output`."""
    values = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "gradient_accumulation_steps": 2, **overrides}
    args = NanotronTrainingArguments(**training_arguments(output_dir=output, **values))
    model = ParallelAuto.from_pretrained(str(Path(output).parent / "start"), parallel=args.parallel)
    history = History()
    trainer = NanotronTrainer(
        model=model, args=args, train_dataset=random_dataset(64), data_collator=pad_batch,
        callbacks=[history, *callbacks],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume or None)
    trainer.mesh.close()
    return history.losses, trainer.state.log_history


@pytest.fixture
def start(tmp_path: Path) -> Path:
    stock_model("llama").save_pretrained(tmp_path / "start")
    return tmp_path


# ---- asynchronous ----


@pytest.mark.parametrize(
    ("world", "sizes"),
    [
        pytest.param(2, {"zero_stage": 1, "bf16": True}, marks=pytest.mark.full_matrix),  # as the last, without tp
        (2, {"zero_stage": 3}),
        (4, {"tp_size": 2, "pp_size": 2}),
        (4, {"tp_size": 2, "optim": "muon", "ema_decay": 0.5, "bf16": True, "memory_snapshot_steps": 1}),
    ],
    ids=["zero1-bf16", "zero3", "tp2-pp2", "tp2-dp2-muon-average-snapshots"],
)
def test_an_asynchronous_save_is_the_synchronous_one(
    pool: WorkerPool, start: Path, world: int, sizes: dict[str, Any]
) -> None:
    """Bit by bit, though training went on while it was written, with snapshots and an average beside it."""
    if "memory_snapshot_steps" in sizes:
        sizes = {**sizes, "memory_snapshot_dir": str(start)}
    plain = pool.run(world, run, str(start / "plain"), sizes)[0]
    asynchronous = pool.run(world, run_with_a_slow_disk, str(start / "async"), {**sizes, "async_save": True})[0]
    assert asynchronous[0] == plain[0]
    for step in (3, 6):
        one, other = (contents(start / name / f"checkpoint-{step}") for name in ("plain", "async"))
        assert one == other
        assert {path.name for path in (start / "plain" / f"checkpoint-{step}").iterdir()} == {
            path.name for path in (start / "async" / f"checkpoint-{step}").iterdir()
        }
    resumed = pool.run(world, run, str(start / "async"), sizes, str(start / "async" / "checkpoint-3"))[0]
    assert resumed[0] == plain[0][3:]


def run_with_writer(output: str, overrides: dict[str, Any], before: Callable[[int], None]) -> Any:
    """`before(rank)` is called when the training state is to be written."""
    write = save_module.write_rank

    def call(directory: Any, rank: int, pieces: Any) -> None:
        before(rank)
        write(directory, rank, pieces)

    save_module.write_rank = call
    try:
        return run(output, overrides)
    finally:
        save_module.write_rank = write


def run_with_a_slow_disk(output: str, overrides: dict[str, Any]) -> Any:
    """Steps are taken while a save is being copied and written: it must not see them."""
    complete = HostCopies.complete

    def complete_late(self: HostCopies) -> None:
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.4)
        complete(self)

    with mock.patch.object(HostCopies, "complete", complete_late):
        return run_with_writer(output, overrides, lambda rank: time.sleep(0.7))


def run_with_a_save_each_step(output: str) -> list[str]:
    """What rank 0 is told of a save that comes before the one before has ended, which rank 0 writes until then."""
    told, is_told = list[str](), threading.Event()

    def hear(record: logging.LogRecord) -> None:
        told.append(record.getMessage())
        if " waits for " in told[-1]:
            is_told.set()

    handler = logging.Handler()
    handler.emit = hear  # type: ignore[method-assign]
    checkpointer.logger.addHandler(handler)
    try:
        overrides = {"async_save": True, "save_steps": 1, "max_steps": 2}
        run_with_writer(output, overrides, lambda rank: is_told.wait(0.0 if rank else 300.0))
    finally:
        checkpointer.logger.removeHandler(handler)
    return told


def test_a_save_waits_for_the_one_before_and_says_so(pool: WorkerPool, start: Path) -> None:
    told, others = pool.run(2, run_with_a_save_each_step, str(start / "out"))
    assert [text for text in told if text.startswith("checkpoint-2 waits for checkpoint-1, whose writing began")]
    assert not [text for text in others if " waits for " in text]
    assert {path.name for path in (start / "out").glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}


def run_with_little_memory(output: str) -> None:
    with mock.patch.object(host_memory, "available_bytes", lambda: 1000):
        run(output, {"async_save": True})


def test_copies_that_a_host_has_no_memory_for_are_refused(pool: WorkerPool, start: Path) -> None:
    said = r"async_save=True: the 2 processes of host .* need .* GiB of host memory .* Save with async_save=False"
    with pytest.raises(JobError, match=said) as error:
        pool.run(2, run_with_little_memory, str(start / "out"))
    assert error.value.kinds == {0: "ValueError", 1: "ValueError"}


def run_with_a_full_disk(output: str, broken_rank: int, asynchronous: bool) -> None:
    def fail(rank: int) -> None:
        if rank == broken_rank:
            raise OSError(28, "No space left on device")

    run_with_writer(output, {"async_save": asynchronous, "max_steps": 40}, fail)


@pytest.mark.parametrize("broken_rank", [0, 1])
def test_a_failed_background_save_ends_the_run(pool: WorkerPool, start: Path, broken_rank: int) -> None:
    with pytest.raises(JobError, match=r"checkpoint-3 in the background failed.*No space left on device") as error:
        pool.run(2, run_with_a_full_disk, str(start / "out"), broken_rank, True)
    assert set(error.value.kinds) == {0, 1}
    assert not (start / "out" / "checkpoint-3" / "committed.json").exists()


def test_a_failed_save_ends_the_run_on_every_rank(pool: WorkerPool, start: Path) -> None:
    with pytest.raises(JobError, match="No space left on device|failed on 1 other ranks") as error:
        pool.run(2, run_with_a_full_disk, str(start / "out"), 1, False)
    assert set(error.value.kinds) == {0, 1}


def run_with_unwritable_weights(output: str) -> None:
    write = checkpointer.write_safetensors

    def fail(path: Any, entries: Any, tensors: Any) -> None:
        next(iter(tensors))
        raise OSError(28, "No space left on device")

    checkpointer.write_safetensors = fail
    try:
        run(output, {"tp_size": 2})
    finally:
        checkpointer.write_safetensors = write


def test_weights_that_cannot_be_written_end_the_run_on_every_rank(pool: WorkerPool, start: Path) -> None:
    """The ranks that send their parts to the one that fails do not wait for it."""
    with pytest.raises(JobError, match="No space left on device") as error:
        pool.run(2, run_with_unwritable_weights, str(start / "out"))
    assert set(error.value.kinds) == {0, 1}


# ---- retention ----


def run_with_evaluation(output: str, overrides: dict[str, Any]) -> tuple[str | None, list[str], float]:
    """The best checkpoint, those that are left, and a weight of the model in the end."""
    values = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 6}
    values |= {"metric_for_best_model": "loss", "save_total_limit": 1, "learning_rate": 0.3}
    args = NanotronTrainingArguments(**training_arguments(output_dir=output, **values, **overrides))
    model = ParallelAuto.from_pretrained(str(Path(output).parent / "start"), parallel=args.parallel)
    trainer = NanotronTrainer(
        model=model, args=args, train_dataset=random_dataset(64), eval_dataset=random_dataset(8, seed=1),
        data_collator=pad_batch,
    )  # fmt: skip
    trainer.train()
    left = sorted(path.name for path in Path(output).glob("checkpoint-*"))
    weight = float(trainer.model.whole_parameter("model.norm.weight")[0])
    trainer.mesh.close()
    return trainer.state.best_model_checkpoint, left, weight


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("loads_best", [False, True], ids=["last", "best"])
def test_neither_the_best_nor_the_last_checkpoint_goes(
    pool: WorkerPool, start: Path, asynchronous: bool, loads_best: bool
) -> None:
    """Steps too large: the first checkpoint stays the best. Every rank knows it, and loads it if it is to."""
    overrides = {"async_save": asynchronous, "load_best_model_at_end": loads_best}
    results = pool.run(2, run_with_evaluation, str(start / "out"), overrides)
    assert results[0] == results[1]
    best, left, weight = results[0]
    assert best is not None and best.endswith("checkpoint-2") and left == ["checkpoint-2", "checkpoint-6"]
    saved = stock_weights(start / "out" / ("checkpoint-2" if loads_best else "checkpoint-6"))
    assert weight == pytest.approx(float(saved["model.norm.weight"][0]), rel=1e-6)


# ---- which weights ----


def test_hub_weights_in_the_last_checkpoint_alone(pool: WorkerPool, start: Path) -> None:
    overrides = {"save_hub_weights": "last", "bf16": True}
    losses, _ = pool.run(2, run, str(start / "out"), overrides)[0]
    assert not list((start / "out" / "checkpoint-3").glob("*.safetensors"))
    expected = stock_weights(start / "out" / "checkpoint-6")
    resumed, _ = pool.run(2, run, str(start / "again"), overrides, str(start / "out" / "checkpoint-3"))[0]
    assert resumed == losses[3:]
    assert equal(stock_weights(start / "again" / "checkpoint-6"), expected)


READER = """
import json, sys
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer
root = sys.argv[1]
model, report = AutoModelForCausalLM.from_pretrained(root, output_loading_info=True)
assert not any(report.values()), report
names = list(safe_open(root + "/model.safetensors", "pt").keys())
ids = AutoTokenizer.from_pretrained(root)("a", return_tensors="pt").input_ids
text = model.generate(ids, max_new_tokens=2, min_new_tokens=2, do_sample=False)
assert not any(name.startswith("hf_nanotron") for name in sys.modules)
print(json.dumps([type(model).__name__, len(names), text.shape[1] - ids.shape[1]]))
"""


def test_the_root_is_read_without_this_package(pool: WorkerPool, start: Path) -> None:
    from test_cli import tokenizer

    pool.run(2, run, str(start / "out"), {"zero_stage": 3, "bf16": True, "max_steps": 1, "save_steps": 1})
    checkpoint = start / "out" / "checkpoint-1"
    tokenizer().save_pretrained(checkpoint)
    done = subprocess.run(
        [sys.executable, "-I", "-c", READER, str(checkpoint)], capture_output=True, text=True, timeout=600, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == ["LlamaForCausalLM", 39, 2]


# ---- signals ----


def run_with_a_signal(output: str, overrides: dict[str, Any], number: int, rank: int) -> tuple[list[float], int]:
    def send() -> None:
        if torch.distributed.get_rank() == rank:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    losses, log = run(output, {**overrides, "save_on_signal": 60.0}, callbacks=(At(3, send),))
    assert signal.getsignal(number) is before
    return losses, log[-1]["step"]


@pytest.mark.parametrize(
    ("number", "rank", "asynchronous"),
    [(signal.SIGTERM, 1, False), (signal.SIGUSR1, 0, True)],
    ids=["sigterm-sync", "sigusr1-async"],
)
def test_a_signal_saves_and_stops(pool: WorkerPool, start: Path, number: int, rank: int, asynchronous: bool) -> None:
    """One rank is told; all stop after the next step with a checkpoint, from which the run goes on."""
    overrides = {"save_steps": 100, "max_steps": 8, "async_save": asynchronous}
    expected, _ = pool.run(2, run, str(start / "whole"), overrides)[0]
    for losses, step in pool.run(2, run_with_a_signal, str(start / "out"), overrides, number, rank):
        assert step == 4 and losses == expected[:4]
    assert [path.name for path in (start / "out").glob("checkpoint-*")] == ["checkpoint-4"]
    for losses, _ in pool.run(2, run, str(start / "out"), overrides, True):
        assert losses == expected[4:]


# ---- SIGKILL ----


def losses_of(log: list[dict[str, float]]) -> list[float]:
    return [entry["loss"] for entry in log if "loss" in entry]


@pytest.mark.parametrize(
    "asynchronous", [pytest.param(False, marks=pytest.mark.full_matrix), True], ids=["sync", "async"]
)
def test_a_killed_rank_loses_nothing(start: Path, asynchronous: bool, request: pytest.FixtureRequest) -> None:
    """A rank is killed at a random moment of a save, `--kills` times in a row; every restart goes on from the newest
    committed checkpoint, and the losses of all steps are those of the run that nobody killed."""
    kills, output = request.config.getoption("--kills"), start / "out"
    steps = 4 * kills + 8
    overrides = {"save_steps": 1, "save_total_limit": 2, "max_steps": steps, "async_save": asynchronous}
    overrides |= {"gradient_accumulation_steps": 1, "zero_stage": 1}
    workers = WorkerPool(2)
    expected = losses_of(workers.run(2, run, str(start / "whole"), {**overrides, "save_strategy": "no"})[0][1])
    chance = random.Random(5)
    survived: list[int] = []
    try:
        for _ in range(kills):
            resume = bool(list(output.glob("checkpoint-*/committed.json")))
            end = chance.randrange(2), chance.randint(1, 3), chance.random() * 0.12  # some progress is made
            with pytest.raises(JobError):
                workers.run(2, run_until_killed, str(output), overrides, resume, *end)
            survived.append(max([int(p.parent.name[11:]) for p in output.glob("checkpoint-*/committed.json")] or [0]))
        assert survived == sorted(survived), "a committed checkpoint was lost"
        log = workers.run(2, run, str(output), overrides, survived[-1] > 0)[0][1]
    finally:
        workers.close()
    print(f"{kills} kills; newest committed step after each: {survived}")
    assert losses_of(log) == expected


class Doomed(TrainerCallback):
    """Ends this process with SIGKILL `seconds` after the end of a step of this run, whose save begins then."""

    def __init__(self, steps: int, seconds: float) -> None:
        self.left, self.seconds, self.end = steps, seconds, threading.Thread(target=self.kill)

    def kill(self) -> None:
        time.sleep(self.seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.left -= 1
        if self.left == 0:
            self.end.start()


def run_until_killed(
    output: str, overrides: dict[str, Any], resume: bool, doomed: int, saves: int, seconds: float
) -> None:
    callback = Doomed(saves, seconds)
    run(output, overrides, resume, (callback,) if int(os.environ["RANK"]) == doomed else ())
    callback.end.join()  # a rank that is faster than its end waits for it


# ---- damage ----


@pytest.fixture(scope="module")
def nine_steps(pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """The folder of a run of nine steps, to be copied, and its losses."""
    folder = tmp_path_factory.mktemp("nine_steps")
    stock_model("llama").save_pretrained(folder / "start")
    return folder, pool.run(2, run, str(folder / "out"), {"max_steps": 9})[0][0]


ALSO_BY_DEFAULT = [("training_state/rank-00001.safetensors", "cut"), ("model.safetensors", "remove")]  # besides flips


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
@pytest.mark.parametrize("file", ["model.safetensors", "training_state/rank-00001.safetensors", "trainer_state.json"])
def test_a_damaged_checkpoint_is_passed_over(
    pool: WorkerPool,
    nine_steps: tuple[Path, list[float]],
    tmp_path: Path,
    damage: str,
    file: str,
    pytestconfig: pytest.Config,
) -> None:
    """Named by the error if it was asked for; else the one before is taken."""
    if damage != "flip" and (file, damage) not in ALSO_BY_DEFAULT and not pytestconfig.getoption("full_matrix"):
        pytest.skip("runs with --full-matrix")
    overrides, (folder, expected) = {"max_steps": 9}, nine_steps
    start = shutil.copytree(folder, tmp_path / "copy")
    path = start / "out" / "checkpoint-9" / file
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "cut":
        path.write_bytes(data[:-7])
    else:
        path.unlink()
    if damage != "flip":
        with pytest.raises(JobError, match=f"checkpoint-9/{file}"):
            pool.run(2, run, str(start / "out"), overrides, str(start / "out" / "checkpoint-9"))
    losses, _ = pool.run(2, run, str(start / "out"), overrides, True)[0]
    assert losses == expected[6:]


# ---- from the Hub, by way of a converter ----


def test_a_run_starts_from_a_converted_repository(pool: WorkerPool, start: Path) -> None:
    """`hub_to_sharded` into step 0 of a run: the losses of a run that began with `from_pretrained`."""
    from hf_nanotron.convert.sharded import hub_to_sharded

    sizes = {"zero_stage": 3, "bf16": True}
    expected, _ = pool.run(2, run, str(start / "plain"), sizes)[0]
    hub_to_sharded(start / "start", start / "out" / "checkpoint-0", copy_weights=False)
    torch.manual_seed(8)
    stock_model("llama", initializer_range=0.3).save_pretrained(start / "start")  # not what is to be trained
    losses, _ = pool.run(2, run, str(start / "out"), sizes, True)[0]
    assert losses == expected


def test_a_trainer_goes_by_arguments_that_were_assigned_to_it(tmp_path: Path, pool: WorkerPool) -> None:
    pool.run(1, train_by_others, str(tmp_path))


class Keeping(NanotronTrainer):
    """Has attributes of its own, and assigns one of Trainer's before Trainer does."""

    def __init__(self, model: Any, args: NanotronTrainingArguments, **kwargs: Any) -> None:
        self.args = args
        self._loss = 0.0
        super().__init__(model, args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self._loss = logs.get("loss", self._loss)
        super().log(logs, start_time)


def train_by_others(folder: str) -> None:
    """Between runs. Lock, record, retention, resume and data order are those of the new ones, as the saving is."""
    made_with, other = Path(folder, "made_with"), Path(folder, "other")
    args = NanotronTrainingArguments(**training_arguments(output_dir=str(made_with), save_strategy="no"))
    trainer = Keeping(stock_model("llama"), args, train_dataset=random_dataset(64))
    trainer.args = copy.copy(args)
    for name, value in {"output_dir": str(other), "save_strategy": SaveStrategy.STEPS, "save_steps": 1}.items():
        setattr(trainer.args, name, value)
    trainer.args.max_steps, trainer.args.save_total_limit, trainer.args.train_sampling_strategy = 2, 1, "sequential"
    trainer.train()
    assert [path.name for path in newest(str(other))] == ["checkpoint-2"] and (other / RECORD).is_file()
    cursor = trainer.data_cursor()
    assert cursor is not None and cursor["order"]["kind"] == "sequential"
    trainer.args = copy.copy(trainer.args)
    trainer.args.max_steps = 3
    trainer.train(resume_from_checkpoint=True)
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2, 3]
    assert trainer.args.logging_nan_inf_filter and not any(made_with.iterdir())
    trainer.mesh.close()
