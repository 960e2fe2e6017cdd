"""Attention of a rank's own queries to the keys and values of all tokens that they may see, which it receives.

They come some key-value heads at a time. While a group of heads attends, the next is under way; in the backward they
come again, and the gradients of the group before are on the way home meanwhile.

For a compiler it is one operator, with its backward.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.nn import functional as F

from ...ops.kernels.attention import KERNELS, Problem, Saved
from ..mesh import Group
from .aside import Aside
from .calls import Calls
from .exchange import Exchange, arrive, go_home

# Queries, counted over heads, that keep a GPU busy: two rounds of 128 in a thread block on each of 132 multiprocessors.
FILLED_CALL = 2 * 128 * 128

# Bytes that are worth the launches of another group of heads: NVLink sends them in about 50 us.
WORTH_A_GROUP = 2**24

MOST_GROUPS = 4


def name_of(group: Group) -> str:
    """What operators get in place of a group."""
    return "" if (handle := group.handle) is None else handle.group_name


def group_of(name: str) -> Group:
    """The reverse of `name_of`."""
    if not name:
        return Group((0,), 0, None)
    handle = _resolve_process_group(cast(Any, name))  # a type of its own in new releases of torch
    return Group(tuple(dist.get_process_group_ranks(handle)), dist.get_rank(handle), handle)


# ---- groups of heads, and kernel calls ----


class _Heads:
    """Some key-value heads of a layer, and the queries that share them."""

    def __init__(self, query: torch.Tensor, kv_heads: int, first: int, count: int) -> None:
        share = query.shape[2] // kv_heads
        self.keys = slice(first, min(first + count, kv_heads))
        self.queries = slice(self.keys.start * share, self.keys.stop * share)


def groups_worth_sending(size: int) -> int:
    """Groups of heads in which `size` bytes are sent."""
    return max(1, min(MOST_GROUPS, size // WORTH_A_GROUP))


def groups_of_heads(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, exchange: Exchange, count: int | None
) -> list[_Heads]:
    """Of `count` key-value heads each; or four groups, or less where calls would not fill a GPU or little is sent.

    The same on all ranks, for each group is a collective: the rank with the most calls and the one that gets most
    decide.
    """
    kv_heads = key.shape[2]
    if count is None:
        calls, tokens = exchange.counts[:2].tolist()
        in_a_call = query.shape[0] * query.shape[1] * (query.shape[2] // kv_heads) / calls
        size = tokens * kv_heads * (key.shape[-1] + value.shape[-1]) * key.element_size()
        groups = groups_worth_sending(size)
        least = min(kv_heads, max(-(-kv_heads // groups), math.ceil(FILLED_CALL / in_a_call)))
        count = -(-kv_heads // (kv_heads // least))  # groups of one size
    return [_Heads(query, kv_heads, first, count) for first in range(0, kv_heads, count)]


@dataclass(frozen=True)
class _Call:
    """One kernel call: its problem, its keys among those that arrive, its tokens among those of the rank, and how many
    tokens the calls before have.
    """

    problem: Problem
    keys: slice
    spans: list[slice]
    before: int

    @property
    def tokens(self) -> int:
        return sum(span.stop - span.start for span in self.spans)

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """Of `x` `[tokens, ...]`, `[1, tokens of the call, ...]`; a view if they lie side by side."""
        parts = [x[span] for span in self.spans]
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[None]

    def put(self, rows: torch.Tensor, into: torch.Tensor) -> None:
        """The reverse of `rows`."""
        parts = rows[0].split([span.stop - span.start for span in self.spans])
        for span, part in zip(self.spans, parts, strict=True):
            into[span] = part

    def sums(self, every: torch.Tensor, heads: slice) -> torch.Tensor:
        """`[heads, tokens of the call]`: its part of the memory for the log-sum-exp of all heads and calls."""
        count = heads.stop - heads.start
        begin = heads.start * every.shape[1] + count * self.before
        return every.view(-1)[begin : begin + count * self.tokens].view(count, -1)


def _unpack(calls: Calls, scale: float, window: int | None) -> list[_Call]:
    found, at, spans, before = [], 0, [slice(*span) for span in calls.spans.view(-1, 2).tolist()], 0
    for documents, queries, keys, first, end, count in calls.calls.view(-1, 6).tolist():
        bounds = calls.bounds[:, at : at + documents + 1]
        whole = documents == 1  # without bounds a kernel knows more
        problem = Problem(None if whole else bounds[0], queries, scale, window, None if whole else bounds[1], keys)
        found.append(_Call(problem, slice(first, end), spans[:count], before))
        at, spans, before = at + documents + 1, spans[count:], before + found[-1].tokens
    return found


def _is_all(calls: list[_Call], groups: list[_Heads]) -> bool:
    """Whether one call has all tokens of the rank, in order, and all heads: its results are those of the rank."""
    return len(calls) == len(groups) == len(calls[0].spans) == 1


def _keys_and_values(
    key: torch.Tensor, value: torch.Tensor, heads: slice, exchange: Exchange, group: Group
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of some heads, `[1, keys, heads, features]` in order; values with as many features as keys."""
    own = torch.cat([key[:, :, heads], value[:, :, heads]], -1).flatten(0, 1)
    keys, values = arrive(own, exchange, group).split([key.shape[-1], value.shape[-1]], -1)
    missing = key.shape[-1] - value.shape[-1]
    return keys[None], (F.pad(values, (0, missing)) if missing else values)[None]


# ---- the operator ----

