"""Batches whose rows are not their samples: packed by a padding-free collator, or several rows for a sample.

Evaluation weighs samples, and training fills rows up under sequence parallelism, with the figures of stock Trainer in
one process.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from datasets import Dataset
from pool import WorkerPool
from test_evaluation import Make, Result, Stream, assert_same, checkpoint, parallel_maker, stock_maker
from tiny import History, pad_batch, random_dataset
from transformers import DataCollatorWithFlattening, EvalPrediction

from hf_nanotron.data.padding import pad_sequence

SAMPLES, BATCH = 7, 2  # the last batch has one sample


def flatten(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """All that transformers' padding-free collator can say."""
    return DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)(rows)


def flatten_in_another_order(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The first entry is no tensor, and the first tensor says nothing about rows or samples."""
    batch = flatten(rows)
    names = ["max_length_q", "cu_seq_lens_q", *batch]
    return {"note": None, "names": ["a", "b"], **{name: batch[name] for name in names}}


def doubled(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Two rows for each sample."""
    return pad_batch([row for row in rows for _ in range(2)])


def sums(prediction: EvalPrediction) -> dict[str, float]:
    return {
        "rows": len(prediction.label_ids),
        "logits": prediction.predictions[prediction.predictions != -100].sum() / 1e3,
        "labels": prediction.label_ids[prediction.label_ids != -100].sum(),
    }


class RunningSums:
    """For `batch_eval_metrics`."""

    def __init__(self) -> None:
        self.labels = 0

    def __call__(self, prediction: EvalPrediction, compute_result: bool) -> dict[str, float]:
        self.labels += int(prediction.label_ids[prediction.label_ids != -100].sum())
        return {"labels": self.labels} if compute_result else {}


def rows_of(samples: int = SAMPLES) -> Dataset:
    return random_dataset(samples, seed=5, ragged=True)


def evaluations(make: Make) -> dict[str, Result]:
    results: dict[str, Result] = {}
    for collator in (flatten, flatten_in_another_order, doubled, pad_batch):
        common = {"data_collator": collator, "eval_dataset": rows_of()}
        results[collator.__name__] = {
            "loss": make({"remove_unused_columns": False}, **common).evaluate(),
            "metrics": make({"eval_accumulation_steps": 1}, **common, compute_metrics=sums).evaluate(),
            "prediction_loss_only": make({"prediction_loss_only": True}, **common).predict(rows_of())._asdict(),
            "predict": make(**common).predict(rows_of())._asdict(),
            "batches": make({"batch_eval_metrics": True}, **common, compute_metrics=RunningSums()).evaluate(),
            "losses": make({"include_for_metrics": ["loss"]}, **common, compute_metrics=losses_of).evaluate(),
            "even": make(**common).evaluate(rows_of(8)),
            "few": make(**common).evaluate(rows_of(1)),
        }
        if collator is not flatten_in_another_order:  # accelerate, which deals out streams in stock Trainer, refuses it
            for samples in (1, 6, SAMPLES):
                stream = make(**common, compute_metrics=sums).evaluate(Stream(rows_of(samples)))
                results[collator.__name__][f"stream of {samples}"] = stream
    return results


def losses_of(prediction: EvalPrediction) -> dict[str, float]:
    assert prediction.losses is not None
    return {"count": len(prediction.losses), "sum": prediction.losses.sum()}


def parallel_evaluations(directory: str, sizes: dict[str, Any]) -> dict[str, Result]:
    make = parallel_maker(directory, {**sizes, "per_device_eval_batch_size": BATCH})
    return evaluations(make)


@functools.cache
def expected() -> tuple[str, dict[str, Result]]:
    directory = checkpoint()
    make = stock_maker(directory)
    size = {"per_device_eval_batch_size": BATCH}
    return directory, evaluations(lambda arguments=None, **kwargs: make({**size, **(arguments or {})}, **kwargs))


TOPOLOGIES: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}), "tp2": (2, {"tp_size": 2}), "pp2": (2, {"pp_size": 2}), "dp2": (2, {}), "dp4": (4, {}),
}  # fmt: skip


REPEATED = ("one process", "tp2", "dp4")  # "dp2" and "pp2" meet the same batches


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.full_matrix] * (name in REPEATED)) for name in TOPOLOGIES]
)
def test_evaluation_weighs_samples(pool: WorkerPool, name: str) -> None:
    directory, wanted = expected()
    world, sizes = TOPOLOGIES[name]
    for rank, got in enumerate(pool.run(world, parallel_evaluations, directory, sizes)):
        assert_same(got, wanted, f"rank {rank}")


def test_stock_weighs_samples() -> None:
    """What is pinned above: batches of 2, 2, 2 and 1 samples weigh 2, 2, 2 and 1, though each is one row."""
    directory, wanted = expected()
    model = stock_maker(directory)(eval_dataset=rows_of()).model.eval()
    losses = []
    for start in range(0, SAMPLES, BATCH):
        batch = flatten([rows_of()[i] for i in range(start, min(start + BATCH, SAMPLES))])
        with torch.no_grad():
            losses.append(model(**batch).loss.item())
    weighed = sum(loss * weight for loss, weight in zip(losses, (2, 2, 2, 1), strict=True)) / SAMPLES
    assert wanted["flatten"]["loss"]["eval_loss"] == pytest.approx(weighed, rel=1e-6)
    assert abs(weighed - sum(losses) / 4) > 1e-3


# ---- rows that are filled up ----


