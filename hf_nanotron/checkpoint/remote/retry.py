"""What fails at a store is tried again, with longer and longer pauses, and said at most once a minute."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from transformers.utils import logging

logger = logging.get_logger(__name__)
T = TypeVar("T")

LOG_SECONDS = 60.0  # between two log lines about a store that fails


@dataclass(frozen=True)
class Backoff:
    """How long to wait for a store that fails."""

    first: float = 2.0  # seconds before the second attempt, doubled for each further one
    longest: float = 60.0  # seconds between two attempts, at most
    start: float = 300.0  # seconds after which the start of a run, which needs the store, gives up. Uploads never do

    def pause(self, failures: int) -> float:
        """Seconds to wait after so many failures in a row."""
        return min(self.first * 2.0 ** min(failures - 1, 60), self.longest)


class Retry:
    """Repeats what failed at one store, for all threads that use it.

    Attributes:
        retries: attempts that have failed and were, or will be, repeated.
        failing_since: when the first attempt failed after the last one that did not, by `clock`; None if none did.
        last_error: what the last failure said.
        note: what else a log line about a failure is to say, or nothing.
    """

    def __init__(self, name: str, backoff: Backoff, clock: Callable[[], float] = time.monotonic) -> None:
        self.name, self.backoff, self.clock = name, backoff, clock
        self.retries = 0
        self.failing_since: float | None = None
        self.last_error = ""
        self.note: Callable[[], str] = str
        self._failures = 0  # since the last success
        self._said_at: float | None = None
        self._saying = threading.Lock()  # never waited for: a fork may have copied it locked

    def __call__(
        self,
        what: str,
        action: Callable[[], T],
        ends: Callable[[Exception, float], bool],
        says: Callable[[Exception], str],
        pause: Callable[[float], object] = time.sleep,
    ) -> T:
        """What `action` returns, as soon as it succeeds.

        Args:
            what: the action in words, such as "uploading checkpoint-2".
            ends: whether to give up, by an error and the seconds since the first attempt. The error is then raised.
            pause: waits for so many seconds. May raise, which ends the attempts.
        """
        start, failures = self.clock(), 0
        while True:
            try:
                result = action()
            except Exception as error:  # each package has its own
                failures += 1
                if ends(error, self.clock() - start):
                    raise
                seconds = self.backoff.pause(failures)
                self._note_failure(f"{what} failed: {says(error)}", seconds)
            else:
                self._note_success()
                return result
            pause(seconds)

    @property
    def failing_seconds(self) -> float:
        """For how long nothing has succeeded at the store; 0 if the last attempt has."""
        since = self.failing_since
        return 0.0 if since is None else self.clock() - since

    def _note_failure(self, text: str, seconds: float) -> None:
        now = self.clock()
        self.retries += 1
        self._failures += 1
        self.last_error = text
        if self.failing_since is None:
            self.failing_since = now
        if not self._saying.acquire(blocking=False):
            return  # another thread is about to say so
        try:
            if self._said_at is None or now - self._said_at >= LOG_SECONDS:
                self._said_at = now
                logger.warning(
                    f"{self.name}: {text}. {self._failures} attempts have failed in {self.failing_seconds:.0f} s; "
                    f"retrying in {seconds:g} s.{self.note()}"
                )
        finally:
            self._saying.release()

    def _note_success(self) -> None:
        since, failures, self.failing_since, self._failures = self.failing_since, self._failures, None, 0
        if since is not None and self._said_at is not None and self._said_at >= since:
            logger.warning(
                f"{self.name} responds again after {self.clock() - since:.0f} s and {failures} failed attempts."
            )
