"""Which elements of a Hub tensor a flat piece of some rank's part of it holds, and where they lie in its data.

Pure geometry, in elements. A piece (`Slice`) is a flat range of a part of a tensor; in the coordinates of the whole
tensor it is a few boxes (`Box`). Two pieces of any two layouts share what their boxes have in common, and a box is a
strided view of a piece's 1-D data, so one `copy_` moves it whatever its number of rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import torch

from ...parallel.shard_spec import Ranges, ShardSpec

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Box:
    """A box of the whole tensor, and where its elements lie in 1-D data."""

    start: Sizes  # its first corner in the whole tensor
    shape: Sizes  # its extent in each dimension
    offset: int  # where the first corner's element lies in the data
    strides: Sizes  # how far apart neighbours in each dimension lie in the data

    def view(self, data: torch.Tensor) -> torch.Tensor:
        """The box's elements of `data` (1-D, contiguous), shape `shape`, without a copy."""
        return data.as_strided(self.shape, self.strides, data.storage_offset() + self.offset)

    def narrow(self, start: Sizes, shape: Sizes) -> Box:
        """A box inside this one, by its corner and shape in the whole tensor."""
        steps = sum((new - old) * stride for new, old, stride in zip(start, self.start, self.strides, strict=True))
        return Box(start, shape, self.offset + steps, self.strides)

    def spans(self, gap: int) -> list[tuple[int, int]]:
        """Ascending half-open ranges of the data that hold the box. Gaps of less than `gap` elements are included."""
        length = 1
        outer: list[tuple[int, int]] = []
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size == 1:
                continue
            if not outer and stride - length < gap:
                length += (size - 1) * stride
            else:
                outer.append((size, stride))
        starts = [self.offset]
        for size, stride in reversed(outer):
            starts = [start + i * stride for start in starts for i in range(size)]
        return [(start, start + length) for start in starts]


def overlap(first: Box, second: Box) -> tuple[Box, Box] | None:
    """What two boxes of one tensor have in common, as it lies in the data of each; None if nothing."""
    start, shape = [], []
    for a, a_size, b, b_size in zip(first.start, first.shape, second.start, second.shape, strict=True):
        low = max(a, b)
        size = min(a + a_size, b + b_size) - low
        if size <= 0:
            return None
        start.append(low)
        shape.append(size)
    corner, extent = tuple(start), tuple(shape)
    return first.narrow(corner, extent), second.narrow(corner, extent)


@dataclass(frozen=True)
class Slice:
    """Elements `[start, stop)` of the flattened part of a Hub tensor that `spec` gives its rank."""

    spec: ShardSpec
    start: int
    stop: int

    @classmethod
    def whole(cls, name: str, shape: Sizes) -> Slice:
        """All of a tensor."""
        return cls(ShardSpec(name, shape), 0, prod(shape))

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def global_shape(self) -> Sizes:
        return self.spec.global_shape

    @property
    def ranges(self) -> Ranges:
        """Half-open ranges of `spec.dim` that make up the part, joined in this order; none for a whole tensor."""
        return () if self.spec.dim is None else self.spec.ranges

    @property
    def numel(self) -> int:
        return self.stop - self.start

    def part(self, first: int, last: int) -> Slice:
        """Elements `[first, last)` of this slice's own data."""
        return replace(self, start=self.start + first, stop=self.start + last)

    @cached_property
    def boxes(self) -> tuple[Box, ...]:
        """The slice in the coordinates of the whole tensor; `offset` and `strides` are those of its own data.

        At most `2 N - 1` boxes for each of `ranges`, for a tensor of `N` dimensions.
        """
        shape = self.spec.local_shape
        strides = tuple(prod(shape[d + 1 :]) for d in range(len(shape)))
        origin = Box((0,) * len(shape), shape, -self.start, strides)
        return tuple(
            box
            for start, extent in _corners(shape, self.start, self.stop)
            for box in self._to_global(origin.narrow(start, extent))
        )

    def _to_global(self, box: Box) -> Iterator[Box]:
        """Cut a box in the part's coordinates where one of `ranges` ends and the next begins, and shift it there."""
        if self.spec.dim is None:
            yield box
            return
        d, begin = self.spec.dim, 0
        for range_start, range_stop in self.ranges:
            end = begin + range_stop - range_start
            low, high = max(begin, box.start[d]), min(end, box.start[d] + box.shape[d])
            if low < high:
                local = (*box.start[:d], low, *box.start[d + 1 :])
                inside = box.narrow(local, (*box.shape[:d], high - low, *box.shape[d + 1 :]))
                yield replace(inside, start=(*local[:d], low - begin + range_start, *local[d + 1 :]))
            begin = end

    @cached_property
    def bounds(self) -> tuple[tuple[int, int], ...]:
        """For each dimension the half-open range outside of which the slice holds nothing."""
        return tuple(
            (min(box.start[d] for box in self.boxes), max(box.start[d] + box.shape[d] for box in self.boxes))
            for d in range(len(self.global_shape))
        )

    def is_near(self, other: Slice) -> bool:
        """Whether the bounds of two slices (none of them empty) meet: False means that they share nothing."""
        return all(a < d and c < b for (a, b), (c, d) in zip(self.bounds, other.bounds, strict=True))

    def common(self, other: Slice) -> Iterator[tuple[Box, Box]]:
        """What two slices of one tensor share, box by box: as it lies in the data of this one, and of the other."""
        for mine in self.boxes:
            for theirs in other.boxes:
                if (pair := overlap(mine, theirs)) is not None:
                    yield pair

    def __str__(self) -> str:
        return f"elements {self.start}:{self.stop}{self.cut}"

    @property
    def cut(self) -> str:
        return "" if self.spec.dim is None else f" of ranges {_show(self.ranges)} of dimension {self.spec.dim}"


