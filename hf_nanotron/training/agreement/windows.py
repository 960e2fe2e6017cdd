"""Ranks compare what they have read of a window, before a step uses it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ...data.loader import order_of
from ...data.window_check import COUNT, SIZE, PendingWindow, WindowCheck
from ...ops.cross_entropy import IGNORE_INDEX
from ...ops.host_copy import to_device
from ..nonfinite import NonFiniteGuard


class WindowAgreement:
    """Ranks tell each other of every window in the sum that counts its tokens.

    On the CPU the verdict is read at once. On a GPU it is read when the host has waited for the gradient of the step
    before anyway, and while the GPU still updates weights.

    Args:
        check: sends and reads what is told.
        guard: holds the verdict on the gradient of the step before, which is read first.
        examine: raises an error for a window of this rank that cannot be trained on.

    Attributes:
        counted: predicted tokens of the window, over all ranks.
    """

    def __init__(self, check: WindowCheck, guard: NonFiniteGuard, examine: Callable[[list[Any]], None]) -> None:
        self.check, self.guard, self._examine = check, guard, examine
        self.counted = 0
        self.begin_epoch(None)

    def begin_epoch(self, loader: Any) -> None:
        """Read from another loader."""
        self._loader = loader
        self._pending: tuple[PendingWindow, str] | None = None
        self._failure: Exception | None = None  # of the loader
        self._told = 0  # micro-batches that ranks have told of and `before_micro_batch` has not seen
        self._all_ended = False  # no rank has data left in this epoch

    def until_failure(self, batches: Iterator[Any]) -> Iterator[Any]:
        """`batches`, which end where reading fails: the other ranks are told of it."""
        self._failure = None
        return self._until_failure(batches)

    def _until_failure(self, batches: Iterator[Any]) -> Iterator[Any]:
        while True:  # not `yield from`, which would close `batches` with this
            try:
                batch = next(batches)
            except StopIteration:
                return
            except Exception as error:
                self._failure = error
                return
            yield batch

    def count_tokens(
        self, window: list[Any], step: int, device: torch.device, across_devices: bool
    ) -> torch.Tensor | None:
        """Tell of a window. Its predicted tokens over all data-parallel ranks; None without labels.

        Args:
            step: that the window is for, from 1.
            across_devices: `average_tokens_across_devices`. Without it each rank weighs its own mean equally, as
                Trainer under DDP.
        """
        if self._all_ended and not window:
            return None
        failure, count = self._failure, None
        try:
            count = predicted_tokens(window)
            self._examine(window)
        except Exception as error:
            failure = failure or error
        pending = self.check.start(
            window, count or 0, failure=failure, after=self.guard.arriving, order=order_of(self._loader)
        )
        self._pending = pending, f"optimizer step {step}"
        self._told += len(window)
        if device.type == "cpu" or failure is not None or not window:
            self.read_verdict()
        if count is None:
            return None
        if across_devices:
            return to_device(pending.count, device)
        return to_device(torch.tensor(max(count, 1) * self.check.mesh.dp_size), device)

    def has_items(self, window: Sequence[tuple[dict[str, Any], Any]], needs_labels: Callable[[], bool]) -> bool:
        """Whether the predicted tokens of a step's window are counted, which takes `labels`.

        Args:
            needs_labels: whether the loss that is trained does.
        """
        inputs, items = window[-1]
        if isinstance(items, torch.Tensor):
            return True
        self.read_verdict()  # of what is wrong with the data, rather than of this
        if needs_labels() or self.counted:
            raise ValueError(
                f"the batches have no `labels` (they have {sorted(inputs)}); tokenise with labels, or use "
                "DataCollatorForLanguageModeling(tokenizer, mlm=False)."
            )
        return False

    def before_micro_batch(self, inputs: Any, step: int) -> None:
        """Tell of `inputs`, if that is not done yet: an overridden `get_batch_samples` may have read them."""
        if self._told:
            self._told -= 1
            return
        self.read_verdict()
        failure: Exception | None = None
        try:
            self._examine([inputs])
        except Exception as error:
            failure = error
        self._pending = self.check.start([inputs], failure=failure), f"optimizer step {step}"

    def read_verdict(self) -> None:
        """Of the gradient of the step before, and of the window that has been read since."""
        self.guard.check()
        if self._pending is not None:
            (pending, where), self._pending = self._pending, None
            total = self.check.judge(pending, where)
            self._all_ended, self.counted = total[SIZE] == 0, total[COUNT]


def predicted_tokens(window: list[Any]) -> int | None:
    """Labels that a window's loss reads; None if it has none."""
    if not window or "labels" not in window[0]:
        return None
    return sum(int(_predicted(batch).ne(IGNORE_INDEX).sum()) for batch in window)


def evaluated_tokens(batch: dict[str, Any]) -> torch.Tensor | None:
    """The predicted tokens of one evaluation batch: a number of fp32, as Trainer counts; None without `labels`."""
    return _predicted(batch).ne(IGNORE_INDEX).sum() / 1 if "labels" in batch else None


def _predicted(batch: dict[str, Any]) -> torch.Tensor:
    shifted: torch.Tensor = batch["shift_labels"] if "shift_labels" in batch else batch["labels"][..., 1:]
    return shifted
