"""The loop: how long it trains, what it logs and when, which callbacks it calls, and what they may change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from contract import DP2, OWN_METRICS, PP2, TP2, Flags, Kit, Recorder, both, check_same, heard, lines, ours
from pool import WorkerPool
from transformers import EarlyStoppingCallback, TrainerCallback


def trained(kit: Kit, **options: Any) -> dict[str, Any]:
    trainer = kit.trainer(**options)
    result = trainer.train()
    return {
        "steps": result.global_step,
        "loss": result.training_loss,
        "metrics": sorted(result.metrics),
        "log": lines(trainer),
        "max_steps": trainer.state.max_steps,
        "epochs": trainer.state.num_train_epochs,
        "intervals": [trainer.state.logging_steps, trainer.state.eval_steps, trainer.state.save_steps],
        "batch": trainer.state.train_batch_size * kit.replicas,
    }


# ---- how long ----

LENGTHS: dict[str, dict[str, Any]] = {
    "epochs": {"num_train_epochs": 2, "train": 10},
    "half an epoch more": {"num_train_epochs": 1.5, "train": 8},
    "steps over epochs": {"max_steps": 5, "num_train_epochs": 1, "train": 6},
    "an epoch that accumulation does not divide": {
        "num_train_epochs": 2,
        "train": 10,
        "gradient_accumulation_steps": 2,
    },
    "a batch that the data do not fill": {"num_train_epochs": 1, "train": 7, "gradient_accumulation_steps": 2},
    "drop_last": {"num_train_epochs": 2, "train": 7, "dataloader_drop_last": True},
    "fewer samples than a step takes": {"num_train_epochs": 2, "train": 4, "gradient_accumulation_steps": 4},
}


def lengths(kit: Kit) -> dict[str, Any]:
    return {name: trained(kit, logging_steps=2, **options) for name, options in LENGTHS.items()}


def test_a_run_is_as_long(pool: WorkerPool, tmp_path: Path, more: bool) -> None:
    said = check_same(pool, lengths, tmp_path, (TP2,) if more else ())
    steps = [result["steps"] for result in said.values()]
    assert steps == [10, 6, 5, 6, 2, 6, 2]


def test_a_run_is_as_long_on_data_parallel_ranks(pool: WorkerPool, tmp_path: Path, more: bool) -> None:
    """By default an epoch whose last round has a batch for one rank alone."""
    check_same(pool, whole_batches if more else uneven_batches, tmp_path, (DP2,))


def whole_batches(kit: Kit) -> dict[str, Any]:
    names = LENGTHS.keys() - {"drop_last"}
    return {name: trained(kit, logging_steps=2, **LENGTHS[name]) for name in sorted(names)}


def uneven_batches(kit: Kit) -> dict[str, Any]:
    return trained(kit, logging_steps=2, **LENGTHS["a batch that the data do not fill"])


def dropped(kit: Kit) -> dict[str, Any]:
    return trained(kit, **LENGTHS["drop_last"])


def test_what_drop_last_leaves_out_on_data_parallel_ranks(pool: WorkerPool, tmp_path: Path) -> None:
    """A batch that is not full, not a round that not all ranks have a part in: 7 batches of one sample are 4 steps."""
    for result in ours(pool, dropped, tmp_path, DP2):
        assert result["steps"] == 8
    assert both(pool, dropped)[1]["steps"] == 6


# ---- what is logged, evaluated and saved, and when ----

EVENTS: dict[str, dict[str, Any]] = {
    "defaults": {"logging_steps": 500, "save_strategy": "steps"},
    "all by steps": {
        "logging_steps": 3, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 4
    },
    "all by epochs": {"logging_strategy": "epoch", "eval_strategy": "epoch", "save_strategy": "epoch"},
    "nothing": {"logging_strategy": "no"},
    "first step": {"logging_steps": 4, "logging_first_step": True},
    "shares of the run": {"logging_steps": 0.25, "eval_strategy": "steps", "eval_steps": 0.5},
    "evaluations as often as log lines": {"logging_steps": 2, "eval_strategy": "steps"},
    "evaluations later": {"eval_strategy": "steps", "eval_steps": 1, "eval_delay": 4},
    "evaluation on start": {"eval_strategy": "steps", "eval_steps": 4, "eval_on_start": True},
    "accumulation": {"gradient_accumulation_steps": 2, "logging_steps": 1},
    "the best ones are saved": {
        "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "best", "metric_for_best_model": "loss"
    },
    "a stop within an epoch": {"max_steps": 3, "save_strategy": "epoch", "eval_strategy": "epoch"},
}  # fmt: skip


def events(kit: Kit) -> dict[str, Any]:
    said = {}
    for name, options in EVENTS.items():
        recorder = Recorder()
        trainer = kit.trainer(callbacks=[recorder], **{"num_train_epochs": 2, **options})
        trainer.train()
        said[name] = {"events": recorder.events, "log": lines(trainer)}
    return said


def test_events_come_in_order(pool: WorkerPool, tmp_path: Path) -> None:
    """All events of all strategies with the steps at which they come, and all log lines."""
    said = check_same(pool, events, tmp_path)
    first = [name for name, _ in said["accumulation"]["events"][:8]]
    assert first == [
        "on_init_end", "on_train_begin", "on_epoch_begin", "on_step_begin", "on_substep_end", "on_pre_optimizer_step",
        "on_optimizer_step", "on_step_end",
    ]  # fmt: skip


@pytest.mark.parametrize("sizes", [PP2, DP2], ids=str)
def test_events_come_in_order_on_two_ranks(
    pool: WorkerPool, tmp_path: Path, sizes: dict[str, int], pytestconfig: pytest.Config
) -> None:
    if not pytestconfig.getoption("full_matrix"):
        pytest.skip("runs with --full-matrix")
    scenario = events if sizes != PP2 else accumulated_events
    check_same(pool, scenario, tmp_path, (sizes,))


def accumulated_events(kit: Kit) -> dict[str, Any]:
    """A pipeline needs as many micro-batches as stages."""
    said = {}
    for name in ("all by steps", "all by epochs", "accumulation"):
        recorder = Recorder()
        options = {**EVENTS[name], "gradient_accumulation_steps": 2, "num_train_epochs": 2}
        trainer = kit.trainer(callbacks=[recorder], **options)
        trainer.train()
        said[name] = {"events": recorder.events, "log": lines(trainer)}
    return said


# ---- flags ----


FLAGS: dict[str, dict[tuple[str, int], dict[str, bool]]] = {
    "stop": {("on_step_end", 3): {"should_training_stop": True}},
    "stop at the end of an epoch": {("on_epoch_end", 2): {"should_training_stop": True}},
    "leave an epoch": {("on_step_end", 1): {"should_epoch_stop": True}},
    "log, evaluate and save once": {
        ("on_step_end", 2): {"should_log": True, "should_evaluate": True, "should_save": True}
    },
    "log and save at the end of an epoch": {("on_epoch_end", 2): {"should_log": True, "should_save": True}},
    "log less": {("on_step_end", 4): {"should_log": False}},
}


def flags(kit: Kit) -> dict[str, Any]:
    said = {}
    for name, plan in FLAGS.items():
        recorder, every = Recorder(), 1 if name == "log less" else 100
        trainer = kit.trainer(
            callbacks=[Flags(plan), recorder],
            gradient_accumulation_steps=2,
            num_train_epochs=3,
            logging_steps=every,
            save_strategy="steps",
            save_steps=100,
        )
        trainer.train()
        said[name] = {"events": recorder.events, "log": lines(trainer)}
    return said


def test_flags_of_callbacks_act(pool: WorkerPool, tmp_path: Path, more: bool) -> None:
    """(By default `test_ranks_differ.py` and `test_flow_agreement.py` have ranks.)"""
    said = check_same(pool, flags, tmp_path, (PP2,) if more else ())
    assert said["stop"]["events"][-1] == ["on_train_end", 3]


def stopped_within_a_step(kit: Kit) -> dict[str, Any]:
    flags = Flags({("on_substep_end", 2): {"should_training_stop": True}})
    recorder = Recorder()
    trainer = kit.trainer(callbacks=[flags, recorder], gradient_accumulation_steps=2, num_train_epochs=2)
    result = trainer.train()
    logged = [line["loss"] for line in lines(trainer) if "loss" in line]
    return {"events": recorder.events, "logged": logged, "loss": result.training_loss}


def test_a_stop_within_a_step(pool: WorkerPool, tmp_path: Path) -> None:
    """The run ends at once, as in stock; `train_loss` is the mean of the steps, without the step that was not made."""
    stock, found = both(pool, stopped_within_a_step)
    assert found["events"] == stock["events"] and found["logged"] == pytest.approx(stock["logged"], rel=1e-5)
    assert found["loss"] == pytest.approx(sum(found["logged"]) / 2, rel=1e-4)
    assert stock["loss"] > found["loss"] * 1.1


# ---- early stopping, the best model ----


def scripted(values: list[float]) -> Any:
    remaining = list(values)
    return lambda prediction: {"score": remaining.pop(0)}


STOPS: dict[str, dict[str, Any]] = {
    "patience of one": {"scores": [1, 2, 1.5, 3, 4], "patience": 1},
    "patience of two": {"scores": [1, 2, 1.5, 1.7, 4], "patience": 2},
    "less is better": {"scores": [3, 2, 2.5, 1, 1], "patience": 1, "greater_is_better": False},
    "a threshold": {"scores": [1, 1.05, 1.5, 2, 4], "patience": 1, "threshold": 0.2},
    "never": {"scores": [1, 2, 3, 4, 5], "patience": 1},
}


def early_stops(kit: Kit) -> dict[str, Any]:
    said = {}
    for name, stop in STOPS.items():
        callback = EarlyStoppingCallback(stop["patience"], stop.get("threshold", 0.0))
        trainer = kit.trainer(
            callbacks=[callback],
            compute_metrics=scripted(stop["scores"]),
            max_steps=5,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            save_total_limit=2,
            load_best_model_at_end=True,
            metric_for_best_model="score",
            greater_is_better=stop.get("greater_is_better", True),
            output_dir=str(kit.folder / name),
        )
        trainer.train()
        state = trainer.state
        trainer.compute_metrics = None
        said[name] = {
            "steps": state.global_step,
            "best": [state.best_metric, state.best_global_step, Path(state.best_model_checkpoint).name],
            "counter": callback.early_stopping_patience_counter,
            "left": sorted(path.name for path in (kit.folder / name).glob("checkpoint-*")),
            "loss": trainer.evaluate()["eval_loss"],  # of the best weights
        }
    return said


def test_early_stops_and_the_best_model(pool: WorkerPool, tmp_path: Path, more: bool) -> None:
    said = check_same(pool, early_stops, tmp_path, (TP2,) if more else ())
    assert [result["steps"] for result in said.values()] == [3, 4, 3, 2, 5]


def limit_of_one(kit: Kit) -> list[str]:
    """The best is the second of three."""
    trainer = kit.trainer(
        compute_metrics=scripted([1, 3, 2]),
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="score",
    )
    trainer.train()
    return sorted(path.name for path in (kit.folder / "out").glob("checkpoint-*"))


def test_a_limit_of_one_keeps_the_best_and_the_last(pool: WorkerPool) -> None:
    """Stock deletes the last one when the run ends."""
    stock, found = both(pool, limit_of_one)
    assert stock == ["checkpoint-2"] and found == ["checkpoint-2", "checkpoint-3"]


# ---- callbacks ----


def registered(kit: Kit) -> dict[str, Any]:
    names = lambda trainer: [type(each).__name__ for each in trainer.callback_handler.callbacks]  # noqa: E731
    with heard() as messages:
        trainer = kit.trainer(callbacks=[Recorder, EarlyStoppingCallback()], max_steps=1)
        before = names(trainer)
        trainer.add_callback(Recorder)
        popped = trainer.pop_callback(Recorder)
        missing = trainer.pop_callback(Flags)
        trainer.remove_callback(EarlyStoppingCallback)
        instance = Flags({})
        trainer.add_callback(instance)
        trainer.remove_callback(instance)
    with_bar = names(kit.trainer(max_steps=1, disable_tqdm=False))
    return {
        "before": before,
        "after": names(trainer),
        "popped": type(popped).__name__,
        "missing": missing,
        "bar": with_bar,
        "twice": any("Recorder" in message for message in messages),
    }


OWN_CALLBACKS = ["DataProgress", "Throughput", "FreezeGarbage", "StepProfiler", "RunLog"]


def test_callbacks_of_a_trainer(pool: WorkerPool) -> None:
    """Ours has more: the place in the data, speed, garbage, the profile of steps, and the log of a running job."""
    stock, found = both(pool, registered)
    for name in ("before", "after", "bar"):
        assert [each for each in found[name] if each not in OWN_CALLBACKS] == stock[name]
        assert sorted(set(found[name]) - set(stock[name])) == sorted(OWN_CALLBACKS)
    assert {**found, "before": 0, "after": 0, "bar": 0} == {**stock, "before": 0, "after": 0, "bar": 0}
    assert stock["twice"] and stock["popped"] == "Recorder" and stock["missing"] is None


class Seen(TrainerCallback):
    """What callbacks are given."""

    def __init__(self) -> None:
        self.given: dict[str, list[str]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.given["on_step_end"] = sorted(name for name, value in kwargs.items() if value is not None)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.given.setdefault("logs", sorted(logs))

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self.given["metrics"] = sorted(metrics)


def given(kit: Kit) -> dict[str, Any]:
    seen = Seen()
    trainer = kit.trainer(callbacks=[seen], max_steps=2, eval_strategy="steps", eval_steps=2, processing_class=words())
    trainer.train()
    return seen.given


def words() -> Any:
    from test_cli import tokenizer

    return tokenizer()


def test_what_callbacks_are_given(pool: WorkerPool) -> None:
    stock, found = both(pool, given)
    assert found["on_step_end"] == stock["on_step_end"] and found["metrics"] == stock["metrics"]
    assert set(found["logs"]) - set(stock["logs"]) == OWN_METRICS - {"mfu"}  # of GPUs whose peak is known
    assert set(stock["logs"]) <= set(found["logs"])
