"""Stages of a run: other data, rows of another length, another global batch size from a step or a token on."""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset

from ..hashing import of_the_model, sample_hash
from ..identity import order_facts
from ..legs import Leg
from ..ordered import DOMAIN, gives_arrays, has_method
from .mixture import Mixture, same, set_identity

EXACT_SAMPLES = 1_000_000  # of a stage that has not begun: the counts of more are estimated for the check at the start


@dataclass(frozen=True)
class Stage:
    """A part of a run.

    Attributes:
        data: a `Mixture`, or a map-style dataset, which is read again and again. The length of its rows is that of the
            stage.
        start_tokens: begins with the first step before which so many tokens were read in the run.
        start_step: begins behind so many steps. The first stage has neither, or 0; others one of both.
        global_batch_size: samples of a step over all ranks; that of the training arguments if None.
    """

    data: Any
    start_tokens: int | None = None
    start_step: int | None = None
    global_batch_size: int | None = None


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
        tokenizer: of the sets; None if none of them says it.
        legs: what is left of the run, by stage, when it is planned.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = tuple(stages)
        if not self.stages:
            raise ValueError("Stages need a stage.")
        for number, stage in enumerate(self.stages):
            if not isinstance(stage, Stage):
                raise ValueError(f"stage {number} is a {type(stage).__name__}; use Stage(data=..., start_step=...).")
            _check_numbers(number, stage)
        self._mixtures = [_mixture_of(number, stage.data) for number, stage in enumerate(self.stages)]
        _check_starts(self.stages, self._mixtures)
        self.names = tuple(dict.fromkeys(name for mixture in self._mixtures for name in mixture.names))
        for name in self.names:
            used = [(number, mixture) for number, mixture in enumerate(self._mixtures) if name in mixture.datasets]
            for (_, before), (number, mixture) in zip(used, used[1:], strict=False):
                _check_goes_on(name, number, before, mixture)
        by_stage = {f"of stage {number}": mixture for number, mixture in enumerate(self._mixtures)}
        self.tokenizer: str | None = same(by_stage, "tokenizer", "another tokenizer", "a run")
        lengths = [mixture.sequence_length for mixture in self._mixtures]
        self.sequence_length = max((length for length in lengths if length is not None), default=None)
        self.legs: tuple[Leg, ...] = ()
        self._point = _Point()
        self._opened: dict[int, _Opened] = {}

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
        return {"stages": [self._definition(number) for number in range(len(self.stages))], "point": list(self._point)}

    def with_vocabulary(self, size: int) -> Stages:
        """The same, whose ids are checked to be smaller where they are read."""
        other = copy.copy(self)
        other._mixtures, other._opened = [mixture.with_vocabulary(size) for mixture in self._mixtures], {}
        return other

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
        point, legs = self._point, []
        while True:
            number = point.stage
            size = self.stages[number].global_batch_size or batch
            steps = self._steps_of(point, size)
            last = steps is None or point.step + steps >= max_steps
            if steps is None or last:
                steps = max(max_steps - point.step, 0)
            if steps or last:
                stop = point.samples + steps * size
                legs.append(Leg(number, point.step, point.samples, stop, size, point.samples - point.begin))
            if last:
                break
            tokens = point.tokens + steps * size * (self._mixtures[number].sequence_length or 0)
            stop = point.samples + steps * size
            point = _Point(number + 1, point.step + steps, stop, tokens, stop)
        self.legs = tuple(legs)
        self._opened = {n: opened for n, opened in self._opened.items() if n <= self._point.stage}
        self._check_data()
        return self.legs

    def _steps_of(self, point: _Point, size: int) -> int | None:
        """Steps from a point to where the next stage begins; None in the last stage."""
        number = point.stage
        if number + 1 == len(self.stages):
            return None
        after, tokens = self.stages[number + 1], size * (self._mixtures[number].sequence_length or 0)
        if after.start_step is not None:
            steps = after.start_step - point.step
            late = steps < 0
        else:
            missing = (after.start_tokens or 0) - point.tokens
            steps = -(-missing // tokens)
            late = missing <= -(point.last_tokens or tokens)  # it would have begun a step earlier, or before that
        if point.samples > point.begin:
            if late:
                raise ValueError(
                    f"stage {number + 1} begins at {_start_of(after)}, but step {point.step} of stage {number} "
                    f"({point.tokens} tokens of the run) has been trained: it can begin from there on."
                )
        elif steps <= 0:
            raise ValueError(
                f"stage {number} would have no step: it begins at step {point.step} ({point.tokens} tokens), and stage "
                f"{number + 1} at {_start_of(after)}."
            )
        return max(steps, 0)

    def _check_data(self) -> None:
        """Whether the data of each leg lasts; of far stages by the weights, which tell counts to within a few rows."""
        opened: _Opened | None = None
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
                opened = self._opening_after(opened, leg, estimates)

    def _open(self, number: int) -> _Opened:
        """A stage with its mixture where it goes on. Those before it are run through."""
        if number not in self._opened:
            before = [leg for leg in self.legs if leg.number < number]
            if before:
                self._opened[number] = self._opening_after(self._open(before[-1].number), before[-1], False)
            elif self._opened:  # the one before was trained to its end
                last = self._opened[max(self._opened)]
                self._opened[number] = self._begin(number, last.behind(self._point.samples))
            else:
                self._opened[number] = self._begin(number, _Opening())
        return self._opened[number]

    def _opening_after(self, opened: _Opened, leg: Leg, estimates: bool) -> _Opened:
        return self._begin(leg.number + 1, opened.behind(leg.stop, estimates))

    def _begin(self, number: int, opening: _Opening) -> _Opened:
        """A stage from its first sample on. A set whose rows have another length now goes on with its next token."""
        mixture = copy.copy(self._mixtures[number])
        mixture.datasets, firsts, moved = dict(mixture.datasets), dict(opening.firsts), {}
        length = mixture.sequence_length
        for name, dataset in mixture.datasets.items():
            known = opening.lengths.get(name, length)
            if known != length:
                before = opening.sets[name].token_after(opening.state["counts"].get(name, 0))
                mixture.datasets[name], moved[name] = dataset.from_token(*before)
                firsts[name] = before
            elif name in firsts:
                mixture.datasets[name], _ = dataset.from_token(*firsts[name])
        state = opening.state
        if moved:
            counts = {**state["counts"], **moved}
            state = {"counts": counts, "anchor": counts, "mixing": None}
        if state:
            mixture.load_state_dict(state)
        return _Opened(number, opening._replace(firsts=firsts, state=state), mixture, mixture.begin)

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

    def _opened_at(self, samples: int) -> _Opened:
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
        before = self._point_of(opened.number)
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
            "trained": [self._definition(number) for number in range(opened.number + bool(samples))],
        }

    def _point_of(self, number: int) -> _Point:
        """Where the leg of a stage begins."""
        point = self._point
        for leg in self.legs:
            if leg.number >= number:
                break
            length = self._mixtures[leg.number].sequence_length or 0
            tokens = point.tokens + (leg.stop - leg.first) * length
            point = _Point(leg.number + 1, leg.step + leg.steps, leg.stop, tokens, leg.stop)
        return point

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on behind a state, of these stages or of others that had the same ones up to there. Then `plan`.

        Raises:
            ValueError: if it is no state of stages; if a stage that was trained on is another one now.
        """
        try:
            point = _Point(*(int(state[name]) for name in _Point._fields))
            opening, trained = state["opening"], list(state["trained"])
            self._check_trained(trained)
            opened = self._resumed(point, opening, state["mixture"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this is no state of stages ({type(error).__name__}: {error}).") from error
        self._point, self._opened, self.legs = point, {point.stage: opened}, ()

    def _resumed(self, point: _Point, saved: Mapping[str, Any], state: Mapping[str, Any]) -> _Opened:
        mixture = copy.copy(self._mixtures[point.stage])
        firsts = {name: tuple(first) for name, first in saved["firsts"].items()}
        mixture.datasets = {
            name: dataset.from_token(*firsts[name])[0] if name in firsts else dataset
            for name, dataset in mixture.datasets.items()
        }
        mixture.load_state_dict(state)
        read = {name: tuple(values) for name, values in saved["read"].items()}
        earlier = {
            name: dataset.from_token(*firsts[name])[0] if name in firsts else dataset
            for other in self._mixtures[: point.stage]
            for name, dataset in other.datasets.items()
        }
        opening = _Opening(
            point.begin, {"counts": dict(saved["counts"])}, dict(saved["lengths"]), firsts, earlier, read
        )
        return _Opened(point.stage, opening, mixture, mixture.begin - (point.samples - point.begin))

    def _definition(self, number: int) -> dict[str, Any]:
        """What must stay as it is once a stage was trained on."""
        stage, mixture = self.stages[number], self._mixtures[number]
        return {
            "start_tokens": stage.start_tokens if number else None,
            "start_step": stage.start_step if number else None,
            "global_batch_size": stage.global_batch_size,
            "sequence_length": mixture.sequence_length,
            "weights": dict(zip(mixture.names, mixture.parts[0].weights, strict=True)),
            "max_epochs": dict(zip(mixture.names, mixture.max_epochs, strict=True)),
            "when_exhausted": mixture.when_exhausted,
        }

    def _check_trained(self, trained: Sequence[Mapping[str, Any]]) -> None:
        for number, before in enumerate(trained):
            if number >= len(self.stages):
                raise ValueError(
                    f"stage {number} has been trained on, and there are {len(self.stages)} stages now: keep those that "
                    "have begun, and change the ones that follow."
                )
            now = self._definition(number)
            names = [name for name in now if now[name] != before.get(name)]
            if names:
                raise ValueError(
                    f"stage {number} has been trained on with {names[0]}={before.get(names[0])!r}, and has "
                    f"{now[names[0]]!r} now: leave it as it was, and add a stage that begins at the step from which "
                    "the change is to hold."
                )


class _Point(NamedTuple):
    """Between two steps: the stage of the step before; what was done in the run; the stage's first sample; tokens of
    the last step."""

    stage: int = 0
    step: int = 0
    samples: int = 0
    tokens: int = 0
    begin: int = 0
    last_tokens: int = 0


class _Opening(NamedTuple):
    """What a stage goes on from.

    Attributes:
        samples: of the run before it.
        state: of the mixture before it.
        lengths: of the rows that a set was last read in.
        firsts: the epoch, file and token from which a set's rows of this length were cut.
        sets: as they were last read.
        read_before: rows, tokens and epochs of each set.
        is_estimated: counts are not exact.
    """

    samples: int = 0
    state: dict[str, Any] = {}  # noqa: RUF012
    lengths: dict[str, int | None] = {}  # noqa: RUF012
    firsts: dict[str, tuple[int, int, int]] = {}  # noqa: RUF012
    sets: dict[str, Any] = {}  # noqa: RUF012
    read_before: dict[str, tuple[int, int, float]] = {}  # noqa: RUF012
    is_estimated: bool = False


class _Opened(NamedTuple):
    """A stage that can be read: `base` is the number of its first sample in its mixture."""

    number: int
    opening: _Opening
    mixture: Mixture
    base: int

    @property
    def is_estimated(self) -> bool:
        return self.opening.is_estimated

    def read(self, samples: int, names: Sequence[str], state: dict[str, Any] | None = None) -> dict[str, Any]:
        """Rows, tokens and epochs of each set among the first `samples` of the run."""
        before, found = self.opening.state.get("counts", {}), {}
        counts = state["counts"] if state else self.mixture.counts(self.base + samples - self.opening.samples)
        length = self.mixture.sequence_length or 0
        lengths = dict(zip(self.mixture.names, self.mixture.lengths, strict=True))
        for name in names:
            rows, tokens, epochs = self.opening.read_before.get(name, (0, 0, 0.0))
            new = counts[name] - before.get(name, 0) if name in lengths else 0
            found[name] = (rows + new, tokens + new * length, epochs + (new / lengths[name] if new else 0.0))
        return found

    def behind(self, samples: int, estimates: bool = False) -> _Opening:
        """What the next stage goes on from, behind so many samples of the run."""
        mixture, place = self.mixture, self.base + samples - self.opening.samples
        state = _estimated(mixture, self.base, place) if estimates else mixture.state_dict(place)
        names = (*self.opening.read_before, *mixture.names)
        return _Opening(
            samples,
            state,
            self.opening.lengths | dict.fromkeys(mixture.names, mixture.sequence_length),
            self.opening.firsts,
            self.opening.sets | mixture.datasets,
            self.read(samples, tuple(dict.fromkeys(names)), state),
            estimates,
        )


def _estimated(mixture: Mixture, first: int, place: int) -> dict[str, Any]:
    """The state at a place, with counts that follow the weights from the first sample on."""
    state, weights = mixture.state_dict(first), mixture.parts[0].weights
    counts = dict(state["counts"])
    for name, weight, length, epochs in zip(mixture.names, weights, mixture.lengths, mixture.max_epochs, strict=True):
        reached = counts[name] + round((place - first) * weight / sum(weights))
        counts[name] = reached if epochs is None else min(reached, max(epochs * length, counts[name]))
    return {"counts": counts, "anchor": counts, "mixing": None}


def _start_of(stage: Stage) -> str:
    return f"start_step={stage.start_step}" if stage.start_step is not None else f"start_tokens={stage.start_tokens}"


def _check_numbers(number: int, stage: Stage) -> None:
    for name, least in (("start_tokens", 0), ("start_step", 0), ("global_batch_size", 1)):
        value = getattr(stage, name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise ValueError(f"stage {number}: {name}={value!r} must be a whole number, at least {least}.")
    given = [name for name in ("start_tokens", "start_step") if getattr(stage, name) is not None]
    if number and len(given) != 1:
        raise ValueError(
            f"stage {number} needs one of start_tokens and start_step, and has {' and '.join(given) or 'none'}."
        )
    if not number and (stage.start_tokens or stage.start_step):
        raise ValueError(f"stage 0 begins at {_start_of(stage)}: the first stage begins at 0, or says nothing.")


def _check_starts(stages: Sequence[Stage], mixtures: Sequence[Mixture]) -> None:
    for name in ("start_tokens", "start_step"):
        begun = [(n, start) for n, stage in enumerate(stages) if (start := getattr(stage, name)) is not None]
        for (_, before), (number, start) in zip(begun, begun[1:], strict=False):
            if start <= before:
                raise ValueError(
                    f"stage {number} begins at {name}={start}, and one before it at {before}: list them in order."
                )
    for number, stage in enumerate(stages[1:], 1):
        unknown = [n for n in range(number) if mixtures[n].sequence_length is None]
        if stage.start_tokens is not None and unknown:
            raise ValueError(
                f"stage {number} begins at start_tokens={stage.start_tokens}, but the data of stage {unknown[0]} does "
                "not say how many tokens a row has (sequence_length); use start_step."
            )


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


def _some_rows(dataset: Any) -> dict[str, Any]:
    """Hashes of rows of a set that does not say what it is made of: two of one length need not be the same."""
    if has_method(dataset, "identity"):
        return {}
    places = sorted({0, len(dataset) // 2, len(dataset) - 1})
    return {f"row {place}": sample_hash(of_the_model(dataset[place])) for place in places}


def _check_goes_on(name: str, number: int, before: Mixture, now: Mixture) -> None:
    """Whether a set of a stage can go on where that of an earlier one has ended."""
    old, new = before.datasets[name], now.datasets[name]
    other = f"give the set {name!r} of stage {number} another name in a Mixture, if it is to be read from its beginning"
    if old is not new:
        ours, theirs = (order_facts(set_identity(each)) | _some_rows(each) for each in (new, old))
        differ = [key for key in ours if ours[key] != theirs.get(key)]
        if type(old) is not type(new) or differ:
            what = differ[0] if differ else "type"
            raise ValueError(f"the sets {name!r} of stage {number} and of the one before differ in {what}: {other}.")
    if not gives_arrays(old) and before.seed != now.seed:
        raise ValueError(
            f"the mixture of stage {number} shuffles the set {name!r} by another seed: use seed={before.seed}."
        )
    lengths = before.sequence_length, now.sequence_length
    if lengths[0] != lengths[1] and not (getattr(old, "counts_tokens", False) and getattr(new, "counts_tokens", False)):
        raise ValueError(
            f"the set {name!r} has rows of {lengths[1]} tokens in stage {number}, and of {lengths[0]} before: shuffled "
            "or packed rows of one length do not say which tokens are left for rows of another. Read it in the order "
            "of its files (shuffle=False and documents='cross' or 'mask'; shuffle the documents when you tokenize), or "
            f"{other}."
        )
