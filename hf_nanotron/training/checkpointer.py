"""How a trainer saves and resumes: a checkpoint is a Hub repository with the training state beside it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed import ReduceOp
from torch.distributed.tensor import DTensor
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..checkpoint.directory.commit import begin
from ..checkpoint.directory.host_copies import HostCopies, Source, addresses
from ..checkpoint.directory.retention import (
    any_together,
    check_together,
    choose_together,
    is_part,
    newest,
    rotate,
    run_at_hand,
)
from ..checkpoint.directory.run_lock import RunLock, this_process
from ..checkpoint.directory.runs import KEY, Run, write_record
from ..checkpoint.directory.save import BackgroundSave, Save
from ..checkpoint.directory.verify import STATE_INDEX
from ..checkpoint.files.safetensors_file import Entry, write_safetensors
from ..checkpoint.hub.model import hub_bytes, write_hub_config, write_hub_weights
from ..checkpoint.hub.sharded_model import held_buffers
from ..checkpoint.remote.fetch import fetch_newest_together
from ..checkpoint.remote.run_start import lock_together, start_run
from ..checkpoint.state.buffers import buffer_pieces
from ..checkpoint.state.index import StateIndex
from ..checkpoint.state.training_state import DIRECTORY, read_index, state_pieces, state_values
from ..models.base import ParallelModel
from ..optim.ema import WeightAverage
from ..parallel.collectives import all_reduce
from ..parallel.mesh import ParallelMesh
from ..parallel.together import refuse_together, together
from ..parallel.zero.segment import ShardedWeights
from ..training_args import NanotronTrainingArguments
from .beginnings import is_auto, named_beginning
from .host_memory import shortage, state_bytes, warn_of_unpinned
from .remote import RemoteUploads
from .snapshots import MemorySnapshots

logger = logging.get_logger(__name__)
MOST_FILE = "5GB"  # of the Hub's weights


class Checkpointer:
    """The checkpoints of a trainer's runs: written by all ranks, committed at last, resumed on any topology.

    Args:
        uploads: what takes committed checkpoints to a store.
        snapshots: in the memory of hosts, which a restart looks at first.
        on_committed: called on every rank, in the thread that trains, with each checkpoint that is complete.

    Attributes:
        mesh: of the model at hand; given by the trainer.
        run: that this call of `train` is a part of.
        was_told_to_stop: whether a signal ends this call of `train`.
    """

    mesh: ParallelMesh

    def __init__(
        self,
        args: NanotronTrainingArguments,
        uploads: RemoteUploads,
        snapshots: MemorySnapshots,
        on_committed: Callable[[Path], None],
    ) -> None:
        self.args, self._uploads, self._snapshots, self._on_committed = args, uploads, snapshots, on_committed
        self.run, self.was_told_to_stop = Run(), False
        self.background = BackgroundSave()
        self._copies: HostCopies | None = None
        self._began = 0.0  # the save at hand, in seconds of the host's clock
        self._folder: Path | None = None  # `output_dir` as it was when `train` began
        self._saved: set[Path] = set()  # by this call of `train`, or taken up by it; resolved
        self._lock = RunLock()
        self._read: tuple[str, StateIndex | None] | None = None  # of the checkpoint that is being resumed

    # ---- one call of `train` ----

    @contextlib.contextmanager
    def running(self, resume_from_checkpoint: str | bool | None) -> Iterator[str | None]:
        """Around a run, which holds the lock of its folder: the checkpoint that it resumes, if any."""
        together(self.mesh, "the save of the run before", self.finish)
        self._saved.clear()
        self.was_told_to_stop = False
        args, store, output_dir = self.args, self._uploads.store, cast(str, self.args.output_dir)
        self._folder, saves = Path(output_dir).absolute(), args.save_strategy != "no"
        if saves:
            lock_together(self.mesh, self._lock, output_dir)
        try:
            with self._snapshots.running():
                source, overwrite = self.choose(resume_from_checkpoint), args.overwrite_output_dir
                is_own = self._snapshots.holds(source)
                self.run = start_run(self.mesh, output_dir, source, overwrite, store, is_noted=saves, is_own=is_own)
                self._uploads.begin_run(self.run)
                self._read = None if source is None else (source, read_index(self.mesh, source))
                yield source
        finally:
            self._read = None
            self.hold()
            if not self.background.is_busy:  # otherwise until it has written, and the process or the next run ends
                self._lock.release()
                self._copies = None

    def choose(self, named: str | bool | None) -> str | None:
        """The checkpoint to resume: the one that is named; for True the newest that is undamaged; None for neither.

        `auto` is True if the run has a checkpoint, and a fresh start if it has none yet; `auto:PATH` begins there then.
        """
        if not named:
            return None
        output_dir = cast(str, self.args.output_dir)
        begins_at, goes_on = named_beginning(named, output_dir), is_auto(named)
        if named is not True and not goes_on:
            return self._take_named(os.fspath(named))
        return self._snapshots.choose(lambda: self._choose_on_disk(goes_on, begins_at))

    def _choose_on_disk(self, goes_on: bool, begins_at: str | None) -> str | None:
        """The newest checkpoint that is undamaged, or where a run without one begins."""
        output_dir = cast(str, self.args.output_dir)
        if self._uploads.store is not None:
            fetch_newest_together(self.mesh, self._uploads.store, output_dir)
        if goes_on and not any_together(self.mesh, output_dir):
            where = "the first step" if begins_at is None else begins_at
            logger.info(f"{output_dir} has no checkpoint of this run: it starts from {where}.")
            return None if begins_at is None else self._take_named(begins_at)
        chosen = choose_together(self.mesh, output_dir, needs=(STATE_INDEX, TRAINER_STATE_NAME))
        if chosen is None:
            others = ", ".join(path.name for path in newest(output_dir)[:5])
            hint = f" of the run that was started last. To resume another run, name one of: {others}."
            raise ValueError(f"No valid checkpoint found in output directory ({output_dir}){hint if others else ''}")
        self._saved.add(chosen.resolve())
        return str(chosen)

    def _take_named(self, source: str) -> str:
        check_together(self.mesh, source, deep=False)  # what is read of it is verified then
        self._saved.add(Path(source).resolve())  # with no step left, what was resumed is not written anew
        return source

    def index_of(self, checkpoint: str | None) -> StateIndex | None:
        """Of its training state; None if it has none. All ranks together; read once for the one that is resumed."""
        if checkpoint is None:
            return None
        if self._read is not None and self._read[0] == checkpoint:
            return self._read[1]
        return read_index(self.mesh, checkpoint)

    def note_run(self) -> None:
        """In the folder and the store, by rank 0, when nothing but the first step can still fail."""
        self._read = None  # it is large
        if self.args.save_strategy != "no" and self.mesh.rank == 0:
            write_record(cast(str, self.args.output_dir), self.run, this_process())
            if self._uploads.uploader is not None:
                self._uploads.uploader.note_run()

    def stop_if_told(self, told: torch.Tensor, received: str | None, control: TrainerControl) -> None:
        """Save and stop after this step if any rank was `told` to by a signal; this one `received` which."""
        if self.args.save_on_signal and told.item():
            logger.warning(f"{received or 'Another rank was told to stop'}: saving, then stopping.")
            control.should_save = control.should_training_stop = self.was_told_to_stop = True

    def where_to_resume(self, besides: str | None = None) -> str:
        """What to do about lost weights, up to an "and"; not from `besides` or what is newer. All ranks together."""
        try:
            together(self.mesh, "the save before", self.finish)  # it is the one to resume from
        except Exception as error:
            logger.warning(f"{type(error).__name__}: {error}")
        output_dir = self.args.output_dir
        run = self.run if self.run.branch or not output_dir else run_at_hand(output_dir)
        kept = newest(output_dir, run) if output_dir else []
        if besides is not None and Path(besides).resolve() in (paths := [path.resolve() for path in kept]):
            kept = kept[paths.index(Path(besides).resolve()) + 1 :]
        return f"Resume from {kept[0]}" if kept else "There is no checkpoint before it: start again"

    # ---- memory for copies ----

    def reserve(
        self,
        model: ParallelModel,
        weights: ShardedWeights,
        optimizer: torch.optim.Optimizer,
        average: WeightAverage | None,
        with_weights: bool,
    ) -> None:
        """Begin to get the host's memory that asynchronous saves and snapshots copy to, and use again. All ranks
        together.

        Args:
            with_weights: a checkpoint has the Hub's files of the model.

        Raises:
            ValueError: on every rank, if a host does not have as much.
        """
        args = self.args
        if not args.async_save or (args.save_strategy == "no" and not args.save_on_signal):
            self._snapshots.reserve(optimizer, average, awaited=0)
            return
        size = state_bytes(weights, optimizer, average, self.mesh)
        if with_weights and args.save_hub_weights == "always":
            size += hub_bytes(model, MOST_FILE) * (1 if average is None else 2)
        copies = self._host_copies()
        refuse_together(self.mesh, shortage(self.mesh, size - copies.reserved))
        copies.reserve(size)
        largest = int(all_reduce(torch.tensor(size, device=self.mesh.device), self.mesh.world, ReduceOp.MAX))
        logger.info(
            f"async_save: copies of a checkpoint take up to {largest / 2**30:.2f} GiB of host memory a process."
        )
        self._snapshots.reserve(optimizer, average, awaited=copies.awaited)

    def _host_copies(self) -> HostCopies:
        if self._copies is None or self._copies.device != self.mesh.device:
            self._copies = HostCopies(self.mesh.device)
        return self._copies

    def hold(self) -> None:
        """Weights or the optimizer's state are about to be written: saves and snapshots have to have copied them."""
        if self._copies is not None:
            self._copies.hold()
        self._snapshots.hold()

    @contextlib.contextmanager
    def averaged(self, average: WeightAverage | None) -> Iterator[None]:
        """Around what the model is to do as the moving average of its weights, if there is one."""
        if average is None:
            yield
            return
        self.hold()
        with average.in_place():
            try:
                yield
            finally:
                self.hold()

    def hold_weights(self, weights: ShardedWeights) -> None:
        """A user's code may write to the model's weights, which may be the masters themselves."""
        are_apart = all(segment.weight is not None for segment in weights.segments)
        if self._copies is not None:
            self._copies.hold(marked=are_apart)
        if not are_apart:
            self._snapshots.hold()

    # ---- saving ----

    def begin(self, folder: Path, step: int) -> Save | None:
        """Begin `checkpoint-N/` in the folder of a run; None if this run has it already."""
        mesh, directory = self.mesh, folder.absolute() / f"{PREFIX_CHECKPOINT_DIR}-{step}"  # a thread may write it
        if directory.resolve() in self._saved:  # at the end of an epoch, say, that is also a step to save at
            return None
        self._saved.add(directory.resolve())
        self._began = time.perf_counter()
        if self.args.async_save:
            self._host_copies().begin()

        def make() -> None:
            self._refuse_moved(directory.name)
            if mesh.rank == 0:
                begin(directory)
                if not self.args.save_only_model:
                    (directory / DIRECTORY).mkdir(exist_ok=True)

        together(mesh, f"saving {directory}", make)
        return Save(directory, step, self.args.ddp_timeout, run=self.run.to_dict())

    def _refuse_moved(self, name: str) -> None:
        """A relative `output_dir` is another folder where the working directory is another one."""
        now = Path(cast(str, self.args.output_dir)).absolute()
        if self._folder not in (None, now) and not os.path.isabs(cast(str, self.args.output_dir)):
            raise ValueError(
                f"output_dir={self.args.output_dir!r} was {self._folder} when train began, and is {now} now, since the "
                f"working directory was changed: {name} would be lost to a resume. Give an absolute output_dir."
            )

    def write_model(self, save: Save, model: ParallelModel, with_weights: bool, folder: str = "") -> None:
        """The Hub's files, in a folder of the checkpoint: weights now or, with `async_save`, as copies for later."""
        directory = save.directory / folder
        in_use, changing = addresses(_in_use(model)), addresses(held_buffers(model).values())
        together(self.mesh, f"saving {directory}", lambda: write_hub_config(model, directory))
        if not with_weights:
            return
        errors: list[Exception] = []

        def source_of(tensor: torch.Tensor) -> Source:
            where = tensor.untyped_storage().data_ptr()
            return Source.CHANGES if where in changing else Source.KEPT if where in in_use else Source.OWN

        def write(path: Path, entries: list[Entry], tensors: Iterator[torch.Tensor]) -> None:
            if self.args.async_save:
                copies = self._host_copies().of((tensor, source_of(tensor)) for tensor in tensors)
                save.writes.append(partial(write_safetensors, path, entries, copies))
                return
            try:
                write_safetensors(path, entries, tensors)
            except Exception as error:
                errors.append(error)
                for _ in tensors:  # which other ranks go on sending
                    pass

        def raise_error() -> None:
            if errors:
                raise errors[0]

        save.files += write_hub_weights(model, directory, MOST_FILE, write)
        together(self.mesh, f"saving {directory}", raise_error)
        if self.args.async_save:
            self._host_copies().mark()

    def add_training_state(
        self,
        save: Save,
        model: ParallelModel,
        weights: ShardedWeights,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        average: WeightAverage | None,
        extra: dict[str, Any],
    ) -> None:
        """This rank's part of the training state, still in its place."""
        save.pieces = state_pieces(weights.segments, optimizer, self.mesh, average) + buffer_pieces(model)
        save.values = state_values(self.mesh, optimizer, scheduler, {**extra, KEY: self.run.to_dict()})

    def finish_save(self, save: Save, best: str | None) -> None:
        """Write what is left, now or in the background, and commit. The `best` checkpoint is kept in any case."""
        save.on_committed = partial(self._retain, keep=() if best is None else (Path(best),))
        if self.args.async_save:
            copies = self._host_copies()
            save.copy_to_host(copies)
            warn_of_unpinned(copies, "async_save")
            self.background.start(save, self.mesh)
            seconds = time.perf_counter() - self._began
            logger.info(
                f"{save.directory.name}: training stood still for {seconds:.2f} s, and goes on while it is saved."
            )
        else:
            together(self.mesh, f"saving {save.directory}", lambda: save.finish(self.mesh))
            self._on_committed(save.directory)

    def finish_before(self, step: int) -> None:
        """Before the save of a step: the save before it has ended."""
        if self.background.is_busy and self.mesh.rank == 0:
            logger.warning(
                f"{PREFIX_CHECKPOINT_DIR}-{step} waits for {self.background}: training stands still until it is "
                "complete. If this comes often, save less often (save_steps)."
            )
        self.finish()

    def finish(self, wait: bool = True) -> None:
        """Take note of a background save that has ended."""
        directory = self.background.wait() if wait else self.background.poll()
        if directory is not None:
            self._on_committed(directory)

    def _retain(self, directory: Path, keep: tuple[Path, ...]) -> None:
        """Upload a committed checkpoint, and delete older ones; on rank 0, in the thread that has written it."""
        limit, uploader = self.args.save_total_limit, self._uploads.uploader
        if uploader is None:
            rotate(directory.parent, limit, (directory, *keep), self.run)
            return
        uploader.submit(directory, keep)
        with uploader.local_lock:
            rotate(directory.parent, limit, (directory, *keep, *uploader.pending()), self.run)

    # ---- the best checkpoint ----

    def note_best(self, state: TrainerState, folder: Path) -> None:
        """The best checkpoint so far, if it is there. On every rank: all of them load it in the end."""
        best = folder / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
        exists = bool(state.best_global_step) and self.mesh.rank == 0 and best.exists()
        exists = exists and (best.resolve() in self._saved or is_part(self.run, best))  # not what another run has left
        if all_reduce(torch.tensor(float(exists), device=self.mesh.device), self.mesh.world):
            state.best_model_checkpoint = str(best)

    def take_up(self, state: TrainerState, max_steps: int) -> None:
        """What a resumed `trainer_state.json` says goes on in this run, and in its folder. All ranks together."""
        best = state.best_model_checkpoint
        if best is not None and not self.is_of_run(Path(best)):
            logger.warning(f"ignoring the best checkpoint in {TRAINER_STATE_NAME}, {best}: it is not one of this run.")
            state.best_model_checkpoint = None
        self.note_best(state, Path(cast(str, self.args.output_dir)))  # which may have moved, or come from a store
        own = TrainerState()
        own.compute_steps(self.args, max_steps)
        for name in ("logging_steps", "eval_steps", "save_steps"):  # a checkpoint converted from the Hub has none
            if not getattr(state, name):
                setattr(state, name, getattr(own, name))

    def is_of_run(self, checkpoint: Path) -> bool:
        """Whether a checkpoint is of the run, in the output directory or beside the one that was taken up."""
        folders = {Path(cast(str, self.args.output_dir)), *(path.parent for path in self._saved)}
        is_there = checkpoint.resolve().parent in {folder.resolve() for folder in folders}
        return is_there and is_part(self.run, checkpoint)


def _in_use(model: ParallelModel) -> Iterator[torch.Tensor]:
    """What the model holds: these tensors are not made for a save alone."""
    for tensor in (*model.parameters(), *model.buffers()):
        yield tensor.to_local() if isinstance(tensor, DTensor) else tensor
