"""The scripts of `examples/benchmarks`, which import each other by short names, as modules of a test."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "benchmarks"


@contextmanager
def scripts(names: Sequence[str]) -> Iterator[argparse.Namespace]:
    """The scripts of these names, and nothing of them left behind: so short a name may be another's."""
    before = set(sys.modules)
    sys.path.insert(0, str(FOLDER))
    yield argparse.Namespace(**{name: importlib.import_module(name) for name in names})
    sys.path.remove(str(FOLDER))
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(FOLDER) in str(sys.modules[name].__file__):
            del sys.modules[name]
