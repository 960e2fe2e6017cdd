"""Evaluation and prediction of a parallel model, with the figures of one process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import nn
from torch.nn import functional as F
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput

from ..data.loader import DataParallelLoader, DataParallelStream, order_of
from ..data.same_data import check_same_data
from ..data.window_check import WindowCheck
from ..models.logits import whole_outputs
from ..parallel.collectives import all_gather, all_reduce
from ..parallel.mesh import ParallelMesh
from ..parallel.tp.loss import IGNORE_INDEX
from ..redaction import redacted
from .custom_loss import LossTrainer


class AnnouncedLoader:
    """A loader that tells of each batch before it hands it out, and of its end."""

    def __init__(self, loader: Any, tell: Callable[[Any, int], None]) -> None:
        self.loader, self.tell = loader, tell

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        number, on_host = 0, getattr(self.loader, "host_batches", None)
        for number, batch in enumerate(self.loader if on_host is None else on_host(), 1):
            self.tell(batch, number)
            yield batch
        self.tell(None, number + 1)


def correct_speed(metrics: dict[str, float], rounds: int) -> None:
    """Steps a second of an evaluation, for which Trainer divides samples by the batches of all processes."""
    if "total_flos" in metrics:  # the summary of a training run
        return
    for name in [name for name in metrics if name.endswith("_steps_per_second")]:
        if runtime := metrics.get(name.replace("_steps_per_second", "_runtime")):
            metrics[name] = round(rounds / runtime, 3)


def is_stream(loader: Any) -> bool:
    return isinstance(getattr(loader, "dataset", None), DataParallelStream)


class EvaluatingTrainer(LossTrainer):
    """A Trainer whose evaluation loop reads each sample once and joins results over data-parallel ranks alone."""

    mesh: ParallelMesh
    window_check: WindowCheck

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._evaluated: DataParallelLoader | None = None
        self._announced: Any = None  # the loader of the evaluation that is going on, whoever made it
        self._description: str | None = None  # of the evaluation that is going on
        self._rounds = 0  # batches of this rank in the last one
        super().__init__(*args, **kwargs)

    def evaluation_loop(self, dataloader: Any, description: str, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Trainer's, over batches that all ranks have compared.

        Raises:
            ValueError: on every rank, for data that differs between them, or ids that the model does not know.
        """
        check_same_data(self.mesh, dataloader, description.lower(), reads=not is_stream(dataloader))
        announced: Any = AnnouncedLoader(dataloader, self._announce)
        self._description = description
        self._announced = dataloader
        self._evaluated = dataloader if isinstance(dataloader, DataParallelLoader) else None
        try:
            output = super().evaluation_loop(announced, description, *args, **kwargs)
            if self._evaluated is not None and is_stream(dataloader):
                # A stream has no length, and Trainer counts what this rank saw of it.
                seen = torch.tensor(self._evaluated.samples_read, device=self.mesh.device)
                output = output._replace(num_samples=int(all_reduce(seen, self.mesh.dp)))
        finally:
            self._description = self._evaluated = self._announced = None
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        correct_speed(logs, self._rounds)
        for name in [name for name, value in logs.items() if isinstance(value, str)]:
            logs[name] = redacted(name, logs[name])  # log lines become part of every checkpoint
        super().log(logs, *args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> PredictionOutput:
        output = super().predict(*args, **kwargs)
        correct_speed(output.metrics or {}, self._rounds)
        return output

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        if self._description is None:  # called by hand
            self._compare(inputs, "prediction_step")
        if prediction_loss_only and "labels" in inputs and not self._has_own_loss:
            with torch.no_grad():
                loss = model(**self._prepare_inputs(inputs), gather_logits=False).loss
            return loss.detach(), None, None
        inputs = {**inputs, "use_cache": False}
        self._evaluates = True
        view = self.model if self._overrides_compute_loss else None  # it may call the backbone and the head itself
        try:
            with contextlib.nullcontext() if view is None else whole_outputs(self.model, view):
                return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            self._evaluates = False

    def _announce(self, inputs: Any, number: int) -> None:
        """Tell all ranks of batch `number` of an evaluation, or of the end of its data."""
        self._compare(inputs, f"{self._description}, batch {number}")
        self._rounds = number - (inputs is None)

    def _compare(self, inputs: Any, where: str) -> None:
        """Learn whether ranks have the same batch.

        Raises:
            ValueError, RuntimeError: see `WindowCheck.judge`.
        """
        window = [] if inputs is None else [inputs]
        self.window_check.judge(self.window_check.start(window, order=order_of(self._evaluated)), where)

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
        return recursively_apply(self._gather_tensor, data)

    def _gather_tensor(self, data: torch.Tensor) -> torch.Tensor:
        """`[rows, ...]` of all data-parallel ranks; rows of a batch need not be its samples.

        Trainer repeats a batch's loss `eval_batch_size` times, and cuts the last batch to what it has.
        """
        own = torch.atleast_1d(data)
        if self._evaluated is not None:
            own = own[: self._evaluated.counted_rows]
        if self.mesh.dp_size == 1:
            return self._cut_repeated(own)
        counts = all_gather(torch.tensor([own.shape[0]], device=self.mesh.device), self.mesh.dp, 0).tolist()
        padded = torch.cat((own, own.new_zeros((max(counts) - own.shape[0], *own.shape[1:]))))
        parts = all_gather(padded, self.mesh.dp, 0).chunk(self.mesh.dp_size)
        return self._cut_repeated(torch.cat([part[:rows] for part, rows in zip(parts, counts, strict=True)]))

    def _cut_repeated(self, rows: torch.Tensor) -> torch.Tensor:
        """As accelerate for a loader that it has prepared: without the rows with which it has filled the last round."""
        state = self.accelerator.gradient_state
        is_prepared = self._evaluated is None and state.in_dataloader and state.active_dataloader is self._announced
        return rows[: state.remainder] if is_prepared and state.end_of_dataloader and state.remainder > 0 else rows


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
