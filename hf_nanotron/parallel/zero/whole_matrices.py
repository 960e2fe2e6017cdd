"""Whole matrices for an optimizer whose state is flat segments: gathered at their owners, a batch at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from ..mesh import Group
from ..shard_spec import Ranges
from .matrix_plan import Batch, Held, MatrixLayout, Transfer, Unit, make_plan

BATCH_ELEMENTS = 1 << 27  # of a batch, for each rank: eight matrices of 2,048 x 8,192, which fill a GPU


class MatrixUpdate(Protocol):
    """What an optimizer does with whole matrices, and with its segments before and after."""

    def prepare(self, parameter: nn.Parameter, start: int, stop: int, out: torch.Tensor | None) -> None:
        """Update the state of elements `[start, stop)` of a segment; write what the direction is taken of to `out`."""

    def compute(self, group: int, matrices: torch.Tensor) -> torch.Tensor:
        """The update of matrices `[count, rows, columns]` of parameter group `group`: of the same shape."""

    def apply(self, parameter: nn.Parameter, start: int, stop: int, update: torch.Tensor, factor: float) -> None:
        """Subtract `factor` times the learning rate times `update` from elements `[start, stop)` of a segment."""

    def factor(self, group: int, fan_out: int, fan_in: int) -> float:
        """What multiplies the learning rate of a matrix."""


@dataclass
class _Route:
    """This rank's part of the transfers of a batch in one direction: what it sends, what it receives, where each lies
    in the memory of either, and how many elements go to and come from each rank.
    """

    sends: list[tuple[Transfer, int]]
    receives: list[tuple[Transfer, int]]
    send_sizes: list[int]
    receive_sizes: list[int]


@dataclass
class _Work:
    """This rank's part of a batch."""

    batch: Batch
    gather: _Route
    scatter: _Route
    # Which elements of which segment, and where they go in what is sent.
    prepared: list[tuple[nn.Parameter, int, int, int | None]] = field(default_factory=list)


@dataclass
class _Moving:
    """Elements on their way. What is sent lives until it has arrived."""

    received: torch.Tensor
    sent: torch.Tensor
    work: Any
    places: list[tuple[Transfer, int]]

    def wait(self) -> list[tuple[Transfer, torch.Tensor]]:
        """What each transfer has brought."""
        if self.work is not None:
            self.work.wait()
        self.sent = self.received
        return [(transfer, self.received[offset : offset + transfer.numel]) for transfer, offset in self.places]


@dataclass
class _Here:
    """Results on the rank that computed them, when it is the only one."""

    results: Mapping[int, torch.Tensor]
    places: list[tuple[Transfer, int]]

    def wait(self) -> list[tuple[Transfer, torch.Tensor]]:
        return [(transfer, self.results[transfer.unit].reshape(-1)) for transfer, _ in self.places]


