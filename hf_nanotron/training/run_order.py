"""A run over a dataset whose samples are those of the whole run: its legs, and what a checkpoint says of the data."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from transformers.trainer_utils import has_length
from transformers.utils import logging

from ..checkpoint.state.values import encode
from ..data.cursor import ANEW, Cursor, EpochShape, Resumption
from ..data.identity import ACCEPT, difference, without_times
from ..data.legs import Leg, RunSampler, accumulation
from ..data.ordered import identities_of, shown_files
from ..data.tokens.stages import Stages
from ..training_args import NanotronTrainingArguments

logger = logging.get_logger(__name__)


class Consumed(NamedTuple):
    """What a run has read of each set: rows, tokens (empty if the sets do not say how long rows are), epochs.

    Attributes:
        names: of the sets; a row's `domain` is a place in them.
    """

    names: tuple[str, ...]
    rows: dict[str, int]
    tokens: dict[str, int]
    epochs: dict[str, float]


class RunOrder:
    """The samples of a `Mixture`, `Stages` or another dataset with `state_dict(samples)`, from a checkpoint's on.

    Each leg is an epoch to Trainer: the only one of a mixture, or a stage. Where a stage has a global batch size of its
    own, `gradient_accumulation_steps` of the arguments is what that takes, until the run ends.

    Args:
        dataset: of the user; it stays as it is.
        cursor: of the checkpoint that is resumed, if there is one.
        step: of the run, before it.
        step_batches: micro-batches of a step over all ranks, unless a stage has its own number.

    Attributes:
        dataset: a copy, which goes on behind the cursor once `resume` was called.
        sampler: reads the legs.
    """

    def __init__(
        self, args: NanotronTrainingArguments, dataset: Any, cursor: Cursor | None, step: int, step_batches: int
    ) -> None:
        self.args, self.cursor, self.step, self.step_batches = args, cursor, step, step_batches
        self.dataset = copy.copy(dataset)
        self.begin = int(getattr(dataset, "begin", 0))
        self.sampler = RunSampler(self.dataset, self.begin)

    def resume(self, compares_times: bool) -> None:
        """Go on behind the cursor, if there is one.

        Args:
            compares_times: see `accept_changes`.

        Raises:
            ValueError: for data that is not that of the checkpoint; for stages that a run cannot go on with.
        """
        cursor = self.cursor
        if cursor is not None and cursor.order == self.order:
            accept_changes(cursor, self.dataset, self.args, compares_times)
            self.dataset.load_state_dict(cursor.state["dataset"])
            self.begin, self.step = cursor.samples, cursor.step
            self.sampler.begin = self.begin
        elif cursor is None and self.step and isinstance(self.dataset, Stages):
            raise ValueError(
                "ignore_data_skip=True with Stages: they begin at steps and tokens of the run, which a checkpoint has "
                "behind it. Start a new run from its weights (from_pretrained of the checkpoint) instead."
            )

    @property
    def order(self) -> dict[str, Any]:
        """That of a cursor."""
        return {"kind": "run", "type": type(self.dataset).__name__}

    def plan(self, batch_size: int, dp_size: int) -> None:
        """Find the legs. See `Stages.plan`, whose errors may come from here.

        Args:
            batch_size: samples of one rank in a micro-batch.
        """
        args = self.args
        self.batch_size, self.dp_size = batch_size, dp_size
        size = batch_size * self.step_batches
        if isinstance(self.dataset, Stages):
            legs = self._plan_stages(self.dataset, size)
        else:
            legs = [self._only_leg(size)]
        self.legs = {leg.number: leg for leg in legs}
        self.accumulations = {}
        for leg in legs:
            what = f"stage {leg.number}" if isinstance(self.dataset, Stages) else "the run"
            full = accumulation(leg.batch, batch_size, args.full_dp_size, what)
            self.accumulations[leg.number] = -(-full * args.full_dp_size // dp_size)
            try:
                args.parallel.check_micro_batches(self.accumulations[leg.number])
            except ValueError as error:
                raise ValueError(f"{what}, with global_batch_size={leg.batch}: {error}") from None
        encode(self.dataset.state_dict(self.begin), f"the state_dict of the {type(self.dataset).__name__}")
        self.sampler.legs = self.legs
        self.first, self.last = legs[0], legs[-1]
        self.max_steps = self.last.step + self._shape(self.last).steps(self.last.first)
        args.gradient_accumulation_steps = self.accumulations[self.first.number]

    def _plan_stages(self, stages: Stages, size: int) -> list[Leg]:
        if self.args.max_steps <= 0:
            raise ValueError("Stages need max_steps: the last stage ends with it, and others where the next begins.")
        legs = list(stages.plan(size, self.args.max_steps))
        if legs[0].step != self.step:
            raise ValueError(
                f"these Stages go on behind step {legs[0].step}, by a state that was loaded, but the run begins behind "
                f"step {self.step}: pass new Stages, and resume_from_checkpoint."
            )
        if missed := stages.stages[legs[-1].number + 1 :]:
            logger.warning(
                f"max_steps={self.args.max_steps} ends the run in stage {legs[-1].number}, before {len(missed)} of its "
                f"{len(stages.stages)} stages have begun."
            )
        return legs

    def _only_leg(self, size: int) -> Leg:
        args, name = self.args, type(self.dataset).__name__
        steps, wanted = max(args.max_steps - self.step, 0), self.begin
        if args.max_steps > 0:
            end, wanted = self._end(self.begin + steps * size), self.begin + steps * size
            if end is not None and end < wanted:
                last = (
                    self.step
                    + EpochShape(end, self.batch_size, 1, 1, args.dataloader_drop_last).steps(self.begin)
                    // self.step_batches
                )
                why = self.dataset.why_it_ends(end) if hasattr(self.dataset, "why_it_ends") else "it has no more."
                logger.warning(
                    f"The {name} ends the run after {end} samples, at about step {last} of max_steps="
                    f"{args.max_steps}, and learning rates follow that: {why}"
                )
                wanted = end
        else:
            if args.num_train_epochs > 1:
                raise ValueError(
                    f"num_train_epochs={args.num_train_epochs:g} with a {name}, whose samples are those of a whole run "
                    "and which says itself how often its sets are read (max_epochs): use num_train_epochs=1 for all of "
                    "it, or max_steps."
                )
            length = len(self.dataset)
            whole = EpochShape(
                length, self.batch_size, 1, self.step_batches, args.dataloader_drop_last, self.step_batches
            )
            wanted = min(math.ceil(whole.steps() * args.num_train_epochs) * size, length)  # whole steps, as in Trainer
        return Leg(0, self.step, self.begin, max(wanted, self.begin), size, self.begin)

    def _end(self, samples: int) -> int | None:
        """The end of the dataset, if it is among so many samples, or is known anyway."""
        if hasattr(self.dataset, "end"):
            return self.dataset.end(samples)
        return len(self.dataset) if has_length(self.dataset) else None

    def _shape(self, leg: Leg) -> EpochShape:
        window = self.accumulations[leg.number]
        sizes = self.batch_size, self.dp_size, window
        return EpochShape(leg.stop, *sizes, self.args.dataloader_drop_last, leg.batch // self.batch_size)

    def training_values(self) -> tuple[int, int, int, int, int, int, int]:
        """What `Trainer.set_initial_training_values` returns."""
        first, last = self.first, self.last
        shape, samples = self._shape(first), last.stop - first.first
        steps = self.max_steps - first.step
        epochs = last.number + 1 if steps else first.number
        of_all = samples * self.max_steps // steps if steps else samples  # Trainer takes the share of this call's steps
        rounds = shape.rounds(first.first)
        steps_of_first = max(shape.steps(first.first), 1)  # Trainer divides by it, also where nothing is left
        return epochs, steps_of_first, samples, of_all, first.batch, rounds, self.max_steps

    def begin_epoch(self, number: int, samples: int, is_resumed: bool) -> Resumption:
        """What is left of a leg, of which `samples` of the run are trained on.

        Raises:
            ValueError: if a callback has ended the leg before it early.
        """
        leg = self.legs[number]
        if leg.first != samples:
            raise ValueError(
                f"a callback set should_epoch_stop after {samples} samples, in the middle of the stage before stage "
                f"{number}, which begins at sample {leg.first}: say in `Stages` where it is to begin."
            )
        self.args.gradient_accumulation_steps = self.accumulations[number]
        shape = self._shape(leg)
        rounds, steps = shape.rounds(leg.first), shape.steps(leg.first)
        return Resumption(number, leg.done, rounds, steps, self.last.number + 1, self.max_steps, is_resumed)

    def rounds_before(self, leg: Leg) -> int:
        """Rounds of this run's sizes that a leg has behind it: for its progress only."""
        return -(-leg.done // (self.batch_size * self.dp_size))

    def consumed(self, samples: int) -> Consumed | None:
        """What the first `samples` were read of."""
        if not all(hasattr(self.dataset, name) for name in ("names", "counts", "tokens", "epochs")):
            return None
        data = self.dataset
        return Consumed(tuple(data.names), data.counts(samples), data.tokens(samples), data.epochs(samples))


def data_state(dataset: Any, samples: int) -> dict[str, Any]:
    """What a checkpoint keeps of a dataset that brings its order."""
    state = {"sets": identities_of(dataset, samples)}
    return {**state, "dataset": dataset.state_dict(samples)} if hasattr(dataset, "state_dict") else state


def accept_changes(cursor: Cursor, dataset: Any, args: NanotronTrainingArguments, compares_times: bool) -> Cursor:
    """Compare the sets of a checkpoint with those of now; the cursor to go on from.

    Args:
        compares_times: of files, too: on rank 0, whose files the checkpoint knows. Others may read copies.

    Raises:
        ValueError: if a set has changed, unless only files did and `accept_changed_data` says to go on.
    """
    before: Mapping[str, Any] = (cursor.state or {}).get("sets", {}) if isinstance(cursor.state, Mapping) else {}
    now = identities_of(dataset, None)
    for name in before:
        if name not in now:
            continue
        facts = (lambda identity: identity) if compares_times else without_times
        found = difference(facts(before[name]), facts(now[name]), shown_files(dataset, name))
        if found is None:
            continue
        sentence = f"the data set {name!r} is not the one that the checkpoint was trained on: {found.sentence}"
        if not found.in_files:
            raise ValueError(f"{sentence}. Resume with the same data, or {ANEW}.")
        if not args.accept_changed_data:
            raise ValueError(
                f"{sentence}. Samples might be repeated or skipped. Put it back, or make new files a set of their own "
                f"in a Mixture. If the change is meant, pass {ACCEPT}=True to go on behind the same number of rows, or "
                f"{ANEW}."
            )
        logger.warning(f"{ACCEPT}=True: {sentence}. The run goes on behind the same number of its rows.")
        if "samples" in cursor.order and "rows" in now[name]:
            cursor = replace(cursor, order={**cursor.order, "samples": now[name]["rows"]})
    return cursor
