"""Experts over a group of ranks, a part of them at a time, so that tokens travel beside the experts' products.

Each rank's experts are cut into parts. All tokens leave for the first experts of every rank, then for the second ones,
and so on: while a part is computed, the tokens of the next ones arrive, and the outputs of those before go home (the
idea of Hwang et al. 2022, arXiv:2206.03382, who cut tokens instead). The backward is the mirror of it: gradients of
outputs leave all at once, and while a part's backward runs, the next ones arrive and those of the part before go home;
weight gradients, for which nobody waits, run when their part's gradients have left.

The pairs of a token and an expert travel, each for itself, where `expert_exchange.py` sends a token once to a rank. On
two GPUs that is four times as much, and more than what is hidden.

Cut by experts, every expert computes the same rows in the same order for any number of parts, and each token sums its
experts' outputs at home in one go. So results are the same to the last bit, and an expert's products are no smaller. A
part hands all local experts to a product, of which those of other parts have no rows: such cost next to nothing, and
parameters and their gradients stay whole.

The order in which autograd runs the mirror is that of its nodes' making, the latest first; so it is the same on all
ranks. A communicator executes what it is given in order, on a stream of its own, and the host waits for the numbers of
rows alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from ...ops.grouped_mm import GroupedWeightGradient
from ...ops.permute import (
    Sorting,
    gather_rows,
    permute,
    sort_by_expert,
    sort_into_slots,
    sum_rows,
    unpermute,
    unpermute_gradients as sum_gradients,
)
from ..mesh import MULTIPROCESSORS_BESIDE_PRODUCTS, Group

MOST_PARTS = 2  # four took as long as one on two H200: their products are smaller, and the host launches twice as much
# What one rank sends, as measured on two H200 with NVLink, waiting for the other one included.
BYTES_PER_SECOND = 200e9
# What a part more costs a layer's forward: the start of two collectives, and the launches of some twenty kernels.
SECONDS_PER_PART = 1e-4


class Started(Protocol):
    """A collective under way."""

    def wait(self) -> Any:
        """Let the current stream wait for it."""


# (into, rows, numbers of rows from each rank, numbers of rows to each rank, group)
Exchange = Callable[[torch.Tensor, torch.Tensor, list[int], list[int], Group], Started]


def start_all_to_all(
    into: torch.Tensor, rows: torch.Tensor, received: list[int], sent: list[int], group: Group
) -> Started:
    """Start filling `into` with rows from each rank. Both tensors are to be kept until it is waited for."""
    work = dist.all_to_all_single(into, rows, received, sent, group=group.handle, async_op=True)
    assert work is not None
    return work


def suitable_parts(nbytes: float, ranks: int) -> int:
    """How many parts cost least, where each rank hands on so many bytes.

    With n parts, 1/n of the way out and of the way back is not hidden, and each part has a cost of its own: the sum is
    smallest at the square root of their ratio. Below two parts' worth, which is 40 MB on its way, there is one.

    Args:
        nbytes: of the rows of one rank, those included that it keeps. The same number on all ranks.
    """
    seconds = 2 * nbytes * (ranks - 1) / ranks / BYTES_PER_SECOND
    return max(1, min(MOST_PARTS, int(math.sqrt(seconds / SECONDS_PER_PART))))


class HeldGroupedGradient(GroupedWeightGradient, Protocol):
    """A gradient that knows how many of its products are still to come."""

    def hold(self) -> None:
        """A product will come, by `add_held_grouped_product`, before the end of this backward."""

    def add_held_grouped_product(self, left: torch.Tensor, right: torch.Tensor, offsets: torch.Tensor) -> None:
        """As `add_grouped_product`."""


class Beside:
    """What the products of one part do for the rows that travel beside them.

    Args:
        spared: multiprocessors that they leave to the communication, on CUDA.
        holds: keep weight gradients back until `run`.
    """

    def __init__(self, spared: int, holds: bool) -> None:
        self.spared, self._holds = spared, holds
        self._held: list[tuple[HeldGroupedGradient, torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def sink(self, total: HeldGroupedGradient | None) -> GroupedWeightGradient | None:
        """What takes the gradient of a weight in the place of `total`."""
        return total if total is None or not self._holds else Holding(self, total)

    def hold(self, total: HeldGroupedGradient, left: torch.Tensor, right: torch.Tensor, offsets: torch.Tensor) -> None:
        total.hold()
        self._held.append((total, left, right, offsets))

    def run(self) -> None:
        while self._held:
            total, left, right, offsets = self._held.pop(0)
            total.add_held_grouped_product(left, right, offsets)


class Holding:
    """Takes the products of one weight for later."""

    def __init__(self, beside: Beside, total: HeldGroupedGradient) -> None:
        self._beside, self._total = beside, total

    def takes_product(self, dtype: torch.dtype) -> bool:
        return self._total.takes_product(dtype)

    def add_grouped_product(self, left: torch.Tensor, right: torch.Tensor, offsets: torch.Tensor) -> None:
        self._beside.hold(self._total, left, right, offsets)


Compute = Callable[[torch.Tensor, torch.Tensor, Beside], torch.Tensor]


class Part:
    """Some of the experts of each rank, and the rows that are under way to them or from them.

    Args:
        experts: of those of a rank.
        at_home, here: which rows of all parts, of those we sent and of those we received.
        sent, received: rows to and from each rank.
    """

    def __init__(self, experts: slice, at_home: slice, here: slice, sent: list[int], received: list[int]) -> None:
        self.experts, self.at_home, self.here = experts, at_home, here
        self.sent, self.received = sent, received
        self.beside = Beside(0, holds=False)
        self._under_way: tuple[Started, torch.Tensor, torch.Tensor] | None = None

    def leave(self, route: Route, rows: torch.Tensor) -> None:
        """Start sending the rows that we have of our tokens, or their gradients."""
        into = rows.new_empty(sum(self.received), *rows.shape[1:])
        self._start(route, rows, into, self.received, self.sent)

    def go_home(self, route: Route, rows: torch.Tensor) -> None:
        """Start sending back what has become of the rows that we received, into the memory of `route`."""
        self._start(route, rows, route.home_like(rows)[self.at_home], self.sent, self.received)

    def arrive(self) -> torch.Tensor:
        """The rows that were under way, from now on in the order of the current stream."""
        assert self._under_way is not None
        started, _, into = self._under_way
        started.wait()
        self._under_way = None  # not before: it keeps what is read and written on another stream
        return into

    def _start(
        self, route: Route, rows: torch.Tensor, into: torch.Tensor, received: list[int], sent: list[int]
    ) -> None:
        rows = rows.contiguous()
        self._under_way = (route.exchange(into, rows, received, sent, route.group), rows, into)


class Route:
    """Where the rows of one layer and one micro-batch go.

    Attributes:
        order, inverse: as of a `Sorting`, of our pairs by part, then rank, then expert.
        counts: `[experts]`, of the whole group: how many pairs each has.
        parts: in the order in which they are computed.
    """

    def __init__(
        self, home: Sorting, to: list[list[int]], of: list[list[int]], number: int, group: Group, exchange: Exchange
    ) -> None:
        self.group, self.exchange, self.counts = group, exchange, home.counts
        self.parts: list[Part] = []
        local = len(to[0])
        left = come = 0
        for first, last in pairwise(local * part // number for part in range(number + 1)):
            sent, received = [sum(row[first:last]) for row in to], [sum(row[first:last]) for row in of]
            ends = left + sum(sent), come + sum(received)
            self.parts.append(Part(slice(first, last), slice(left, ends[0]), slice(come, ends[1]), sent, received))
            left, come = ends
        self.order, self.inverse = self._arrange(home, left)
        self._home: torch.Tensor | None = None

    def _arrange(self, home: Sorting, total: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows by rank, then expert, put in the order of the parts. Pairs of no expert are left out."""
        if len(self.parts) == 1:
            return home.order[:total], home.inverse
        by_rank = [part.sent[rank] for rank in range(self.group.size) for part in self.parts]
        blocks = home.order[:total].split(by_rank)
        number = len(self.parts)
        order = torch.cat([block for part in range(number) for block in blocks[part::number]])
        pairs = home.inverse.numel()
        inverse = order.new_full((pairs + 1,), -1)  # slots that are no pair go to one more, which is cut off
        inverse.scatter_(0, torch.where(order < 0, pairs, order), torch.arange(total, device=order.device))
        return order, inverse[:pairs].view(home.inverse.shape)

    def home_like(self, rows: torch.Tensor) -> torch.Tensor:
        """Memory for rows of all parts at home, which `take_home` gives out."""
        if self._home is None:
            self._home = rows.new_empty(self.order.shape[0], *rows.shape[1:])
        return self._home

    def take_home(self) -> torch.Tensor:
        """What has come home of all parts, in their order. Waits for it."""
        for part in self.parts:
            part.arrive()
        home, self._home = self._home, None
        assert home is not None
        return home


