"""The trainer's public calls that communicate: each is made on every rank, or fails within seconds."""

from __future__ import annotations

import os
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import has_length

from ..parallel.mesh import ParallelMesh


class CollectiveTrainer(Trainer):
    """A Trainer whose ranks come together before they communicate (see `parallel.roll_call`)."""

    mesh: ParallelMesh

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        self.mesh.assemble("train", f" with resume_from_checkpoint={resume_from_checkpoint or None}")
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> Any:
        self.mesh.assemble("evaluate", _size(self.eval_dataset if eval_dataset is None else eval_dataset))
        return super().evaluate(eval_dataset, *args, **kwargs)

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        self.mesh.assemble("predict", _size(test_dataset))
        return super().predict(test_dataset, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        self.mesh.assemble("save_model", f" to {os.fspath(output_dir or self.args.output_dir or '.')}")
        super().save_model(output_dir, *args, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        self.mesh.assemble("push_to_hub")
        return super().push_to_hub(*args, **kwargs)


def _size(dataset: Any) -> str:
    """For people, and compared between ranks: how many samples `dataset` has."""
    if isinstance(dataset, dict):
        return "".join(f" {name!r}{_size(part)}" for name, part in dataset.items())
    if isinstance(dataset, str):  # a name in `eval_dataset`
        return f" {dataset!r}"
    return f" over {len(dataset)} samples" if has_length(dataset) else ""
