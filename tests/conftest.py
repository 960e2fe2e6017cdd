"""Fixtures of the whole suite."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
from pool import WorkerPool


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full-matrix", action="store_true", help="resume every topology on every other (minutes)")
    parser.addoption("--kills", type=int, default=3, help="how often the kill test kills a rank")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the tables of relative errors."""
    for name in ("test_parity", "test_zero", "test_resume"):
        module = sys.modules.get(name)
        if module is not None and module.ROWS:
            terminalreporter.section(module.TITLE)
            terminalreporter.write_line(module.HEADER)
            terminalreporter.write_line("\n".join(module.ROWS))


@pytest.fixture(scope="session")
def pool() -> Iterator[WorkerPool]:
    """Eight gloo workers with torch and transformers imported."""
    workers = WorkerPool()
    yield workers
    workers.close()