class Regrouping(Protocol):
    """The received rows of one part, which lie by rank, sorted by local expert."""

    offsets: torch.Tensor  # `[local experts]`, int32: where each one's rows end

    def sort(self, rows: torch.Tensor) -> torch.Tensor: ...

    def restore(self, rows: torch.Tensor) -> torch.Tensor: ...


class ByCounts:
    """Rows of which each expert has another number, from each rank."""

    def __init__(self, sorting: Sorting, part: Part) -> None:
        start, stop = part.here.start, part.here.stop
        self.offsets = sorting.offsets.clamp(start, stop) - start
        order, inverse = sorting.order[part.here] - start, sorting.inverse[part.here] - start
        self._sorting = Sorting(order, inverse, sorting.counts, self.offsets)

    def sort(self, rows: torch.Tensor) -> torch.Tensor:
        return permute(rows, self._sorting)

    def restore(self, rows: torch.Tensor) -> torch.Tensor:
        return unpermute(rows, self._sorting)


class BySlots:
    """Rows of which each expert has as many, from each rank."""

    def __init__(self, part: Part, ranks: int, local: int, capacity: int, device: torch.device) -> None:
        first, last = part.experts.start, part.experts.stop
        ends = torch.arange(1, local + 1, device=device, dtype=torch.int32).clamp_(first, last)
        self.offsets = (ends - first) * (ranks * capacity)
        self._sizes = ranks, last - first, capacity

    def sort(self, rows: torch.Tensor) -> torch.Tensor:
        ranks, experts, capacity = self._sizes
        return rows.unflatten(0, (ranks, experts, capacity)).transpose(0, 1).flatten(0, 2)

    def restore(self, rows: torch.Tensor) -> torch.Tensor:
        ranks, experts, capacity = self._sizes
        return rows.unflatten(0, (experts, ranks, capacity)).transpose(0, 1).flatten(0, 2)