class WholeMatrices:
    """Runs `MatrixUpdate`s over the segments of the ranks of a group. Making one, and `run`, are collective calls.

    While a batch is computed, elements of the next one and results of the one before are on their way. Each batch in
    flight needs memory for its elements as they are sent, as they arrive and as they are computed.

    Args:
        held: this rank's segments of the weights that are matrices, with what each is. `rank` counts in `group`.
        layouts: how each weight is taken as matrices, by name.
        group: ranks that share the work: all that hold a part of the same weights.
        dtype: in which matrices and updates travel and are computed.
        cost: of a matrix, by its output and input features.
        batch_elements: elements of a batch, for each rank. A larger matrix is a batch by itself.
    """

    def __init__(
        self,
        held: Mapping[nn.Parameter, Held],
        layouts: Mapping[str, MatrixLayout],
        group: Group,
        device: torch.device,
        dtype: torch.dtype,
        cost: Callable[[int, int], int],
        batch_elements: int = BATCH_ELEMENTS,
    ) -> None:
        self._group, self._device, self._dtype = group, device, dtype
        own = list(held.values())
        everyone: list[list[Held]] = [own]
        if group.size > 1:
            everyone = [[] for _ in group.ranks]
            dist.all_gather_object(everyone, own, group=group.handle)
        batches = make_plan([one for of_rank in everyone for one in of_rank], layouts, group.size, cost, batch_elements)
        self._parameters = {one.spec.name: parameter for parameter, one in held.items()}
        self._works = [self._own_work(batch) for batch in batches]

    def __len__(self) -> int:
        """Matrices of all ranks of the group."""
        return sum(unit.shape[0] * len(unit.fans()) for work in self._works for unit in work.batch.units)

    def run(self, update: MatrixUpdate) -> None:
        """One update of all matrices. All ranks of the group together, those too that hold none."""
        following = self._gather(self._works[0], update) if self._works else None
        leaving: tuple[_Work, _Moving | _Here] | None = None
        for index, work in enumerate(self._works):
            arriving, following = following, None
            assert arriving is not None
            if index + 1 < len(self._works):
                following = self._gather(self._works[index + 1], update)
            results = self._compute(work, arriving, update)
            del arriving
            if leaving is not None:
                self._apply(*leaving, update)
            leaving = work, self._scatter(work, results)
        if leaving is not None:
            self._apply(*leaving, update)

    # ---- transfers ----

    def _own_work(self, batch: Batch) -> _Work:
        work = _Work(batch, self._route(batch.gather), self._route(batch.scatter))
        sent = {(transfer.unit, transfer.part): (transfer, offset) for transfer, offset in work.gather.sends}
        for number, unit in enumerate(batch.units):
            for one in unit.holdings:
                if one.rank != self._group.rank:
                    continue
                parameter, start, stop = self._parameters[unit.name], one.low + one.shift, one.high + one.shift
                if (number, one.part) in sent:
                    transfer, offset = sent[number, one.part]
                    first = transfer.low + one.shift  # another rank may send its copy of what is before
                    work.prepared.append((parameter, first, stop, offset))
                    stop = first
                if start < stop:
                    work.prepared.append((parameter, start, stop, None))
        return work

    def _route(self, transfers: Sequence[Transfer]) -> _Route:
        rank = self._group.rank
        sends, send_sizes = self._placed([t for t in transfers if t.source == rank], lambda t: t.target)
        receives, receive_sizes = self._placed([t for t in transfers if t.target == rank], lambda t: t.source)
        return _Route(sends, receives, send_sizes, receive_sizes)

    def _placed(
        self, transfers: Sequence[Transfer], other: Callable[[Transfer], int]
    ) -> tuple[list[tuple[Transfer, int]], list[int]]:
        """Where each transfer begins in memory that is ordered by the ranks at the `other` end, and their sizes."""
        places, sizes, offset = [], [0] * self._group.size, 0
        for transfer in sorted(transfers, key=other):
            places.append((transfer, offset))
            sizes[other(transfer)] += transfer.numel
            offset += transfer.numel
        return places, sizes

    def _new(self, sizes: Sequence[int]) -> torch.Tensor:
        return torch.empty(sum(sizes), dtype=self._dtype, device=self._device)

    def _send(self, sent: torch.Tensor, route: _Route) -> _Moving:
        if self._group.size == 1:
            return _Moving(sent, sent, None, route.receives)
        received, item = self._new(route.receive_sizes), self._dtype.itemsize
        work = dist.all_to_all_single(
            received.view(torch.uint8),  # gloo has no bfloat16
            sent.view(torch.uint8),
            [item * size for size in route.receive_sizes],
            [item * size for size in route.send_sizes],
            group=self._group.handle,
            async_op=True,
        )
        return _Moving(received, sent, work, route.receives)

    def _gather(self, work: _Work, update: MatrixUpdate) -> _Moving:
        """Update the state of our segments, and send what the owners need of them."""
        sent = self._new(work.gather.send_sizes)
        for parameter, start, stop, offset in work.prepared:
            out = None if offset is None else sent[offset : offset + stop - start]
            update.prepare(parameter, start, stop, out)
        return self._send(sent, work.gather)

    def _scatter(self, work: _Work, results: Mapping[int, torch.Tensor]) -> _Moving | _Here:
        """Send our results to all that hold a part of these matrices."""
        if self._group.size == 1:  # each of them whole
            return _Here(results, work.scatter.receives)
        sent = self._new(work.scatter.send_sizes)
        for transfer, offset in work.scatter.sends:
            unit = work.batch.units[transfer.unit]
            part, result = unit.parts[transfer.part], results[transfer.unit]
            if part.dim is not None:
                result = _chosen(result, part.dim, part.ranges)
            there = sent[offset : offset + transfer.numel]
            if transfer.numel == part.numel:
                there.view(part.shape).copy_(result)
            else:
                there.copy_(result.reshape(-1)[transfer.low : transfer.high])
        return self._send(sent, work.scatter)

    # ---- at the owner ----

    def _compute(self, work: _Work, arriving: _Moving, update: MatrixUpdate) -> dict[int, torch.Tensor]:
        """Number of a unit that we own -> the update of its matrices, `[count, rows, columns]`."""
        units = work.batch.units
        arrived: dict[int, list[tuple[Transfer, torch.Tensor]]] = {}
        for transfer, piece in arriving.wait():
            arrived.setdefault(transfer.unit, []).append((transfer, piece))
        results: dict[int, torch.Tensor] = {}
        # What is of one shape is one call. What multiplies a part is relative to the first part of its unit.
        alike: dict[tuple[int, tuple[int, ...], float], list[tuple[int, int, torch.Tensor]]] = {}
        for number, pieces in arrived.items():
            unit = units[number]
            results[number] = whole = _assembled(unit, pieces)
            factors = [update.factor(unit.group, *fans) for fans in unit.fans()]
            for index, factor in enumerate(factors):
                matrices = _chosen(whole, unit.layout.out_dim, unit.layout.parts[index]) if unit.layout.parts else whole
                relative = 1.0 if factor == factors[0] else factor / factors[0]
                alike.setdefault((unit.group, matrices.shape[1:], relative), []).append((number, index, matrices))
        for (group, _, relative), members in alike.items():
            stacked = _stacked([matrices for _, _, matrices in members])
            found = update.compute(group, stacked)
            if relative != 1.0:
                found = found * relative
            counts = [len(matrices) for _, _, matrices in members]
            for (number, index, _), result in zip(members, found.split(counts), strict=True):
                layout = units[number].layout
                if layout.parts:
                    _put(results[number], layout.out_dim, layout.parts[index], result)
                else:
                    results[number] = result
        return results

    def _apply(self, work: _Work, arriving: _Moving | _Here, update: MatrixUpdate) -> None:
        for transfer, piece in arriving.wait():
            unit = work.batch.units[transfer.unit]
            update.apply(
                self._parameters[unit.name],
                transfer.low + transfer.shift,
                transfer.high + transfer.shift,
                piece,
                update.factor(unit.group, *unit.fans()[0]),
            )


