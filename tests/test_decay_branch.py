"""A decay that branches off a stable run, and schedules that change on resume."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from family_runs import tiny_model
from pool import WorkerPool
from tiny import message, pad_batch, random_dataset, training_arguments
from transformers import AutoModelForCausalLM as StockAuto, TrainerCallback

from hf_nanotron import AutoModelForCausalLM as ParallelAuto, NanotronTrainer, NanotronTrainingArguments

WARMUP, BRANCH, DECAY, STABLE = 2, 4, 3, 8
WSD = {"lr_scheduler_type": "warmup_stable_decay", "warmup_steps": WARMUP, "save_strategy": "steps", "save_steps": 2}


class Record(TrainerCallback):
    """Step, loss and learning rate of every log line."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, float, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.rows.append((state.global_step, logs["loss"], logs["learning_rate"]))


def train(weights: str, output: str, resume_from: str | None, **overrides: Any) -> list[tuple[int, float, float]]:
    """Over 5 steps of an epoch, so that a decay goes on in the middle of one."""
    values = {**WSD, "gradient_accumulation_steps": 4, **overrides}
    args = NanotronTrainingArguments(**training_arguments(output_dir=output, **values))
    before = args.max_steps, args.lr_scheduler_kwargs, args.warmup_steps
    record = Record()
    trainer = NanotronTrainer(
        model=ParallelAuto.from_pretrained(weights, parallel=args.parallel),
        args=args,
        train_dataset=random_dataset(20 * args.dp_size),
        data_collator=pad_batch,
        callbacks=[record],
    )
    trainer.train(resume_from_checkpoint=resume_from)
    assert (args.max_steps, args.lr_scheduler_kwargs, args.warmup_steps) == before
    trainer.model.mesh.close()
    return record.rows


@contextlib.contextmanager
def messages() -> Iterator[list[str]]:
    """What the library says of schedules."""
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("hf_nanotron.training.lr_schedule")
    logger.addHandler(handler)
    yield told
    logger.removeHandler(handler)


def final(output: Path, step: int) -> dict[str, torch.Tensor]:
    return StockAuto.from_pretrained(output / f"checkpoint-{step}").state_dict()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("weights")
    tiny_model("qwen3").save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def stable(weights: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[int, float, float]]]:
    """A run whose rate stays, with checkpoints; it ends without a decay."""
    output = tmp_path_factory.mktemp("stable")
    rows = train(weights, str(output), None, max_steps=STABLE, lr_scheduler_kwargs={"num_decay_steps": 0})
    return output, rows


def test_decay_is_that_of_an_uninterrupted_run(weights: str, stable: Any, tmp_path: Path) -> None:
    """Losses, rates and weights, to the last bit; the decay itself can be resumed, and the stable run goes on."""
    output, rows = stable
    source, total = str(output / f"checkpoint-{BRANCH}"), BRANCH + DECAY
    whole = train(
        weights, str(tmp_path / "whole"), None, max_steps=total, lr_scheduler_kwargs={"num_decay_steps": DECAY}
    )
    assert whole[:BRANCH] == rows[:BRANCH]
    branch = {"max_steps": STABLE, "lr_scheduler_kwargs": {"num_decay_steps": 0}, "wsd_decay_steps": DECAY}
    decayed = train(weights, str(tmp_path / "decay"), source, **branch)
    assert decayed == whole[BRANCH:] and len(decayed) == DECAY
    assert decayed[-1][2] < decayed[0][2] == rows[BRANCH][2]
    expected = final(tmp_path / "whole", total)
    assert all(torch.equal(value, expected[name]) for name, value in final(tmp_path / "decay", total).items())

    resumed = train(weights, str(tmp_path / "again"), str(tmp_path / "decay" / "checkpoint-6"), **branch)
    assert resumed == whole[6:]
    stays = {"max_steps": STABLE, "lr_scheduler_kwargs": {"num_decay_steps": 0}}
    assert train(weights, str(tmp_path / "stable"), source, **stays) == rows[BRANCH:]
    # The last checkpoint of the stable run, whose scheduler has gone beyond its end, is a stable one as well.
    last = str(output / f"checkpoint-{STABLE}")
    late = train(weights, str(tmp_path / "late"), last, **branch)
    assert [rate for _, _, rate in late] == [rate for _, _, rate in decayed]
    with messages() as told:  # nor does a longer stable run change its rate there
        longer = train(weights, str(tmp_path / "longer"), last, **{**stays, "max_steps": STABLE + 1})
    assert not told and [rate for _, _, rate in longer] == [rows[BRANCH][2]]


