"""Weights that change within a mixture: parts, each a blend that begins where the one before ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from .blend import UNLIMITED, Blend, Point

KEYS = ("weights", "start_samples", "start_tokens")


class Part(NamedTuple):
    """Weights `[K]` that hold from sample `start` of a mixture on."""

    start: int
    weights: tuple[float, ...]


def part_start(number: int, entry: Mapping[str, Any], sequence_length: int | None) -> int:
    """The sample with which a part of a `schedule` begins: the first at whose beginning so many tokens were read.

    Raises:
        ValueError: for an entry that does not say it, or says what it cannot be.
    """
    unknown = sorted(set(entry) - set(KEYS))
    starts = [key for key in KEYS[1:] if entry.get(key) is not None]
    if unknown or "weights" not in entry or len(starts) != 1:
        raise ValueError(
            f"schedule[{number}] has {sorted(entry)}: it needs `weights`, and `start_samples` or `start_tokens`."
        )
    start = entry[starts[0]]
    if not isinstance(start, int) or start < 0:
        raise ValueError(f"schedule[{number}]: {starts[0]}={start!r} must be a whole number, at least 0.")
    if starts[0] == "start_samples":
        return start
    if sequence_length is None:
        raise ValueError(f"schedule[{number}]: start_tokens needs sets with a sequence_length; use start_samples.")
    return -(-start // sequence_length)


def parts_of(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Parts in order, without those that change nothing.

    Raises:
        ValueError: if they do not begin at 0, or one begins before the one before it.
    """
    if parts[0].start:
        raise ValueError(f"the schedule begins at sample {parts[0].start}: say the weights that hold before it.")
    kept = [parts[0]]
    for number, part in enumerate(parts[1:], 1):
        if part.start <= parts[number - 1].start:
            raise ValueError(
                f"weights that begin at sample {part.start} follow those of sample {parts[number - 1].start}: the "
                "schedule must be in order, and each part have a sample."
            )
        if part.weights != kept[-1].weights:
            kept.append(part)
    return tuple(kept)


@dataclass
class BlendSchedule:
    """As `Blend`, with `parts`. Where one begins is found out when it is asked for, once."""

    parts: tuple[Part, ...]
    capacities: tuple[int, ...]
    redistribute: bool
    begin: Point
    _blends: list[Blend] = field(default_factory=list, repr=False)
    _offset: int = field(default=0, repr=False)  # number of the part of the first of them

    def __post_init__(self) -> None:
        self._offset = self._part_at(self.begin.samples)
        self._blends = [self._blend(self._offset, self.begin)]

    def _part_at(self, samples: int) -> int:
        return max(number for number, part in enumerate(self.parts) if part.start <= samples)

    def _blend(self, number: int, begin: Point) -> Blend:
        return Blend(self.parts[number].weights, self.capacities, self.redistribute, begin)

    def _stop(self, number: int) -> int | None:
        """The sample before which a part ends, if its sets last."""
        return self.parts[number + 1].start if number + 1 < len(self.parts) else None

    def blend_of(self, number: int) -> Blend:
        """Of a part; of the one in which the mixture ends, if that comes before. Parts before it are run through."""
        while len(self._blends) <= number - self._offset:
            last = self._blends[-1]
            stop = self._stop(self._offset + len(self._blends) - 1)
            assert stop is not None
            if last.end is not None and last.end < stop:
                return last
            self._blends.append(self._blend(self._offset + len(self._blends), last.at(stop).anchored()))
        return self._blends[number - self._offset]

    def weights_at(self, samples: int) -> tuple[float, ...]:
        """Of sample `samples`."""
        return self.parts[self._part_at(samples)].weights

    def end(self, samples: int | None = None) -> int | None:
        """The number of samples up to its end, as of `Blend`; None if it has none, or not among the first `samples`.

        If sets might end among them, parts that begin before are run through, a second for a million samples or two.
        """
        if (samples is None and min(self.capacities) >= UNLIMITED) or (samples is not None and self._lasts(samples)):
            return None
        end = self.last(samples).end
        return None if end is None or (samples is not None and end > samples) else end

    def _lasts(self, samples: int) -> bool:
        """Whether all sets last for the first `samples` for certain: by what a set has at most (see `Blend.end`)."""
        room = np.array(self.capacities, np.float64) - self.begin.anchor_counts
        start, is_read = self.begin.anchor_samples, np.zeros(len(room), bool)
        for number in range(self._offset, self._part_at(max(samples, self.begin.samples)) + 1):
            weights = np.array(self.parts[number].weights, np.float64)
            stop = min(self._stop(number) or samples, samples)
            room -= weights / weights.sum() * (stop - start) + 2  # at most 1, and what is rounded
            start, is_read = stop, is_read | (weights > 0)
        return bool((room > 0)[is_read].all())

    def last(self, samples: int | None = None) -> Blend:
        """The blend in which the mixture ends, or which has the sample behind the first `samples`."""
        return self.blend_of(
            len(self.parts) - 1 if samples is None else self._part_at(max(samples, self.begin.samples))
        )

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As of `Blend`."""
        samples = np.asarray(samples, np.int64)
        starts = np.array([part.start for part in self.parts], np.int64)
        numbers = np.maximum(np.searchsorted(starts, samples, "right") - 1, self._offset)
        sets, ordinals = np.empty(samples.shape, np.int64), np.empty(samples.shape, np.int64)
        for number in np.unique(numbers).tolist():
            here = numbers == number
            sets[here], ordinals[here] = self.blend_of(number).locate(samples[here])
        return sets, ordinals

    def at(self, samples: int) -> Point:
        """As of `Blend`. Where a part begins, it is the end of the one before."""
        number = self._part_at(max(samples - 1, self.begin.samples))
        return self.blend_of(number).at(samples)
