"""Ids outside the vocabulary: one error on every rank, with the id, the size, the sample, and what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from pool import WorkerPool
from tiny import VOCABULARY, message, random_dataset, tiny_config, training_arguments
from transformers import AutoModelForCausalLM as StockAuto

from hf_nanotron import AutoModelForCausalLM, NanotronTrainer, NanotronTrainingArguments
from hf_nanotron.data.vocabulary import Vocabulary, foreign_id

RESIZE = "resize the stock model first (model.resize_token_embeddings(len(tokenizer)))"


def rows_with(column: str, value: int, place: int = 5, row: int = 6) -> Dataset:
    rows = random_dataset(8).to_list()
    if column == "shift_labels":
        for entry in rows:
            entry["shift_labels"] = [*entry["labels"][1:], -100]
    rows[row][column][place] = value
    return Dataset.from_list(rows)


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


# column, id -> what the message says. Row 6 is sample 0 of the second micro-batch, and the last data-parallel rank's.
FOREIGN = {
    ("input_ids", 127): "input_ids contains the id 127, but the vocabulary has 120 (ids 0 to 119)",
    ("input_ids", -1): "input_ids contains the id -1",
    ("labels", 120): "labels contains the id 120, but the vocabulary has 120 (ids 0 to 119, or -100 for a token",
    ("labels", -1): "labels contains the id -1",
    ("shift_labels", 121): "shift_labels contains the id 121",
}


def refused(directory: str, sizes: dict[str, Any], dp: int) -> dict[Any, str]:
    told: dict[Any, str] = {}
    args = NanotronTrainingArguments(
        **training_arguments(
            per_device_train_batch_size=4 // dp,
            per_device_eval_batch_size=4 // dp,
            gradient_accumulation_steps=2,
            max_steps=1,
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            **sizes,
        )
    )
    model = AutoModelForCausalLM.from_pretrained(directory, parallel=args.parallel)
    for column, value in FOREIGN:
        rows = rows_with(column, value)
        trainer = NanotronTrainer(model=model, args=args, train_dataset=rows, data_collator=collate)
        told[column, value] = message(trainer.train)
        assert trainer.state.global_step == 0
        told[column, value, "evaluation"] = message(lambda t=trainer, r=rows: t.evaluate(r))
    told["prediction"] = message(lambda: trainer.predict(rows_with("input_ids", 127).remove_columns("labels")))
    told["first label"] = message(lambda: trainer.evaluate(rows_with("labels", 500, place=0)))  # no loss reads it
    told["generation"] = message(lambda: model.generate(torch.tensor([[5, 127]]), max_new_tokens=1))
    model.eval()
    told["forward"] = message(lambda: model(input_ids=torch.tensor([[5, 127]])))
    told["right"] = message(lambda: trainer.evaluate(random_dataset(8)))
    model.mesh.close()
    return told


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("model")
    torch.manual_seed(1)
    StockAuto.from_config(tiny_config(num_hidden_layers=2)).save_pretrained(directory)
    return str(directory)


@pytest.mark.parametrize(
    ("world", "sizes"),
    [(1, {}), (2, {"tp_size": 2}), (2, {"pp_size": 2}), (2, {}), (4, {"tp_size": 2, "pp_size": 2})],
    ids=["one", "tp2", "pp2", "dp2", "tp2-pp2"],
)
def test_ids_outside_the_vocabulary(pool: WorkerPool, checkpoint: str, world: int, sizes: dict[str, Any]) -> None:
    dp = world // (sizes.get("tp_size", 1) * sizes.get("pp_size", 1))
    first, *others = pool.run(world, refused, checkpoint, sizes, dp)
    for name in first:  # replicas generate on their own
        assert name == "generation" or {other[name] for other in others} <= {first[name]}, name
    whose = "ranks " + ", ".join(map(str, range(world))) if dp < world else f"rank {world - 1}"
    sample = 0 if dp == 2 else 2
    for (column, value), said in FOREIGN.items():
        wanted = f"optimizer step 1, micro-batch 2 of 2, {whose}, sample {sample}: {said}"
        assert first[column, value].startswith(wanted), first[column, value]
        assert RESIZE in first[column, value]
        evaluated = f"Evaluation, batch 2, {whose}, sample {sample}: {said}"
        assert first[column, value, "evaluation"].startswith(evaluated), first[column, value, "evaluation"]
    assert "Prediction, batch 2" in first["prediction"] and "127" in first["prediction"]
    for name in ("generation", "forward"):
        assert "sample 0: input_ids contains the id 127" in first[name] and RESIZE in first[name]
    assert first["first label"] == first["right"] == "nothing was raised"


def test_the_size_is_that_of_the_whole_embedding(pool: WorkerPool, checkpoint: str) -> None:
    assert pool.run(2, whole_sizes, checkpoint) == [Vocabulary(VOCABULARY, VOCABULARY)] * 2


def whole_sizes(directory: str) -> Vocabulary:
    args = NanotronTrainingArguments(**training_arguments(tp_size=2))
    model = AutoModelForCausalLM.from_pretrained(directory, parallel=args.parallel)
    model.mesh.close()
    return model.vocabulary


def test_what_is_no_id() -> None:
    known = Vocabulary(10, 12)
    ids = torch.tensor([[1, 2, 3]])
    assert foreign_id({"input_ids": ids, "labels": ids + 8}, known) is None  # a head with more rows
    assert foreign_id({"input_ids": ids, "labels": ids + 9, "shift_labels": ids}, known) is None  # labels are not read
    assert foreign_id({"input_ids": ids[:, :0], "labels": ids[:, :1]}, known) is None
    assert foreign_id({"inputs_embeds": torch.ones(1, 2, 3)}, known) is None
    assert str(foreign_id({"input_ids": ids[0] + 8}, known)).startswith("sample 0: input_ids contains the id 10")
