"""Traces of chosen steps on chosen ranks (`profile_steps`, `profile_ranks`), and a table of where a step goes."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule
from transformers import TrainerCallback
from transformers.utils import logging

from ..arguments.watching import profiled_ranks, profiled_steps
from ..monitor.throughput import Throughput
from ..monitor.trace_table import table_of, text_of
from ..parallel.mesh import ParallelMesh

logger = logging.get_logger(__name__)

FOLDER = "_profile"  # in output_dir; pushes leave out what begins with "_"


class StepProfiler(TrainerCallback):
    """Profiles this rank while the chosen steps run. Others wait for it in the next collective, as they always do.

    A step is from the end of the one before to its own end, the reading of its data included. It is numbered over the
    whole training, so that a resumed run profiles what is left of the steps. One step before them the profiler is
    warmed up, where there is one.
    """

    def __init__(self, mesh: ParallelMesh, throughput: Throughput) -> None:
        self.mesh, self.throughput = mesh, throughput
        self._ends: set[int] = set()  # steps after which some rank writes a profile
        self._ranges: list[tuple[int, int]] = []
        self._profile: profile | None = None
        self._running = (0, 0)  # the range at hand

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.release()
        ranges = profiled_steps(args.profile_steps) or []
        if ranges and ranges[-1][1] > state.max_steps:
            raise ValueError(
                f"profile_steps={args.profile_steps!r} has step {ranges[-1][1]}, but training ends with step "
                f"{state.max_steps}; choose steps from 1 to {state.max_steps}."
            )
        if ranges and ranges[-1][1] <= state.global_step and self.mesh.rank == 0:
            logger.warning(
                f"profile_steps={args.profile_steps!r}: the run goes on from step {state.global_step}, so that none of "
                "these steps is profiled."
            )
        self._ends = {last for _, last in ranges}
        is_chosen = self.mesh.rank in profiled_ranks(args.profile_ranks, self.mesh.world_size)
        self._ranges = [(first, last) for first, last in ranges if last > state.global_step] if is_chosen else []
        self._folder = Path(args.output_dir, FOLDER)
        self._begin(state.global_step)

    def _begin(self, done: int) -> None:
        """Start the profiler if the step after the next one, or that one, is the first of a range."""
        if self._profile is not None or not self._ranges:
            return
        first, last = max(self._ranges[0][0], done + 1), self._ranges[0][1]
        warmup = first - done - 1
        if warmup > 1:
            return
        self._ranges.pop(0)
        self._running = first, last
        activities = [ProfilerActivity.CPU]
        if self.mesh.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.synchronize(self.mesh.device)
        plan = schedule(wait=0, warmup=warmup, active=last - first + 1, repeat=1)
        found = profile(activities=activities, schedule=plan)
        try:
            found.start()
        except RuntimeError as error:  # a user's own profiler runs, say; an error of one rank would end all
            logger.warning(f"steps {first} to {last} cannot be profiled: {error}")
        else:
            self._profile = found

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._profile is not None:
            first, last = self._running
            edge = state.global_step in (first - 1, last)
            if edge and self.mesh.device.type == "cuda":
                torch.cuda.synchronize(self.mesh.device)
            if state.global_step < last:
                self._profile.step()
            else:
                self._finish(last)
        if state.global_step in self._ends:
            self.throughput.pause()  # writing it is no part of the next step, and neither is waiting for it
        self._begin(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._profile is not None and state.global_step >= self._running[0]:  # told to stop in the middle
            self._finish(state.global_step)
        self.release()

    def _finish(self, last: int) -> None:
        """Stop, and write what there is. What cannot be written is a warning: other ranks go on."""
        found, self._profile = self._profile, None
        assert found is not None
        found.stop()
        name = f"steps-{self._running[0]}-{last}-rank-{self.mesh.rank}"
        try:
            write_profile(found, self._folder, name)
        except (OSError, RuntimeError, ValueError) as error:
            logger.warning(f"the profile {self._folder / name} cannot be written: {error}")

    def release(self) -> None:
        """End a profile that was not finished, after a failure for example. Nothing is written."""
        if self._profile is not None:
            self._profile.stop()
            self._profile = None


def write_profile(found: profile, folder: Path, name: str) -> None:
    """Write `NAME.trace.json.gz`, `NAME.json` and `NAME.txt` into `folder`, each at once."""
    if folder.is_symlink():
        raise ValueError(f"{folder} is a symbolic link; remove it.")
    folder.mkdir(parents=True, exist_ok=True)
    trace, partial = folder / f"{name}.trace.json.gz", folder / f".{name}-{os.getpid()}.json.gz"
    try:
        found.export_chrome_trace(str(partial))
        with gzip.open(partial, "rt", encoding="utf-8") as file:
            events = json.load(file)["traceEvents"]
        os.replace(partial, trace)
    finally:
        partial.unlink(missing_ok=True)
    table = table_of(events)
    for suffix, text in ((".json", json.dumps(table, indent=2) + "\n"), (".txt", text_of(table))):
        partial = folder / f".{name}-{os.getpid()}{suffix}"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, folder / f"{name}{suffix}")
    logger.info(f"profile in {folder / name}.txt:\n{text_of(table)}")
