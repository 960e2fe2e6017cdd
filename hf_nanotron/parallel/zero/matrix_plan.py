"""Who computes with which whole matrix, and what each rank sends for that: a plan of an optimizer step.

Optimizer states are flat segments of the weights. Where an update needs whole matrices, the ranks of a pipeline stage
share the work: each matrix has an owner, which gets its elements from the ranks that hold them, and sends each holder
its part of the result. All ranks make the same plan, from the same list of what every rank holds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from ..shard_spec import Ranges, ShardSpec


@dataclass(frozen=True)
class MatrixLayout:
    """How a weight of two dimensions, or of three with the experts first, is taken as matrices.

    Args:
        out_dim: the dimension of the output features, -2 (as in `nn.Linear`) or -1.
        parts: ranges of that dimension, each of which is a matrix by itself (fused queries, keys and values). Empty:
            the whole is one.
    """

    out_dim: int = -2
    parts: tuple[Ranges, ...] = ()


@dataclass(frozen=True)
class Held:
    """What a rank's optimizer updates of a weight: elements `[start, stop)` of its flattened part, of `spec`.

    Args:
        rank: in the group that shares the work.
        group: number of the parameter group.
    """

    rank: int
    spec: ShardSpec
    start: int
    stop: int
    group: int


@dataclass(frozen=True)
class Part:
    """What the ranks with the same part of a weight hold of a `Unit`: `shape`, cut at `ranges` of `dim` (None: all)."""

    shape: tuple[int, int, int]
    dim: int | None
    ranges: Ranges

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1] * self.shape[2]


@dataclass(frozen=True)
class Holding:
    """Elements `[low, high)` of a flattened `Part` of a unit, which are `[low + shift, ...)` of the rank's segment."""

    rank: int
    part: int
    low: int
    high: int
    shift: int


@dataclass
class Unit:
    """Matrices that have one owner: a weight, or some of its experts. `shape` is `[count, rows, columns]`."""

    name: str
    group: int
    shape: tuple[int, int, int]
    layout: MatrixLayout
    alone: bool  # several stages compute it, and must do so in the same batches
    parts: list[Part] = field(default_factory=list)
    holdings: list[Holding] = field(default_factory=list)
    owner: int = 0

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1] * self.shape[2]

    def fans(self) -> list[tuple[int, int]]:
        """Output and input features of the matrices that each of `count` is taken as."""
        rows, columns = self.shape[1:]
        fan_out, fan_in = (rows, columns) if self.layout.out_dim == -2 else (columns, rows)
        lengths = [sum(stop - start for start, stop in ranges) for ranges in self.layout.parts]
        return [(length, fan_in) for length in lengths or [fan_out]]


@dataclass(frozen=True)
class Transfer:
    """Elements `[low, high)` of a part of a unit between a holder and the owner; `shift` as in `Holding`."""

    unit: int
    part: int
    low: int
    high: int
    shift: int
    source: int
    target: int

    @property
    def numel(self) -> int:
        return self.high - self.low


@dataclass(frozen=True)
class Batch:
    """Units whose elements travel together, and all transfers: to the owners, and back to everyone who holds some."""

    units: list[Unit]
    gather: list[Transfer]
    scatter: list[Transfer]


