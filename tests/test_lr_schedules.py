"""Every learning rate schedule of transformers: the rates that stock Trainer logs, to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pool import WorkerPool
from tiny import pad_batch, random_dataset, tiny_config, training_arguments
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import SchedulerType

STEPS = 12
# Both lower the rate where the evaluation loss falls by less than this share of its best, which is now and then.
ON_METRICS = {"patience": 0, "factor": 0.5, "threshold": 1e-3, "threshold_mode": "rel"}
# What each schedule needs beside its name, and cases of its own.
CASES: list[tuple[str, dict[str, Any]]] = [
    ("linear", {}),
    ("cosine", {}),
    ("cosine", {"num_cycles": 1.5}),
    ("cosine_with_restarts", {"num_cycles": 2}),
    ("polynomial", {"lr_end": 1e-4, "power": 2.0}),
    ("constant", {}),
    ("constant_with_warmup", {}),
    ("inverse_sqrt", {}),
    ("inverse_sqrt", {"timescale": 7}),
    ("reduce_lr_on_plateau", ON_METRICS),
    ("cosine_with_min_lr", {"min_lr": 1e-4}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
    ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.1}),
    ("cosine_warmup_with_min_lr", {"min_lr": 1e-4, "warmup_lr_rate": 0.2}),
    ("warmup_stable_decay", {"num_decay_steps": 5}),
    ("warmup_stable_decay", {"num_decay_steps": 3, "num_stable_steps": 4, "decay_type": "1-sqrt", "min_lr_ratio": 0.1}),
    ("greedy", {**ON_METRICS, "min_lr": 1e-4, "max_lr": 1e-2}),
]


class Rates(TrainerCallback):
    """The learning rate in the log of every step."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.rates.append(logs["learning_rate"])


def arguments(schedule: str, options: dict[str, Any], **overrides: Any) -> dict[str, Any]:
    values = {
        "max_steps": STEPS,
        "warmup_steps": 4,
        "lr_scheduler_type": schedule,
        "lr_scheduler_kwargs": options or None,
        **overrides,
    }
    if options.get("patience") is not None:
        values |= {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 2}
    return training_arguments(**values)


def rates(trainer_class: type[Trainer], model: Any, args: TrainingArguments) -> list[float]:
    recorded = Rates()
    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=random_dataset(STEPS * 2),
        eval_dataset=random_dataset(4, seed=1),
        data_collator=pad_batch,
        callbacks=[recorded],
    )
    trainer.train()
    return recorded.rates


def parallel_rates(checkpoint: str, schedule: str, options: dict[str, Any], **overrides: Any) -> list[float]:
    """Through `NanotronTrainer`; call it on every rank."""
    from hf_nanotron import AutoModelForCausalLM as ParallelAuto, NanotronTrainer, NanotronTrainingArguments

    args = NanotronTrainingArguments(**arguments(schedule, options, **overrides))
    model = ParallelAuto.from_pretrained(checkpoint, parallel=args.parallel)
    result = rates(NanotronTrainer, model, args)
    model.mesh.close()
    return result


def stock_rates(checkpoint: str, schedule: str, options: dict[str, Any], **overrides: Any) -> list[float]:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    return rates(Trainer, model, TrainingArguments(**arguments(schedule, options, **overrides)))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config(num_hidden_layers=2)).save_pretrained(path)
    return str(path)


def test_every_schedule_has_a_case() -> None:
    assert {name for name, _ in CASES} == {schedule.value for schedule in SchedulerType}


@pytest.mark.parametrize(("schedule", "options"), CASES)
def test_logged_rates_are_those_of_trainer(schedule: str, options: dict[str, Any], checkpoint: str) -> None:
    ours, expected = parallel_rates(checkpoint, schedule, options), stock_rates(checkpoint, schedule, options)
    assert len(expected) == STEPS
    assert ours == expected
    assert schedule == "constant" or len(set(expected)) > 1


TWO_RANKS: dict[str, dict[str, Any]] = {"pp2": {"pp_size": 2, "gradient_accumulation_steps": 2}, "dp2": {}}


@pytest.mark.parametrize("topology", TWO_RANKS)
def test_a_schedule_on_metrics_on_two_ranks(topology: str, checkpoint: str, pool: WorkerPool) -> None:
    """The rates follow the loss of the evaluation, which every rank must therefore know."""
    case = ("reduce_lr_on_plateau", ON_METRICS)
    expected = stock_rates(checkpoint, *case, gradient_accumulation_steps=2)
    assert 2 < len(set(expected)) < STEPS - 1  # lowered at some evaluations, and at others not
    for ours in pool.run(2, two_ranks, checkpoint, *case, TWO_RANKS[topology]):
        assert ours == expected


def two_ranks(checkpoint: str, schedule: str, options: dict[str, Any], overrides: dict[str, Any]) -> list[float]:
    return parallel_rates(checkpoint, schedule, options, **overrides)
