"""Evaluation and prediction: metrics of a user's functions, data of many shapes, and what comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from contract import DP2, TP2, Kit, Recorder, check_same, without_clock
from pool import WorkerPool
from tiny import random_dataset


def accuracy(prediction: Any) -> dict[str, float]:
    predictions, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    if predictions.ndim == 3:
        predictions = predictions.argmax(-1)
    return {"accuracy": float((predictions[:, :-1] == labels[:, 1:]).mean())}


class Batched:
    """Metrics that are summed batch by batch (`batch_eval_metrics`)."""

    def __init__(self) -> None:
        self.rows, self.sum = 0, 0.0

    def __call__(self, prediction: Any, compute_result: bool) -> dict[str, float] | None:
        self.rows += len(prediction.predictions)
        self.sum += float(np.asarray(prediction.predictions.float()).sum())
        if not compute_result:
            return None
        result = {"rows": float(self.rows), "sum": self.sum}
        self.rows, self.sum = 0, 0.0
        return result


def with_inputs(prediction: Any) -> dict[str, float]:
    inputs, losses = np.asarray(prediction.inputs), np.asarray(prediction.losses)
    return {"first": float(inputs[0, 0]), "ids": float(inputs.sum()), "losses": float(losses.sum()), "n": len(losses)}


EVALUATIONS: dict[str, dict[str, Any]] = {
    "the loss alone": {},
    "a metric": {"compute_metrics": accuracy},
    "a number that the batch does not divide": {"compute_metrics": accuracy, "evaluate": 7},
    "logits made smaller": {
        "compute_metrics": accuracy, "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1)
    },
    "metrics batch by batch": {"compute_metrics": Batched, "batch_eval_metrics": True, "evaluate": 7},
    "inputs and losses": {"compute_metrics": with_inputs, "include_for_metrics": ["inputs", "loss"]},
    "no predictions": {"compute_metrics": accuracy, "prediction_loss_only": True},
    "moved to the CPU in between": {"compute_metrics": accuracy, "eval_accumulation_steps": 1},
    "drop_last": {"evaluate": 7, "dataloader_drop_last": True},
    "rows of several lengths": {"evaluate": "ragged", "compute_metrics": lambda p: {"shape": p.predictions.shape[1]}},
    "a stream": {"evaluate": "stream", "compute_metrics": accuracy},
    "label smoothing": {"label_smoothing_factor": 0.1},
}  # fmt: skip


def sets(name: Any) -> Any:
    if name == "ragged":
        return random_dataset(6, length=8, seed=2, ragged=True)
    return random_dataset(6, length=8, seed=1).to_iterable_dataset() if name == "stream" else name


def evaluations(kit: Kit) -> dict[str, Any]:
    said = {}
    for name, options in EVALUATIONS.items():
        options = {**options, "evaluate": sets(options.get("evaluate", 6))}
        if options.get("compute_metrics") is Batched:
            options["compute_metrics"] = Batched()
        trainer = kit.trainer(**options)
        first = trainer.evaluate()
        said[name] = [without_clock(first), without_clock(trainer.evaluate(metric_key_prefix="held_out"))]
    return said


def test_evaluations(pool: WorkerPool, tmp_path: Path, more: bool) -> None:
    said = check_same(pool, evaluations, tmp_path, (TP2,) if more else ())
    assert said["metrics batch by batch"][0]["eval_rows"] == 7
    assert "eval_accuracy" not in said["no predictions"][0] and "held_out_accuracy" in said["a metric"][1]


def test_evaluations_on_data_parallel_ranks(pool: WorkerPool, tmp_path: Path) -> None:
    check_same(pool, shared_evaluations, tmp_path, (DP2,))


def shared_evaluations(kit: Kit) -> dict[str, Any]:
    """Losses of a batch are weighed by rows, so batches are of equal size here."""
    said = {}
    for name in ("a metric", "logits made smaller", "inputs and losses", "no predictions", "a stream"):
        options = {**EVALUATIONS[name], "evaluate": sets(EVALUATIONS[name].get("evaluate", 8))}
        said[name] = without_clock(kit.trainer(**options, eval_batch=2).evaluate())
        if name == "inputs and losses":
            del said[name]["eval_losses"], said[name]["eval_n"]
        said[name].pop("eval_loss")
    return said


def ids_alone(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"input_ids": torch.tensor([row["input_ids"] for row in rows])}


def predictions(kit: Kit) -> dict[str, Any]:
    said: dict[str, Any] = {}
    rows = random_dataset(5, length=8, seed=1)
    recorder = Recorder()
    trainer = kit.trainer(compute_metrics=accuracy, callbacks=[recorder])
    result = trainer.predict(rows)
    said["whole"] = [
        result.predictions.sum(),
        result.predictions.shape,
        result.label_ids.sum(),
        without_clock(result.metrics),
    ]
    said["events"] = recorder.events
    trainer = kit.trainer(data_collator=ids_alone)
    unlabelled = trainer.predict(rows.remove_columns("labels"))
    said["without labels"] = [unlabelled.predictions.sum(), unlabelled.label_ids, without_clock(unlabelled.metrics)]
    said["prefix"] = without_clock(trainer.predict(rows, metric_key_prefix="quiz").metrics)
    said["ignored"] = np.shape(trainer.predict(rows, ignore_keys=["past_key_values"]).predictions)
    lists = kit.trainer(eval_do_concat_batches=False).predict(rows)
    said["lists"] = [[np.shape(each) for each in lists.predictions], [np.shape(each) for each in lists.label_ids]]
    ragged = kit.trainer().predict(random_dataset(5, length=8, seed=2, ragged=True))
    said["padded"] = [ragged.predictions.shape, (ragged.predictions == -100).sum(), ragged.label_ids.sum()]
    return said


def test_predictions(pool: WorkerPool, tmp_path: Path, more: bool) -> None:
    said = check_same(pool, predictions, tmp_path, (TP2,) if more else ())
    assert said["whole"][1] == [5, 8, 120] and said["lists"][0] == [[2, 8, 120], [2, 8, 120], [1, 8, 120]]


def several(kit: Kit) -> dict[str, Any]:
    """A mapping of data sets: each with its prefix; the best model by one of them."""
    data = {name: random_dataset(4, length=8, seed=seed) for name, seed in (("first", 1), ("second", 2))}
    trainer = kit.trainer(
        evaluate=data,
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="second_loss",
        greater_is_better=False,
    )
    trainer.train()
    loaders = [len(trainer.get_eval_dataloader(name)) for name in data]
    own = without_clock(trainer.evaluate(random_dataset(2, length=8, seed=3)))
    return {
        "log": [without_clock(line) for line in trainer.state.log_history],
        "best": [trainer.state.best_metric, trainer.state.best_global_step],
        "loaders": loaders,
        "all": without_clock(trainer.evaluate()),
        "own": own,
    }


def test_several_sets(pool: WorkerPool, tmp_path: Path, more: bool) -> None:
    said = check_same(pool, several, tmp_path, (TP2,) if more else ())
    assert {"eval_first_loss", "eval_second_loss"} <= said["all"].keys() and "eval_loss" in said["own"]


def while_training(kit: Kit) -> dict[str, Any]:
    """Evaluating between and before runs changes no step; metrics of a run do not tell of preparing the model."""
    result = {}
    for name, before in (("alone", False), ("evaluated before", True)):
        trainer = kit.trainer(max_steps=2, eval_strategy="steps", eval_steps=1)
        if before:
            trainer.evaluate()
        trainer.train()
        result[name] = [
            {key: value for key, value in line.items() if key.endswith("loss") or key == "grad_norm"}
            for line in trainer.state.log_history
        ]
        result[f"{name}, keys"] = [
            sorted(name for name in line if name.startswith("eval_")) for line in trainer.state.log_history
        ]
    return result


def test_evaluation_while_training(pool: WorkerPool, tmp_path: Path) -> None:
    said = check_same(pool, while_training, tmp_path)
    assert said["evaluated before"] == said["alone"]
    assert not any("eval_model_preparation_time" in keys for keys in said["alone, keys"])
