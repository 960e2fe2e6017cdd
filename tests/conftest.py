"""Fixtures of the whole suite."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pool import WorkerPool


@pytest.fixture(scope="session")
def pool() -> Iterator[WorkerPool]:
    """Eight gloo workers with torch and transformers imported."""
    workers = WorkerPool()
    yield workers
    workers.close()
