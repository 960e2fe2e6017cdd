"""Evaluation and prediction of a parallel model, with the metrics of one process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import recursively_apply
from torch.nn import functional as F
from transformers.trainer_utils import EvalLoopOutput, has_length

from ..data.dealing import DataParallelStream
from ..data.loader import DataParallelLoader, order_of
from ..data.same_data import check_same_data, dataset_of
from ..data.window_check import WindowCheck
from ..models.base import ParallelModel
from ..models.logits import whole_outputs
from ..models.token_figures import TokenFigures
from ..ops.cross_entropy import IGNORE_INDEX
from ..parallel.collectives import all_gather, all_reduce
from .domains import DomainTotals


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


def samples_in_words(dataset: Any) -> str:
    """For people, and compared between ranks: how many samples `dataset` has."""
    if isinstance(dataset, dict):
        return "".join(f" {name!r}{samples_in_words(part)}" for name, part in dataset.items())
    if isinstance(dataset, str):  # a name in `eval_dataset`
        return f" {dataset!r}"
    return f" over {len(dataset)} samples" if has_length(dataset) else ""


def is_stream(loader: Any) -> bool:
    return isinstance(getattr(loader, "dataset", None), DataParallelStream)


class EvaluationRun:
    """What an evaluation is at, so that each sample is read once and results are joined over data-parallel ranks alone.

    Args:
        check: compares batches between ranks.
        accelerator: of the trainer, for loaders that it has prepared.
        model: that is evaluated.

    Attributes:
        rounds: batches of this rank in the last evaluation.
        is_predicting: whether `prediction_step` is computing a loss or logits.
    """

    def __init__(self, check: WindowCheck, accelerator: Accelerator, model: ParallelModel) -> None:
        self.check, self.mesh, self._accelerator, self._model = check, check.mesh, accelerator, model
        self.rounds = 0
        self.is_predicting = False
        self._description: str | None = None  # of the evaluation that is going on
        self._announced: Any = None  # its loader, whoever made it
        self._evaluated: DataParallelLoader | None = None  # the same, if it is ours
        self._domains: DomainTotals | None = None  # of its rows

    # ---- batches in ----

    @contextlib.contextmanager
    def over(self, loader: Any, description: str, has_own_loss: bool) -> Iterator[Any]:
        """During an evaluation: the loader to evaluate over, whose batches all ranks compare."""
        check_same_data(self.mesh, loader, description.lower(), reads=not is_stream(loader))
        self._description, self._announced = description, loader
        self._evaluated = loader if isinstance(loader, DataParallelLoader) else None
        self._domains = DomainTotals(self._model, dataset_of(loader))
        self._domains.only_named = has_own_loss
        try:
            yield AnnouncedLoader(loader, self._announce)
        finally:
            self._description = self._evaluated = self._announced = self._domains = None

    @contextlib.contextmanager
    def summing_domains(self, inputs: Any) -> Iterator[None]:
        """While the plain loss of a batch is computed: add its tokens' losses up, by domain."""
        domains = self._domains
        sums = None if domains is None else domains.sums_of([inputs])
        if domains is None or sums is None:
            yield
            return
        self._model.training_loss.domains = sums
        try:
            yield
        finally:
            self._model.training_loss.domains = None
        domains.add(torch.cat((sums.total, sums.total[:, 1:]), 1))

    @contextlib.contextmanager
    def summing_figures(self, figures: TokenFigures | None, inputs: Any) -> Iterator[TokenFigures | None]:
        """While a batch is computed: add up `figures` of its tokens, which are those of all ranks afterwards."""
        if figures is None:
            yield None
            return
        self._model.training_loss.figures = figures
        try:
            yield figures
        finally:
            self._model.training_loss.figures = None
        figures.total = all_reduce(figures.own_part([inputs], self.mesh), self.mesh.world)

    def with_losses_of_domains(self, output: EvalLoopOutput, prefix: str) -> EvalLoopOutput:
        """And the mean loss of the tokens of each domain. Inside of `over`; all ranks together."""
        assert self._domains is not None
        sums = self._domains.read()
        losses = {f"{prefix}_loss/{name}": loss / count for name, (loss, count, _) in sums.items() if count}
        return output._replace(metrics={**(output.metrics or {}), **losses})

    def with_samples_of_all(self, output: EvalLoopOutput) -> EvalLoopOutput:
        """A stream has no length, and Trainer counts what this rank saw of it. Inside of `over`."""
        if self._evaluated is None or not is_stream(self._evaluated):
            return output
        seen = torch.tensor(self._evaluated.samples_read, device=self.mesh.device)
        return output._replace(num_samples=int(all_reduce(seen, self.mesh.dp)))

    def _announce(self, inputs: Any, number: int) -> None:
        """Tell all ranks of batch `number` of an evaluation, or of the end of its data."""
        self._compare(inputs, f"{self._description}, batch {number}")
        self.rounds = number - (inputs is None)

    def compare_by_hand(self, inputs: Any) -> None:
        """Compare the batch of a `prediction_step` that no evaluation has called."""
        if self._description is None:
            self._compare(inputs, "prediction_step")

    def _compare(self, inputs: Any, where: str) -> None:
        """Learn whether ranks have the same batch."""
        window, failure = [] if inputs is None else [inputs], None
        try:
            if self._domains is not None:
                self._domains.check(window)
        except ValueError as error:
            failure = error
        self.check.judge(self.check.start(window, failure=failure, order=order_of(self._evaluated)), where)

    @contextlib.contextmanager
    def predicting(self, view: ParallelModel | None) -> Iterator[None]:
        """While `prediction_step` computes; user's code may call backbone and head of the `view` itself."""
        self.is_predicting = True
        try:
            with contextlib.nullcontext() if view is None else whole_outputs(view, view):
                yield
        finally:
            self.is_predicting = False

    # ---- results out ----

    def preprocess(self, function: Callable[[Any, Any], Any], padded_logits: Any, padded_labels: Any) -> Any:
        """Call the user's `function` on the batch of this rank alone, as in one process.

        Trainer pads to the longest batch of the round first; a maximum, say, would make tokens of that padding.
        """
        filled = _filled_up(padded_logits)

        def cut(data: torch.Tensor) -> torch.Tensor:
            return data[:, : data.shape[1] - filled] if filled and data.dim() > 1 else data

        result = function(recursively_apply(cut, padded_logits), recursively_apply(cut, padded_labels))
        return recursively_apply(self._pad_to_longest, result)

    def _pad_to_longest(self, data: torch.Tensor) -> torch.Tensor:
        """Fill dimension 1 up to the longest of the round, with what Trainer fills up with between batches."""
        if data.dim() < 2:
            return data
        length = data.shape[1]
        longest = all_reduce(torch.tensor(length, device=data.device), self.mesh.dp, torch.distributed.ReduceOp.MAX)
        return F.pad(data, (0, 0) * (data.dim() - 2) + (0, int(longest) - length), value=IGNORE_INDEX)

    def gather(self, data: Any) -> Any:
        """Join results over the data-parallel ranks, in the order of one process."""
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
        state = self._accelerator.gradient_state
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
