"""The model card of a parallel run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers import Trainer
from transformers.modelcard import TrainingSummary


def write_model_card(trainer: Trainer, parallel_sizes: dict[str, int], path: Path, **fields: Any) -> None:
    """Write Trainer's card with the batch sizes that this run really had.

    Trainer multiplies batch sizes by the number of processes, as if each read samples of its own.

    Args:
        parallel_sizes: what to list besides, such as `tp_size`.
        fields: of `transformers.modelcard.TrainingSummary.from_trainer`. Tags of an earlier card are kept.
    """
    tags = fields.get("tags") or []
    tags = [tags] if isinstance(tags, str) else list(tags)
    if path.is_file():
        tags += [tag for tag in ModelCard.load(path).data.tags or [] if tag not in tags]
    fields = {"tasks": "text-generation", **{name: value for name, value in fields.items() if value is not None}}
    summary = TrainingSummary.from_trainer(trainer, **{**fields, "tags": tags})
    for name in ("distributed_type", "total_eval_batch_size"):
        summary.hyperparameters.pop(name, None)
    summary.hyperparameters["total_train_batch_size"] = trainer.get_total_train_batch_size(trainer.args)
    summary.hyperparameters.update({name: size for name, size in parallel_sizes.items() if size > 1})
    path.write_text(summary.to_model_card(), encoding="utf-8")
