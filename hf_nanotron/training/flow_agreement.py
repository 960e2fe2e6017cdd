"""What a callback asks for on one rank (stop, save, evaluate, log) happens on all ranks, at the same step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers import DefaultFlowCallback, PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.utils import logging

from ..ops.host_copy import HostCopy
from ..parallel.collectives import all_reduce
from ..parallel.mesh import ParallelMesh

logger = logging.get_logger(__name__)

FLAGS = ("should_training_stop", "should_epoch_stop", "should_save", "should_evaluate", "should_log")
STOPS = FLAGS[:2]
# They do the same on every rank, or do not touch the flow of control.
STOCK_CALLBACKS = (DefaultFlowCallback, PrinterCallback, ProgressCallback)
STOCK_MODULES = ("transformers.integrations", "transformers.utils.notebook", "hf_nanotron")


class FlowTrainer(Trainer):
    """A Trainer whose ranks agree on the flags of `control`.

    The sum that carries them starts after the callbacks of a step, and a rank without flags does not wait for it. If
    every rank has one (each does where the step logs, saves or is the last), all flags act at once. If only some do,
    all ranks learn of it while the next step is computed, and act at its end. Where ranks wait for each other anyway
    (the ends of epochs, log lines, evaluations, saves) flags act at once. Without callbacks of the user's, and on one
    process, nothing is sent.
    """

    mesh: ParallelMesh
    _agrees: bool = False
    _asked: HostCopy | None = None
    _keeper: KeepWhole
    _agreed_at: int = 0  # step

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        callbacks = self.callback_handler.callbacks
        callbacks[:] = [callback for callback in callbacks if not isinstance(callback, KeepWhole)]
        own = type(self).__module__.partition(".")[0] != "hf_nanotron" or any(map(_is_foreign, callbacks))
        self._asked, self._keeper = None, KeepWhole()
        self._agrees = self.mesh.world_size > 1 and bool(self._sum([own]).read()[0])
        return super()._inner_training_loop(*args, **kwargs)

    # ---- where ranks agree ----

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        self._agreed_at = self.state.global_step
        self._agree_now()  # on what was asked for when the run, or the epoch, began
        if self._agrees:
            callbacks = self.callback_handler.callbacks
            callbacks[:] = [callback for callback in callbacks if callback is not self._keeper] + [self._keeper]
        return super()._run_epoch(*args, **kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if not self._agrees:
            super()._maybe_log_save_evaluate(*args, **kwargs)
            return
        control, ends_step = self.control, self.state.global_step != self._agreed_at
        self._agreed_at = self.state.global_step
        self._keeper.give_back(control)
        if ends_step:
            self._agree_after_step()
        else:
            self._agree_now()
        logs = control.should_log
        if logs:  # first, and alone: what its callbacks ask for is for all ranks, too
            evaluates, saves = control.should_evaluate, control.should_save
            control.should_evaluate = control.should_save = False
            self._keeper.only_logs = True
            super()._maybe_log_save_evaluate(*args, **kwargs)
            self._keeper.only_logs = False
            control = self.control
            self._keeper.give_back(control)
            control.should_evaluate |= evaluates
            control.should_save |= saves
            self._agree_now()
        acts = control.should_evaluate or control.should_save
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if acts:
            self._agree_now()

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        metrics = super()._evaluate(*args, **kwargs)
        self._agree_now()
        return metrics

    # ---- how ----

    def _agree_now(self) -> None:
        """Every rank has the flags of all."""
        if self._agrees:
            self._set(self._sum(self._flags()).read())
            self._take_asked()

    def _agree_after_step(self) -> None:
        self._take_asked()
        flags = self._flags()
        counted = self._sum([*flags, any(flags)])
        if not any(flags):
            self._asked = counted  # to be read when it has arrived for long
            return
        *counts, ranks = counted.read().tolist()
        if ranks == self.mesh.world_size:
            self._set(torch.tensor(counts))
            return
        self._asked = counted
        for name in FLAGS:
            setattr(self.control, name, False)

    def _take_asked(self) -> None:
        """Set what some rank asked for after the step before."""
        asked, self._asked = self._asked, None
        if asked is not None:
            self._set(asked.read())

    def _flags(self) -> list[bool]:
        return [bool(getattr(self.control, name)) for name in FLAGS]

    def _set(self, counts: torch.Tensor) -> None:
        for name, count in zip(FLAGS, counts.tolist(), strict=False):
            if count and not getattr(self.control, name):
                logger.info(f"{name} was set on another rank.")
                setattr(self.control, name, True)

    def _sum(self, values: list[bool]) -> HostCopy:
        """How many ranks say yes to each."""
        mine = torch.tensor(values, dtype=torch.float32)
        if self.mesh.device.type == "cuda":
            mine = mine.pin_memory()
        return HostCopy(all_reduce(mine.to(self.mesh.device, non_blocking=True), self.mesh.world))


class KeepWhole(TrainerCallback):
    """Keeps flags back until ranks agree: of what asks to stop in the middle of a step, and of what a log line sets.

    Attributes:
        only_logs: whether Trainer has been called to log, and is not to save or evaluate yet.
    """

    def __init__(self) -> None:
        self.only_logs = False
        self._kept: set[str] = set()

    def _keep(self, control: Any, names: Iterable[str]) -> None:
        for name in names:
            if getattr(control, name):
                self._kept.add(name)
                setattr(control, name, False)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._keep(control, STOPS)

    on_substep_end = on_step_begin

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.only_logs:
            self._keep(control, ("should_save", "should_evaluate"))

    def give_back(self, control: Any) -> None:
        """Set again what was kept."""
        for name in self._kept:
            setattr(control, name, True)
        self._kept.clear()


def _is_foreign(callback: Any) -> bool:
    """Whether a callback may set other flags on other ranks."""
    return type(callback) not in STOCK_CALLBACKS and not type(callback).__module__.startswith(STOCK_MODULES)