def _stacked(members: Sequence[torch.Tensor]) -> torch.Tensor:
    """`[count, rows, columns]` of all members: a view where one follows the other in memory, as they have arrived."""
    first, end = members[0], members[0].data_ptr()
    for member in members:
        if not member.is_contiguous() or member.data_ptr() != end:
            return torch.cat(list(members))
        end += member.nbytes
    storage = first.untyped_storage()
    if end > storage.data_ptr() + storage.nbytes():  # neighbours by chance
        return torch.cat(list(members))
    rows, columns = first.shape[1:]
    return first.as_strided((sum(len(member) for member in members), rows, columns), (rows * columns, columns, 1))


def _assembled(unit: Unit, pieces: Sequence[tuple[Transfer, torch.Tensor]]) -> torch.Tensor:
    """A unit's matrices, `[count, rows, columns]`, from what its holders have sent."""
    first, tensor = pieces[0]
    if unit.parts[first.part].dim is None and len(pieces) == 1:
        return tensor.view(unit.shape)
    whole = tensor.new_empty(unit.shape)
    flats: dict[int, torch.Tensor] = {}
    for transfer, piece in pieces:
        part = unit.parts[transfer.part]
        if transfer.part not in flats:
            flats[transfer.part] = whole.view(-1) if part.dim is None else tensor.new_empty(part.numel)
        flats[transfer.part][transfer.low : transfer.high].copy_(piece)
    for number, flat in flats.items():
        part = unit.parts[number]
        if part.dim is not None:
            _put(whole, part.dim, part.ranges, flat.view(part.shape))
    return whole


def _chosen(whole: torch.Tensor, dim: int, ranges: Ranges) -> torch.Tensor:
    """What `ranges` of a dimension select."""
    dim %= whole.dim()
    if (blocks := _blocks(whole, dim, ranges)) is not None:
        return blocks.flatten(dim, dim + 1)
    return torch.cat([whole.narrow(dim, start, stop - start) for start, stop in ranges], dim)


def _put(whole: torch.Tensor, dim: int, ranges: Ranges, values: torch.Tensor) -> None:
    """Write `values` to what `ranges` of a dimension select."""
    dim %= whole.dim()
    if (blocks := _blocks(whole, dim, ranges)) is not None:
        blocks.copy_(values.unflatten(dim, (len(ranges), -1)))
        return
    offset = 0
    for start, stop in ranges:
        whole.narrow(dim, start, stop - start).copy_(values.narrow(dim, offset, stop - start))
        offset += stop - start


def _blocks(whole: torch.Tensor, dim: int, ranges: Ranges) -> torch.Tensor | None:
    """A view of what `ranges` select, `[..., ranges, length, ...]`, if they come at equal distances: rows by turns may
    be thousands.
    """
    period = _period(ranges, whole.shape[dim])
    start, stop = ranges[0]
    return None if period is None else whole.unflatten(dim, (-1, period)).narrow(dim + 1, start, stop - start)


@functools.cache
def _period(ranges: Ranges, size: int) -> int | None:
    """The distance of `ranges` if they are one in each of equal parts of a dimension; None if they are not."""
    start, stop = ranges[0]
    period = ranges[1][0] - start if len(ranges) > 1 else size
    found = tuple((at, at + stop - start) for at in range(start, size, period))
    return period if size % period == 0 and stop <= period and found == ranges else None
