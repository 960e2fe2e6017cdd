"""Which set each sample of a mixture comes from: the greedy rule of Megatron, with counts as its only state.

Sample i comes from the set with the largest `weight * max(i, 1) - count`, the first of equals (Megatron-Core 0.16,
`build_blending_indices`; nanotron's nanosets do the same), so that the counts follow the weights from the first sample
on. Where weights change, i and the counts are counted from there: otherwise the sets whose weight has grown would first
have to make up for all samples before.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

UNLIMITED = 2**62
FEW_SETS = 16  # up to which Python's floats are faster than arrays
BLOCK = 4096  # samples that are found out at a time
KEPT_BLOCKS = 64
KEPT_POINTS = 1024  # at most, of a run of any length: of earlier blocks, every second, fourth, ... is kept


@dataclass(frozen=True)
class Point:
    """Between two samples of a mixture.

    Attributes:
        samples: before it.
        counts: of each set, before it.
        anchor_samples, anchor_counts: the same, where the weights that hold here began to.
    """

    samples: int
    counts: tuple[int, ...]
    anchor_samples: int
    anchor_counts: tuple[int, ...]

    @staticmethod
    def start(sets: int) -> Point:
        return Point(0, (0,) * sets, 0, (0,) * sets)

    def anchored(self) -> Point:
        """Here, as the beginning of new weights."""
        return Point(self.samples, self.counts, self.samples, self.counts)


@dataclass
class Blend:
    """The sets of all samples from `begin` on.

    Attributes:
        weights: `[K]`, not negative; they need not sum to one. A set of weight 0 is never chosen.
        capacities: `[K]`, samples that each set has, `UNLIMITED` if it has no end.
        redistribute: the weight of a set that has given all goes to the others; the mixture ends before that if False.
        begin: where the first sample is.
    """

    weights: tuple[float, ...]
    capacities: tuple[int, ...]
    redistribute: bool
    begin: Point
    _points: dict[int, Point] = field(default_factory=dict, repr=False)  # at the beginning of blocks
    _newest: int = field(default=0, repr=False)  # block with a point
    _every: int = field(default=1, repr=False)  # block of the earlier ones has a point
    _blocks: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict, repr=False)

    @property
    def end(self) -> int | None:
        """Number of samples up to its end; None if it has none.

        A set is chosen when it is behind its weight, so of j samples of a mixture at most `weight * (j - 1) + 1` are
        its own. It ends where a set could have given all of its samples by that, at most a few before one has. The
        quotient is rounded up by less than its error, which changes nothing: counts are whole.
        """
        begin = self.begin
        left = [c - n for c, n in zip(self.capacities, begin.counts, strict=True)]
        chosen = [k for k, weight in enumerate(self.weights) if weight > 0]
        if self.redistribute:
            return (
                None
                if max(self.capacities[k] for k in chosen) >= UNLIMITED
                else begin.samples + sum(max(left[k], 0) for k in chosen)
            )
        limited = [k for k in chosen if self.capacities[k] < UNLIMITED]
        if not limited:
            return None
        total = float(np.sum(np.array(self.weights, np.float64)))
        room = [self.capacities[k] - begin.anchor_counts[k] for k in limited]
        ends = [
            # infinite by a weight that is next to nothing
            int(min((1 + (n - 1) * total / self.weights[k]) * (1 + 1e-13), UNLIMITED)) if n > 0 else 0
            for k, n in zip(limited, room, strict=True)
        ]
        return max(begin.samples, begin.anchor_samples + min(ends))

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The set of each of these samples `[n]`, and how many of the set come before it.

        Raises:
            IndexError: for one before `begin`, or behind the end.
        """
        samples = np.asarray(samples, np.int64)
        end = self.end
        if samples.size and (samples.min() < self.begin.samples or (end is not None and samples.max() >= end)):
            raise IndexError(f"a sample is not in [{self.begin.samples}, {end}).")
        blocks = (samples - self.begin.samples) // BLOCK
        sets, ordinals = np.empty(samples.shape, np.int64), np.empty(samples.shape, np.int64)
        for block in np.unique(blocks).tolist():
            here = blocks == block
            found = self._block(block)
            place = (samples[here] - self.begin.samples) - block * BLOCK
            sets[here], ordinals[here] = found[0][place], found[1][place]
        return sets, ordinals

    def at(self, samples: int) -> Point:
        """The point before sample `samples`."""
        block, rest = divmod(samples - self.begin.samples, BLOCK)
        return self._run(self._point(block), rest)[2]

    def _point(self, block: int) -> Point:
        if block in self._points:
            return self._points[block]
        known = self._newest if block > self._newest else block // self._every * self._every
        point = self._points.get(known, self.begin)
        for _ in range(known, block):
            point = self._run(point, BLOCK)[2]
            known += 1
            self._keep(known, point)
        return point

    def _keep(self, block: int, point: Point) -> None:
        """Keep the point of a block behind all others, and of the earlier ones as many as may be."""
        if block <= self._newest:
            return
        self._points[block], self._newest = point, block
        while len(self._points) > KEPT_POINTS:
            recent = block - KEPT_BLOCKS
            self._points = {n: p for n, p in self._points.items() if n % self._every == 0 or n > recent}
            if len(self._points) > KEPT_POINTS // 2:
                self._every *= 2

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        if block not in self._blocks:
            sets, ordinals, after = self._run(self._point(block), BLOCK)
            if len(sets) == BLOCK:
                self._keep(block + 1, after)
            if len(self._blocks) >= KEPT_BLOCKS:
                self._blocks.pop(next(iter(self._blocks)))
            self._blocks[block] = (sets, ordinals)
        return self._blocks[block]

    def _run(self, point: Point, size: int) -> tuple[np.ndarray, np.ndarray, Point]:
        """Sets and ordinals of up to `size` samples from a point on, and the point behind them."""
        sets: list[int] = []
        ordinals: list[int] = []
        while len(sets) < size:
            open_sets = [
                k
                for k, weight in enumerate(self.weights)
                if weight > 0 and point.counts[k] < (self.capacities[k] if self.redistribute else UNLIMITED)
            ]
            if not open_sets:
                break
            chosen = self._until_one_ends(point, open_sets, size - len(sets))
            counts = list(point.counts)
            for k in chosen:
                sets.append(k)
                ordinals.append(counts[k])
                counts[k] += 1
            point = Point(point.samples + len(chosen), tuple(counts), point.anchor_samples, point.anchor_counts)
            if self.redistribute and chosen and counts[chosen[-1]] == self.capacities[chosen[-1]]:
                point = point.anchored()
        return np.array(sets, np.int64), np.array(ordinals, np.int64), point

    def _until_one_ends(self, point: Point, open_sets: list[int], size: int) -> list[int]:
        """The sets of the next samples, up to the one that takes the last of a set."""
        weights = np.array([self.weights[k] for k in open_sets], np.float64)
        weights = weights / np.sum(weights)  # as Megatron normalizes
        counts = [point.counts[k] - point.anchor_counts[k] for k in open_sets]
        first = point.samples - point.anchor_samples
        limit = UNLIMITED if not self.redistribute else None
        lasts = [limit or self.capacities[k] - point.anchor_counts[k] for k in open_sets]
        choose = greedy if len(open_sets) <= FEW_SETS else greedy_by_arrays
        return [open_sets[k] for k in choose(weights, counts, lasts, first, size)]


