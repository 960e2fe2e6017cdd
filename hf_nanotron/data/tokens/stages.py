"""Stages of a run: other data, rows of another length, another global batch size from a step or a token on."""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset

from ..legs import Leg
from ..ordered import DOMAIN
from .mixture import Mixture, set_identity
from .opened_stage import Opened, Opening, begin_stage, resume_stage
from .same_tokenizer import check_one_tokenizer
from .stage import Stage, check_goes_on, check_numbers, check_starts, check_trained, definition
from .stage_plan import Point, plan_legs, point_of

EXACT_SAMPLES = 1_000_000  # of a stage that has not begun: the counts of more are estimated for the check at the start


class Stages(Dataset[dict[str, Any]]):
    """The samples of a run in stages, as `train_dataset`. A step never mixes two of them.

    Sets are known by their names in the mixtures (a `TokenDataset` alone has its `name`): one that is named in several
    stages goes on with its next row, in its next epoch when all have been read. With rows of another length a set goes
    on with its next token, if it is read in the order of its files (`shuffle=False`, `documents="cross"` or `"mask"`);
    any other order has no next token, and is refused.

    `stages[i]` is sample i of the run, once `plan` has been called with what the trainer knows. A row's `domain` is the
    place of its set in `names`.

    Raises:
        ValueError: for starts that are missing or not in order; sets of one name that are not the same; a set that
            cannot go on with rows of another length; different tokenizers.

    Attributes:
        stages: as given.
        names: of all sets, in the order of the stages.
        sequence_length: of the longest rows; None if no data says it.
        tokenizer, vocabulary: of the sets; None if none of them says it.
        legs: what is left of the run, by stage, when it is planned.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = tuple(stages)
        if not self.stages:
            raise ValueError("Stages need a stage.")
        for number, stage in enumerate(self.stages):
            if not isinstance(stage, Stage):
                raise ValueError(f"stage {number} is a {type(stage).__name__}; use Stage(data=..., start_step=...).")
            check_numbers(number, stage)
        self._mixtures = [_mixture_of(number, stage.data) for number, stage in enumerate(self.stages)]
        check_starts(self.stages, self._mixtures)
        self.names = tuple(dict.fromkeys(name for mixture in self._mixtures for name in mixture.names))
        for name in self.names:
            used = [(number, mixture) for number, mixture in enumerate(self._mixtures) if name in mixture.datasets]
            for (_, before), (number, mixture) in zip(used, used[1:], strict=False):
                check_goes_on(name, number, before, mixture)
        by_stage = {f"of stage {number}": mixture for number, mixture in enumerate(self._mixtures)}
        check_one_tokenizer(by_stage, "a run")
        said = [(mixture.tokenizer, mixture.vocabulary) for mixture in self._mixtures]
        self.tokenizer, self.vocabulary = (next(filter(None, each), None) for each in zip(*said, strict=True))
        self._lengths = [mixture.sequence_length for mixture in self._mixtures]
        self.sequence_length = max((length for length in self._lengths if length is not None), default=None)
        self.legs: tuple[Leg, ...] = ()
        self._point = Point()
        self._opened: dict[int, Opened] = {}

    @property
    def datasets(self) -> dict[str, Any]:
        """The sets by name, each as in the first stage that has it."""
        return {name: dataset for mixture in reversed(self._mixtures) for name, dataset in mixture.datasets.items()}

    @property
    def begin(self) -> int:
        """The sample with which it goes on behind a state that was loaded; 0 without."""
        return self._point.samples

    def settings(self) -> dict[str, Any]:
        """What the order depends on besides the sets, in JSON's types."""
        return {"stages": self._definitions(), "point": list(self._point)}

    def with_vocabulary(self, size: int) -> Stages:
        """The same, whose ids are checked to be smaller where they are read."""
        other = copy.copy(self)
        other._mixtures, other._opened = [mixture.with_vocabulary(size) for mixture in self._mixtures], {}
        return other

    def _definitions(self) -> list[dict[str, Any]]:
        pairs = zip(self.stages, self._mixtures, strict=True)
        return [definition(number, stage, mixture) for number, (stage, mixture) in enumerate(pairs)]

    # ---- the plan of a run ----

    def plan(self, batch: int, max_steps: int) -> tuple[Leg, ...]:
        """Find out which samples each stage has, from here to the step that ends the run.

        Args:
            batch: samples of a step, of stages that do not say it.
            max_steps: steps of the whole run.

        Raises:
            ValueError: for a stage without a step, one whose data ends before the next begins, or one that would begin
                before steps that were trained.
        """
        self.legs = plan_legs(self.stages, self._lengths, self._point, batch, max_steps)
        self._opened = {n: opened for n, opened in self._opened.items() if n <= self._point.stage}
        self._check_data()
        return self.legs

    def _check_data(self) -> None:
        """Whether the data of each leg lasts; of far stages by the weights, which tell counts to within a few rows."""
        opened: Opened | None = None
        for leg in self.legs:
            if opened is None:
                opened = self._open(leg.number)
            margin = len(opened.mixture.names) + 1 if opened.is_estimated else 0
            first = opened.base + leg.first - opened.opening.samples
            last = first + leg.stop - leg.first - margin
            if last > first and (end := opened.mixture.end(last - 1)) is not None:
                raise ValueError(
                    f"stage {leg.number} trains on {leg.stop - leg.first} samples (steps {leg.step} to "
                    f"{leg.step + leg.steps}), but its data ends after {'about ' * bool(margin)}{end - first} of them: "
                    f"{opened.mixture.why_it_ends(end)}"
                )
            if leg is not self.legs[-1]:
                estimates = opened.is_estimated or leg.stop - leg.first > EXACT_SAMPLES
                opened = self._next_stage(opened, leg, estimates)

    def _open(self, number: int) -> Opened:
        """A stage with its mixture where it goes on. Those before it are run through."""
        if number not in self._opened:
            before = [leg for leg in self.legs if leg.number < number]
            if before:
                self._opened[number] = self._next_stage(self._open(before[-1].number), before[-1], False)
            elif self._opened:  # the one before was trained to its end
                last = self._opened[max(self._opened)]
                self._opened[number] = begin_stage(number, self._mixtures[number], last.behind(self._point.samples))
            else:
                self._opened[number] = begin_stage(number, self._mixtures[number], Opening())
        return self._opened[number]

    def _next_stage(self, opened: Opened, leg: Leg, estimates: bool) -> Opened:
        return begin_stage(leg.number + 1, self._mixtures[leg.number + 1], opened.behind(leg.stop, estimates))

    # ---- samples ----

    def __len__(self) -> int:
        """Samples of the planned run.

        Raises:
            TypeError: before it is planned.
        """
        if not self.legs:
            raise TypeError(
                "the samples of stages follow from the steps of a run: call plan(), or train with max_steps."
            )
        return self.legs[-1].stop

    def __getitem__(self, sample: int) -> dict[str, Any]:
        return self.__getitems__([sample])[0]

    def __getitems__(self, samples: Sequence[int]) -> list[dict[str, Any]]:
        """What a `DataLoader` asks for: the rows of a batch, which are of one stage in a run."""
        found: list[Any] = [None] * len(samples)
        for number, places, inner in self._by_stage(samples):
            mixture = self._open(number).mixture
            domains = [torch.tensor(self.names.index(name)) for name in mixture.names]
            for place, row in zip(places, mixture.__getitems__(inner), strict=True):
                found[place] = {**row, DOMAIN: domains[int(row[DOMAIN])]}
        return found

    def _by_stage(self, samples: Sequence[int] | np.ndarray) -> Iterator[tuple[int, list[int], list[int]]]:
        """The stage, the places of its samples, their numbers in its mixture."""
        wanted = [int(sample) for sample in samples]
        if wanted and (not self.legs or min(wanted) < self.legs[0].first or max(wanted) >= self.legs[-1].stop):
            planned = f"{self.legs[0].first} to {self.legs[-1].stop}" if self.legs else "none"
            raise IndexError(f"the samples {min(wanted)} to {max(wanted)} are not planned ({planned}); see plan().")
        starts = [leg.first for leg in self.legs]
        numbers = [bisect_right(starts, sample) - 1 for sample in wanted]
        for number in sorted(set(numbers)):
            opened = self._open(self.legs[number].number)
            places = [place for place, other in enumerate(numbers) if other == number]
            yield opened.number, places, [opened.base + wanted[p] - opened.opening.samples for p in places]

    def locate(self, samples: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each sample `[n]`, the place of its set in `names`, and how many rows of it come before."""
        sets, ordinals = np.empty(len(samples), np.int64), np.empty(len(samples), np.int64)
        for number, places, inner in self._by_stage(samples):
            mixture = self._open(number).mixture
            found, ordinals[places] = mixture.locate(inner)
            sets[places] = np.array([self.names.index(name) for name in mixture.names])[found]
        return sets, ordinals

    # ---- what was read ----

    def _opened_at(self, samples: int) -> Opened:
        """The stage of the last of the first `samples`."""
        numbers = [leg.number for leg in self.legs if leg.first < samples]
        return self._open(numbers[-1] if numbers else self._point.stage)

    def counts(self, samples: int) -> dict[str, int]:
        """Rows that were read of each set among the first `samples`, of any length."""
        return {name: rows for name, (rows, _, _) in self._opened_at(samples).read(samples, self.names).items()}

    def tokens(self, samples: int) -> dict[str, int]:
        """Tokens of each set, as `counts`."""
        return {name: tokens for name, (_, tokens, _) in self._opened_at(samples).read(samples, self.names).items()}

    def epochs(self, samples: int) -> dict[str, float]:
        """How often each set was read, as `counts`."""
        return {name: epochs for name, (_, _, epochs) in self._opened_at(samples).read(samples, self.names).items()}

    def identities(self, samples: int | None = None) -> dict[str, dict[str, Any]]:
        """Of the sets by name, as in the first stage that has them; those of stages that have begun, or of all."""
        begun = len(self.stages) if samples is None else self._opened_at(samples).number + 1 if samples else 0
        names = {name for mixture in self._mixtures[:begun] for name in mixture.names}
        return {name: set_identity(dataset) for name, dataset in self.datasets.items() if name in names}

    # ---- the state ----

    def state_dict(self, samples: int) -> dict[str, Any]:
        """Where it is behind the first `samples`, in JSON's types."""
        opened = self._opened_at(samples)
        opening = opened.opening
        length = opened.mixture.sequence_length or 0
        leg = next((leg for leg in self.legs if leg.number == opened.number), None)
        done = samples - leg.first if leg is not None else 0
        before = point_of(opened.number, self.legs, self._lengths, self._point)
        return {
            "stage": opened.number,
            "step": before.step + (-(-done // leg.batch) if leg is not None else 0),
            "samples": samples,
            "tokens": before.tokens + done * length,
            "begin": opening.samples,
            "last_tokens": leg.batch * length if leg is not None and done else before.last_tokens,
            "opening": {
                "counts": opening.state.get("counts", {}),
                "read": {name: list(values) for name, values in opening.read_before.items()},
                "lengths": opening.lengths,
                "firsts": {name: list(first) for name, first in opening.firsts.items()},
            },
            "mixture": opened.mixture.state_dict(opened.base + samples - opening.samples),
            "trained": self._definitions()[: opened.number + bool(samples)],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on behind a state, of these stages or of others that had the same ones up to there. Then `plan`.

        Raises:
            ValueError: if it is no state of stages; if a stage that was trained on is another one now.
        """
        try:
            point = Point(*(int(state[name]) for name in Point._fields))
            opening, trained = state["opening"], list(state["trained"])
            check_trained(trained, self._definitions())
            opened = resume_stage(point, opening, self._mixtures, state["mixture"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this is no state of stages ({type(error).__name__}: {error}).") from error
        self._point, self._opened, self.legs = point, {point.stage: opened}, ()


def _mixture_of(number: int, data: Any) -> Mixture:
    """The data of a stage as a mixture, if need be of one set without end."""
    if isinstance(data, Mixture):
        if len(data.parts) > 1:
            raise ValueError(
                f"the mixture of stage {number} has a schedule of weights: make a stage of each of its parts."
            )
        return data
    if isinstance(data, Stages | IterableDataset) or not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        raise ValueError(
            f"the data of stage {number} is a {type(data).__name__}; a Mixture, a TokenDataset or another map-style "
            "dataset can be."
        )
    return Mixture({getattr(data, "name", None) or "data": data}, [1.0], max_epochs=None)
