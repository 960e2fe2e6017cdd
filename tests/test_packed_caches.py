"""Packed documents stay apart wherever the model is called, also where its config asks for a key-value cache.

A text model that makes itself a cache does not look for documents in `position_ids`. Trainer's `use_cache` is that of
the outermost config: under stock Trainer the text model of gemma3n, which needs timm, has a cache while it trains.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from family_runs import tiny_model
from tiny import History, training_arguments
from transformers import default_data_collator

from hf_nanotron import NanotronTrainer, NanotronTrainingArguments

DOCUMENTS = (7, 3, 6)


def rows() -> Dataset:
    """No row predicts the first token of a document."""
    ids = torch.randint(3, 100, (4, sum(DOCUMENTS)), generator=torch.Generator().manual_seed(3))
    positions = torch.cat([torch.arange(length) for length in DOCUMENTS]).expand_as(ids)
    columns = {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(positions == 0, -100)}
    return Dataset.from_dict({name: value.tolist() for name, value in columns.items()})


def loss_alone() -> float:
    """Of the first row, each document by itself through the stock model."""
    model, row, total, at = tiny_model("llama").eval(), rows()[0], 0.0, 0
    for length in DOCUMENTS:
        ids = torch.tensor(row["input_ids"][at : at + length])[None]
        with torch.no_grad():
            total += float(model(ids, labels=ids, use_cache=False).loss) * (length - 1)
        at += length
    return total / (sum(DOCUMENTS) - len(DOCUMENTS))


class NamesInputs(NanotronTrainer):
    """Calls the model with what it needs, without `use_cache`, as a `compute_loss` may."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        logits = model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"]).logits
        labels = inputs["labels"][:, 1:].flatten()
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels)
        return (loss, {"logits": logits}) if return_outputs else loss


@pytest.mark.parametrize("trainer_class", [NanotronTrainer, NamesInputs])
def test_packed_documents_stay_apart_in_training_and_evaluation(trainer_class: Any) -> None:
    """`use_cache=True` leaves the config of the text model as that of a composite one is."""
    history = History()
    overrides = {"max_steps": 1, "use_cache": True, "prediction_loss_only": True, "per_device_eval_batch_size": 1}
    trainer = trainer_class(
        model=tiny_model("llama"),
        args=NanotronTrainingArguments(**training_arguments(**overrides), train_sampling_strategy="sequential"),
        train_dataset=rows(),
        eval_dataset=rows().select([0]),
        data_collator=default_data_collator,
        callbacks=[history],
    )
    assert trainer.model.config.use_cache
    try:
        assert trainer.evaluate()["eval_loss"] == pytest.approx(loss_alone(), rel=1e-5)
        trainer.train()
    finally:
        trainer.mesh.close()
    assert history.losses[0] == pytest.approx(loss_alone(), rel=1e-5)
