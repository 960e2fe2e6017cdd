"""What a trainer hides from Python's garbage collector, and what it leaves alone."""

from __future__ import annotations

import gc
from typing import Any

import pytest
from pool import WorkerPool
from test_gradients import stock_model
from tiny import pad_batch, random_dataset, training_arguments
from transformers import TrainerCallback

from hf_nanotron import NanotronTrainer, NanotronTrainingArguments


class Frozen(TrainerCallback):
    """How many objects were frozen at the beginning of each step. The last step may fail."""

    def __init__(self, fails: bool) -> None:
        self.counts: list[int] = []
        self.fails = fails

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.counts.append(gc.get_freeze_count())
        if self.fails and len(self.counts) == 2:
            raise RuntimeError("on purpose")


def frozen_by_training(fails: bool) -> tuple[list[int], int]:
    callback = Frozen(fails)
    trainer = NanotronTrainer(
        model=stock_model("llama"), args=NanotronTrainingArguments(**training_arguments(max_steps=2)),
        train_dataset=random_dataset(8), data_collator=pad_batch, callbacks=[callback],
    )  # fmt: skip
    if fails:
        with pytest.raises(RuntimeError, match="on purpose"):
            trainer.train()
    else:
        trainer.train()
    return callback.counts, gc.get_freeze_count()


def with_and_without_what_a_user_froze() -> tuple[int, list[tuple[list[int], int]]]:
    """`preloaded.py` has frozen what it imported, as a user would."""
    frozen = gc.get_freeze_count()
    gc.enable()
    found = [frozen_by_training(fails=False)]
    gc.unfreeze()
    try:
        found += [frozen_by_training(fails) for fails in (False, True)]
    finally:
        gc.freeze()
        gc.disable()
    return frozen, found


def test_training_freezes_for_itself_and_takes_back_only_that(pool: WorkerPool) -> None:
    ((frozen, ((counts, afterwards), *ours)),) = pool.run(1, with_and_without_what_a_user_froze)
    assert frozen > 1000 and all(0.99 * frozen <= count <= frozen for count in (*counts, afterwards))  # some die
    for (before, meanwhile), after in ours:
        assert before == after == 0 and meanwhile > 1000
