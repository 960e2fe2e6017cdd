"""The data of a training run: loaders, samplers, and the cursor by which a run goes on with the next sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import Dataset, IterableDataset, Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import seed_worker
from transformers.utils import logging

from ..checkpoint.state.read import StoredState
from ..checkpoint.state.training_state import DIRECTORY, run_values
from ..checkpoint.state.values import encode
from ..data.cursor import ANEW, FINGERPRINT, OTHER_DATA, Cursor, EpochShape, Resumption, resume_at, why_not_resumable
from ..data.loader import DataParallelLoader, Position, build_loader
from ..data.same_data import check_same_data, dataset_of, is_repeatable
from ..models.base import ParallelModel
from ..parallel.dropout_streams import share_host_generators
from ..training_args import NanotronTrainingArguments

logger = logging.get_logger(__name__)

CURSOR = "data_cursor"  # its key in the `extra` of a training state


class DataTrainer(Trainer):
    """A Trainer whose data order is that of one process, before and after a resume, at any sizes.

    Trainer itself would count `global_step` batches of the new sizes. Here a checkpoint says how many samples were
    trained on, and the rest of the epoch is cut anew from there. A loader of the user's own
    (`get_train_dataloader`) has no cursor; it is resumed as Trainer does.
    """

    args: NanotronTrainingArguments
    model: ParallelModel

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._cursor: Cursor | None = None
        self._resumed: Cursor | None = None
        self._rest: Resumption | None = None
        self._rng_checkpoint: str | None = None
        self._fingerprint: int | None = None
        super().__init__(*args, **kwargs)
        # First, so that all others find the epoch right.
        self.callback_handler.callbacks.insert(0, DataProgress(self))

    # ---- loaders ----

    def _get_dataloader(
        self,
        dataset: Any,
        description: str,
        batch_size: int,
        sampler_fn: Callable[[Any], Sampler[int] | None] | None = None,
        is_training: bool = False,
        dataloader_key: str | None = None,
    ) -> DataParallelLoader:
        sampler = sampler_fn(dataset) if sampler_fn is not None else None  # it may read a column that goes next
        if isinstance(dataset, Dataset) or not hasattr(dataset, "column_names"):
            collate = self._get_collator_with_removed_columns(self.data_collator, description=description)
        else:
            dataset, collate = self._remove_unused_columns(dataset, description=description), self.data_collator
        args, mesh = self.args, self.model.mesh
        loader = build_loader(
            dataset,
            sampler,
            collate,
            batch_size,
            mesh.dp_rank,
            mesh.dp_size,
            args.dataloader_drop_last,
            self._data_seed,
            positions=is_training,
            # As Trainer's, with data-parallel ranks for processes: those of a replica draw the same.
            worker_init_fn=partial(seed_worker, num_workers=args.dataloader_num_workers, rank=mesh.dp_rank)
            if is_training and not isinstance(dataset, IterableDataset)
            else None,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and mesh.device.type == "cuda",
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
        )
        loader.device = None if is_training or mesh.device.type == "cpu" else mesh.device
        if dataloader_key is not None and args.dataloader_persistent_workers:
            self._eval_dataloaders = {**getattr(self, "_eval_dataloaders", {}), dataloader_key: loader}
        return loader

    @property
    def _data_seed(self) -> int:
        return self.args.data_seed if self.args.data_seed is not None else self.args.seed

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        dataset: Any = train_dataset if train_dataset is not None else self.train_dataset
        if isinstance(dataset, IterableDataset):
            return None
        if self.args.train_sampling_strategy == "sequential":
            return SequentialSampler(dataset)
        if self.args.train_sampling_strategy == "group_by_length":
            return self._length_sampler(dataset, self._length_group())
        return SeedableRandomSampler(dataset, data_seed=self._data_seed)

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler[int] | None:
        if isinstance(eval_dataset, IterableDataset):
            return None
        if self.args.train_sampling_strategy == "group_by_length":
            return self._length_sampler(eval_dataset, self.args.eval_batch_size)
        return SequentialSampler(eval_dataset)

    def _length_sampler(self, dataset: Any, batch_size: int) -> LengthGroupedSampler:
        column = self.args.length_column_name
        names = getattr(self.processing_class, "model_input_names", [None])
        return LengthGroupedSampler(
            batch_size,
            dataset=dataset,
            lengths=list(dataset[column]) if column in getattr(dataset, "column_names", ()) else None,
            model_input_name=names[0],
            generator=torch.Generator().manual_seed(self._data_seed),
        )

    def _length_group(self) -> int:
        """Samples that are sorted by length together: the global batch with which the run began."""
        saved = self._resumed.order.get("group") if self._resumed is not None else None
        return saved or self.get_total_train_batch_size(self.args)

    # ---- the cursor ----

    def data_cursor(self) -> dict[str, Any] | None:
        """Where the last optimizer step ended: for a checkpoint, equal on all ranks. None without a loader of ours."""
        cursor = self._cursor
        if cursor is None:
            return None
        if self.control.should_epoch_stop and cursor.samples:  # a callback has had enough of this epoch
            cursor = replace(cursor, epoch=cursor.epoch + 1, samples=0, state=None)
        if cursor.samples and cursor.order["kind"] == "stream":
            cursor = replace(cursor, refused=why_not_resumable(self.train_dataset))
            try:
                encode(cursor.state, "the stream's state_dict")
            except ValueError as error:
                cursor = replace(cursor, state=None, refused=str(error).rstrip("."))
        return cursor.to_dict()

    def extra_state(self) -> dict[str, Any]:
        """For the training state of a checkpoint."""
        return {CURSOR: self.data_cursor()}

    def _read_cursor(self, checkpoint: str) -> Cursor | None:
        folder = Path(checkpoint) / DIRECTORY
        if not folder.is_dir():
            return None
        with StoredState(folder) as stored:
            found = run_values(stored)["extra"].get(CURSOR)
        known = {field.name for field in fields(Cursor)}
        return None if found is None else Cursor(**{key: value for key, value in found.items() if key in known})

    def _data_order(self, loader: DataParallelLoader) -> dict[str, Any]:
        if isinstance(self.train_dataset, IterableDataset):
            return {"kind": "stream", FINGERPRINT: self._fingerprint}
        kind = self.args.train_sampling_strategy
        return {
            "kind": kind,
            "samples": len(loader.dataset),  # type: ignore[arg-type]
            "data_seed": None if kind == "sequential" else self._data_seed,
            "group": self._length_group() if kind == "group_by_length" else None,
            FINGERPRINT: self._fingerprint,
        }

    # ---- the loop ----

    def _inner_training_loop(
        self,
        batch_size: int | None = None,
        args: Any = None,
        resume_from_checkpoint: str | None = None,
        *rest: Any,
        **kwargs: Any,
    ) -> Any:
        self._cursor, self._resumed, self._rest, self._rng_checkpoint = None, None, None, None
        self._goes_on = resume_from_checkpoint is not None and not self.args.ignore_data_skip
        if resume_from_checkpoint is not None and self._goes_on:
            self._resumed = self._read_cursor(resume_from_checkpoint)
            state = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / TRAINER_STATE_NAME))
            self._resumed_step = state.global_step
        return super()._inner_training_loop(batch_size, args, resume_from_checkpoint, *rest, **kwargs)

    def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
        """Trainer's; of a resumed run, with the epochs and steps that its remaining samples take.

        Raises:
            ValueError: if the run cannot go on with the next sample.
        """
        self._fingerprint = check_same_data(self.model.mesh, dataloader, "training")
        epochs, steps, *others, rounds, max_steps = super().set_initial_training_values(args, dataloader)
        if not (isinstance(dataloader, DataParallelLoader) and dataloader.tracks_position):
            self._resumed = None
            return epochs, steps, *others, rounds, max_steps
        order = self._data_order(dataloader)
        is_stream = isinstance(self.train_dataset, IterableDataset)
        refused = why_not_resumable(self.train_dataset) if is_stream else None
        if refused and args.save_strategy != "no" and not args.save_only_model:
            logger.warning(f"A run cannot be resumed in the middle of this data: {refused}.")
        self._cursor = Cursor(0, 0, 0, order)
        if not self._goes_on:
            return epochs, steps, *others, rounds, max_steps
        if self._resumed is None and self._resumed_step == 0:  # converted from the Hub: no data was seen
            return epochs, steps, *others, rounds, max_steps
        if self._resumed is None:
            raise ValueError(f"the checkpoint does not say which samples it was trained on; {ANEW}.")
        cursor = self._resumed
        cursor.check(order)
        if not is_stream:
            shape = EpochShape(
                order["samples"],
                self._train_batch_size,
                self.model.mesh.dp_size,
                args.gradient_accumulation_steps,
                args.dataloader_drop_last,
            )
            self._rest = resume_at(cursor, shape, args.num_train_epochs, args.max_steps)
            epochs, max_steps = self._rest.num_train_epochs, self._rest.max_steps
        else:
            refused = refused or (
                cursor.refused or "the checkpoint has no state of it" if cursor.state is None else None
            )
            if cursor.samples and refused:
                raise ValueError(
                    f"cannot resume in epoch {cursor.epoch} behind sample {cursor.samples}: {refused}; or {ANEW}."
                )
            # Trainer counts the epoch of a stream as `max_steps` steps.
            in_epoch = max_steps * args.gradient_accumulation_steps
            self._rest = Resumption(cursor.epoch, cursor.samples, in_epoch, max_steps, epochs, max_steps)
            if cursor.step >= max_steps:
                epochs = cursor.epoch
        before = cursor.order.get(FINGERPRINT)
        if self._fingerprint is not None and before not in (None, self._fingerprint):
            # Samples that are drawn anew at each reading, a crop from the system's entropy say, are others every time.
            if is_repeatable(self.model.mesh, dataset_of(dataloader), self._fingerprint):
                raise ValueError(OTHER_DATA)
        # With the fingerprint of this run: an older checkpoint may have none.
        self._cursor = replace(cursor, epoch=self._rest.epoch, samples=self._rest.samples, order=order)
        return epochs, steps, *others, rounds, max_steps

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        epoch, rounds = super()._init_training_state(*args, **kwargs)
        return (epoch, rounds) if self._rest is None else (self._rest.epoch, self._rounds_before(self._rest))

    def _rounds_before(self, rest: Resumption) -> int:
        """Rounds of this run's sizes that a resumed epoch has behind it: for its progress only."""
        if isinstance(self.train_dataset, IterableDataset):
            return max(round(((self.state.epoch or 0.0) - rest.epoch) * rest.rounds), 0)
        return -(-rest.samples // (self._train_batch_size * self.model.mesh.dp_size))

    def _run_epoch(self, **kwargs: Any) -> None:  # type: ignore[override]
        loader, epoch, rest = kwargs["train_dataloader"], kwargs["epoch"], self._rest
        self._loader = loader
        self._epoch, self._rounds_done, self._rounds_in_epoch = epoch, 0, kwargs["steps_in_epoch"]
        if rest is None or epoch != rest.epoch or self._cursor is None:
            super()._run_epoch(**kwargs)
            return
        self._rest = None
        is_stream = isinstance(self.train_dataset, IterableDataset)
        self._rounds_done = self._rounds_before(rest)
        self._rounds_in_epoch = rest.rounds if is_stream else self._rounds_done + rest.rounds
        if rest.samples:
            loader.start_at(Position(rest.samples, self._cursor.state))
            # Reading the first window may draw random numbers that were drawn before the checkpoint.
            self._rng_checkpoint = kwargs["resume_from_checkpoint"]
        else:
            self._load_rng_state(kwargs["resume_from_checkpoint"])
        # For Trainer this is a short epoch from its first batch on; it has nothing to skip.
        kwargs.update(epochs_trained=-1, steps_in_epoch=rest.rounds, num_update_steps_per_epoch=rest.steps)
        stops = self.control.should_training_stop
        super()._run_epoch(**kwargs)
        if loader.rounds == 0 and rest.samples:
            self.control.should_training_stop = stops  # nothing was left of a stream: on to the next epoch

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Trainer's; then the ranks of a replica go on from the state of its first: they must draw the same crops."""
        super()._load_rng_state(checkpoint)
        share_host_generators(self.model.mesh.model)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        window = super().get_batch_samples(*args, **kwargs)
        if self._rng_checkpoint is not None:
            self._load_rng_state(self._rng_checkpoint)
            self._rng_checkpoint = None
        return window

    def _on_step_end(self) -> None:
        if self._cursor is None:
            return
        loader = self._loader
        self.state.epoch = self._epoch + (self._rounds_done + loader.rounds) / self._rounds_in_epoch
        order, step = self._cursor.order, self.state.global_step
        if loader.is_finished:
            self._cursor = Cursor(step, self._epoch + 1, 0, order)
            return
        self._cursor = Cursor(step, self._epoch, loader.position.samples, order, loader.position.state)


class DataProgress(TrainerCallback):
    """Keeps the cursor, and the fraction of the epoch that is done."""

    def __init__(self, trainer: DataTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.trainer._on_step_end()