def test_decay_on_another_layout(
    pool: WorkerPool, weights: str, stable: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if not request.config.getoption("--full-matrix"):
        pytest.skip("needs --full-matrix")
    source, branch = str(stable[0] / f"checkpoint-{BRANCH}"), {"wsd_decay_steps": DECAY, "max_steps": STABLE}
    one = train(weights, str(tmp_path / "one"), source, **branch)
    for sizes in ({"tp_size": 2, "pp_size": 2}, {"pp_size": 2, "tp_size": 2, "zero_stage": 0}):
        rows = pool.run(4, _on_rank, weights, str(tmp_path / "other"), source, {**branch, **sizes})[0]
        assert [(step, rate) for step, _, rate in rows] == [(step, rate) for step, _, rate in one]
        assert [loss for _, loss, _ in rows] == pytest.approx([loss for _, loss, _ in one], rel=1e-5)


def _on_rank(weights: str, output: str, source: str, overrides: dict[str, Any]) -> list[tuple[int, float, float]]:
    return train(weights, output, source, **overrides)


def test_refusals(weights: str, stable: Any, tmp_path: Path) -> None:
    output, _ = stable
    branch = {"max_steps": STABLE, "wsd_decay_steps": DECAY}
    say = lambda source, **values: message(lambda: train(weights, str(tmp_path / "x"), source, **values))  # noqa: E731
    assert "wsd_decay_steps=3 needs resume_from_checkpoint" in say(None, **branch)
    cosine = {**branch, "lr_scheduler_type": "cosine"}
    assert "wsd_decay_steps=3 needs lr_scheduler_type='warmup_stable_decay', not 'cosine'" in say(None, **cosine)
    assert "wsd_decay_steps=0 must be at least 1" in say(None, **{**branch, "wsd_decay_steps": 0})
    train(weights, str(tmp_path / "decay"), str(output / "checkpoint-4"), **branch)
    inside = str(tmp_path / "decay" / "checkpoint-6")
    assert "branched off at step 4: go on with it by wsd_decay_steps=3" in say(
        inside, max_steps=9, lr_scheduler_kwargs={"num_decay_steps": 1}
    )
    assert "checkpoint-6 is in a decay of 3 steps" in say(inside, **{**branch, "wsd_decay_steps": 5})
    short = {"max_steps": 4, "lr_scheduler_kwargs": {"num_decay_steps": 1}}
    train(weights, str(tmp_path / "short"), None, **short)
    assert (
        "is of step 4, and its run, with lr_scheduler_type='warmup_stable_decay', was stable from step 2 to 3"
        in say(str(tmp_path / "short" / "checkpoint-4"), **branch)
    )
    train(weights, str(tmp_path / "weights"), None, save_only_model=True, **short)
    assert "has no training_state/ (it was saved with" in say(str(tmp_path / "weights" / "checkpoint-4"), **branch)
    train(weights, str(tmp_path / "cosine"), None, max_steps=4, lr_scheduler_type="cosine")
    assert "was stable nowhere" in say(str(tmp_path / "cosine" / "checkpoint-2"), **branch)


def test_changed_schedules_are_told(weights: str, tmp_path: Path) -> None:
    """A cosine over other steps: a warning, and the rates of the new one from the first step on."""
    cosine = {"lr_scheduler_type": "cosine"}
    train(weights, str(tmp_path / "a"), None, max_steps=4, **cosine)
    source = str(tmp_path / "a" / "checkpoint-2")
    with messages() as told:
        same = train(weights, str(tmp_path / "b"), source, max_steps=4, **cosine)
    assert not told and len(same) == 2
    with messages() as told:
        last = str(tmp_path / "a" / "checkpoint-4")
        longer = train(weights, str(tmp_path / "c"), last, max_steps=8, learning_rate=1e-3, **cosine)
    assert "learning_rate=0.001 has no effect" in told.pop(0)
    assert "the learning rate changes at step 4, from 0 to" in told[0] and "(cosine over 4 steps)" in told[0]
    whole = train(weights, str(tmp_path / "d"), None, max_steps=8, **cosine)
    assert [rate for _, _, rate in longer] == [rate for _, _, rate in whole[4:]]
