"""`evaluate()` and `predict()` give on every topology what stock `transformers.Trainer` gives in one process.

Each scenario is written once, for any trainer, and run with both. The evaluation set divides by neither the batch nor
the data-parallel size, its samples have different lengths, and different numbers of labels.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from pool import WorkerPool
from tiny import History, pad_batch, random_dataset, tiny_config, training_arguments
from transformers import AutoModelForCausalLM, EvalPrediction, Trainer, TrainingArguments

SAMPLES, BATCH = 11, 4  # batches of 4, 4 and 3: with two data-parallel ranks, one has nothing to do in the last round
TIMES = ("_runtime", "_per_second", "_preparation_time")

Make = Callable[..., Trainer]
Result = dict[str, Any]


def checkpoint(layers: int = 2) -> str:
    """A Hub checkpoint of random weights, whose vocabulary two ranks do not divide."""
    directory = tempfile.mkdtemp()
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(tiny_config(num_hidden_layers=layers, vocab_size=131)).save_pretrained(directory)
    return directory


# ---- what users pass ----


def token_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy, and the mean logit of the right token, which no other prediction would give."""
    logits, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
    keep = labels != -100
    right = np.take_along_axis(logits, np.where(keep, labels, 0)[..., None], -1)[..., 0]
    return {"accuracy": (logits.argmax(-1) == labels)[keep].mean(), "logit": right[keep].mean()}


def best_tokens(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Three best tokens, whether any of them is the label, and how long the batch was for each sample."""
    assert logits.shape[:2] == labels.shape
    best = logits.topk(3, dim=-1).indices
    return best, (best == labels.unsqueeze(-1)).any(-1), torch.full((len(labels),), labels.shape[1])


def compare_inputs(prediction: EvalPrediction) -> dict[str, float]:
    """For `include_for_metrics`: figures of everything that is handed over."""
    inputs, losses = prediction.inputs, prediction.losses
    assert inputs is not None and losses is not None and inputs.shape == prediction.label_ids.shape
    parts = (losses, inputs, *prediction.predictions, prediction.label_ids)
    return {"samples": len(losses), **{f"sum_{index}": part.sum() for index, part in enumerate(parts)}}


class RunningAccuracy:
    """A metric for `batch_eval_metrics`: sums over batches, and a result when asked for one."""

    def __init__(self) -> None:
        self.logit = self.tokens = self.samples = 0.0

    def __call__(self, prediction: EvalPrediction, compute_result: bool) -> dict[str, float]:
        logits, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
        keep = labels != -100
        self.samples += len(labels)
        self.tokens += keep.sum().item()
        self.logit += logits.gather(-1, labels.where(keep, 0).unsqueeze(-1)).squeeze(-1)[keep].sum().item()
        return {"logit": self.logit / self.tokens, "samples": self.samples} if compute_result else {}


class Stream(torch.utils.data.IterableDataset):
    """torch's own kind of stream over the rows of a dataset."""

    def __init__(self, rows: Dataset) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)


# ---- scenarios ----


def evaluation_set(samples: int = SAMPLES, seed: int = 5) -> Dataset:
    """Short samples first, so that the batches of one round have different lengths."""
    rows = random_dataset(samples, length=14, seed=seed, ragged=True)
    return rows.select(sorted(range(samples), key=lambda index: len(rows[index]["input_ids"])))


def loss_only(make: Make) -> Result:
    """Without `compute_metrics`, no logits leave the model."""
    return make(eval_dataset=evaluation_set()).evaluate()


def predict(make: Make) -> Result:
    """Logits, labels and metrics, and those of `evaluate` under `prediction_loss_only`."""
    trainer = make(eval_dataset=evaluation_set(), compute_metrics=token_metrics)
    output = trainer.predict(evaluation_set())
    trainer.args.prediction_loss_only = True
    return {**output._asdict(), "loss only": trainer.evaluate()}


