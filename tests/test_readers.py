"""Actions in threads that read: each has its buffer, and the first error in their order counts."""

from __future__ import annotations

import threading

import pytest

from hf_nanotron.checkpoint.files import readers
from hf_nanotron.checkpoint.files.readers import WORTHWHILE, Readers


def test_actions_have_buffers_of_their_own_and_the_first_error_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "cores", lambda: 3)
    both = threading.Barrier(2, timeout=30)
    seen = dict[int, int]()

    def act(number: int, buffer: memoryview) -> None:
        buffer[0] = number
        if number < 2:
            both.wait()  # two run at once
        seen[number] = buffer[0]
        if number % 2:
            raise ValueError(f"action {number}")

    with pytest.raises(ValueError, match="action 1"), Readers(WORTHWHILE, 16) as several:
        for number in range(6):
            several.give(lambda buffer, number=number: act(number, buffer))
    assert all(number == found for number, found in seen.items()) and {0, 1} <= set(seen)


def test_few_bytes_are_read_without_threads() -> None:
    names = set[str]()
    with Readers(WORTHWHILE - 1) as one:
        one.give(lambda buffer: names.add(threading.current_thread().name))
        assert names == {threading.current_thread().name}
