"""How `NanotronTrainer` saves and resumes: a checkpoint is a Hub repository with the training state beside it."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..checkpoint.directory.commit import begin
from ..checkpoint.directory.retention import check_together, choose_together, is_part, newest, rotate
from ..checkpoint.directory.run_lock import RunLock, this_process
from ..checkpoint.directory.runs import KEY, Run, write_record
from ..checkpoint.directory.save import BackgroundSave, Save
from ..checkpoint.directory.verify import STATE_INDEX
from ..checkpoint.files.repository import unlink_link, unlink_links
from ..checkpoint.files.safetensors_file import Entry, write_safetensors
from ..checkpoint.hub.card import write_model_card
from ..checkpoint.hub.model import load_hub_weights, save_hub_model, write_hub_config, write_hub_weights
from ..checkpoint.remote.fetch import fetch_newest_together
from ..checkpoint.remote.run_start import lock_together, start_run
from ..checkpoint.state.buffers import buffer_pieces, load_buffers
from ..checkpoint.state.training_state import (
    DIRECTORY,
    has_training_state,
    load_masters,
    load_training_state,
    state_pieces,
    state_values,
)
from ..models.base import ParallelModel
from ..optim.optimizer_link import OptimizerLink
from ..parallel.collectives import all_reduce
from ..parallel.together import together
from ..parallel.zero.segment import ShardedWeights
from ..redaction import redacted
from ..training_args import NanotronTrainingArguments
from .remote import RemoteTrainer
from .same_on_all_ranks import check_shared
from .trainer_methods import is_overridden

logger = logging.get_logger(__name__)


class CheckpointingTrainer(RemoteTrainer):
    """A Trainer whose checkpoints are written by all ranks, committed at last, and resumed on any topology."""

    args: NanotronTrainingArguments
    model: ParallelModel
    weights: ShardedWeights
    _link: OptimizerLink | None
    _filters_losses: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._background = BackgroundSave()
        self._saved: set[Path] = set()  # by this call of `train`, or taken up by it; resolved
        self._told_to_stop = False
        self._run = Run()  # that this call of `train` is a part of
        self._lock = RunLock()
        super().__init__(*args, **kwargs)

    # ---- saving ----

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write a Hub repository, all ranks together (see `save_hub_model`)."""
        directory = Path(output_dir or cast(str, self.args.output_dir))
        check_shared(self.mesh, directory, "output_dir")
        save_hub_model(self.model, directory)
        self._save_companions(directory)

    def create_model_card(self, language: str | None = None, **fields: Any) -> None:  # type: ignore[override]
        """As `Trainer.create_model_card`, with the batch and parallel sizes of this run; on rank 0."""
        if self.is_world_process_zero():
            path = Path(cast(str, self.args.output_dir), "README.md")
            unlink_link(path)
            write_model_card(self, self.mesh, path, language=language, **fields)

    def _save_companions(self, directory: Path) -> None:
        """Tokenizer and arguments, by rank 0."""
        if not self.args.should_save:
            return
        tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
        args = copy.copy(self.args)  # which is pickled without secrets
        args.logging_nan_inf_filter |= self._filters_losses  # what stands for it while a run is going on
        torch.save(args, directory / "training_args.bin")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write `checkpoint-N/`, and commit it; with `async_save` the training goes on meanwhile."""
        mesh, args = self.mesh, self.args
        together(mesh, "the save before", self._finish_background_save)
        self.store_flos()
        run = Path(self._get_output_dir(trial=trial))
        directory = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if directory.resolve() in self._saved:  # at the end of an epoch, say, that is also a step to save at
            return
        self._saved.add(directory.resolve())
        what = f"saving {directory}"
        together(mesh, what, lambda: begin(directory) if mesh.rank == 0 else None)
        save = Save(directory, self.state.global_step, args.ddp_timeout, run=self._run.to_dict())
        writes_weights = args.save_hub_weights == "always" or self._is_last_save()
        if writes_weights and (is_overridden(self, "save_model") or is_overridden(self, "_save")):
            self.save_model(str(directory), _internal_call=True)  # as Trainer does
        else:
            together(mesh, what, lambda: write_hub_config(self.model, directory))
            if writes_weights:
                self._write_hub_weights(save)
        self._note_best(run)
        together(mesh, what, lambda: self._write_own_files(save))
        best = self.state.best_model_checkpoint
        save.on_committed = partial(self._retain, keep=() if best is None else (Path(best),))
        if args.async_save:
            save.copy_to_host(self._background.copies)
            self._background.start(save, mesh)
        else:
            together(mesh, what, lambda: save.finish(mesh))
            self._on_committed(directory)

    def _write_hub_weights(self, save: Save) -> None:
        """The Hub's weights, now or, with `async_save`, as copies for later. All ranks together."""
        errors: list[Exception] = []

        def write(path: Path, entries: list[Entry], tensors: Iterator[torch.Tensor]) -> None:
            if self.args.async_save:
                copies = [self._background.copies.of(e.name, t) for e, t in zip(entries, tensors, strict=True)]
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

        save.files = write_hub_weights(self.model, save.directory, "5GB", write)
        together(self.mesh, f"saving {save.directory}", raise_error)

    def _write_own_files(self, save: Save) -> None:
        """What this rank can do alone: the small files, and its part of the training state, still in its place."""
        if not self.args.save_only_model:
            assert self.optimizer is not None
            self.weights.take_written(compare=self._link is not None and self._link.compares)
            save.pieces = state_pieces(self.weights.segments, self.optimizer, self.mesh) + buffer_pieces(self.model)
            extra = {**self.extra_state(), KEY: self._run.to_dict()}
            save.values = state_values(self.mesh, self.optimizer, self.lr_scheduler, extra)
            self._save_rng_state(str(save.directory))
            (save.directory / DIRECTORY).mkdir(exist_ok=True)
        if self.mesh.rank == 0:
            self._save_companions(save.directory)
            self._save_trainer_state(save.directory)

    def _note_best(self, run: Path) -> None:
        """The best checkpoint so far, if it is there. On every rank: all of them load it in the end."""
        best = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        exists = bool(self.state.best_global_step) and self.mesh.rank == 0 and best.exists()
        exists = exists and (best.resolve() in self._saved or is_part(self._run, best))  # not what another run has left
        if all_reduce(torch.tensor(float(exists), device=self.mesh.device), self.mesh.world):
            self.state.best_model_checkpoint = str(best)

    def extra_state(self) -> dict[str, Any]:
        """What else a training state is to hold, the same on every rank."""
        return {}

    def _is_last_save(self) -> bool:
        return self.control.should_training_stop or self.state.global_step >= self.state.max_steps

    def _save_trainer_state(self, directory: Path) -> None:
        """Step, log history and the callbacks' states, as Trainer writes them; by rank 0."""
        for callback in (*self.callback_handler.callbacks, self.control):
            if isinstance(callback, ExportableState):
                name, state = type(callback).__name__, redacted("", callback.state(), None)
                states = cast(dict[str, Any], self.state.stateful_callbacks)
                if isinstance(states.get(name), list):
                    states[name].append(state)
                else:
                    states[name] = state
        self.state.save_to_json(str(directory / TRAINER_STATE_NAME))

    def _on_committed(self, directory: Path) -> None:
        """What is done with a complete checkpoint."""
        if self.args.push_to_hub:
            if self.is_world_process_zero():
                unlink_links(Path(cast(str, self.args.output_dir)))
            self._push_from_checkpoint(str(directory))

    def _retain(self, directory: Path, keep: tuple[Path, ...]) -> None:
        """Upload a committed checkpoint, and delete older ones; on rank 0, in the thread that has written it."""
        limit = self.args.save_total_limit
        if self._uploader is None:
            rotate(directory.parent, limit, (directory, *keep), self._run)
            return
        self._uploader.submit(directory, keep)
        with self._uploader.local_lock:
            rotate(directory.parent, limit, (directory, *keep, *self._uploader.pending()), self._run)

    def _finish_background_save(self, wait: bool = True) -> None:
        """Take note of a save that has ended.

        Raises:
            RuntimeError: if it failed.
        """
        directory = self._background.wait() if wait else self._background.poll()
        if directory is not None:
            self._on_committed(directory)

    # ---- resuming ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`. `resume_from_checkpoint=True` takes the newest committed checkpoint that is undamaged.

        Raises:
            ValueError: if the named checkpoint is not complete, or there is none at all.
        """
        together(self.mesh, "the save of the run before", self._finish_background_save)
        self._saved.clear()
        self._told_to_stop = False
        output_dir, saves = cast(str, self.args.output_dir), self.args.save_strategy != "no"
        if saves:
            lock_together(self.mesh, self._lock, output_dir)
        try:
            source = self._checkpoint_to_resume(resume_from_checkpoint)
            self._run = start_run(
                self.mesh, output_dir, source, self.args.overwrite_output_dir, self._store, is_noted=saves
            )
            if self._store is not None:
                together(self.mesh, "listing the local checkpoints to upload", self._submit_existing)
            with self._signals:
                result = super().train(source, *args, **kwargs)
                self._wait_for_uploads()
            self.weights.wait()
            return result
        finally:
            if not self._background.is_busy:  # otherwise until it has written, and the process or the next run ends
                self._lock.release()

    def _checkpoint_to_resume(self, named: str | bool | None) -> str | None:
        """
        Raises:
            ValueError: as `train`.
        """
        output_dir = cast(str, self.args.output_dir)
        if named is True:
            if self._store is not None:
                fetch_newest_together(self.mesh, self._store, output_dir)
            chosen = choose_together(self.mesh, output_dir, needs=(STATE_INDEX, TRAINER_STATE_NAME))
            if chosen is None:
                others = ", ".join(path.name for path in newest(output_dir)[:5])
                raise ValueError(
                    f"No valid checkpoint found in output directory ({output_dir})"
                    + (
                        f" of the run that was started last. Name one of others to resume it: {others}."
                        if others
                        else ""
                    )
                )
            self._saved.add(chosen.resolve())
            return str(chosen)
        if not named:
            return None
        source = os.fspath(named)
        check_together(self.mesh, source, deep=False)  # what is read of it is verified then
        self._saved.add(Path(source).resolve())  # a run that has no step left does not write what it came from anew
        return source

    def _submit_existing(self) -> None:
        if self._uploader is not None:
            self._uploader.run = self._run
            self._uploader.submit_existing()

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer would delete the last checkpoint here if another is the best; `rotate` has kept to the limit."""
        together(self.mesh, "the last save", self._finish_background_save)
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        """Whether to save under `save_strategy="best"`: also when told to stop."""
        return super()._determine_best_metric(*args, **kwargs) or self._told_to_stop

    def _stop_if_told(self, told: torch.Tensor) -> None:
        """Save and stop after this step if any rank has received a signal.

        Args:
            told: how many ranks have.
        """
        if self.args.save_on_signal and told.item():
            logger.warning(f"{self._signals.received or 'Another rank was told to stop'}: saving, then stopping.")
            self.control.should_save = self.control.should_training_stop = self._told_to_stop = True

    def _init_training_state(self, max_steps: int, *args: Any) -> tuple[int, int]:
        """A checkpoint converted from the Hub leaves logging, evaluation and saving intervals to this run."""
        progress = super()._init_training_state(max_steps, *args)
        best = self.state.best_model_checkpoint
        if best is not None and not self._is_of_run(Path(best)):
            logger.warning(f"The best checkpoint that {TRAINER_STATE_NAME} names, {best}, is in no folder of this run.")
            self.state.best_model_checkpoint = None
        self._note_best(Path(cast(str, self.args.output_dir)))  # which may have moved, or come from a store
        own = TrainerState()
        own.compute_steps(self.args, max_steps)
        for name in ("logging_steps", "eval_steps", "save_steps"):
            if not getattr(self.state, name):
                setattr(self.state, name, getattr(own, name))
        return progress

    def _load_callback_state(self) -> None:
        """
        Raises:
            ValueError: for states that the callbacks of this run do not take.
        """
        try:
            super()._load_callback_state()
        except (TypeError, AttributeError) as error:
            raise ValueError(
                f"{TRAINER_STATE_NAME} holds a state that its callback does not take ({error}); set "
                "restore_callback_states_from_checkpoint=False, or use an earlier checkpoint."
            ) from error

    def _is_of_run(self, checkpoint: Path) -> bool:
        """Whether a checkpoint is of the run, in the output directory or beside the one that was taken up."""
        folders = {Path(cast(str, self.args.output_dir)), *(path.parent for path in self._saved)}
        is_there = checkpoint.resolve().parent in {folder.resolve() for folder in folders}
        return is_there and is_part(self._run, checkpoint)

    def _note_run(self) -> None:
        """In the folder and the store, by rank 0, when nothing but the first step can still fail."""
        if self.args.save_strategy != "no" and self.mesh.rank == 0:
            write_record(cast(str, self.args.output_dir), self._run, this_process())
            if self._uploader is not None:
                self._uploader.note_run()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The weights that are not in the training state, which follows with the optimizer: the frozen ones, or all."""
        if not has_training_state(resume_from_checkpoint):
            load_hub_weights(self.model, resume_from_checkpoint)
            self.weights.read_from_model()
            return
        trained = {segment.name for segment in self.weights.segments}
        frozen = [name for name, p in self.model.named_parameters() if not p.requires_grad and name not in trained]
        if frozen:
            load_hub_weights(self.model, resume_from_checkpoint, frozen)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            assert self.optimizer is not None
            self.weights.wait()
            load_training_state(checkpoint, self.mesh, self.weights.segments, self.optimizer, self.lr_scheduler)
            load_buffers(checkpoint, self.model)
            self.weights.publish()

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        assert best is not None
        logger.info(f"Loading best model from {best} (score: {self.state.best_metric}).")
        self._finish_background_save()
        self.weights.wait()
        self._load_from_checkpoint(best)
        if has_training_state(best):
            load_masters(best, self.mesh, self.weights.segments)
            load_buffers(best, self.model)
            self.weights.publish()
            self.weights.wait()
