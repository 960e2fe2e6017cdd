"""What a callback asks for on one rank (stop, save, evaluate, log) happens on all ranks, at the same step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from transformers import DefaultFlowCallback, PrinterCallback, ProgressCallback, TrainerCallback, TrainerControl
from transformers.utils import logging

from ...ops.host_copy import HostCopy
from ...parallel.collectives import all_reduce
from ...parallel.mesh import ParallelMesh

logger = logging.get_logger(__name__)

FLAGS = ("should_training_stop", "should_epoch_stop", "should_save", "should_evaluate", "should_log")
STOPS = FLAGS[:2]
# They do the same on every rank, or do not touch the flow of control.
STOCK_CALLBACKS = (DefaultFlowCallback, PrinterCallback, ProgressCallback)
STOCK_MODULES = ("transformers.integrations", "transformers.utils.notebook", "hf_nanotron")


class FlowAgreement:
    """Lets the ranks of one run agree on the flags of `control`. Made by all ranks together.

    The reduction that carries the flags starts after the callbacks of a step, and a rank without flags does not wait
    for it. If every rank has one (each does where the step logs, saves or is the last), all flags act at once. If only
    some do, all ranks learn of it while the next step is computed, and act at its end. Where ranks wait for each other
    anyway (the ends of epochs, log lines, evaluations, saves) flags act at once. Without callbacks of the user's, and
    on one process, nothing is sent.

    Args:
        callbacks: of the trainer, a list that it goes on using.
        is_subclass: whether the trainer is the user's subclass, which may set flags itself.
    """

    def __init__(self, mesh: ParallelMesh, callbacks: list[TrainerCallback], is_subclass: bool = False) -> None:
        self.mesh, self._callbacks = mesh, callbacks
        self._asked: HostCopy | None = None
        self._agreed_at = 0  # step
        self._keeper = FlagKeeper()
        callbacks[:] = [callback for callback in callbacks if not isinstance(callback, FlagKeeper)]
        own = is_subclass or any(map(_is_foreign, callbacks))
        self.agrees = mesh.world_size > 1 and bool(self._any([own]).read()[0])

    def begin_epoch(self, control: TrainerControl, step: int) -> None:
        """Agree on what was asked for when the run, or the epoch, began."""
        self._agreed_at = step
        self.agree(control)
        if self.agrees:
            others = [callback for callback in self._callbacks if callback is not self._keeper]
            self._callbacks[:] = [*others, self._keeper]

    def turns(self, get_control: Callable[[], TrainerControl], step: int) -> Iterator[None]:
        """One turn for each time that Trainer is to act by the flags of a control that callbacks may replace."""
        if not self.agrees:
            yield
            return
        control, ends_step = get_control(), step != self._agreed_at
        self._agreed_at = step
        self._keeper.give_back(control)
        if ends_step:
            self._agree_after_step(control)
        else:
            self.agree(control)
        if control.should_log:  # first, and alone: what its callbacks ask for is for all ranks, too
            evaluates, saves = control.should_evaluate, control.should_save
            control.should_evaluate = control.should_save = False
            self._keeper.only_logs = True
            yield
            self._keeper.only_logs = False
            control = get_control()
            self._keeper.give_back(control)
            control.should_evaluate |= evaluates
            control.should_save |= saves
            self.agree(control)
        acts = control.should_evaluate or control.should_save
        yield
        if acts:
            self.agree(get_control())

    def agree(self, control: TrainerControl) -> None:
        """Give every rank the flags of all, now."""
        if self.agrees:
            _set(control, self._any(_flags(control)).read())
            self._take_asked(control)

    def _agree_after_step(self, control: TrainerControl) -> None:
        self._take_asked(control)
        flags = _flags(control)
        asked = self._any([*flags, not any(flags)])
        if not any(flags):
            self._asked = asked  # to be read when it has arrived for long
            return
        *of_all, is_some_rank_without = asked.read().tolist()
        if not is_some_rank_without:
            _set(control, torch.tensor(of_all))
            return
        self._asked = asked
        for name in FLAGS:
            setattr(control, name, False)

    def _take_asked(self, control: TrainerControl) -> None:
        """Set what some rank asked for after the step before."""
        asked, self._asked = self._asked, None
        if asked is not None:
            _set(control, asked.read())

    def _any(self, values: list[bool]) -> HostCopy:
        """Whether some rank says yes to each."""
        mine = torch.tensor(values, dtype=torch.int32)  # a rehearsal has no values of numbers of floating point
        if self.mesh.device.type == "cuda":
            mine = mine.pin_memory()
        there = mine.to(self.mesh.device, non_blocking=True)
        return HostCopy(all_reduce(there, self.mesh.world, dist.ReduceOp.MAX))


class FlagKeeper(TrainerCallback):
    """Keeps flags back until ranks agree: those that stop in the middle of a step, and those that a log line sets.

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


def _flags(control: TrainerControl) -> list[bool]:
    return [bool(getattr(control, name)) for name in FLAGS]


def _set(control: TrainerControl, asked: torch.Tensor) -> None:
    for name, is_asked in zip(FLAGS, asked.tolist(), strict=False):
        if is_asked and not getattr(control, name):
            logger.info(f"{name} was set on another rank.")
            setattr(control, name, True)


def _is_foreign(callback: Any) -> bool:
    """Whether a callback may set other flags on other ranks."""
    return type(callback) not in STOCK_CALLBACKS and not type(callback).__module__.startswith(STOCK_MODULES)
