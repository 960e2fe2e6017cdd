"""The samples of a training run, and the cursor by which it goes on with the next one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.utils.data import IterableDataset, Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from ..checkpoint.state.index import StateIndex
from ..checkpoint.state.training_state import saved_extra
from ..checkpoint.state.values import encode
from ..data.cursor import ANEW, FINGERPRINT, OTHER_DATA, Cursor, EpochShape, Resumption, resume_at, why_not_resumable
from ..data.dealing import Position
from ..data.loader import DataParallelLoader
from ..data.ordered import brings_order, is_run
from ..data.same_data import check_same_data, dataset_of, is_repeatable
from ..data.streaming.lane_stream import LaneStream, joined
from ..parallel.mesh import ParallelMesh
from ..parallel.together import all_or_none
from ..training_args import NanotronTrainingArguments
from .batch_warmup import naming_sizes
from .loaders import data_seed
from .run_order import Consumed, RunOrder, accept_changes, data_state
from .samplers import train_sampler

logger = logging.get_logger(__name__)

CURSOR = "data_cursor"  # its key in the `extra` of a training state
NO_CURSOR = f"the checkpoint does not say which samples it was trained on; {ANEW}."


class DataOrder:
    """The samples of a run come in the order of one process, before and after a resume, at any sizes.

    Trainer itself would count `global_step` batches of the new sizes. Here a checkpoint says how many samples were
    trained on, and the rest of the epoch is cut anew from there. A loader of the user's own
    (`get_train_dataloader`) has no cursor; it is resumed as Trainer does.
    """

    def __init__(self, args: NanotronTrainingArguments) -> None:
        self.args = args
        self._given: int | None = None
        self._forget(None)

    def begin_run(self, checkpoint: str | None, index: StateIndex | None = None) -> None:
        """Forget the run before, and take the cursor of the checkpoint that this one resumes, if any, from its `index`.

        Until `end_run`, `gradient_accumulation_steps` of the arguments is what this rank takes part in: more than given
        where the run has fewer data-parallel ranks than `max_dp_size`.
        """
        self._forget(checkpoint, index)
        self._given = self.args.gradient_accumulation_steps
        self.args.gradient_accumulation_steps = -(-self.step_batches // self.args.dp_size)

    @property
    def step_batches(self) -> int:
        """Micro-batches of an optimizer step over all data-parallel ranks, at any number of them."""
        given = self.args.gradient_accumulation_steps if self._given is None else self._given
        return given * self.args.full_dp_size

    @property
    def step_samples(self) -> int:
        """Samples of an optimizer step over all data-parallel ranks; at present, of a run whose stages have others."""
        if (run := self._run) is not None:
            return run.legs[min(max(self._epoch, run.first.number), run.last.number)].batch
        return self.step_batches * self.args.per_device_train_batch_size

    def _forget(self, checkpoint: str | None, index: StateIndex | None = None) -> None:
        self._cursor: Cursor | None = None
        self._resumed: Cursor | None = None
        self._resumed_step = 0
        self._rest: Resumption | None = None
        self._epoch = 0
        self._rng_checkpoint: str | None = None
        self._run: RunOrder | None = None  # of the loader that is trained on
        self._taken: RunOrder | None = None  # of the one made last
        self._fingerprint: int | None = None
        self._loader: Any = None
        self._goes_on = checkpoint is not None and not self.args.ignore_data_skip
        if checkpoint is not None:
            self._resumed_step = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME)).global_step
            self._resumed = read_cursor(index) if self._goes_on else None

    def end_run(self) -> None:
        """Give the arguments back as they were."""
        if self._given is not None:
            self.args.gradient_accumulation_steps, self._given = self._given, None

    @property
    def users_accumulation(self) -> int:
        """`gradient_accumulation_steps` as given; a stage may have its own."""
        return self.args.gradient_accumulation_steps if self._given is None else self._given

    def take(self, dataset: Any) -> Any:
        """What a loader is to read of a training dataset: a copy, where its samples are those of a run."""
        if not is_run(dataset):
            return dataset
        step = 0 if self._goes_on else self._resumed_step
        self._taken = RunOrder(self.args, dataset, self._resumed, step, self.step_batches)
        return self._taken.dataset

    @property
    def consumed(self) -> Consumed | None:
        """What the steps of this run, and of those that it resumes, have read of each set; None if the data is one."""
        if self._run is None or self._cursor is None:
            return None
        return self._run.consumed(self._cursor.samples)

    def train_sampler(
        self, dataset: Any, global_batch: Callable[[], int], tokenizer: Any = None
    ) -> Sampler[int] | None:
        """See `samplers.train_sampler`; of a run that is resumed, groups by length are as it began."""
        run = self._taken if self._taken is not None and dataset is self._taken.dataset else None
        group = partial(self._length_group, global_batch)
        return train_sampler(self.args, dataset, None if run is None else run.sampler, group, tokenizer)

    def _length_group(self, global_batch: Callable[[], int]) -> int:
        """Samples that are sorted by length together: the global batch with which the run began."""
        saved = self._resumed.order.get("group") if self._resumed is not None else None
        return saved or global_batch()

    # ---- the cursor ----

    def cursor(self, control: TrainerControl, dataset: Any) -> dict[str, Any] | None:
        """See `NanotronTrainer.data_cursor`."""
        cursor = self._cursor
        if cursor is None:
            return None
        if self._run is not None:
            return replace(cursor, state=data_state(self._run.dataset, cursor.samples)).to_dict()
        if control.should_epoch_stop and cursor.samples:  # a callback has had enough of this epoch
            cursor = replace(cursor, epoch=cursor.epoch + 1, samples=0, state=None)
        if cursor.samples and cursor.order["kind"] == "stream":
            cursor = replace(cursor, refused=why_not_resumable(dataset))
            try:
                encode(cursor.state, "the stream's state_dict")
            except ValueError as error:
                cursor = replace(cursor, state=None, refused=str(error).rstrip("."))
        elif brings_order(dataset):
            cursor = replace(cursor, state=data_state(dataset, cursor.samples))
        return cursor.to_dict()

    def share_state(self, dataset: Any) -> None:
        """Before a checkpoint: have the state of all lanes, of which each data-parallel rank knows its own.

        All ranks together.
        """
        cursor = self._cursor
        if cursor is None or not isinstance(dataset, LaneStream) or self._mesh.dp.size == 1:
            return
        states: list[Any] = [None] * self._mesh.dp.size
        dist.all_gather_object(states, cursor.state, group=self._mesh.dp.handle)
        if known := [state for state in states if state is not None]:  # none where an epoch begins
            self._cursor = replace(cursor, state=joined(known))

    def _order(self, loader: DataParallelLoader, dataset: Any, global_batch: int) -> dict[str, Any]:
        if isinstance(dataset, IterableDataset):
            own = dataset.identity() if isinstance(dataset, LaneStream) else {}
            return {"kind": "stream", **own, FINGERPRINT: self._fingerprint}
        kind = "sequential" if brings_order(dataset) else self.args.train_sampling_strategy
        return {
            "kind": kind,
            "samples": len(loader.dataset),  # type: ignore[arg-type]
            "data_seed": None if kind == "sequential" else data_seed(self.args),
            "group": self._length_group(lambda: global_batch) if kind == "group_by_length" else None,
            FINGERPRINT: None if brings_order(dataset) else self._fingerprint,  # which have an identity
        }

    # ---- the loop ----

    def compare(self, mesh: ParallelMesh, loader: Any) -> None:
        """Go on behind the checkpoint, and learn whether all ranks have the same data. All ranks together.

        Raises:
            ValueError: on every rank, for data that cannot be gone on with on one.
        """
        self._mesh = mesh
        if (run := self._taken) is not None:
            with naming_sizes(self.args):
                all_or_none(mesh, "reading where the data goes on", lambda: run.resume(mesh.rank == 0))
        self._fingerprint = check_same_data(mesh, loader, "training")

    def plan_run(self, loader: Any, batch_size: int) -> tuple[int, ...] | None:
        """What `set_initial_training_values` returns, for data whose samples are those of a run. After `compare`.

        None for other data.
        """
        run, cursor = self._taken, self._resumed
        if run is None or not isinstance(loader, DataParallelLoader):
            return None
        if getattr(loader.batch_sampler, "sampler", None) is not run.sampler:  # a subclass has chosen another one
            return None
        if cursor is None and self._goes_on and self._resumed_step:
            raise ValueError(NO_CURSOR)
        with naming_sizes(self.args):
            if cursor is not None:
                cursor.check(run.order)
            run.plan(batch_size, self._mesh.dp_size)
        self._run, self._batch_size, self._is_stream = run, batch_size, False
        self._cursor = Cursor(run.step, run.first.number, run.begin, run.order)
        return run.training_values()

    def plan(
        self, loader: Any, dataset: Any, batch_size: int, global_batch: int, epochs: int, max_steps: int
    ) -> tuple[int, int]:
        """Epochs and steps of the run: of a resumed one, those that its remaining samples take. After `compare`.

        Args:
            dataset: of the trainer.
            batch_size: samples of one rank.
            epochs, max_steps: as Trainer has reckoned them, for a run from the beginning.
        """
        self._is_stream, self._batch_size = isinstance(dataset, IterableDataset), batch_size
        if not (isinstance(loader, DataParallelLoader) and loader.tracks_position):
            self._resumed = None
            return epochs, max_steps
        args, order = self.args, self._order(loader, dataset, global_batch)
        refused = why_not_resumable(dataset) if self._is_stream else None
        if refused and args.save_strategy != "no" and not args.save_only_model:
            logger.warning(f"A run on this data can be resumed only where an epoch ends: {refused}.")
        self._cursor = Cursor(0, 0, 0, order)
        if not self._goes_on:
            return epochs, max_steps
        cursor = self._resumed
        if cursor is None and self._resumed_step == 0:  # converted from the Hub: no data was seen
            return epochs, max_steps
        if cursor is None:
            raise ValueError(NO_CURSOR)
        if brings_order(dataset):
            saved = cursor
            cursor = all_or_none(
                self._mesh,
                "comparing the data with that of the checkpoint",
                lambda: accept_changes(saved, dataset, args, self._mesh.rank == 0),
            )
        cursor.check(order)
        self._rest = self._rest_of(cursor, order, refused, batch_size, epochs, max_steps)
        if not self._is_stream:
            epochs, max_steps = self._rest.num_train_epochs, self._rest.max_steps
        elif cursor.step >= max_steps:
            epochs = cursor.epoch
        self._check_fingerprint(cursor, order, dataset, loader)
        # With the fingerprint of this run: an older checkpoint may have none.
        self._cursor = replace(cursor, epoch=self._rest.epoch, samples=self._rest.samples, order=order)
        return epochs, max_steps

    def _rest_of(
        self, cursor: Cursor, order: dict[str, Any], refused: str | None, batch_size: int, epochs: int, max_steps: int
    ) -> Resumption:
        """What a resumed run has left of an epoch.

        Args:
            refused: why a stream cannot go on in the middle of one.
        """
        args = self.args
        if not self._is_stream:
            sizes = batch_size, self._mesh.dp_size, args.gradient_accumulation_steps
            shape = EpochShape(order["samples"], *sizes, args.dataloader_drop_last, self.step_batches)
            return resume_at(cursor, shape, args.num_train_epochs, args.max_steps)
        if cursor.state is None:
            refused = refused or cursor.refused or "the checkpoint has no state of it"
        if cursor.samples and refused:
            raise ValueError(
                f"cannot resume in epoch {cursor.epoch} after sample {cursor.samples}: {refused}; or {ANEW}."
            )
        # Trainer counts the epoch of a stream as `max_steps` steps.
        in_epoch = max_steps * args.gradient_accumulation_steps
        return Resumption(cursor.epoch, cursor.samples, in_epoch, max_steps, epochs, max_steps)

    def _check_fingerprint(self, cursor: Cursor, order: dict[str, Any], dataset: Any, loader: Any) -> None:
        """Refuse data whose rows are not those of the checkpoint. All ranks together."""
        before = cursor.order.get(FINGERPRINT)
        has_new_sets = isinstance(dataset, LaneStream) and not set(order) <= set(cursor.order)  # of a StreamMixture
        if self._fingerprint is not None and before not in (None, self._fingerprint) and not has_new_sets:
            # Samples that are drawn anew at each reading, a crop from the system's entropy say, are others every time.
            if is_repeatable(self._mesh, dataset_of(loader), self._fingerprint):
                raise ValueError(OTHER_DATA)

    def progress(self, epoch: int, rounds: int, state: TrainerState) -> tuple[int, int]:
        """Epochs and rounds that a run has behind it: as Trainer has reckoned them, unless the cursor knows better."""
        if self._run is not None:
            return self._run.first.number, self._run.rounds_before(self._run.first)
        return (epoch, rounds) if self._rest is None else (self._rest.epoch, self._rounds_before(self._rest, state))

    def _rounds_before(self, rest: Resumption, state: TrainerState) -> int:
        """Rounds of this run's sizes that a resumed epoch has behind it: for its progress only."""
        if self._is_stream:
            return max(round(((state.epoch or 0.0) - rest.epoch) * rest.rounds), 0)
        return -(-rest.samples // (self._batch_size * self._mesh.dp_size))

    def begin_epoch(
        self, loader: Any, epoch: int, rounds: int, state: TrainerState, checkpoint: str | None
    ) -> Resumption | None:
        """What is left of an epoch that is resumed, from which `loader` then reads; None for one from its beginning."""
        rest = self._rest
        self._loader, self._epoch, self._rounds_done, self._rounds_in_epoch = loader, epoch, 0, rounds
        if self._run is not None and self._cursor is not None:
            return self._begin_leg(self._run, self._cursor, checkpoint)
        if rest is None or epoch != rest.epoch or self._cursor is None:
            return None
        self._rest = None
        self._rounds_done = self._rounds_before(rest, state)
        self._rounds_in_epoch = rest.rounds if self._is_stream else self._rounds_done + rest.rounds
        if rest.samples:
            loader.start_at(Position(rest.samples, self._cursor.state))
            self._rng_checkpoint = checkpoint
        return rest

    def _begin_leg(self, run: RunOrder, cursor: Cursor, checkpoint: str | None) -> Resumption:
        is_first = self._epoch == run.first.number
        rest = run.begin_epoch(self._epoch, cursor.samples, is_first and checkpoint is not None)
        self._rounds_done = run.rounds_before(run.legs[self._epoch])
        self._rounds_in_epoch = self._rounds_done + rest.rounds
        if rest.is_resumed and rest.samples:
            self._rng_checkpoint = checkpoint
        return rest

    @property
    def is_at_end_of_epoch(self) -> bool:
        """Whether the step that was done last has read the last sample of its epoch."""
        return self._cursor is not None and bool(getattr(self._loader, "is_finished", False))

    def rng_to_restore(self) -> str | None:
        """Once, when the first window of a resumed epoch has been read: the checkpoint that has the random state.

        Reading that window may draw random numbers that were drawn before the checkpoint.
        """
        checkpoint, self._rng_checkpoint = self._rng_checkpoint, None
        return checkpoint

    def end_step(self, state: TrainerState) -> None:
        """Move the cursor behind the window of the step, and note the fraction of the epoch that is done."""
        if self._cursor is None:
            return
        loader = self._loader
        state.epoch = self._epoch + (self._rounds_done + loader.rounds) / self._rounds_in_epoch
        order, step = self._cursor.order, state.global_step
        if self._run is not None:
            samples = self._run.legs[self._epoch].first + loader.position.samples
            self._cursor = Cursor(step, self._epoch, samples, order)
            return
        if loader.is_finished:
            self._cursor = Cursor(step, self._epoch + 1, 0, order)
            return
        self._cursor = Cursor(step, self._epoch, loader.position.samples, order, loader.position.state)


class DataProgress(TrainerCallback):
    """Calls `DataOrder.end_step`. First of the callbacks, so that all others find the epoch right."""

    def __init__(self, data_order: DataOrder) -> None:
        self.data_order = data_order

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.data_order.end_step(state)


def read_cursor(index: StateIndex | None) -> Cursor | None:
    """Of a checkpoint; None if it has no training state, or one without a cursor."""
    found = saved_extra(index).get(CURSOR)
    known = {field.name for field in fields(Cursor)}
    return None if found is None else Cursor(**{key: value for key, value in found.items() if key in known})