def masked_squares(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A mask that the collator makes itself, additive, `[B, 1, S, S]`: documents of five tokens."""
    batch = pad_batch(rows)
    length = batch["input_ids"].shape[1]
    document = torch.arange(length) // 5
    sees = (document[:, None] == document[None]) & (torch.arange(length)[:, None] >= torch.arange(length)[None])
    mask = torch.zeros(len(rows), 1, length, length).masked_fill(~sees, torch.finfo(torch.float32).min)
    return {**batch, "attention_mask": mask}


def seen_squares(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The same as bool."""
    batch = masked_squares(rows)
    return {**batch, "attention_mask": batch["attention_mask"] == 0}


def with_masks(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What TRL's collators leave in a batch."""
    batch = pad_batch(rows)
    ones = torch.ones_like(batch["input_ids"])
    return {**batch, "attention_mask": ones, "completion_mask": ones, "assistant_masks": ones, "seq_lengths": [[3]]}


def packed_rows(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Two packed rows of equal length; bounds over the tokens of both."""
    length = min(len(row["input_ids"]) for row in rows)
    batch = pad_batch([{name: row[name][:length] for name in ("input_ids", "labels")} for row in rows])
    positions = torch.cat([torch.arange(4), torch.arange(length - 4)]).expand(len(rows), -1)
    starts = [start for row in range(len(rows)) for start in (row * length, row * length + 4)]
    bounds = torch.tensor([*starts, len(rows) * length], dtype=torch.int32)
    longest = torch.tensor(length - 4)
    return {
        **batch,
        "position_ids": positions,
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
    }


COLLATORS = (flatten, masked_squares, seen_squares, with_masks, packed_rows)


def train_each(directory: str, sizes: dict[str, Any] | None) -> dict[str, Any]:
    """A fresh model for each collator."""
    results = {}
    for index in range(len(COLLATORS)):
        make = stock_maker(directory) if sizes is None else parallel_maker(directory, sizes)
        results.update(train_one(make, index))
    return results


def train_one(make: Make, index: int) -> dict[str, Any]:
    collator, history = COLLATORS[index], History()
    arguments = {
        "max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-2,
        "remove_unused_columns": False, "train_sampling_strategy": "sequential", "lr_scheduler_type": "constant",
        "warmup_steps": 0,
    }  # fmt: skip
    rows = random_dataset(12, length=15, seed=2, ragged=True)
    make(arguments, train_dataset=rows, data_collator=collator, callbacks=[history]).train()
    return {collator.__name__: {"losses": history.losses, "norms": history.norms}}


@pytest.mark.parametrize(
    "sizes", [pytest.param({"tp_size": 4}, marks=pytest.mark.full_matrix), {"tp_size": 2, "pp_size": 2}], ids=str
)
def test_training_on_rows_that_are_filled_up(pool: WorkerPool, sizes: dict[str, Any]) -> None:
    directory, _ = expected()
    (wanted,) = pool.run(1, train_each, directory, None)
    for got in pool.run(4, train_each, directory, sizes):
        for name, figures in wanted.items():
            assert got[name]["losses"] == pytest.approx(figures["losses"], rel=1e-5), name
            assert got[name]["norms"] == pytest.approx(figures["norms"], rel=1e-4), name


def test_what_tokens_that_fill_up_get() -> None:
    ids = torch.arange(10).view(2, 5)
    batch = {
        "input_ids": ids,
        "position_ids": torch.tensor([[0, 1, 2, 0, 1]]).expand(3, 2, 5),
        "seq_idx": torch.tensor([[0, 0, 0, 1, 1], [0, 1, 1, 1, 2]], dtype=torch.int32),
        "cu_seq_lens_q": torch.tensor([0, 3, 5, 6, 9, 10], dtype=torch.int32),
        "cu_seq_lens_k": torch.tensor([[0, 3, 5, 5], [0, 1, 4, 5]]),
        "max_length_q": 2, "max_length_k": torch.tensor(5), "cache_position": torch.arange(5), "rows": torch.ones(2),
        "token_type_ids": ids, "completion_mask": ids, "num_items_in_batch": torch.tensor(3), "names": ["a"],
        "attention_mask": {"full": torch.ones(2, 1, 5, 5, dtype=torch.bool), "none": None},
    }  # fmt: skip
    filled = pad_sequence(batch, 4)
    assert filled["position_ids"][2, 1].tolist() == [0, 1, 2, 0, 1, 0, 1, 2]
    assert filled["seq_idx"].tolist() == [[0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 1, 1, 2, 3, 3, 3]]
    assert (
        filled["cu_seq_lens_q"].tolist() == [0, 3, 5, 8, 9, 12, 13, 16] and filled["cu_seq_lens_q"].dtype == torch.int32
    )
    assert filled["cu_seq_lens_k"].tolist() == [[0, 3, 5, 5, 8], [0, 1, 4, 5, 8]]
    assert filled["max_length_q"] == 3 and filled["max_length_k"] == 5
    assert filled["cache_position"].tolist() == list(range(8)) and filled["rows"].shape == (2,)
    assert filled["token_type_ids"][:, 5:].eq(0).all() and filled["completion_mask"].shape == (2, 8)
    square = filled["attention_mask"]["full"][0, 0]
    assert square[:5, 5:].eq(0).all() and torch.equal(square[5:], torch.eye(8, dtype=torch.bool)[5:])
    for name, tensor in {
        "weights": torch.ones(2, 5), "segments": torch.ones(5), "attention_mask": torch.ones(2, 1, 5, 5).long(),
        "labels": torch.ones(2, 4), "seq_idx": torch.ones(2, 4),
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"'{name}' of shape .*cannot be padded"):
            pad_sequence({**batch, name: tensor}, 4)
