"""End a run cleanly when the scheduler asks for it: note the signal, save at the end of the step, stop."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from transformers.utils import logging

logger = logging.get_logger(__name__)
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # of torchrun and Slurm at the end of a job; of `sbatch --signal=USR1@120`


class StopSignals:
    """While entered, SIGTERM and SIGUSR1 are noted instead of ending the process.

    Outside the main thread, where Python allows no handlers, it does nothing.

    Args:
        grace: seconds from the first signal after which the process ends by it after all; 0 leaves signals alone.
    """

    def __init__(self, grace: float) -> None:
        self.grace = grace
        self.received: str | None = None
        self._received_at = 0.0
        self._before: dict[signal.Signals, Any] = {}
        self._timer: threading.Timer | None = None

    def __enter__(self) -> StopSignals:
        self.received = None
        if self.grace and threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    @property
    def seconds_left(self) -> float:
        """Of the grace; infinite if no signal has come."""
        return math.inf if self.received is None else self._received_at + self.grace - time.monotonic()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self._received_at = time.monotonic()
            self.received = signal.Signals(number).name
            self._timer = threading.Timer(self.grace, self._end, (number,))
            self._timer.daemon = True
            self._timer.start()

    def _end(self, number: int) -> None:
        logger.error(f"{self.received}: no checkpoint was complete within save_on_signal={self.grace} seconds.")
        os._exit(128 + number)  # as a shell reports a death by this signal; no handler of ours can come between
