"""Evaluation and prediction of a parallel model, with the figures of one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.utils import find_batch_size, recursively_apply
from torch import nn
from torch.nn import functional as F
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from .data.loader import DataParallelStream, FillerBatch
from .parallel.collectives import all_gather, all_reduce
from .parallel.loss import IGNORE_INDEX
from .parallel.mesh import ParallelMesh


class EvaluatingTrainer(Trainer):
    """A Trainer whose evaluation loop reads each sample once and joins results over data-parallel ranks alone."""

    mesh: ParallelMesh

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._valid_rows: tuple[int, ...] = ()
        self._evaluated_rows = 0
        super().__init__(*args, **kwargs)

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        self._evaluated_rows = 0
        counted: Any = CountedBatches(dataloader, self._count_rows)
        output = super().evaluation_loop(counted, *args, **kwargs)
        if isinstance(getattr(dataloader, "dataset", None), DataParallelStream):
            # A stream has no length, and Trainer counts what this rank saw of it.
            output = output._replace(num_samples=self._evaluated_rows)
        return output

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Loss of one evaluation batch: the mean over its own tokens, as one process computes it."""
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        if prediction_loss_only and "labels" in inputs:
            with torch.no_grad():
                loss = model(**self._prepare_inputs(inputs), gather_logits=False).loss
            return loss.detach(), None, None
        inputs = {**inputs, "use_cache": False}
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def _count_rows(self, inputs: Any) -> None:
        """Which rows of the batches of a round, one on each data-parallel rank, are results."""
        rows = 0 if isinstance(inputs, FillerBatch) else (find_batch_size(inputs) or 0)
        counts = all_gather(torch.tensor([rows], device=self.mesh.device), self.mesh.dp, 0)
        self._valid_rows = tuple(counts.tolist())
        self._evaluated_rows += sum(self._valid_rows)

    @property
    def preprocess_logits_for_metrics(self) -> Callable[[Any, Any], Any] | None:
        """The user's function, which sees the batch of this rank alone, as in one process."""
        return self._preprocess_own_logits if self._preprocess_logits is not None else None

    @preprocess_logits_for_metrics.setter
    def preprocess_logits_for_metrics(self, value: Callable[[Any, Any], Any] | None) -> None:
        self._preprocess_logits = value

    def _preprocess_own_logits(self, padded_logits: Any, padded_labels: Any) -> Any:
        """Trainer pads to the longest batch of the round first; a maximum, say, would make tokens of that padding."""
        assert self._preprocess_logits is not None
        filled = _filled_up(padded_logits)

        def cut(data: torch.Tensor) -> torch.Tensor:
            return data[:, : data.shape[1] - filled] if filled and data.dim() > 1 else data

        result = self._preprocess_logits(recursively_apply(cut, padded_logits), recursively_apply(cut, padded_labels))
        return recursively_apply(self._pad_to_longest, result)

    def _pad_to_longest(self, data: torch.Tensor) -> torch.Tensor:
        """Fill dimension 1 up to the longest of the round, with what Trainer fills up with between batches."""
        if data.dim() < 2:
            return data
        length = data.shape[1]
        longest = all_reduce(torch.tensor(length, device=data.device), self.mesh.dp, torch.distributed.ReduceOp.MAX)
        return F.pad(data, (0, 0) * (data.dim() - 2) + (0, int(longest) - length), value=IGNORE_INDEX)

    @property
    def gather_function(self) -> Callable[[Any], Any]:
        """Join evaluation results over the data-parallel ranks, in the order of one process."""
        return self._gather_rows

    @gather_function.setter
    def gather_function(self, value: Any) -> None:
        """Trainer assigns accelerate's gather here, which would count every batch once per tp and pp rank."""

    def _gather_rows(self, data: Any) -> Any:
        if isinstance(data, list | tuple):
            return type(data)(self._gather_rows(item) for item in data)
        if isinstance(data, dict):
            return type(data)({name: self._gather_rows(item) for name, item in data.items()})
        most = max(self._valid_rows)
        own = data[: self._valid_rows[self.mesh.dp_rank]]
        padded = torch.cat((own, own.new_zeros((most - own.shape[0], *own.shape[1:]))))
        parts = all_gather(padded, self.mesh.dp, 0).chunk(self.mesh.dp_size)
        return torch.cat([part[:rows] for part, rows in zip(parts, self._valid_rows, strict=True)])


class CountedBatches:
    """A loader that shows each batch to `count` before it hands it out, so that no prediction step has to."""

    def __init__(self, loader: Any, count: Callable[[Any], None]) -> None:
        self.loader, self.count = loader, count

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        on_host = getattr(self.loader, "host_batches", None)
        for batch in self.loader if on_host is None else on_host():
            self.count(batch)
            yield batch


def _filled_up(logits: Any) -> int:
    """How many positions Trainer has added at the end of dimension 1: whole ones of its filling value."""
    first = _first_tensor(logits)
    if first is None or first.dim() < 2 or not first.shape[1]:
        return 0
    is_filled = (first == IGNORE_INDEX).flatten(2).all(2).all(0) if first.dim() > 2 else (first == IGNORE_INDEX).all(0)
    return int(is_filled.flip(0).cumprod(0).sum())


def _first_tensor(data: Any) -> torch.Tensor | None:
    while isinstance(data, list | tuple | dict) and data:
        data = next(iter(data.values())) if isinstance(data, dict) else data[0]
    return data if isinstance(data, torch.Tensor) else None
