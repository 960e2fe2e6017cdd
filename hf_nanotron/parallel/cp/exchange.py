"""Keys and values on their way to the ranks that need them, and their gradients on the way home.

Where ranks need most tokens, as those of whole rows do, an all-gather brings all. Where they need few others than their
own (short documents, narrow windows), an all-to-all brings what each needs and no more. What arrives lies rank after
rank; an index puts it in the order of the rows for the kernels, and gradients back.

Numerics: the gradients that one rank has of several calls are summed in fp32 and rounded, sent, and summed over the
ranks in fp32, rank after rank: each is rounded once, and once more at the end, whatever the number of ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
import torch.distributed as dist

from ...ops.host_copy import to_device
from ..collectives import all_gather
from ..mesh import Group
from .calls import Needs
from .layout import Ints, Layout

# Of what an all-gather brings: where a rank gets more, an all-to-all does not pay. By counting bytes: it copies what is
# sent once more, and adds the gradients of one rank after another.
FEW = 0.5

WORD = torch.int64


class Exchange(NamedTuple):
    """What a rank sends and receives, as tensors that go through an operator.

    Attributes:
        order: `[keys]`, int64, on the device: for each key that the kernels need, in the order of the rows, its place
            among those that arrive, rank after rank.
        send: `[sent]`, int64, on the device: tokens of this rank for each rank, one rank after another. Unused if all
            are for all.
        counts: `[3 + 2 * ranks]`, int64, on the host: the most kernel calls of a rank; the most tokens that a rank gets
            from others; whether all tokens are for all ranks; tokens for each rank; tokens from each rank.
    """

    order: torch.Tensor
    send: torch.Tensor
    counts: torch.Tensor

    @property
    def most_received(self) -> int:
        """Tokens that the rank that gets most gets from others."""
        return int(self.counts[1])

    @property
    def is_all(self) -> bool:
        """Whether all tokens are for all ranks."""
        return bool(self.counts[2])

    @property
    def sent(self) -> list[int]:
        """Tokens for each rank."""
        return cast(list[int], self.counts[3:].chunk(2)[0].tolist())

    @property
    def got(self) -> list[int]:
        """Tokens from each rank."""
        return cast(list[int], self.counts[3:].chunk(2)[1].tolist())


def exchange_of(layout: Layout, rank: int, needs: Sequence[Needs], device: torch.device) -> Exchange:
    """The exchange of `rank`; `needs` are those of all ranks."""
    own = layout.rows * layout.length // layout.size
    pieces = [_pieces(layout, each.keys) for each in needs]  # places among the tokens of all ranks, rank after rank
    moved = np.array([_by_rank(layout.size, own, *each) for each in pieces])  # [to, from]
    others = moved * ~np.eye(layout.size, dtype=bool)
    most = int(max(others.sum(0).max(), others.sum(1).max()))
    first, count = pieces[rank]
    is_all = layout.size == 1 or most > FEW * (layout.size - 1) * own
    if is_all:
        moved[:], most = own, (layout.size - 1) * own
        # Two of no use, for a compiler makes code of its own for sizes of 0 and 1.
        order, send = (first, count), (np.zeros(1, np.int64), np.full(1, 2))
    else:
        arrival = np.argsort(first // own, kind="stable")
        place = np.empty_like(first)
        place[arrival] = np.cumsum(count[arrival]) - count[arrival]
        order = place, count
        mine = [(start[ours] - rank * own, size[ours]) for start, size in pieces for ours in [start // own == rank]]
        send = np.concatenate([start for start, _ in mine]), np.concatenate([size for _, size in mine])
    counts = [max(len(each.calls) for each in needs), most, is_all, *moved[:, rank].tolist(), *moved[rank].tolist()]
    return Exchange(_ranges(*order, device), _ranges(*send, device), torch.tensor(counts))


def _pieces(layout: Layout, keys: Ints) -> tuple[Ints, Ints]:
    """`keys` `[ranges, 2]`, cut at the edges of chunks: the place of each piece among the tokens of all ranks, one rank
    after another, and its length.
    """
    first, end = keys.T
    low, counts = first // layout.chunk, -(-end // layout.chunk) - first // layout.chunk
    chunks = np.repeat(low - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
    begin = np.maximum(chunks * layout.chunk, np.repeat(first, counts))
    stop = np.minimum((chunks + 1) * layout.chunk, np.repeat(end, counts))
    places = layout.places()[0].numpy()[chunks]
    return places * layout.chunk + begin - chunks * layout.chunk, stop - begin


def _by_rank(size: int, own: int, first: Ints, count: Ints) -> Ints:
    """Tokens of pieces by the rank that holds them."""
    return np.bincount(first // own, count, size).astype(np.int64)


def _ranges(first: Ints, count: Ints, device: torch.device) -> torch.Tensor:
    """The numbers of all ranges `[first, first + count)`, one range after another; made on the device."""
    shift, counts = (torch.from_numpy(x) for x in (first - np.cumsum(count) + count, count))
    total = int(counts.sum())
    steps = torch.repeat_interleave(to_device(shift, device), to_device(counts, device), output_size=total)
    return steps + torch.arange(total, device=device)


# ---- on the device ----


def arrive(own: torch.Tensor, exchange: Exchange, group: Group) -> torch.Tensor:
    """Of `[tokens of the rank, heads, features]`, `[keys, heads, features]` in the order of the rows."""
    if exchange.is_all:
        joined = all_gather(own, group, 0)
    else:
        joined = all_to_all(take(own, exchange.send), group, exchange.sent, exchange.got)
    return take(joined, exchange.order)


def go_home(
    parts: Sequence[tuple[slice, torch.Tensor, torch.Tensor]], exchange: Exchange, group: Group, dtype: torch.dtype
) -> torch.Tensor:
    """The gradients of this rank's tokens, summed over calls and ranks, `[tokens, heads, features]`.

    Args:
        parts: for each call, which of the keys it had, and the gradients of its keys and values.
        dtype: of what is sent and returned.
    """
    exact = torch.promote_types(dtype, torch.float32)
    arrived = sum(exchange.got)
    _, first, other = parts[0]
    make = first.new_empty if len(exchange.order) == arrived else first.new_zeros  # an all-gather brought more
    ready = make((arrived, first.shape[1], first.shape[-1] + other.shape[-1]), dtype=dtype)
    for begin, end, covering in _segments([keys for keys, *_ in parts]):
        mine = [slice(begin - parts[each][0].start, end - parts[each][0].start) for each in covering]
        into = exchange.order[begin:end]
        of_keys, of_values = ready.split([first.shape[-1], other.shape[-1]], -1)
        put(_sum([parts[each][1][rows] for each, rows in zip(covering, mine, strict=True)], dtype), into, of_keys)
        put(_sum([parts[each][2][rows] for each, rows in zip(covering, mine, strict=True)], dtype), into, of_values)
    if exchange.is_all:
        return all_to_all(ready, group).unflatten(0, (group.size, -1)).sum(0, dtype=exact).to(dtype)
    returned = all_to_all(ready, group, exchange.got, exchange.sent).split(exchange.sent)
    to = exchange.send.split(exchange.sent)
    # A rank needs all of its own, in its order.
    total = returned[group.rank].to(exact, copy=True)
    for rank, part in enumerate(returned):
        if rank != group.rank and len(part):
            total.index_add_(0, to[rank], part.to(exact))  # each token once: the order is the same in every run
    return total.to(dtype)


def _segments(slices: Sequence[slice]) -> list[tuple[int, int, list[int]]]:
    """Where the same of `slices` cover: begin, end, and which."""
    cuts = sorted({edge for each in slices for edge in (each.start, each.stop)})
    found = [
        (begin, end, [index for index, each in enumerate(slices) if each.start <= begin and end <= each.stop])
        for begin, end in itertools.pairwise(cuts)
    ]
    return [segment for segment in found if segment[2]]


def _sum(terms: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Summed in fp32 or better, and rounded once."""
    if len(terms) <= 2:  # one addition rounds once, whatever the dtype
        return (terms[0] if len(terms) == 1 else terms[0] + terms[1]).to(dtype)
    total = terms[0].to(torch.promote_types(dtype, torch.float32), copy=True)
    for term in terms[1:]:
        total += term
    return total.to(dtype)


