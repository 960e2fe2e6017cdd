"""Fixtures of the whole suite."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import family_table
import process_state
import pytest
from pool import WorkerPool
from ports import reserved_port


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full-matrix", action="store_true", help="all resumes and all layouts of families (minutes)")
    parser.addoption("--write-families", action="store_true", help="write docs/families.md from this run's table")
    parser.addoption("--kills", type=int, default=3, help="how often the kill test kills a rank")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full_matrix: repeats what others cover; runs with --full-matrix")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("full_matrix") and not item.config.getoption("full_matrix"):
        pytest.skip("runs with --full-matrix")
    process_state.begin()  # for the fixtures of a module, too


@pytest.fixture(autouse=True)
def own_state() -> Iterator[None]:
    """A test depends on none before it: random numbers are the same, and what it changes of the process is put back."""
    put_back = process_state.remember()
    process_state.begin()
    yield
    put_back()


def pytest_collection_finish() -> None:
    """What was imported stays: the collections of every stock `Trainer` need not walk through it, 0.2 s each."""
    gc.collect()
    gc.freeze()


TABLES = ("test_parity", "test_context_parallel", "test_zero", "test_resume", "test_sft", "test_families")
FROM_WORKERS: dict[str, dict[str, Any]] = {}  # where pytest-xdist runs the tests in processes of its own


def own_tables() -> dict[str, dict[str, Any]]:
    """What the tests of this process have to tell, by module."""
    names = ("TITLE", "HEADER", "ROWS")
    tables = {name: {each: getattr(sys.modules.get(name), each, None) for each in names} for name in TABLES}
    return {name: table for name, table in tables.items() if table["ROWS"]}


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["tables"] = json.dumps(own_tables())


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    for name, table in json.loads(getattr(node, "workeroutput", {}).get("tables", "{}")).items():
        known = FROM_WORKERS.setdefault(name, table)
        if known is not table:  # another worker has run tests of the same module
            known["ROWS"] = known["ROWS"] | table["ROWS"] if name == "test_families" else known["ROWS"] + table["ROWS"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the tables of relative errors, and the table of families."""
    for name, table in (own_tables() | FROM_WORKERS).items():
        rows = table["ROWS"]
        terminalreporter.section(table["TITLE"])
        if name != "test_families":
            terminalreporter.write_line("\n".join([table["HEADER"], *rows]))
            continue
        terminalreporter.write_line("\n".join(family_table.counts(rows)))
        if config.getoption("write_families"):
            here = Path(__file__).parent
            data, page = here / "data" / "family_table.json", here.parent / "docs" / "families.md"
            family_table.write_page(data, rows, page, str(date.today()))


@pytest.fixture
def port() -> Iterator[int]:
    """A port for a server of the test, which nobody else is given meanwhile."""
    with reserved_port() as port:
        yield port


@pytest.fixture(scope="session")
def pool() -> Iterator[WorkerPool]:
    """Eight gloo workers with torch and transformers imported."""
    workers = WorkerPool()
    yield workers
    workers.close()
