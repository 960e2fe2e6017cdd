"""Reports to wandb, trackio and tensorboard: one run there for a run here, with its layout.

The callbacks are transformers' own. They report on rank 0, which has the metrics of the whole job, but know nothing of
the sizes that are not arguments, and begin another run with each `train()`. This opens the run for them.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from typing import Any, cast

from transformers import TrainerCallback, TrainerState
from transformers.integrations import (
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
    is_tensorboard_available,
    is_trackio_available,
    is_wandb_available,
)

from ..checkpoint.directory.runs import Run
from ..models.base import ParallelModel
from ..parallel.mesh import ParallelMesh
from ..training_args import NanotronTrainingArguments

PACKAGES: dict[str, Callable[[], bool]] = {
    "wandb": is_wandb_available,
    "trackio": is_trackio_available,
    "tensorboard": is_tensorboard_available,
}


def check_reports(args: NanotronTrainingArguments) -> None:
    """ValueError for a value of `report_to` whose package is not installed, naming the extra that has it."""
    for name in args.report_to or ():
        if name in PACKAGES and not PACKAGES[name]():
            raise ValueError(
                f"report_to={name!r} needs the package {name}, which is not installed: pip install "
                f"'hf-nanotron[{name}]', or report_to='none'."
            )


def layout_of(mesh: ParallelMesh) -> dict[str, int]:
    """Ranks along each axis, and in all."""
    sizes = {axis: getattr(mesh, f"{axis}_size") for axis in ("tp", "cp", "pp", "dp", "ep")}
    return {**sizes, "processes": mesh.world.size}


class Reports:
    """What is reported of a trainer's runs, on the rank that reports."""

    def __init__(self) -> None:
        self._opened: str | None = None  # the run of wandb that was opened here
        self._folder: str | None = None  # of tensorboard's files, that was chosen here

    def begin(
        self,
        callbacks: Sequence[TrainerCallback],
        args: NanotronTrainingArguments,
        state: TrainerState,
        model: ParallelModel,
        run: Run,
    ) -> None:
        """Before the first step of a `train()`; on other ranks it does nothing.

        A run that resumes in its `output_dir` goes on under its id. A branch in another `output_dir` has its own, since
        both may go on at the same time.
        """
        if not state.is_world_process_zero:
            return
        layout = layout_of(model.mesh)
        name = report_id(run, cast(str, args.output_dir))
        for callback in callbacks:
            if isinstance(callback, WandbCallback):
                self._open_wandb(args, name)
                callback.setup(_reported(args, layout), state, model)
            elif isinstance(callback, TrackioCallback):
                # Trackio resumes the run of a name; without one it makes a new name each time.
                own = os.path.basename(os.path.realpath(cast(str, args.output_dir)))
                callback.setup(_reported(args, layout, args.run_name or f"{own}-{name[:8]}"), state, model)
            elif isinstance(callback, TensorBoardCallback):
                self._open_tensorboard(callback, args, state, name)
                if callback.tb_writer is not None:
                    callback.tb_writer.add_text("layout", json.dumps(layout))

    def _open_wandb(self, args: NanotronTrainingArguments, name: str) -> None:
        import wandb

        if wandb.run is not None and wandb.run.id == self._opened != name:
            wandb.finish()
        # A run that the script has opened, or named by wandb's own variable, is the user's choice.
        if wandb.run is None and "WANDB_RUN_ID" not in os.environ:
            project = os.environ.get("WANDB_PROJECT", args.project)
            wandb.init(project=project, name=args.run_name, id=name, resume="allow")
            self._opened = name

    def _open_tensorboard(
        self, callback: TensorBoardCallback, args: NanotronTrainingArguments, state: TrainerState, name: str
    ) -> None:
        if callback.tb_writer is not None or callback.logging_dir not in (None, self._folder):
            return
        from torch.utils.tensorboard import SummaryWriter

        self._folder = callback.logging_dir = os.path.join(cast(str, args.output_dir), "runs", name)
        # Of steps that are made again, those of the run before do not count.
        purged = state.global_step + 1 if state.global_step else None
        callback.tb_writer = SummaryWriter(self._folder, purge_step=purged)


def report_id(run: Run, output_dir: str) -> str:
    """Of a run in its folder: 16 letters and digits."""
    return hashlib.sha256(f"{run.id}\n{os.path.realpath(output_dir)}".encode()).hexdigest()[:16]


def _reported(args: NanotronTrainingArguments, layout: dict[str, int], name: str | None = None) -> Any:
    """Arguments as a callback's `setup` reads them, whose `to_dict` has the layout."""
    reported = copy.copy(args)
    reported.run_name = name or args.run_name
    vars(reported)["to_dict"] = lambda: {**args.to_dict(), "layout": layout}
    return reported