def all_to_all(
    x: torch.Tensor, group: Group, send: list[int] | None = None, receive: list[int] | None = None
) -> torch.Tensor:
    """Rows for each rank, and from each: equally many, or `send` and `receive`."""
    if group.size == 1:
        return x
    x = x.contiguous()
    out = torch.empty_like(x) if receive is None else x.new_empty((sum(receive), *x.shape[1:]))
    dist.all_to_all_single(out, x, receive, send, group=group.handle)
    return out


def permute_chunks(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """`[tokens, ...]` with its `len(order)` chunks in another order."""
    return take(x.unflatten(0, (len(order), -1)), order).flatten(0, 1)


def take(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`rows[index]`, contiguous."""
    return _words(rows)[0].index_select(0, index).view(rows.dtype)


def put(rows: torch.Tensor, index: torch.Tensor, into: torch.Tensor) -> None:
    """`into[index] = rows`."""
    words = _words(into, rows)
    words[0].index_copy_(0, index, words[1])


def _words(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The same memory as numbers of 8 bytes, where they fit: a GPU moves one number for each thread."""

    def fits(x: torch.Tensor) -> bool:
        numbers = WORD.itemsize // x.element_size()
        steps = (x.shape[-1], x.storage_offset(), *x.stride()[:-1])
        return x.stride(-1) == 1 and all(step % numbers == 0 for step in steps)

    return tuple(x.view(WORD) for x in tensors) if all(map(fits, tensors)) else tensors
