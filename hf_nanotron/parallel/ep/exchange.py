"""Tokens are sent to the ranks that own their experts, and their outputs back.

Rank r of n owns experts `[r * E / n, (r + 1) * E / n)` (Lepikhin et al. 2020, arXiv:2006.16668). A token is sent once
to each rank that owns experts of its choice, with its choice (as between nodes in DeepSeek-AI 2024, arXiv:2412.19437).
That rank sorts its pairs by expert, sums their outputs with the routing weights and returns one row, to be added to
those of other ranks. For K of E experts, n * (1 - (1 - K / E) ** (E / n)) rows are sent per token instead of K.

With a capacity, pairs of a token and an expert are sent, in an equal number of slots for each expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from ...ops.host_copy import HostCopy
from ...ops.permute import Sorting, permute, sort_by_expert, sort_into_slots, unpermute
from ..mesh import Group


def exchange_rows(x: torch.Tensor, sent: list[int], received: list[int], group: Group) -> torch.Tensor:
    """Send the first `sent[0]` rows to the first rank of `group`, and so on; returns `[sum(received), ...]`. No
    gradient.
    """
    out = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), received, sent, group=group.handle)
    return out


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, sent: list[int], received: list[int], group: Group) -> torch.Tensor:
        ctx.sent, ctx.received, ctx.group, ctx.rows = sent, received, group, x.shape[0]
        return exchange_rows(x[: sum(sent)], sent, received, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        out = grad.new_empty(ctx.rows, *grad.shape[1:])
        leaving = sum(ctx.sent)
        dist.all_to_all_single(out[:leaving], grad.contiguous(), ctx.sent, ctx.received, group=ctx.group.handle)
        out[leaving:].zero_()
        return out, None, None, None


def all_to_all(x: torch.Tensor, sent: list[int], received: list[int], group: Group) -> torch.Tensor:
    """`[rows, ...] -> [sum(received), ...]`: rows go to the ranks of `group` in order; gradients go back.

    `sent` and `received` are row counts per rank; rows of `x` from `sum(sent)` on are not sent.
    """
    if len(sent) != group.size or len(received) != group.size or sum(sent) > x.shape[0]:
        raise ValueError(f"{sent} rows to and {received} from {group.size} ranks do not fit a tensor of {x.shape[0]}.")
    return x[: sum(sent)] if group.size == 1 else _AllToAll.apply(x, sent, received, group)


class Route(Protocol):
    """Where the rows of one layer came from.

    Attributes:
        offsets: `[local experts]`, int32: the end of each local expert's rows.
        counts: `[experts]`, int32, of the whole group: how many of our pairs each has; None if not counted.
    """

    @property
    def offsets(self) -> torch.Tensor: ...

    @property
    def counts(self) -> torch.Tensor | None: ...

    def combine(self, y: torch.Tensor) -> torch.Tensor:
        """Outputs `[rows, H]` to `[N, H]`, summed for our tokens; what was dropped or had no expert adds nothing."""


@dataclass(frozen=True)
class LocalRoute:
    """All experts are here."""

    sorting: Sorting
    weights: torch.Tensor

    @property
    def offsets(self) -> torch.Tensor:
        return self.sorting.offsets

    @property
    def counts(self) -> torch.Tensor:
        return self.sorting.counts

    def combine(self, y: torch.Tensor) -> torch.Tensor:
        return unpermute(y, self.sorting, self.weights)


@dataclass(frozen=True)
class TokenRoute:
    """Each token is on each rank that owns one of its experts.

    Args:
        home: our tokens, sorted by rank; of a token's pairs, only the first for each rank has a row.
        here: pairs of the received tokens and our experts, sorted by expert.
        weights: `[received tokens, K]`.
        sent, received: rows to and from each rank.
    """

    home: Sorting
    here: Sorting
    weights: torch.Tensor
    sent: list[int]
    received: list[int]
    group: Group
    counts: None = None

    @property
    def offsets(self) -> torch.Tensor:
        return self.here.offsets

    def combine(self, y: torch.Tensor) -> torch.Tensor:
        y = unpermute(y, self.here, self.weights)
        return unpermute(all_to_all(y, self.received, self.sent, self.group), self.home)


@dataclass(frozen=True)
class SlotRoute:
    """Each expert has `capacity` rows from each rank."""

    home: Sorting
    weights: torch.Tensor
    group: Group
    capacity: int

    @property
    def counts(self) -> torch.Tensor:
        return self.home.counts

    @property
    def local(self) -> int:
        return len(self.home.counts) // self.group.size

    @property
    def offsets(self) -> torch.Tensor:
        ends = torch.arange(1, self.local + 1, device=self.home.counts.device, dtype=torch.int32)
        return ends * (self.group.size * self.capacity)

    def leave(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens `[N, H]` to the rows of our experts."""
        return self._swap(self._exchange(permute(x, self.home)), self.group.size, self.local)

    def combine(self, y: torch.Tensor) -> torch.Tensor:
        return unpermute(self._exchange(self._swap(y, self.local, self.group.size)), self.home, self.weights)

    def _exchange(self, rows: torch.Tensor) -> torch.Tensor:
        splits = [self.local * self.capacity] * self.group.size
        return all_to_all(rows, splits, splits, self.group)

    def _swap(self, rows: torch.Tensor, outer: int, inner: int) -> torch.Tensor:
        """Blocks of `capacity` rows in the order (outer, inner) to the order (inner, outer)."""
        return rows.unflatten(0, (outer, inner, self.capacity)).transpose(0, 1).flatten(0, 2)