def preprocessed(make: Make) -> Result:
    """A function of logits and labels; inputs and losses for the metrics; results moved to the host on the way."""
    trainer = make(
        {"eval_accumulation_steps": 2, "include_for_metrics": ["inputs", "loss"]},
        eval_dataset=evaluation_set(),
        compute_metrics=compare_inputs,
        preprocess_logits_for_metrics=best_tokens,
    )
    return {"evaluate": trainer.evaluate(), **trainer.predict(evaluation_set())._asdict()}


def by_batch(make: Make) -> Result:
    arguments = {"batch_eval_metrics": True}
    return make(arguments, eval_dataset=evaluation_set(), compute_metrics=RunningAccuracy()).evaluate()


def several_sets(make: Make) -> Result:
    """A dict of datasets, one of which is smaller than a batch; and another prefix."""
    trainer = make(
        eval_dataset={"small": evaluation_set(3), "large": evaluation_set(9, seed=6)}, compute_metrics=token_metrics
    )
    return {**trainer.evaluate(), **trainer.evaluate(evaluation_set(5), metric_key_prefix="other")}


def without_labels(make: Make) -> Result:
    rows = evaluation_set().remove_columns("labels")
    return make(data_collator=pad_ids).predict(rows)._asdict()


def pad_ids(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {"input_ids": pad_batch([{**row, "labels": []} for row in rows])["input_ids"]}


def streams(make: Make) -> Result:
    """Both kinds of `IterableDataset`."""
    rows = evaluation_set(3 * BATCH)
    results = {}
    for name, stream in {"datasets": rows.to_iterable_dataset(), "torch": Stream(rows)}.items():
        trainer = make(eval_dataset=stream, compute_metrics=token_metrics)
        results[name] = {"evaluate": trainer.evaluate(), "predict": trainer.predict(stream)._asdict()}
    return results


def grouped_by_length(make: Make) -> Result:
    """The sampling strategy changes the order of an evaluation too, by the seed alone."""
    return make({"train_sampling_strategy": "group_by_length", "data_seed": 3}).predict(evaluation_set())._asdict()


def separate_batches(make: Make) -> Result:
    """`eval_do_concat_batches=False`: lists of batches (with data parallelism, of rounds of batches)."""
    trainer = make({"eval_do_concat_batches": False}, eval_dataset=evaluation_set())
    return {**trainer.predict(evaluation_set())._asdict(), "evaluate": trainer.evaluate()}


def whole_batches(make: Make) -> Result:
    """`dataloader_drop_last` leaves the short last batch out."""
    return make({"dataloader_drop_last": True}).predict(evaluation_set())._asdict()


SCENARIOS = (
    loss_only, predict, preprocessed, by_batch, several_sets, without_labels, streams, grouped_by_length, whole_batches,
    separate_batches,
)  # fmt: skip


def stock_maker(directory: str) -> Make:
    """Makes stock trainers of one model."""
    model = AutoModelForCausalLM.from_pretrained(directory)

    def make(arguments: dict[str, Any] | None = None, **kwargs: Any) -> Trainer:
        args = TrainingArguments(**training_arguments(**{"per_device_eval_batch_size": BATCH, **(arguments or {})}))
        return Trainer(**{"model": model, "args": args, "data_collator": pad_batch, **kwargs})

    return make


def parallel_maker(directory: str, sizes: dict[str, Any]) -> Make:
    """Makes parallel trainers of one model; call it on every rank."""
    from hf_nanotron import AutoModelForCausalLM as ParallelAuto, NanotronTrainer, NanotronTrainingArguments

    base = {"per_device_eval_batch_size": BATCH, "gradient_accumulation_steps": sizes.get("pp_size", 1), **sizes}
    parallel = NanotronTrainingArguments(**training_arguments(**base)).parallel
    model = ParallelAuto.from_pretrained(directory, parallel=parallel)

    def make(arguments: dict[str, Any] | None = None, **kwargs: Any) -> Trainer:
        args = NanotronTrainingArguments(**training_arguments(**{**base, **(arguments or {})}))
        return NanotronTrainer(**{"model": model, "args": args, "data_collator": pad_batch, **kwargs})

    return make


def run_scenarios(directory: str, sizes: dict[str, Any], names: list[str]) -> dict[str, Result]:
    make = parallel_maker(directory, sizes)
    return {name: globals()[name](make) for name in names}


@functools.cache
def expected(layers: int) -> tuple[str, dict[str, Result]]:
    """A checkpoint and what stock Trainer makes of it."""
    directory = checkpoint(layers)
    make = stock_maker(directory)
    return directory, {scenario.__name__: scenario(make) for scenario in SCENARIOS}


def assert_same(got: Any, wanted: Any, where: str = "") -> None:
    """Equal but for rounding, and for times."""
    if isinstance(wanted, dict):
        names = {name for name in wanted if not name.endswith(TIMES)}
        assert names == {name for name in got if not name.endswith(TIMES)}, where
        for name in names:
            assert_same(got[name], wanted[name], f"{where}/{name}")
    elif isinstance(wanted, list | tuple):
        assert len(got) == len(wanted), where
        for index, (one, other) in enumerate(zip(got, wanted, strict=True)):
            assert_same(one, other, f"{where}/{index}")
    elif wanted is None:
        assert got is None, where
    else:
        got, wanted = np.asarray(got), np.asarray(wanted)
        assert got.shape == wanted.shape and got.dtype == wanted.dtype, where
        if np.issubdtype(wanted.dtype, np.floating):
            np.testing.assert_allclose(got, wanted, rtol=2e-6, atol=2e-6, err_msg=where)
        else:
            np.testing.assert_array_equal(got, wanted, err_msg=where)


ALL = [scenario.__name__ for scenario in SCENARIOS]
SHARED = [name for name in ALL if name != "separate_batches"]  # what does not show how batches are dealt out
TOPOLOGIES: dict[str, tuple[int, dict[str, Any], list[str]]] = {
    "one process": (1, {}, ALL),
    "tp2 sp": (2, {"tp_size": 2}, ALL),
    "tp2": (2, {"tp_size": 2, "sequence_parallel": False}, ["loss_only", "predict"]),
    "pp2": (2, {"pp_size": 2}, ALL),
    "pp2 interleaved": (
        2, {"pp_size": 2, "pp_virtual_stages": 2, "pp_schedule": "interleaved_1f1b"}, ["predict", "streams"]
    ),
    "dp2": (2, {}, SHARED),
    "dp4": (4, {}, ["loss_only", "preprocessed", "several_sets"]),
    "tp2 pp2": (4, {"tp_size": 2, "pp_size": 2}, ["loss_only", "predict", "by_batch"]),
    "tp2 pp2 dp2": (8, {"tp_size": 2, "pp_size": 2}, ["predict"]),
    "cp2": (2, {"cp_size": 2}, ["loss_only", "predict", "by_batch"]),
    "cp2 tp2": (4, {"cp_size": 2, "tp_size": 2, "cp_mode": "heads"}, ["predict"]),
    "cp2 pp2": (4, {"cp_size": 2, "pp_size": 2}, ["loss_only", "predict"]),
}  # fmt: skip


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_evaluation_equals_stock(pool: WorkerPool, name: str) -> None:
    """Metrics, logits and labels of every scenario, on every rank."""
    world, sizes, scenarios = TOPOLOGIES[name]
    directory, wanted = expected(4 if "interleaved" in name else 2)
    for rank, got in enumerate(pool.run(world, run_scenarios, directory, sizes, scenarios)):
        for scenario in scenarios:
            assert_same(got[scenario], wanted[scenario], f"rank {rank}/{scenario}")


def stream_figures(directory: str, sizes: dict[str, Any]) -> Result:
    """A stream whose last batch is short."""
    return parallel_maker(directory, sizes)(eval_dataset=Stream(evaluation_set())).evaluate()


@pytest.mark.parametrize(("world", "sizes"), [(2, {"tp_size": 2}), (2, {})], ids=["tp2", "dp2"])
def test_every_sample_of_a_stream_weighs_the_same(pool: WorkerPool, world: int, sizes: dict[str, Any]) -> None:
    """The loss is that of the same samples in a dataset, as in stock Trainer."""
    directory, wanted = expected(2)
    for got in pool.run(world, stream_figures, directory, sizes):
        assert got["eval_loss"] == pytest.approx(wanted["loss_only"]["eval_loss"], rel=2e-6)
        assert got["eval_samples_per_second"] * got["eval_runtime"] == pytest.approx(SAMPLES, rel=0.05)


# ---- while training ----


def train_and_evaluate(make: Make, output_dir: str, micro_batches: int) -> Result:
    """Evaluations and checkpoints every two steps, and the best model at the end."""
    history = History()
    trainer = make(
        {
            "output_dir": output_dir,
            "max_steps": 6,
            "learning_rate": 5e-2,
            "gradient_accumulation_steps": micro_batches,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "save_strategy": "steps",
            "save_steps": 2,
            "load_best_model_at_end": True,
            "eval_on_start": True,
        },
        train_dataset=random_dataset(8),
        eval_dataset=evaluation_set(),
        compute_metrics=token_metrics,
        callbacks=[history],
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint is not None
    return {
        "losses": history.losses,
        "evaluations": [entry for entry in trainer.state.log_history if "eval_loss" in entry],
        "best": Path(trainer.state.best_model_checkpoint).name,
        "afterwards": trainer.evaluate(),
    }


def train_parallel_and_evaluate(directory: str, sizes: dict[str, Any], output_dir: str, micro_batches: int) -> Result:
    return train_and_evaluate(parallel_maker(directory, sizes), output_dir, micro_batches)


@pytest.mark.parametrize(("world", "sizes"), [(2, {}), (4, {"tp_size": 2, "pp_size": 2})], ids=["dp2", "tp2 pp2"])
def test_evaluation_during_training(pool: WorkerPool, world: int, sizes: dict[str, Any], tmp_path: Path) -> None:
    """Losses, evaluations, the choice of the best checkpoint, and the model that it leaves."""
    directory, _ = expected(2)
    wanted = train_and_evaluate(stock_maker(directory), str(tmp_path / "stock"), 4)
    assert wanted["best"] != "checkpoint-6", "the best model must not be the last"
    dp = world // (sizes.get("tp_size", 1) * sizes.get("pp_size", 1))
    for rank, got in enumerate(
        pool.run(world, train_parallel_and_evaluate, directory, sizes, str(tmp_path / "ours"), 4 // dp)
    ):
        assert got.pop("best") == wanted["best"]
        assert_same(got, {k: v for k, v in wanted.items() if k != "best"}, f"rank {rank}")


def noisy_metrics(prediction: EvalPrediction) -> dict[str, float]:
    return {"noise": torch.rand(()).item()}


def train_with_dropout(directory: str, sizes: dict[str, Any], output_dir: str) -> dict[str, list[float]]:
    """Losses with evaluations between the steps, and without."""
    losses = {}
    for strategy in ("steps", "no"):
        history = History()
        parallel_maker(directory, sizes)(
            {"output_dir": output_dir, "max_steps": 4, "eval_strategy": strategy, "eval_steps": 1},
            train_dataset=random_dataset(8),
            eval_dataset=evaluation_set(),
            compute_metrics=noisy_metrics,
            callbacks=[history],
        ).train()
        losses[strategy] = history.losses
    return losses


@pytest.mark.parametrize(("world", "sizes"), [(2, {"tp_size": 2}), (2, {"pp_size": 2})], ids=["tp2", "pp2"])
def test_evaluation_leaves_training_alone(pool: WorkerPool, world: int, sizes: dict[str, Any], tmp_path: Path) -> None:
    """Bit for bit, with dropout and shuffling, although the evaluation uses up random numbers."""
    directory = str(tmp_path / "model")
    torch.manual_seed(1)
    config = tiny_config(num_hidden_layers=2, attention_dropout=0.2)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    for losses in pool.run(world, train_with_dropout, directory, sizes, str(tmp_path / "out")):
        assert losses["steps"] == losses["no"]
        assert len(set(losses["no"])) == 4
