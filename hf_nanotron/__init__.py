"""Hugging Face-native pretraining: a `transformers.Trainer` that trains Hub models on any tp x pp x dp."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .version import __version__ as __version__

if TYPE_CHECKING:
    from .models.auto import AutoModelForCausalLM
    from .models.stock.families import register_plan
    from .optim.matrix_optimizer import MatrixOptimizer
    from .parallel.config import ParallelConfig
    from .trainer import NanotronTrainer
    from .training.doremi import DoReMi
    from .training_args import NanotronTrainingArguments

__all__ = [
    "AutoModelForCausalLM",
    "DoReMi",
    "MatrixOptimizer",
    "NanotronTrainer",
    "NanotronTrainingArguments",
    "ParallelConfig",
    "register_plan",
]

_HOME = {
    "AutoModelForCausalLM": ".models.auto",
    "DoReMi": ".training.doremi",
    "MatrixOptimizer": ".optim.matrix_optimizer",
    "NanotronTrainer": ".trainer",
    "NanotronTrainingArguments": ".training_args",
    "ParallelConfig": ".parallel.config",
    "register_plan": ".models.stock.families",
}


def __getattr__(name: str) -> Any:
    """Import on first use: the command line answers `--help` without loading torch."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name], __name__), name)