def dispatch(
    x: torch.Tensor,
    top_k_index: torch.Tensor,
    weights: torch.Tensor,
    num_experts: int,
    group: Group,
    capacity: int | None = None,
) -> tuple[torch.Tensor, Route]:
    """Send tokens to the ranks of their experts. Returns rows sorted by local expert, `[rows, H]`, and the way home.

    The host waits for the device once, for the numbers of rows; not with one rank or with a capacity.

    Args:
        x: `[N, H]`. Ranks may have different N, also 0.
        top_k_index: `[N, K]`: expert of the whole group; below 0 or from `num_experts` on means none.
        weights: `[N, K]`, of any floating dtype: routing weights.
        capacity: rows for each expert, padded with zeros; pairs beyond it are dropped. The same on all ranks.
    """
    if num_experts % group.size:
        raise ValueError(
            f"{num_experts} experts cannot be divided over {group.size} expert-parallel ranks; use an ep_size that "
            f"divides {num_experts}."
        )
    if capacity is not None:
        slots = SlotRoute(sort_into_slots(top_k_index, num_experts, capacity), weights, group, capacity)
        return slots.leave(x), slots
    if group.size == 1:
        sorting = sort_by_expert(top_k_index, num_experts)
        return permute(x, sorting), LocalRoute(sorting, weights)
    return _dispatch_tokens(x, top_k_index, weights, num_experts // group.size, group)


def _dispatch_tokens(
    x: torch.Tensor, top_k_index: torch.Tensor, weights: torch.Tensor, local: int, group: Group
) -> tuple[torch.Tensor, TokenRoute]:
    with torch.no_grad():
        owner = top_k_index.div(local, rounding_mode="floor")  # of no expert: below 0, or from the group's size on
        home = sort_by_expert(owner.masked_fill(_is_repeated(owner), -1), group.size)
        ranks = torch.arange(group.size, device=owner.device)
        pairs = (owner.reshape(-1) == ranks[:, None]).sum(1, dtype=home.counts.dtype)
        mine = torch.stack((home.counts, pairs), 1)
        ones = [1] * group.size
        counts = HostCopy(torch.stack((mine, exchange_rows(mine, ones, ones, group))))
    # While the host waits for the numbers and launches more, the device sorts as many rows as there can be.
    most = len(x) * min(top_k_index.shape[1], group.size)
    home = home._replace(order=home.order[:most])
    rows = permute(x, home)
    # One exchange for both: numbers of experts are exact in fp32.
    exact = torch.promote_types(weights.dtype, torch.float32)
    choice = permute(torch.cat((weights.to(exact), top_k_index.to(exact)), 1), home)
    to, of = counts.read().tolist()
    sent, received = [tokens for tokens, _ in to], [tokens for tokens, _ in of]
    home = home._replace(order=home.order[: sum(sent)])
    rows = all_to_all(rows, sent, received, group)
    weights, index = all_to_all(choice, sent, received, group).chunk(2, 1)
    here = sort_by_expert(index.detach().long() - group.rank * local, local)
    here = here._replace(order=here.order[: sum(pairs for _, pairs in of)])
    return permute(rows, here), TokenRoute(home, here, weights, sent, received, group)


def _is_repeated(values: torch.Tensor) -> torch.Tensor:
    """Whether a value of a row, of `[N, K]`, stands further left in it too."""
    return (values[:, :, None] == values[:, None, :]).tril(-1).any(-1)
