"""Snapshots in the memory of hosts: a restart goes on from them, with the same samples, and losses equal bit for bit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from pool import JobError, WorkerPool
from test_gradients import stock_model
from tiny import History, pad_batch, random_dataset, training_arguments
from transformers import TrainerCallback

from hf_nanotron import AutoModelForCausalLM as ParallelAuto, NanotronTrainer, NanotronTrainingArguments


class Dies(TrainerCallback):
    """Breaks off at the beginning of a step, on every rank."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise RuntimeError("the cable was pulled")


def run(output: str, overrides: dict[str, Any], dies_at: int | None = None, resume: str | None = "auto") -> Any:
    """Losses by step, of this call of `train`."""
    values = {"save_strategy": "steps", "save_steps": 100, "max_steps": 7, "memory_snapshot_steps": 2, **overrides}
    values.setdefault("memory_snapshot_dir", str(Path(output).parent / "memory"))
    args = NanotronTrainingArguments(**training_arguments(output_dir=output, **values))
    model = ParallelAuto.from_pretrained(str(Path(output).parent / "start"), parallel=args.parallel)
    history = History()
    callbacks = [history] if dies_at is None else [history, Dies(dies_at)]
    trainer = NanotronTrainer(
        model=model, args=args, train_dataset=random_dataset(64), eval_dataset=random_dataset(8, seed=1),
        data_collator=pad_batch, callbacks=callbacks,
    )  # fmt: skip
    try:
        trainer.train(resume_from_checkpoint=resume)
    finally:
        losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
        (Path(output).parent / f"began-{os.environ.get('RANK', 0)}").write_text(str(7 - len(history.losses)))
        trainer.mesh.close()
    return losses


@pytest.fixture
def start(tmp_path: Path) -> Path:
    stock_model("llama").save_pretrained(tmp_path / "start")
    (tmp_path / "memory").mkdir()
    return tmp_path


def test_a_restart_goes_on_from_memory(pool: WorkerPool, start: Path) -> None:
    expected = pool.run(
        2, run, str(start / "whole"), {"memory_snapshot_steps": None, "memory_snapshot_dir": "/dev/shm"}
    )[0]
    with pytest.raises(JobError, match="the cable was pulled"):
        pool.run(2, run, str(start / "out"), {}, 5)
    assert not list((start / "out").glob("checkpoint-*"))
    assert len(list((start / "memory").iterdir())) == 1
    found = pool.run(2, run, str(start / "out"), {})[0]
    print(found, expected)
    assert found == expected
    assert (start / "began-0").read_text() == "4"
    assert not list((start / "memory").iterdir())
