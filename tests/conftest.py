"""Fixtures of the whole suite."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import family_table
import pytest
from pool import WorkerPool


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full-matrix", action="store_true", help="all resumes and all layouts of families (minutes)")
    parser.addoption("--write-families", action="store_true", help="write docs/families.md from this run's table")
    parser.addoption("--kills", type=int, default=3, help="how often the kill test kills a rank")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the tables of relative errors, and the table of families."""
    for name in ("test_parity", "test_zero", "test_resume"):
        module = sys.modules.get(name)
        if module is not None and module.ROWS:
            terminalreporter.section(module.TITLE)
            terminalreporter.write_line(module.HEADER)
            terminalreporter.write_line("\n".join(module.ROWS))
    families = sys.modules.get("test_families")
    if families is not None and families.ROWS:
        terminalreporter.section(families.TITLE)
        terminalreporter.write_line("\n".join(family_table.counts(families.ROWS)))
        if config.getoption("write_families"):
            docs = Path(__file__).parent.parent / "docs"
            family_table.write_page(docs / "families.json", families.ROWS, docs / "families.md", str(date.today()))


@pytest.fixture(scope="session")
def pool() -> Iterator[WorkerPool]:
    """Eight gloo workers with torch and transformers imported."""
    workers = WorkerPool()
    yield workers
    workers.close()
