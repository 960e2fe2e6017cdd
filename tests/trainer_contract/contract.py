"""One script, run with stock classes and with ours.

A scenario is a function of a `Kit` that returns what a user would see: logs, events, metrics, files. `both` runs it
with `transformers.Trainer` and with `NanotronTrainer` in one process, `ours` with `NanotronTrainer` on the ranks of a
layout. Which behaviours are compared follows the list of those that transformers tests of its Trainer.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from pool import WorkerPool
from tiny import pad_batch, random_dataset, tiny_config
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

TP2, PP2, DP2 = {"tp_size": 2}, {"pp_size": 2}, {"dp": 2}
# What depends on the clock and on memory; the second row is what our log has besides.
CLOCK = ("_runtime", "_per_second", "train_runtime", "_memory", "_mem_", "preparation_time")
OWN_METRICS = {"step_time", "tokens_per_second", "tokens_per_second_per_device", "peak_memory_gib", "mfu"}


@dataclass
class Kit:
    """The classes that a scenario trains with, and small things to train."""

    is_ours: bool
    folder: Path
    sizes: dict[str, int] = field(default_factory=dict)

    @property
    def Trainer(self) -> type[Trainer]:
        from hf_nanotron import NanotronTrainer

        return NanotronTrainer if self.is_ours else Trainer

    @property
    def Arguments(self) -> type[TrainingArguments]:
        from hf_nanotron import NanotronTrainingArguments

        return NanotronTrainingArguments if self.is_ours else TrainingArguments

    @property
    def replicas(self) -> int:
        return self.sizes.get("dp", 1)

    def args(self, batch: int = 2, eval_batch: int = 2, **overrides: Any) -> Any:
        """Arguments of a run; `batch` and `eval_batch` are samples of all data-parallel ranks together."""
        values: dict[str, Any] = {
            "output_dir": str(self.folder / "out"),
            "per_device_train_batch_size": batch // self.replicas,
            "per_device_eval_batch_size": eval_batch // self.replicas,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "data_seed": 3,
        }
        sizes = {name: size for name, size in self.sizes.items() if name != "dp"}
        return self.Arguments(**{**values, **overrides}, **sizes)

    def model(self, **overrides: Any) -> Any:
        """A stock Llama of two layers, the same each time."""
        set_seed(0)
        return AutoModelForCausalLM.from_config(tiny_config(num_hidden_layers=2, hidden_size=16, **overrides))

    def trainer(self, *, base: type | None = None, train: Any = 8, evaluate: Any = 6, **options: Any) -> Any:
        """A trainer; what `Trainer` takes is passed on, and the rest are training arguments."""
        taken = {
            name: options.pop(name)
            for name in (
                "model", "callbacks", "compute_metrics", "preprocess_logits_for_metrics", "optimizers", "model_init",
                "optimizer_cls_and_kwargs", "compute_loss_func", "processing_class", "data_collator",
            )
            if name in options
        }  # fmt: skip
        args = options.pop("args", None) or self.args(**options)
        if "model" not in taken and "model_init" not in taken:
            taken["model"] = self.model()
        return (base or self.Trainer)(
            args=args,
            train_dataset=random_dataset(train, length=8) if isinstance(train, int) else train,
            eval_dataset=random_dataset(evaluate, length=8, seed=1) if isinstance(evaluate, int) else evaluate,
            **{"data_collator": pad_batch, **taken},
        )


Scenario = Callable[[Kit], Any]


class Recorder(TrainerCallback):
    """Every event with the step at which it comes, and the flags of some."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def record(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.events.append((name, state.global_step))

        return record


class Flags(TrainerCallback):
    """Sets flags of `control` in events, as `{(event, step): {flag: value}}` says."""

    def __init__(self, plan: dict[tuple[str, int], dict[str, bool]]) -> None:
        self.plan = plan

    def _set(self, event: str, state: Any, control: Any) -> Any:
        for name, value in self.plan.get((event, state.global_step), {}).items():
            setattr(control, name, value)
        return control

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        return self._set("on_step_begin", state, control)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        return self._set("on_substep_end", state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        return self._set("on_step_end", state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        return self._set("on_epoch_end", state, control)


def lines(trainer: Any) -> list[dict[str, Any]]:
    """The log without what depends on the clock, and without metrics that ours alone has."""
    return [without_clock(line) for line in trainer.state.log_history]


def without_clock(metrics: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in metrics.items()
        if name not in OWN_METRICS and not any(name.endswith(part) or part in name for part in CLOCK)
    }


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def outcome(call: Callable[[], Any]) -> str:
    """The kind of exception that a call ends with."""
    try:
        call()
    except Exception as error:
        return type(error).__name__
    return "fine"


def said(call: Callable[[], Any]) -> str:
    """What the exception of a call says."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


@contextlib.contextmanager
def heard(name: str = "transformers", level: int = logging.WARNING) -> Iterator[list[str]]:
    """Log messages of a logger and those below it, whatever an earlier scenario of this process has set."""
    messages: list[str] = []
    handler = logging.Handler(level)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(level)
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def run(scenario: Scenario, is_ours: bool, folder: str, sizes: dict[str, int]) -> Any:
    kit = Kit(is_ours, Path(folder), sizes)
    result = plain(scenario(kit))
    gc.collect()
    return result


def plain(value: Any) -> Any:
    """Something that can be compared and sent to another process."""
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        return value.tolist()
    return value


def run_both(scenario: Scenario) -> tuple[Any, Any]:
    """In a worker: with stock classes, then with ours."""
    results = []
    for is_ours in (False, True):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        results.append(run(scenario, is_ours, tempfile.mkdtemp(), {}))
    return results[0], results[1]


def both(pool: WorkerPool, scenario: Scenario) -> tuple[Any, Any]:
    """What a scenario returns with stock classes, and with ours, in one process."""
    ((stock, ours),) = pool.run(1, run_both, scenario)
    return stock, ours


def ours(pool: WorkerPool, scenario: Scenario, folder: Path, sizes: dict[str, int]) -> list[Any]:
    """What a scenario returns with our classes, on each of two ranks."""
    return pool.run(2, run, scenario, True, str(folder), sizes)


def check_same(pool: WorkerPool, scenario: Scenario, folder: Path, layouts: tuple[dict[str, int], ...] = ()) -> Any:
    """Stock and ours say the same, in one process and, on rank 0, on `layouts`; returns what stock says."""
    expected, found = both(pool, scenario)
    same(found, expected, "one process")
    for number, sizes in enumerate(layouts):
        first, _ = ours(pool, scenario, folder / str(number), sizes)
        same(first, expected, str(sizes))
    return expected


def same(found: Any, expected: Any, where: str) -> None:
    """Equal, numbers up to rounding."""
    if isinstance(expected, dict):
        assert isinstance(found, dict) and list(found) == list(expected), f"{where}: {found} is not {expected}"
        for name, value in expected.items():
            same(found[name], value, f"{where}, {name}")
    elif isinstance(expected, list):
        assert isinstance(found, list) and len(found) == len(expected), f"{where}: {found} is not {expected}"
        for number, value in enumerate(expected):
            same(found[number], value, f"{where}[{number}]")
    elif isinstance(expected, float) and isinstance(found, float | int):
        close = found == pytest.approx(expected, rel=2e-5, abs=1e-7) or (math.isnan(found) and math.isnan(expected))
        assert close, f"{where}: {found} is not {expected}"
    else:
        assert found == expected, f"{where}: {found} is not {expected}"


def is_rank_0() -> bool:
    return int(os.environ.get("RANK", "0")) == 0
