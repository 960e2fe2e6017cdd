"""Several datasets as one, by weights: which row comes next follows from how many of each came before."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
import xxhash
from torch.utils.data import Dataset, IterableDataset

from ..ordered import gives_arrays, has_method
from .blend import UNLIMITED, Point
from .permutation import Permutation
from .row_reader import Rows
from .same_tokenizer import Tokenizer, check_one_tokenizer, tokenizer_of
from .weight_schedule import BlendSchedule, Part, part_start, parts_of

ENDINGS = ("stop", "redistribute")


class Mixture(Dataset[dict[str, Any]]):
    """Rows of several sets, in proportion to their weights from the first row on.

    `mixture[i]` is sample i of the whole run, not of an epoch: the set is the one furthest behind its weight (see
    `blend`), and of each set rows come in the order of its epochs, one after the other. A row has a `domain`, too:
    the place of its set in `names`.

    What was read is told by the number of rows of each set alone (`state_dict`). A mixture that is given the state goes
    on with its own weights, sets and ends, whatever those before were: no row of a set is left out or comes again.

    Args:
        datasets: map-style, by name, each with rows. `TokenDataset`s bring their order; any other set is shuffled by
            the seed, its name and the epoch, without storing an order.
        weights: by name, or in the order of the sets; shares of the rows. They need not sum to one. A set of weight 0
            is not read. None if the `schedule` begins at 0.
        seed: of the order of sets that bring none.
        max_epochs: how often a set is read at most: one number, or one by name; None for any.
        when_exhausted: what happens when a set has been read that often: `"stop"`: the mixture ends; `"redistribute"`:
            its weight goes to the others, and the mixture ends with the last.
        schedule: weights that hold later: a list of dicts with `weights`, and `start_samples` or `start_tokens` of the
            mixture. Parts that have not begun may be others when a run is resumed.

    Raises:
        ValueError: for weights that are negative, not finite, all zero or not those of the sets; a set without rows;
            sets whose rows have different lengths, or that were written with different tokenizers.

    Attributes:
        names: of the sets.
        sequence_length, tokenizer, vocabulary: of the sets; None if none of them says it.
        parts: weights, and the samples with which they begin.
        samples: where `iter(mixture)` goes on.
    """

    def __init__(
        self,
        datasets: Mapping[str, Any],
        weights: Mapping[str, float] | Sequence[float] | None = None,
        seed: int = 0,
        max_epochs: int | None | Mapping[str, int | None] = 1,
        when_exhausted: Literal["stop", "redistribute"] = "stop",
        schedule: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        if when_exhausted not in ENDINGS:
            raise ValueError(f"when_exhausted={when_exhausted!r} is not one of {', '.join(map(repr, ENDINGS))}.")
        self.datasets, self.names, self.seed = dict(datasets), tuple(datasets), seed
        if not self.names:
            raise ValueError("a mixture needs a set.")
        for name in self.names:
            if not isinstance(name, str):
                raise ValueError(f"the name {name!r} of a set must be text: the state tells sets by their names.")
        for name, dataset in self.datasets.items():
            if isinstance(dataset, IterableDataset):
                raise ValueError(f"the set {name!r} is a stream ({type(dataset).__name__}): use StreamMixture.")
        self.lengths = tuple(len(dataset) for dataset in self.datasets.values())
        for name, length in zip(self.names, self.lengths, strict=True):
            if not length:
                raise ValueError(f"the set {name!r} has no rows.")
        self.sequence_length: int | None = same(self.datasets, "sequence_length", "rows of another length", "a mixture")
        check_one_tokenizer(self.datasets, "a mixture")
        self.tokenizer, self.vocabulary = _first_said(map(tokenizer_of, self.datasets.values()))
        self.parts = self._parts(weights, schedule)
        self.max_epochs = _epochs(self.names, max_epochs)
        self.when_exhausted = when_exhausted
        self.samples = 0
        self._gone: dict[str, int] = {}  # rows of sets that this mixture does not have
        self._blend = self._blend_from(Point.start(len(self.names)))

    def _parts(
        self, weights: Mapping[str, float] | Sequence[float] | None, schedule: Sequence[Mapping[str, Any]]
    ) -> tuple[Part, ...]:
        if weights is None and not schedule:
            raise ValueError(f"a mixture needs weights of its sets ({', '.join(self.names)}), or a schedule of them.")
        parts = [] if weights is None else [Part(0, shares_of(self.names, weights))]
        for number, entry in enumerate(schedule):
            if not isinstance(entry, Mapping):
                raise ValueError(f"schedule[{number}]={entry!r} must be a dict with `weights` and where they begin.")
            if not number and weights is None and len(entry) == 1:
                entry = {**entry, "start_samples": 0}
            parts.append(
                Part(part_start(number, entry, self.sequence_length), shares_of(self.names, entry.get("weights", ())))
            )
        return parts_of(parts)

    def _blend_from(self, begin: Point) -> BlendSchedule:
        capacities = tuple(
            UNLIMITED if epochs is None else epochs * length
            for epochs, length in zip(self.max_epochs, self.lengths, strict=True)
        )
        gone = sum(self._gone.values())  # which the samples of the schedule count, and those of the blend do not
        parts = tuple(Part(max(part.start - gone, 0), part.weights) for part in self.parts)
        first = max(number for number, part in enumerate(parts) if not part.start)
        return BlendSchedule(parts[first:], capacities, self.when_exhausted == "redistribute", begin)

    def __len__(self) -> int:
        """Samples up to its end, those before a state that was loaded among them.

        Raises:
            TypeError: if it has no end, because a set is repeated without end.
        """
        end = self.end()
        if end is None:
            raise TypeError("the mixture has no end (max_epochs=None); say with max_steps how far to train.")
        return end

    def end(self, samples: int | None = None) -> int | None:
        """Samples up to its end; None if it has none, or none among the first `samples`, which is found out faster."""
        gone = sum(self._gone.values())
        end = self._blend.end(None if samples is None else samples - gone)
        return None if end is None else end + gone

    @property
    def begin(self) -> int:
        """The sample with which it goes on behind a state that was loaded; 0 without."""
        return self._blend.begin.samples + sum(self._gone.values())

    def locate(self, samples: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each sample `[n]`, the set, and how many rows of the set come before it.

        Raises:
            IndexError: for a sample behind the end, which says which set ends it; or before the state that was loaded.
        """
        gone = sum(self._gone.values())
        wanted = np.asarray(samples, np.int64) - gone
        begin = self._blend.begin.samples
        if wanted.size and (end := self._blend.end(int(wanted.max()))) is not None:
            raise IndexError(f"the mixture has {end + gone} samples: {self.why_it_ends(end + gone)}")
        if wanted.size and wanted.min() < begin:
            raise IndexError(
                f"sample {int(wanted.min()) + gone} comes before sample {begin + gone}, with which this mixture goes "
                "on: its weights may have been others."
            )
        return self._blend.locate(wanted)

    def why_it_ends(self, end: int) -> str:
        """What ends it at its `end`, and what would work, as a sentence."""
        ways = "raise max_epochs, lower its weight, or use when_exhausted='redistribute'"
        if self.when_exhausted == "redistribute":
            return "all of its sets have been read max_epochs times."
        end -= sum(self._gone.values())
        blend = self._blend.last(end)
        left = [
            c - n if weight > 0 else UNLIMITED
            for c, n, weight in zip(blend.capacities, blend.at(end).counts, blend.weights, strict=True)
        ]
        k = int(np.argmin(left))
        return (
            f"the set {self.names[k]!r} ({self.lengths[k]} rows) has then been read {self.max_epochs[k]} times; {ways}."
        )

    def rows(self, samples: Sequence[int] | np.ndarray) -> Rows:
        """Many samples at once: int64 arrays `[B, S]`, and `domain` `[B]`. All sets must have a method `rows`."""
        sets, ordinals = self.locate(samples)
        parts = []
        for k, places, epoch in self._reads(sets, ordinals):
            found = self.datasets[self.names[k]].rows(ordinals[places] % self.lengths[k], epoch)
            parts.append((places, found))
        rows: Rows = {}
        for places, found in parts:
            for name in self.columns:
                column = found.get(name)
                if column is None:  # of positions: the set does not keep documents apart
                    column = np.broadcast_to(np.arange(found["input_ids"].shape[1]), found["input_ids"].shape)
                if name not in rows:
                    rows[name] = np.empty((len(sets), *column.shape[1:]), column.dtype)
                rows[name][places] = column
        return {**rows, "domain": sets}

    @property
    def columns(self) -> tuple[str, ...]:
        """Of the rows of token sets, without `domain`: those of all sets, so that every batch has the same."""
        return tuple(dict.fromkeys(name for dataset in self.datasets.values() for name in dataset.columns))

    def _reads(self, sets: np.ndarray, ordinals: np.ndarray) -> Iterator[tuple[int, np.ndarray, int]]:
        """Samples of one set and epoch: the set, their places, the epoch."""
        epochs = ordinals // np.array(self.lengths)[sets]
        for k, epoch in sorted(set(zip(sets.tolist(), epochs.tolist(), strict=True))):
            yield k, np.flatnonzero((sets == k) & (epochs == epoch)), epoch

    def __getitem__(self, sample: int) -> dict[str, Any]:
        return self.__getitems__([sample])[0]

    def __getitems__(self, samples: Sequence[int]) -> list[dict[str, Any]]:
        """What a `DataLoader` asks for: the rows of a batch."""
        if all(gives_arrays(dataset) for dataset in self.datasets.values()):
            columns = {name: torch.from_numpy(column) for name, column in self.rows(samples).items()}
            return [{name: column[row] for name, column in columns.items()} for row in range(len(samples))]
        sets, ordinals = self.locate(samples)
        found: list[Any] = [None] * len(samples)
        for k, places, epoch in self._reads(sets, ordinals):
            for place, row in zip(places, self._own_rows(k, ordinals[places] % self.lengths[k], epoch), strict=True):
                found[place] = {**row, "domain": torch.tensor(k)}
        return found

    def _own_rows(self, k: int, places: np.ndarray, epoch: int) -> list[Mapping[str, Any]]:
        name, dataset = self.names[k], self.datasets[self.names[k]]
        if gives_arrays(dataset):
            columns = {column: torch.from_numpy(array) for column, array in dataset.rows(places, epoch).items()}
            return [{column: array[row] for column, array in columns.items()} for row in range(len(places))]
        stream = xxhash.xxh32_intdigest(name.encode())
        return [dataset[int(n)] for n in Permutation(self.lengths[k], self.seed, epoch, stream)(places)]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Rows from `samples` on, which counts them."""
        end = self.end()
        while end is None or self.samples < end:
            row = self[self.samples]
            self.samples += 1
            yield row

    def counts(self, samples: int | None = None) -> dict[str, int]:
        """Rows of each set among the first `samples`; among those iterated over if None."""
        samples = self.samples if samples is None else samples
        return dict(zip(self.names, self._point(samples).counts, strict=True))

    def epochs(self, samples: int | None = None) -> dict[str, float]:
        """How often each set has been read, as `counts`."""
        return {name: n / length for (name, n), length in zip(self.counts(samples).items(), self.lengths, strict=True)}

    def tokens(self, samples: int | None = None) -> dict[str, int]:
        """Tokens that were read of each set, as `counts`; of sets that say their `sequence_length`."""
        length = self.sequence_length
        return {} if length is None else {name: n * length for name, n in self.counts(samples).items()}

    def settings(self) -> dict[str, Any]:
        """What the order depends on besides the sets, in JSON's types."""
        parts = [[part.start, list(part.weights)] for part in self.parts]
        return {"names": list(self.names), "parts": parts, "seed": self.seed, "state": self.state_dict(self.begin)}

    def with_vocabulary(self, size: int) -> Mixture:
        """The same, whose ids are checked to be smaller where they are read."""
        other = copy.copy(self)
        other.datasets = {
            name: dataset.with_vocabulary(size) if hasattr(dataset, "with_vocabulary") else dataset
            for name, dataset in self.datasets.items()
        }
        return other

    def identities(self, samples: int | None = None) -> dict[str, dict[str, Any]]:
        """Of the sets by name, to be compared when a run is resumed: those read by then; of all if None."""
        counts = None if samples is None else self.counts(samples)
        return {
            name: set_identity(dataset) for name, dataset in self.datasets.items() if counts is None or counts[name]
        }

    def _point(self, samples: int) -> Point:
        gone = sum(self._gone.values())
        wanted, begin = samples - gone, self._blend.begin.samples
        end = self._blend.end(wanted - 1) if wanted > begin else None
        if wanted < begin or end is not None:
            raise IndexError(
                f"the mixture goes on from sample {begin + gone}"
                f"{'' if end is None else f', to {end + gone}'}; there is no point behind {samples} samples."
            )
        return self._blend.at(wanted)

    def state_dict(self, samples: int | None = None) -> dict[str, Any]:
        """Where it is behind the first `samples`, or behind those iterated over: counts, in JSON's types."""
        samples = self.samples if samples is None else samples
        point = self._point(samples)
        weights = self._blend.weights_at(max(point.samples - 1, self._blend.begin.samples))
        return {
            "counts": {**self._gone, **dict(zip(self.names, point.counts, strict=True))},
            "anchor": dict(zip(self.names, point.anchor_counts, strict=True)),
            "mixing": self._mixing(weights),
        }

    def _mixing(self, weights: tuple[float, ...]) -> dict[str, Any]:
        """What the next set depends on besides the counts."""
        return {
            "weights": dict(zip(self.names, weights, strict=True)),
            "max_epochs": dict(zip(self.names, self.max_epochs, strict=True)),
            "rows": dict(zip(self.names, self.lengths, strict=True)),
            "when_exhausted": self.when_exhausted,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on behind a state, of this mixture or of one with other weights or sets.

        New weights hold from here on. The count of a set that is not here is kept, should it come back.

        Raises:
            ValueError: if it is no state of a mixture.
        """
        try:
            counts = {str(name): int(count) for name, count in state["counts"].items()}
            anchor, mixing = {str(name): int(n) for name, n in state["anchor"].items()}, state["mixing"]
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"this is no state of a mixture ({type(error).__name__}: {error}).") from error
        if min(counts.values(), default=0) < 0:
            raise ValueError(f"this is no state of a mixture: a count is negative ({counts}).")
        self._gone = {name: count for name, count in counts.items() if name not in self.names}
        ours = tuple(counts.get(name, 0) for name in self.names)
        begin = Point(sum(ours), ours, sum(ours), ours)
        self._blend = self._blend_from(begin)
        if mixing == self._mixing(self._blend.weights_at(begin.samples)):
            before = tuple(anchor.get(name, 0) for name in self.names)
            begin = Point(sum(ours), ours, sum(before), before)
        self._blend = self._blend_from(begin)
        self.samples = sum(counts.values())

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_blend": self._blend_from(self._blend.begin)}


def shares_of(names: Sequence[str], weights: Mapping[str, float] | Sequence[float]) -> tuple[float, ...]:
    """Weights by the order of `names`. Raises a ValueError for those that cannot be."""
    if isinstance(weights, Mapping):
        missing, unknown = sorted(set(names) - set(weights)), sorted(set(weights) - set(names))
        if missing or unknown:
            raise ValueError(
                "weights must name the sets of the mixture: "
                + " and ".join(
                    [f"{', '.join(map(repr, missing))} has none"] * bool(missing)
                    + [f"{', '.join(map(repr, unknown))} is no set"] * bool(unknown)
                )
                + "."
            )
        weights = [weights[name] for name in names]
    if len(weights) != len(names):
        raise ValueError(f"{len(weights)} weights do not cover {len(names)} sets ({', '.join(names)}).")
    found = tuple(_number(name, weight) for name, weight in zip(names, weights, strict=True))
    for name, weight in zip(names, found, strict=True):
        if not math.isfinite(weight) or weight < 0:
            raise ValueError(f"the weight {weight} of the set {name!r} cannot be: weights are finite and not negative.")
    if not sum(found) or not math.isfinite(sum(found)):
        raise ValueError(f"the weights {list(found)} sum to {sum(found)}; the sum must be positive and finite.")
    return found


def _number(name: str, weight: Any) -> float:
    try:
        return float(weight)
    except (TypeError, ValueError):
        raise ValueError(f"the weight {weight!r} of the set {name!r} is no number.") from None


def _epochs(names: Sequence[str], epochs: int | None | Mapping[str, int | None]) -> tuple[int | None, ...]:
    if isinstance(epochs, Mapping):
        if set(epochs) != set(names):
            raise ValueError(f"max_epochs names {sorted(epochs)}, and the sets are {sorted(names)}.")
        found = tuple(epochs[name] for name in names)
    else:
        found = (epochs,) * len(names)
    for name, number in zip(names, found, strict=True):
        if number is not None and (not isinstance(number, int) or number < 1):
            raise ValueError(f"max_epochs={number!r} of the set {name!r} cannot be: a positive integer, or None.")
    return found


def set_identity(dataset: Any) -> dict[str, Any]:
    """Of a set of a mixture: its own, or its number of rows."""
    return dataset.identity() if has_method(dataset, "identity") else {"rows": len(dataset)}


def _first_said(tokenizers: Iterable[Tokenizer]) -> Tokenizer:
    """Of sets of one tokenizer: the first name, and the vocabulary if one tells it."""
    found = list(tokenizers)
    name, vocabulary = (next((said for said in each if said is not None), None) for each in zip(*found, strict=True))
    return Tokenizer(name, vocabulary)


def same(datasets: Mapping[str, Any], attribute: str, what: str, whole: str) -> Any:
    """The attribute that all sets have which have it at all; None if none does."""
    known = [(name, value) for name, d in datasets.items() if (value := getattr(d, attribute, None)) is not None]
    for name, value in known[1:]:
        if value != known[0][1]:
            raise ValueError(
                f"the set {name!r} has {what} ({value!r}) than {known[0][0]!r} ({known[0][1]!r}); {whole} has one."
            )
    return known[0][1] if known else None