class _Leave(torch.autograd.Function):
    """Tokens leave for all experts. Returns a ticket for each part: what has no rows yet has no place in a graph."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor, route: Route
    ) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(inverse)
        ctx.route = route
        for part in route.parts:
            part.leave(route, gather_rows(x, order[part.at_home], inverse.shape[1]))
        return tuple(x.new_empty(0) for _ in route.parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return sum_rows(ctx.route.take_home(), ctx.saved_tensors[0], None), None, None, None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ticket: torch.Tensor, route: Route, part: Part) -> torch.Tensor:
        ctx.route, ctx.part = route, part
        return part.arrive()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        ctx.part.go_home(ctx.route, grad)
        ctx.part.beside.run()
        return grad.new_empty(0), None, None


class _GoHome(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, route: Route, part: Part) -> torch.Tensor:
        ctx.part = part
        part.go_home(route, y)
        return y.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.part.arrive(), None, None


class _Sum(torch.autograd.Function):
    """Outputs of all parts are waited for, and summed for each token."""

    @staticmethod
    def forward(
        ctx: Any, weights: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor, route: Route, *_: torch.Tensor
    ) -> torch.Tensor:
        y = route.take_home()
        ctx.save_for_backward(y, order, weights)
        ctx.route = route
        return sum_rows(y, inverse, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (y, order, weights), route = ctx.saved_tensors, ctx.route
        total = torch.zeros_like(weights)
        for part in reversed(route.parts):  # as autograd will ask for them
            grad_y, grad_weights = sum_gradients(grad, y[part.at_home], order[part.at_home], weights)
            if any(ctx.needs_input_grad[4:]):  # else nobody would wait for them: experts and tokens without gradients
                part.leave(route, grad_y)
            total += grad_weights  # of other pairs than those before
        return total, None, None, None, *(grad.new_empty(0) for _ in route.parts)


def run_in_parts(
    x: torch.Tensor,
    top_k_index: torch.Tensor,
    weights: torch.Tensor,
    compute: Compute,
    num_experts: int,
    group: Group,
    capacity: int | None = None,
    parts: int | Callable[[float, int], int] = suitable_parts,
    exchange: Exchange = start_all_to_all,
    spared: int = MULTIPROCESSORS_BESIDE_PRODUCTS,
) -> tuple[torch.Tensor, Route]:
    """Bring tokens to the ranks of their experts, let these compute, bring the outputs home and sum them.

    The host waits for the device once, for the numbers of rows; with a capacity it does not.

    Args:
        x: `[N, H]`. Ranks may have different N, also 0.
        top_k_index: `[N, K]`: expert of the whole group; below 0 or from `num_experts` on means none.
        weights: `[N, K]`.
        compute: from rows sorted by local expert, `[rows, H]`, and where each expert's rows end (int32) to their
            outputs, in the manner that the third argument says.
        capacity: send exactly so many rows to each expert; see `experts.dispatch`.
        parts: of a rank's experts, and at most as many; or what finds their number, as `suitable_parts` does. The same
            on all ranks.
        exchange: how rows are sent. All ranks call it in the same order.
        spared: multiprocessors that products leave to it, where there are several parts.

    Returns:
        `[N, H]`, and the route that was taken.

    Raises:
        ValueError: if the group's size does not divide the number of experts.
    """
    ranks, local = group.size, num_experts // group.size
    if num_experts % ranks:
        raise ValueError(
            f"{num_experts} experts cannot be divided over {ranks} expert-parallel ranks; take a number that divides "
            f"{num_experts}."
        )
    rows_of_all, theirs = num_experts * (capacity or 0) * ranks, None
    if capacity is not None:
        home = sort_into_slots(top_k_index, num_experts, capacity)
        to = of = [[capacity] * local for _ in range(ranks)]
    else:
        home = sort_by_expert(top_k_index, num_experts)
        theirs, to, of, rows_of_all = _tell_counts(home, top_k_index.numel(), local, group)
    if not isinstance(parts, int):
        parts = parts(rows_of_all / ranks * x.shape[1] * x.element_size(), ranks)
    route = Route(home, to, of, max(1, min(parts, local)), group, exchange)

    tickets = _Leave.apply(x, route.order, route.inverse, route)
    regroupings: Sequence[Regrouping]  # found while the tokens travel
    if capacity is not None:
        regroupings = [BySlots(part, ranks, local, capacity, x.device) for part in route.parts]
    else:
        assert theirs is not None
        sorting = _sort_received(theirs, route.parts)
        regroupings = [ByCounts(sorting, part) for part in route.parts]
    returning = []
    for part, ticket, regrouping in zip(route.parts, tickets, regroupings, strict=True):
        rows = regrouping.sort(_Arrive.apply(ticket, route, part))
        # Without a gradient for the tokens, nothing would run what is held.
        part.beside = Beside(spared if len(route.parts) > 1 else 0, holds=ticket.requires_grad)
        y = compute(rows, regrouping.offsets, part.beside)
        returning.append(_GoHome.apply(regrouping.restore(y), route, part))
    out: torch.Tensor = _Sum.apply(weights.contiguous(), route.order, route.inverse, route, *returning)
    return out, route


@torch.no_grad()
def _tell_counts(
    home: Sorting, pairs: int, local: int, group: Group
) -> tuple[torch.Tensor, list[list[int]], list[list[int]], int]:
    """Tell each rank how many rows its experts get from us.

    Returns:
        `[ranks, local experts]`, how many ours get from each rank; the numbers to and from each rank on the host; and
        the pairs of all ranks, from which all can draw the same conclusion.
    """
    counts = home.counts.view(group.size, local)
    mine = torch.cat((counts, counts.new_full((group.size, 1), pairs)), 1)
    theirs = torch.empty_like(mine)
    dist.all_to_all_single(theirs, mine, group=group.handle)
    to, of = torch.stack((mine, theirs)).tolist()
    return theirs[:, :-1], [row[:-1] for row in to], [row[:-1] for row in of], sum(row[-1] for row in of)


@torch.no_grad()
def _sort_received(theirs: torch.Tensor, parts: Sequence[Part]) -> Sorting:
    """Rows of all parts, received by part, then rank, then expert, sorted by expert: those of a part stay together."""
    ranks, local = theirs.shape
    expert = torch.arange(local, device=theirs.device).expand(ranks, local)
    blocks = torch.cat([expert[:, part.experts].flatten() for part in parts])
    counts = torch.cat([theirs[:, part.experts].flatten() for part in parts])
    experts = blocks.repeat_interleave(counts, output_size=parts[-1].here.stop)
    return sort_by_expert(experts[:, None], local)