TABLES = (
    "Tensor bounds, Tensor calls, Tensor spans, Tensor order, Tensor send, Tensor counts, float scale, int? window,"
    " str kernel, int? heads, str group"
)
SCHEMA = f"(Tensor query, Tensor key, Tensor value, {TABLES}) -> (Tensor, Tensor)"
BACKWARD_SCHEMA = (
    f"(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor output, Tensor sums, {TABLES})"
    " -> (Tensor, Tensor, Tensor)"
)


def forward(*inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments and results of `SCHEMA`: the output and the log-sum-exp of the scores."""
    query, key, value, bounds, table, spans, order, send, counts, scale, window, kernel, heads, name = inputs
    exchange, group = Exchange(order, send, counts), group_of(name)
    calls = _unpack(Calls(bounds, table, spans), scale, window)
    groups = groups_of_heads(query, key, value, exchange, heads)
    tokens = query.flatten(0, 1)

    def gather(some: _Heads) -> Aside[tuple[torch.Tensor, torch.Tensor]]:
        return Aside(lambda: _keys_and_values(key, value, some.keys, exchange, group), query.device)

    coming = gather(groups[0])
    output, sums = _empty_results(query, value)
    for index, some in enumerate(groups):
        keys, values = coming.get()
        if index + 1 < len(groups):
            coming = gather(groups[index + 1])
        for call in calls:
            k, v = keys[:, call.keys], values[:, call.keys]
            found, found_sums = KERNELS[kernel].forward(call.rows(tokens[:, some.queries]), k, v, call.problem)
            found = found[..., : value.shape[-1]]
            if _is_all(calls, groups):
                return found.reshape(output.shape).contiguous(), found_sums.reshape(sums.shape).contiguous()
            call.put(found, output.flatten(0, 1)[:, some.queries])
            into = call.sums(sums, some.queries)
            into.copy_(found_sums.reshape(into.shape))
        del keys, values
    return output, sums


def _empty_results(query: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The output `[B, S/n, heads, D of value]` and, in the memory of `[heads, B * S/n]`, the log-sum-exp of the scores
    by group of heads and call (`_Call.sums`).
    """
    batch, length, heads = query.shape[:3]
    sums = query.new_empty((heads, batch * length), dtype=torch.promote_types(query.dtype, torch.float32))
    return query.new_empty((batch, length, heads, value.shape[-1])), sums


def backward(*inputs: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Arguments and results of `BACKWARD_SCHEMA`: gradients of queries, keys and values."""
    grad, query, key, value, output, sums, *tables = inputs
    bounds, table, spans, order, send, counts, scale, window, kernel, heads, name = tables
    exchange, group = Exchange(order, send, counts), group_of(name)
    calls = _unpack(Calls(bounds, table, spans), scale, window)
    groups = groups_of_heads(query, key, value, exchange, heads)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))
    tokens, grads, outputs = (x.flatten(0, 1) for x in (query, grad, output))
    missing = key.shape[-1] - value.shape[-1]
    if missing:
        grads, outputs = F.pad(grads, (0, missing)), F.pad(outputs, (0, missing))

    def gather(some: _Heads) -> Aside[tuple[torch.Tensor, torch.Tensor]]:
        return Aside(lambda: _keys_and_values(key, value, some.keys, exchange, group), query.device)

    def leave(parts: list[tuple[slice, torch.Tensor, torch.Tensor]]) -> Aside[torch.Tensor]:
        return Aside(lambda: go_home(parts, exchange, group, key.dtype), query.device)

    coming, leaving = gather(groups[0]), list[tuple[_Heads, Any, Aside[torch.Tensor]]]()

    def finish() -> None:
        some, _, sent = leaving.pop(0)
        own = sent.get().unflatten(0, key.shape[:2])
        for gradient, part in zip((dk, dv), own.split([key.shape[-1], value.shape[-1]], -1), strict=True):
            gradient[:, :, some.keys] = part

    for index, some in enumerate(groups):
        keys, values = coming.get()
        if index + 1 < len(groups):
            coming = gather(groups[index + 1])
        parts = []
        for call in calls:
            q, d, out = (call.rows(x[:, some.queries]) for x in (tokens, grads, outputs))
            lse = call.sums(sums, some.queries)
            lse = lse if lse.data_ptr() % 16 == 0 else lse.clone()  # kernels load 16 bytes at once
            lse = lse[None] if KERNELS[kernel].dense and call.problem.bounds is None else lse
            saved = Saved(q, keys[:, call.keys], values[:, call.keys], out, lse)
            found, found_k, found_v = KERNELS[kernel].backward(d, saved, call.problem)
            parts.append((call.keys, found_k[0], found_v[0, ..., : value.shape[-1]]))
            if _is_all(calls, groups):
                dq = found.reshape(query.shape).contiguous()
            else:
                call.put(found, dq.flatten(0, 1)[:, some.queries])
        del keys, values
        leaving.append((some, parts, leave(parts)))
        if len(leaving) > 1:
            finish()
    while leaving:
        finish()
    return dq, dk, dv


_attention_cp = torch.library.custom_op("hf_nanotron::attention_cp", forward, mutates_args=(), schema=SCHEMA)
_attention_cp_backward = torch.library.custom_op(
    "hf_nanotron::attention_cp_backward", backward, mutates_args=(), schema=BACKWARD_SCHEMA
)


@_attention_cp.register_fake
def _(*inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty_results(inputs[0], inputs[2])


@_attention_cp_backward.register_fake
def _(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, *tables = inputs
    ctx.save_for_backward(query, key, value, *output, *tables[:6])
    ctx.rest = tables[6:]
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: torch.Tensor, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    found = torch.ops.hf_nanotron.attention_cp_backward(grad, *ctx.saved_tensors, *ctx.rest)
    return (*found, *[None] * 11)


_attention_cp.register_autograd(_gradients, setup_context=_keep)
