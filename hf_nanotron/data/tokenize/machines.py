"""The shards of a corpus on many machines: through datatrove's executors for Slurm and Ray."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from ..tokens.same_tokenizer import OWN
from .shards import Job

EXECUTORS = {"slurm": ("slurm", "SlurmPipelineExecutor"), "ray": ("ray", "RayPipelineExecutor")}
OURS = frozenset(("self", "pipeline", "tasks", "logging_dir", "skip_completed"))


class TokenizeShards:
    """A step of a datatrove pipeline: task n writes shard n, unless it is complete."""

    def __init__(self, job: Job, complete: frozenset[int]) -> None:
        self.job, self.complete = job, complete

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        if rank not in self.complete:
            self.job.run(rank)

    def __repr__(self) -> str:
        return f"TokenizeShards({len(self.job.pieces)} shards to {self.job.out.shown})"


def check_executor(executor: str, options: Mapping[str, Any]) -> Any:
    """The class of an executor, if it is installed and takes these options.

    Raises:
        ValueError: for an executor or option that it does not know.
        ImportError: if datatrove is not installed.
    """
    if executor not in EXECUTORS:
        raise ValueError(f"executor={executor!r} is not one of 'local', {', '.join(map(repr, EXECUTORS))}.")
    module, name = EXECUTORS[executor]
    try:
        import importlib

        found = getattr(importlib.import_module(f"datatrove.executor.{module}"), name)
        if executor == "ray":
            importlib.import_module("ray")
    except ImportError as error:
        what = "hf-nanotron[datatrove]" + (" ray" if executor == "ray" else "")
        raise ImportError(f"executor={executor!r} needs datatrove: pip install {what} ({error}).") from error
    known = inspect.signature(found.__init__).parameters
    for option in options:
        if option not in known or option in OURS:
            raise ValueError(
                f"{option!r} is no option of executor={executor!r}; those of datatrove's {name} are "
                f"{', '.join(key for key in known if key not in OURS)}."
            )
    needed = [key for key, p in known.items() if p.default is p.empty and key not in OURS and key not in options]
    if needed:
        raise ValueError(f"executor={executor!r} needs the options {' and '.join(needed)}.")
    return found


def submit(found: Any, options: Mapping[str, Any], job: Job, complete: frozenset[int]) -> None:
    """Give the shards to an executor. Slurm's comes back when they are in its queue, Ray's when they are written."""
    step = TokenizeShards(job, complete)
    logs = f"{job.out.path}/{OWN}/logs"
    found(pipeline=[step], tasks=len(job.pieces), logging_dir=logs, **options).run()