def _corners(shape: Sizes, start: int, stop: int) -> Iterator[tuple[Sizes, Sizes]]:
    """Corner and shape of the boxes that make up elements `[start, stop)` of a tensor in row-major order.

    A partial first row, whole rows, a partial last row; the partial ones are ranges of a tensor of one dimension less.
    """
    if start >= stop:
        return
    if not shape:
        yield (), ()
        return
    row = prod(shape[1:])
    (first, head), (last, tail) = divmod(start, row), divmod(stop, row)
    if first == last:
        yield from (((first, *c), (1, *s)) for c, s in _corners(shape[1:], head, tail))
        return
    if head:
        yield from (((first, *c), (1, *s)) for c, s in _corners(shape[1:], head, row))
        first += 1
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    yield from (((last, *c), (1, *s)) for c, s in _corners(shape[1:], 0, tail))


def find_fault(slices: Iterable[Slice]) -> str | None:
    """Why `slices` of one tensor do not hold each of its elements exactly once, in words; None if they do.

    Costs a sort: slices of one part are compared as flat ranges, and the parts by their `ranges`.
    """
    parts: dict[tuple[Sizes, int | None, Ranges], list[Slice]] = {}
    for piece in slices:
        parts.setdefault((piece.global_shape, piece.spec.dim, piece.ranges), []).append(piece)
    kinds = {(shape, dim) for shape, dim, _ in parts}
    if len(kinds) != 1:
        return f"it is stored in {len(kinds)} ways, (shape, cut dimension) {_show(sorted(kinds, key=str))}"
    ((shape, dim),) = kinds
    if dim is not None:
        cuts = [cut for _, _, ranges in parts for cut in ranges]
        if (fault := _interval_fault(cuts, shape[dim])) is not None:
            return f"{fault} of dimension {dim}"
    for pieces in parts.values():
        numel = prod(pieces[0].spec.local_shape)
        if (fault := _interval_fault([(piece.start, piece.stop) for piece in pieces], numel)) is not None:
            return f"{fault}{pieces[0].cut}"
    return None


def _interval_fault(intervals: list[tuple[int, int]], size: int) -> str | None:
    """Why half-open `intervals` are not a partition of `[0, size)`."""
    reached = 0
    for start, stop in [*sorted(i for i in intervals if i[0] < i[1]), (size, size)]:
        if start > reached:
            return f"elements {reached}:{start} are missing"
        if start < reached:
            return (
                f"elements {start}:{min(stop, reached)} are stored more than once"
                if start < size
                else (f"elements {size}:{reached} are beyond its end")
            )
        reached = stop
    return None


def _show(items: Iterable[object]) -> str:
    return ", ".join(str(item) for item in items)
