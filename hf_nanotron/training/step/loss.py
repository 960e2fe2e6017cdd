"""The micro-batches of an optimizer step whose loss is not the model's plain one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from ...models.base import ParallelModel
from ...models.logits import whole_outputs
from ...models.stage import Stage
from ...models.training_loss import MicroBatch
from ...parallel.batch import EMBEDDINGS
from ...parallel.tp.loss import shifted


@dataclass(frozen=True)
class StepLoss:
    """How the loss of each micro-batch is made, from whole logits.

    Args:
        share: what each loss is multiplied by.
        takes_items: whether the model is called with `num_items_in_batch`.
        copies: what `num_items_in_batch` is divided by first.
        of_outputs: `(outputs, labels, items)` -> loss, on the last stage; the model is called without labels.
        takes_shifted: whether that is called with `shift_labels`, too.
        of_batch: `(inputs, items)` -> loss, which calls the model itself; for a model of one stage.
    """

    share: float | torch.Tensor = 1.0
    takes_items: bool = True
    copies: int = 1
    of_outputs: Callable[..., torch.Tensor] | None = None
    takes_shifted: bool = False
    of_batch: Callable[[dict[str, Any], Any], torch.Tensor] | None = None

    def hand_over(
        self, batch: dict[str, Any], filled: dict[str, Any], counts: bool
    ) -> tuple[dict[str, Any], MicroBatch]:
        """The inputs of the model for one micro-batch, and what its last stage knows besides.

        `filled` is `batch` padded to a length that sequence parallelism can split; `counts`: it has a loss.
        """
        inputs = dict(batch)
        items = inputs.pop("num_items_in_batch")
        items = None if items is None else items / self.copies
        if self.takes_items and self.of_batch is None and items is not None:
            inputs["num_items_in_batch"] = items
        longer = {id(value): filled[name] for name, value in batch.items() if filled[name] is not value}
        calls_model = self.of_batch is not None
        micro_batch = MicroBatch(self.share, counts, self.of_outputs, items=items, filled=longer, by_caller=calls_model)
        if self.of_outputs is not None:
            micro_batch.labels = labels = inputs.pop("labels", None)
            micro_batch.shift_labels = inputs.get("shift_labels")
            if self.takes_shifted and labels is not None:
                targets = shifted(labels, inputs.pop("shift_labels", None))
                micro_batch.loss = functools.partial(self.of_outputs, shift_labels=targets)
        return inputs, micro_batch


class BatchStage:
    """The one stage of a model whose loss is computed by `of_batch` (of a `StepLoss`), which calls the whole model."""

    def __init__(self, model: ParallelModel, stage: Stage, of_batch: Callable[..., torch.Tensor]) -> None:
        self.index, self.is_first, self.is_last = stage.index, stage.is_first, stage.is_last
        self._model, self._of_batch = model, of_batch

    def forward(self, inputs: dict[str, Any], received: Any) -> Any:
        """An object with the loss of a micro-batch alone."""
        micro_batch = self._model.training_loss.micro_batch
        assert micro_batch is not None
        model = self._model
        if not micro_batch.counts:  # of a batch that `compute_loss` may take apart, the model gets what it names
            ignored = {"labels", *inputs} - {"input_ids", EMBEDDINGS, "attention_mask", "position_ids", "use_cache"}
            model(**{name: value for name, value in inputs.items() if name not in ignored})
            return SimpleNamespace(loss=micro_batch.weigh(None))
        with whole_outputs(model, model):
            given = {name: value for name, value in inputs.items() if name != "use_cache"}
            loss = self._of_batch(given, micro_batch.items)
        if model.mesh.tp_size > 1 and micro_batch.logits is None:
            raise ValueError(
                f"compute_loss called neither the model nor its head. With tp_size={model.mesh.tp_size} each rank only "
                "has a shard of each weight, so a loss computed from weights would be wrong. Call model(**inputs), or "
                "model.get_output_embeddings()(hidden), or use tp_size=1."
            )
        micro_batch.logits = None
        return SimpleNamespace(loss=micro_batch.weigh(loss))
