"""The part of the trainer that has ranks compare what they have read, before a step uses it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..data.loader import order_of
from ..data.window_check import COUNT, SIZE, PendingWindow, WindowCheck
from ..models.base import ParallelModel
from ..ops.host_copy import to_device
from ..optim.finite import FiniteCheck
from ..parallel.mesh import ParallelMesh
from ..parallel.tp.loss import IGNORE_INDEX
from ..training_args import NanotronTrainingArguments
from .nonfinite import FiniteTrainer


class AgreeingTrainer(FiniteTrainer):
    """A Trainer whose ranks tell each other of every window in the sum that counts its tokens.

    On the CPU the verdict is read at once. On a GPU it is read when the host has waited for the gradient of the step
    before anyway, and while the GPU still updates weights.
    """

    args: NanotronTrainingArguments
    model: ParallelModel
    mesh: ParallelMesh
    window_check: WindowCheck
    _unchecked: FiniteCheck | None
    _pending: PendingWindow | None = None
    _reading_failure: Exception | None = None
    _loader: Any = None  # of the epoch that is going on
    _told: int = 0  # micro-batches that ranks have told of and `training_step` has not seen
    _counted: int = 0  # predicted tokens of the window, over all ranks
    _all_ended: bool = False  # no rank has data left in this epoch

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        self._pending, self._reading_failure, self._told, self._all_ended = None, None, 0, False
        return super()._run_epoch(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
        self._reading_failure = None
        return super().get_batch_samples(self._until_failure(epoch_iterator), *args, **kwargs)

    def _until_failure(self, batches: Iterator[Any]) -> Iterator[Any]:
        """`batches`, which end where reading fails: the other ranks are told of it."""
        while True:  # not `yield from`, which would close `batches` with this
            try:
                batch = next(batches)
            except StopIteration:
                return
            except Exception as error:
                self._reading_failure = error
                return
            yield batch

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor | None:
        """Predicted tokens of a window over all data-parallel ranks.

        With `average_tokens_across_devices=False` each rank weighs its own mean equally, as Trainer under DDP.
        """
        if self._all_ended and not batch_samples:
            return None
        failure, count = self._reading_failure, None
        try:
            count = predicted_tokens(batch_samples)
        except Exception as error:
            failure = failure or error
        arrives = self._unchecked.verdict if self._unchecked is not None else None
        self._pending = self.window_check.start(
            batch_samples, count or 0, failure=failure, after=arrives, order=order_of(self._loader)
        )
        self._told += len(batch_samples)
        pending = self._pending
        if device.type == "cpu" or failure is not None or not batch_samples:
            self._read_verdict()
        if count is None:
            return None
        if self.args.average_tokens_across_devices:
            return to_device(pending.count, device)
        return to_device(torch.tensor(max(count, 1) * self.mesh.dp_size), device)

    def _before_micro_batch(self, inputs: Any) -> None:
        """Have ranks told of `inputs`, if that is not done yet."""
        if self._told:
            self._told -= 1
        else:  # by an overridden `get_batch_samples`
            self._read_verdict()
            self._pending = self.window_check.start([inputs])
        if self.args.include_num_input_tokens_seen != "no":  # Trainer communicates after each micro-batch
            self._read_verdict()

    def _read_verdict(self) -> None:
        """Of the gradient of the step before, and of the window that has been read since.

        Raises:
            ValueError, RuntimeError: see `WindowCheck.judge`.
            NonFiniteGradientError: see `_check_gradient`.
        """
        self._check_gradient()
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        total = self.window_check.judge(pending, f"optimizer step {self.state.global_step + 1}")
        self._all_ended, self._counted = total[SIZE] == 0, total[COUNT]


def predicted_tokens(window: list[Any]) -> int | None:
    """Labels that a window's loss reads; None if it has none."""
    if not window or "labels" not in window[0]:
        return None
    labels = [b["shift_labels"] if "shift_labels" in b else b["labels"][..., 1:] for b in window]
    return sum(int(x.ne(IGNORE_INDEX).sum()) for x in labels)