def make_plan(
    held: Sequence[Held],
    layouts: Mapping[str, MatrixLayout],
    ranks: int,
    cost: Callable[[int, int], int],
    batch_elements: int,
) -> list[Batch]:
    """Batches of about `batch_elements` for each of `ranks`, in the order in which they are computed.

    Args:
        held: of all ranks, in the order of the ranks.
        layouts: by the name of the weight; of all weights in `held`.
        cost: of a matrix, by its output and input features.
    """
    by_name: dict[str, list[Held]] = defaultdict(list)
    for one in held:
        by_name[one.spec.name].append(one)
    largest = max(1, batch_elements // 4)
    units = [
        unit for name, holders in by_name.items() for unit in _units_of(name, holders, layouts[name], ranks, largest)
    ]
    # Matrices of one shape are computed at once.
    units.sort(key=lambda unit: (unit.alone, unit.shape[1:], unit.group))
    batches = []
    for _, members in groupby(units, key=lambda unit: unit.alone):
        for chosen in _filled(list(members), batch_elements * ranks):
            _choose_owners(chosen, ranks, cost)
            batches.append(_with_transfers(chosen))
    return batches


def _units_of(name: str, holders: list[Held], layout: MatrixLayout, ranks: int, largest: int) -> list[Unit]:
    """The units of one weight, with who holds what of them."""
    spec = holders[0].spec
    *stack, rows, columns = spec.global_shape
    count = stack[0] if stack else 1
    by_experts = bool(stack) and spec.dim == 0
    runs = sorted({run for ranges in spec.parts for run in ranges}) if by_experts else [(0, count)]
    size = rows * columns
    units = []
    for first, last in runs:
        step = max(1, min(-(-(last - first) // ranks), largest // size))
        for start in range(first, last, step):
            stop = min(start + step, last)
            shape = (stop - start, rows, columns)
            unit = Unit(name, holders[0].group, shape, layout, spec.stages != "one")
            numbers: dict[Ranges, int] = {}
            for one in holders:
                _add_holding(unit, one, start, stop, by_experts, numbers)
            units.append(unit)
    return units


def _add_holding(unit: Unit, held: Held, start: int, stop: int, by_experts: bool, numbers: dict[Ranges, int]) -> None:
    """Note what a rank holds of experts `[start, stop)` of a weight (of the weight, where there are none)."""
    spec = held.spec
    first, shape = start, unit.shape
    dim: int | None = None
    ranges: Ranges = ()
    if by_experts:
        offset = 0
        for low, high in spec.ranges:
            if low <= start and stop <= high:
                first = offset + start - low
                break
            offset += high - low
        else:
            return
    elif spec.dim is not None:
        dim, ranges = spec.dim + 3 - len(spec.global_shape), spec.ranges
        rows, columns = spec.local_shape[-2:]
        shape = unit.shape[0], rows, columns
    part = Part(shape, dim, ranges)
    number = numbers.setdefault(ranges, len(numbers))
    if number == len(unit.parts):
        unit.parts.append(part)
    origin = first * shape[1] * shape[2]  # of the unit, in the flattened part of the weight
    low, high = max(held.start, origin), min(held.stop, origin + part.numel)
    if low < high:
        unit.holdings.append(Holding(held.rank, number, low - origin, high - origin, origin - held.start))


def _filled(units: list[Unit], elements: int) -> list[list[Unit]]:
    """`units` in runs that end when they have so many elements."""
    runs: list[list[Unit]] = [[]]
    filled = 0
    for unit in units:
        if filled and filled + unit.numel > elements:
            runs.append([])
            filled = 0
        runs[-1].append(unit)
        filled += unit.numel
    return [run for run in runs if run]


def _choose_owners(units: list[Unit], ranks: int, cost: Callable[[int, int], int]) -> None:
    """The costliest first, each to the rank with the least to do."""
    load = [0] * ranks
    costs = [unit.shape[0] * sum(cost(*fans) for fans in unit.fans()) for unit in units]
    for index in sorted(range(len(units)), key=lambda index: -costs[index]):
        owner = min(range(ranks), key=lambda rank: (load[rank], rank))
        units[index].owner = owner
        load[owner] += costs[index]


def _with_transfers(units: list[Unit]) -> Batch:
    gather, scatter = [], []
    for index, unit in enumerate(units):
        for number, part in enumerate(unit.parts):
            holdings = [holding for holding in unit.holdings if holding.part == number]
            position = 0
            while position < part.numel:
                here = [one for one in holdings if one.low <= position < one.high]
                # Of several copies, that of the owner itself, or of a neighbour.
                one = min(here, key=lambda one: (abs(one.rank - unit.owner), one.rank))
                gather.append(Transfer(index, number, position, one.high, one.shift, one.rank, unit.owner))
                position = one.high
            scatter += [Transfer(index, number, one.low, one.high, one.shift, unit.owner, one.rank) for one in holdings]
    return Batch(units, gather, scatter)