def greedy(weights: np.ndarray, counts: list[int], lasts: list[int], first: int, size: int) -> list[int]:
    """The sets of samples `first` to `first + size`, or up to the one with which a set's count is its `lasts`.

    Args:
        weights: `[K]`, sum to one.
        counts: `[K]`, before the first; not changed.
    """
    pairs, counts, chosen = list(enumerate(weights.tolist())), list(counts), []
    for number in range(first, first + size):
        scale = float(number) if number > 1 else 1.0
        best, largest = 0, -float("inf")
        for k, weight in pairs:
            behind = weight * scale - counts[k]
            if behind > largest:
                best, largest = k, behind
        chosen.append(best)
        counts[best] += 1
        if counts[best] == lasts[best]:
            break
    return chosen


def greedy_by_arrays(weights: np.ndarray, counts: list[int], lasts: list[int], first: int, size: int) -> list[int]:
    """As `greedy`, for many sets."""
    taken, behind, chosen = np.array(counts, np.float64), np.empty(len(weights)), []
    for number in range(first, first + size):
        np.multiply(weights, float(number) if number > 1 else 1.0, out=behind)
        np.subtract(behind, taken, out=behind)
        best = int(behind.argmax())
        chosen.append(best)
        taken[best] += 1
        if taken[best] == lasts[best]:
            break
    return chosen
