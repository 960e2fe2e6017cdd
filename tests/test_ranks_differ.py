"""Ranks that do different things: a flag of one rank acts on all, and what must agree is compared."""

from __future__ import annotations

from typing import Any

from pool import WorkerPool
from tiny import pad_batch, random_dataset, tiny_config, training_arguments
from transformers import AutoModelForCausalLM, Trainer as StockTrainer, TrainerCallback, TrainingArguments, set_seed

STEPS = 6


class Ask(TrainerCallback):
    """Sets a flag at one event of one step, on some ranks."""

    def __init__(self, event: str, step: int, flag: str, here: bool) -> None:
        def ask(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if here and state.global_step == step:
                setattr(control, flag, True)

        setattr(self, event, ask)


class Steps(TrainerCallback):
    """What happened at which step."""

    def __init__(self) -> None:
        self.seen: dict[str, list[int]] = {"save": [], "evaluate": [], "log": [], "end": []}

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen["save"].append(state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen["evaluate"].append(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in (logs or {}):
            self.seen["log"].append(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen["end"].append(state.global_step)


def asked(
    directory: str, requests: list[tuple[str, int, str]], everywhere: bool, logging_steps: int
) -> list[dict[str, list[int]]]:
    """What each request leads to, on this rank. `directory` is the job's."""
    from hf_nanotron import NanotronTrainer, NanotronTrainingArguments

    parallel = {"tp_size": 2}
    results = []
    for number, (event, step, flag) in enumerate(requests):
        settings = training_arguments(
            output_dir=f"{directory}/{number}",
            num_train_epochs=2,
            max_steps=-1,
            logging_steps=logging_steps,
        )
        args = NanotronTrainingArguments(**settings, **parallel)
        set_seed(0)
        seen = Steps()
        here = everywhere or args.process_index == 1
        trainer = NanotronTrainer(
            model=AutoModelForCausalLM.from_config(tiny_config(num_hidden_layers=1)),
            args=args,
            train_dataset=random_dataset(STEPS // 2, length=6),
            eval_dataset=random_dataset(2, length=6),
            data_collator=pad_batch,
            callbacks=[seen, Ask(event, step, flag, here)],
        )
        trainer.train()
        trainer.model.mesh.close()
        results.append(seen.seen)
    return results


def asked_of_stock(directory: str, requests: list[tuple[str, int, str]], logging_steps: int) -> list[dict[str, Any]]:
    results = []
    for event, step, flag in requests:
        set_seed(0)
        seen = Steps()
        trainer = StockTrainer(
            model=AutoModelForCausalLM.from_config(tiny_config(num_hidden_layers=1)),
            args=TrainingArguments(
                **training_arguments(
                    output_dir=directory, num_train_epochs=2, max_steps=-1, logging_steps=logging_steps
                )
            ),
            train_dataset=random_dataset(STEPS // 2, length=6),
            eval_dataset=random_dataset(2, length=6),
            data_collator=pad_batch,
            callbacks=[seen, Ask(event, step, flag, True)],
        )
        trainer.train()
        results.append(seen.seen)
    return results


# Of two epochs of three steps.
REQUESTS = [
    ("on_train_begin", 0, "should_training_stop"),
    ("on_step_begin", 1, "should_training_stop"),
    ("on_step_end", 1, "should_training_stop"),
    ("on_step_end", 1, "should_epoch_stop"),
    ("on_step_end", 1, "should_save"),
    ("on_step_end", 3, "should_save"),  # the last of an epoch
    ("on_step_end", 2, "should_evaluate"),
    ("on_pre_optimizer_step", 3, "should_log"),
    ("on_epoch_end", 3, "should_training_stop"),
    ("on_epoch_end", 3, "should_evaluate"),
    ("on_log", 2, "should_save"),
    ("on_log", 2, "should_training_stop"),
]

# What one rank asks for at a step that does not log: all ranks do it at the end of the next.
LATER = {
    ("on_step_end", 1, "should_training_stop"): {"save": [], "evaluate": [], "log": [2], "end": [2]},
    ("on_step_end", 1, "should_epoch_stop"): {"save": [], "evaluate": [], "log": [2, 4], "end": [5]},
    ("on_step_end", 1, "should_save"): {"save": [2], "evaluate": [], "log": [2, 4, 6], "end": [6]},
}


def test_flags_of_one_rank(pool: WorkerPool, tmp_path: Any) -> None:
    """In every event: all ranks do the same, at the step of stock Trainer or, between log lines, at the next."""
    wanted = asked_of_stock(str(tmp_path), REQUESTS, 2)
    everywhere = pool.run(2, asked, str(tmp_path / "all"), REQUESTS, True, 2)
    assert everywhere[0] == everywhere[1] == wanted
    alone = pool.run(2, asked, str(tmp_path / "one"), REQUESTS, False, 2)
    assert alone[0] == alone[1]
    for request, got, stock in zip(REQUESTS, alone[0], wanted, strict=True):
        assert got == LATER.get(request, stock), request
