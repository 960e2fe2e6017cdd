"""Causal attention over rows whose tokens are sharded over a context-parallel group.

Two ways, exact to rounding, whatever the layout (`Layout`), the documents and the window:

- `"gather"`: each rank gathers the keys and values of all tokens and attends with its own queries (Llama 3,
  arXiv:2407.21783, 3.3.2), some key-value heads at a time. While a group of heads attends, the next is gathered; in the
  backward, the gradients of the one before are sent home meanwhile. They are gathered again there.
- `"heads"`: an all-to-all gives each rank all tokens of some heads, another brings the outputs back (DeepSpeed-Ulysses,
  arXiv:2309.14509). Key-value heads are repeated where there are fewer than ranks.

Numerics: the gradients of keys and values that one rank has of several calls are summed in fp32, sent in the dtype of
the keys, and summed over the ranks in fp32: each is rounded once, and once more at the end, whatever the number of
ranks. (A reduce-scatter in bf16 rounds once for each rank.)

Received by a rank for a layer, with E the features of a key and a value of all heads together, S the tokens of all
rows, n the ranks, for each gathering of keys and values and each sending of their gradients: (n - 1) / n * S * E
numbers. One all-gather for each group of heads in the forward; one all-gather and one all-to-all in the backward.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.nn import functional as F

from ...ops.attention import attention
from ...ops.host_copy import to_device
from ...ops.kernels.attention import KERNELS, Problem, Saved
from ..collectives import all_gather
from ..mesh import Group
from .calls import Calls, calls_of
from .layout import Layout

MODES = ("gather", "heads")

# Queries, counted over heads, that keep a GPU busy: 128 in a thread block on each of 132 multiprocessors.
FILLED_CALL = 128 * 128


@dataclass(frozen=True, eq=False)
class DeviceLayout:
    """What attention on one rank needs of a `Layout`.

    Attributes:
        calls: for each window of a layer (None: it sees all tokens), the kernel calls of "gather".
        places: `[2, chunks of all rows]`, int64, on the device: `Layout.places`.
        bounds: `[documents + 1]`, int32, on the device, counted over the tokens of all rows, for "heads"; None where
            each row is a document.
        longest: tokens of the longest document, a tensor on the host; None as `bounds`.
    """

    calls: dict[int | None, Calls]
    places: torch.Tensor
    bounds: torch.Tensor | None
    longest: torch.Tensor | None


def device_layout(
    layout: Layout, rank: int, device: torch.device, windows: tuple[int | None, ...] = (None,)
) -> DeviceLayout:
    """`layout` for `rank` of the group, on `device`, for layers with these `windows` (those in `Layout` need not be
    the same). A window of a row or more is None.
    """
    packed = len(layout.bounds) > layout.rows + 1
    bounds = torch.from_numpy(layout.bounds).to(torch.int32)
    made = DeviceLayout(
        {window: calls_of(layout, rank, window).to(device) for window in dict.fromkeys(windows)},
        to_device(torch.stack(layout.places()), device),
        to_device(bounds, device) if packed else None,
        bounds.diff().max() if packed else None,
    )
    # Or another number of documents, calls or chunks would be compiled anew.
    changing = [(made.places, 1)] + ([] if made.bounds is None else [(made.bounds, 0)])
    for calls in made.calls.values():
        changing += [(calls.bounds, 1), (calls.calls, 0), (calls.spans, 0)]
    for tensor, dim in changing:
        torch._dynamo.maybe_mark_dynamic(tensor, dim)
    return made


def cp_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: DeviceLayout,
    group: Group,
    kernel: str,
    scale: float,
    window: int | None = None,
    mode: str = "gather",
    kv_heads_per_gather: int | None = None,
) -> torch.Tensor:
    """Attention of the tokens that this rank holds to all that they may see; `[B, S/n, heads, D of value]`, contiguous.

    All ranks of `group` together. Differentiable.

    Args:
        query, key, value: `[B, S/n, heads, D]`, `[B, S/n, kv_heads, D]` and `[B, S/n, kv_heads, D or less]`, of this
            rank's tokens in the order of `Layout.tokens`.
        kernel: one of `ops.kernels.attention.KERNELS`. `"gather"` needs one that takes documents: `pick` it for packed
            rows.
        scale, window: as in `ops.attention.attention`.
        mode: `"gather"` or `"heads"`.
        kv_heads_per_gather: key-value heads that are gathered at once: fewer overlap better and take less memory, more
            fill the GPU better. None: a quarter of them, or more where a call would have too little to do.

    Raises:
        ValueError: if `layout` was not made for `window`; if `mode` is another; if `kv_heads_per_gather` is less than
            1; in `"heads"`, if the ranks do not divide the heads, or neither of ranks and key-value heads divides the
            other.
    """
    if mode == "heads":
        return _by_heads(query, key, value, layout, group, kernel, scale, window)
    if mode != "gather":
        raise ValueError(f"cp_mode={mode!r} is not one of {', '.join(MODES)}.")
    if window not in layout.calls:
        raise ValueError(f"the context-parallel layout was made for windows {list(layout.calls)}, not for {window}.")
    if kv_heads_per_gather is not None and kv_heads_per_gather < 1:
        raise ValueError(
            f"cp_kv_heads_per_gather={kv_heads_per_gather}: at least 1 key-value head is gathered at once."
        )
    inputs = (layout.places, *layout.calls[window], scale, window, kernel, kv_heads_per_gather, _name(group))
    output, _ = torch.ops.hf_nanotron.attention_cp(query, key, value, *inputs)
    return output


# ---- what runs beside attention ----

T = TypeVar("T")


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)


class _Aside(Generic[T]):
    """`make()`, run on a side stream of a GPU after all that was launched before; elsewhere at once.

    What it reads must be held until `get`, for the memory goes back to another stream. Its own memory is used again
    only by later ones, which wait for what was launched before them.
    """

    def __init__(self, make: Callable[[], T], device: torch.device) -> None:
        self._device, self._done = device, cast(torch.cuda.Event | None, None)
        if device.type != "cuda":
            self._value = make()
            return
        side = _side_stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            self._value = make()
        self._done = side.record_event()

    def get(self) -> T:
        """The result, for the current stream."""
        if self._done is not None:
            torch.cuda.current_stream(self._device).wait_event(self._done)
        return self._value


def _name(group: Group) -> str:
    return "" if group.handle is None else group.handle.group_name


def _group(name: str) -> Group:
    if not name:
        return Group((0,), 0, None)
    handle = _resolve_process_group(cast(Any, name))  # a type of its own in new releases of torch
    return Group(tuple(dist.get_process_group_ranks(handle)), dist.get_rank(handle), handle)


def _all_to_all(x: torch.Tensor, group: Group) -> torch.Tensor:
    """`[n, ...]`: the part for each rank, and from each."""
    if group.size == 1:
        return x
    x = x.contiguous()
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x, group=group.handle)
    return out


def _permuted(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """`[tokens, ...]` with its `len(order)` chunks in another order."""
    return x.unflatten(0, (len(order), -1)).index_select(0, order).flatten(0, 1)


# ---- "gather" ----


class _Group:
    """Some key-value heads of a layer, and the queries that share them."""

    def __init__(self, query: torch.Tensor, kv_heads: int, first: int, count: int) -> None:
        share = query.shape[2] // kv_heads
        self.keys = slice(first, min(first + count, kv_heads))
        self.queries = slice(self.keys.start * share, self.keys.stop * share)


def _groups(query: torch.Tensor, key: torch.Tensor, calls: int, count: int | None) -> list[_Group]:
    """Of `count` key-value heads each, or as many as `calls` are well filled with."""
    kv_heads = key.shape[2]
    if count is None:
        in_a_call = query.shape[0] * query.shape[1] * (query.shape[2] // kv_heads) / calls
        least = min(kv_heads, max(-(-kv_heads // 4), math.ceil(FILLED_CALL / in_a_call)))
        count = -(-kv_heads // (kv_heads // least))  # groups of one size
    return [_Group(query, kv_heads, first, count) for first in range(0, kv_heads, count)]


@dataclass(frozen=True)
class _Call:
    """One kernel call: its problem, its keys among the tokens of all rows, its tokens among those of the rank."""

    problem: Problem
    keys: slice
    spans: list[slice]

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """Of `x` `[tokens, ...]`, `[1, tokens of the call, ...]`; a view if they lie side by side."""
        parts = [x[span] for span in self.spans]
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[None]

    def put(self, rows: torch.Tensor, into: torch.Tensor) -> None:
        """The reverse of `rows`."""
        parts = rows[0].split([span.stop - span.start for span in self.spans])
        for span, part in zip(self.spans, parts, strict=True):
            into[span] = part


def _unpack(calls: Calls, scale: float, window: int | None) -> list[_Call]:
    found, at, spans = [], 0, [slice(*span) for span in calls.spans.view(-1, 2).tolist()]
    for documents, queries, keys, first, end, count in calls.calls.view(-1, 6).tolist():
        bounds = calls.bounds[:, at : at + documents + 1]
        whole = documents == 1  # without bounds a kernel knows more
        problem = Problem(None if whole else bounds[0], queries, scale, window, None if whole else bounds[1], keys)
        found.append(_Call(problem, slice(first, end), spans[:count]))
        at, spans = at + documents + 1, spans[count:]
    return found


def _gather(
    key: torch.Tensor, value: torch.Tensor, heads: slice, places: torch.Tensor, group: Group
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of some heads, of the tokens of all rows in order; values with as many features as keys."""
    own = torch.cat([key[:, :, heads], value[:, :, heads]], -1).flatten(0, 1)
    whole = _permuted(all_gather(own, group, 0), places[0])
    keys, values = whole.split([key.shape[-1], value.shape[-1]], -1)
    missing = key.shape[-1] - value.shape[-1]
    return keys[None], (F.pad(values, (0, missing)) if missing else values)[None]


SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor places, Tensor bounds, Tensor calls, Tensor spans, float scale,"
    " int? window, str kernel, int? heads, str group) -> (Tensor, Tensor)"
)
BACKWARD_SCHEMA = (
    "(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor output, Tensor sums, Tensor places, Tensor bounds,"
    " Tensor calls, Tensor spans, float scale, int? window, str kernel, int? heads, str group)"
    " -> (Tensor, Tensor, Tensor)"
)


@torch.library.custom_op("hf_nanotron::attention_cp", mutates_args=(), schema=SCHEMA)
def _attention_cp(*inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    query, key, value, places, bounds, table, spans, scale, window, kernel, heads, name = inputs
    group, calls = _group(name), _unpack(Calls(bounds, table, spans), scale, window)
    output, sums = _empty_results(query, value)
    tokens = query.flatten(0, 1)

    def gather(some: _Group) -> _Aside[tuple[torch.Tensor, torch.Tensor]]:
        return _Aside(lambda: _gather(key, value, some.keys, places, group), query.device)

    groups = _groups(query, key, len(calls), heads)
    coming = gather(groups[0])
    for index, some in enumerate(groups):
        keys, values = coming.get()
        if index + 1 < len(groups):
            coming = gather(groups[index + 1])
        into, sums_into = output.flatten(0, 1)[:, some.queries], sums[some.queries].transpose(0, 1)
        for call in calls:
            k, v = keys[:, call.keys], values[:, call.keys]
            found, found_sums = KERNELS[kernel].forward(call.rows(tokens[:, some.queries]), k, v, call.problem)
            call.put(found[..., : value.shape[-1]], into)
            call.put(found_sums.reshape(-1, found.shape[1]).transpose(0, 1)[None], sums_into)
        del keys, values
    return output, sums


@_attention_cp.register_fake
def _(*inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty_results(inputs[0], inputs[2])


def _empty_results(query: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The output `[B, S/n, heads, D of value]` and the log-sum-exp of the scores, `[heads, B * S/n]`."""
    batch, length, heads = query.shape[:3]
    sums = query.new_empty((heads, batch * length), dtype=torch.promote_types(query.dtype, torch.float32))
    return query.new_empty((batch, length, heads, value.shape[-1])), sums


@torch.library.custom_op("hf_nanotron::attention_cp_backward", mutates_args=(), schema=BACKWARD_SCHEMA)
def _attention_cp_backward(*inputs: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grad, query, key, value, output, sums, places, bounds, table, spans, scale, window, kernel, heads, name = inputs
    group, calls = _group(name), _unpack(Calls(bounds, table, spans), scale, window)
    found = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value)]
    tokens, grads, outputs, dq = (x.flatten(0, 1) for x in (query, grad, output, found[0]))
    missing = key.shape[-1] - value.shape[-1]
    if missing:
        grads, outputs = F.pad(grads, (0, missing)), F.pad(outputs, (0, missing))

    def gather(some: _Group) -> _Aside[tuple[torch.Tensor, torch.Tensor]]:
        return _Aside(lambda: _gather(key, value, some.keys, places, group), query.device)

    def arrive(some: _Group, leaving: _Leaving) -> None:
        own = leaving.get().unflatten(0, key.shape[:2])
        for gradient, part in zip(found[1:], own.split([key.shape[-1], value.shape[-1]], -1), strict=True):
            gradient[:, :, some.keys] = part

    groups = _groups(query, key, len(calls), heads)
    coming, leaving = gather(groups[0]), list[tuple[_Group, _Leaving]]()
    for index, some in enumerate(groups):
        keys, values = coming.get()
        if index + 1 < len(groups):
            coming = gather(groups[index + 1])
        parts = []
        for call in calls:
            q, d, out = (call.rows(x[:, some.queries]) for x in (tokens, grads, outputs))
            lse = call.rows(sums[some.queries].transpose(0, 1)).transpose(1, 2).contiguous()
            lse = lse if KERNELS[kernel].dense and call.problem.bounds is None else lse[0]
            saved = Saved(q, keys[:, call.keys], values[:, call.keys], out, lse)
            own, dk, dv = KERNELS[kernel].backward(d, saved, call.problem)
            call.put(own, dq[:, some.queries])
            parts.append((call.keys, dk[0], dv[0, ..., : value.shape[-1]]))
        del keys, values
        leaving.append((some, _Leaving(parts, places, group, tokens.shape[0] * group.size, key.dtype)))
        if len(leaving) > 1:
            arrive(*leaving.pop(0))
    for each in leaving:
        arrive(*each)
    dq_, dk_, dv_ = found
    return dq_, dk_, dv_


@_attention_cp_backward.register_fake
def _(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


class _Leaving:
    """Gradients of gathered keys and values, under way to the ranks that hold their tokens."""

    def __init__(
        self,
        parts: list[tuple[slice, torch.Tensor, torch.Tensor]],
        places: torch.Tensor,
        group: Group,
        tokens: int,
        dtype: torch.dtype,
    ) -> None:
        self._parts, self._places, self._group, self._tokens, self._dtype = parts, places, group, tokens, dtype
        self._sum = _Aside(self._send, places.device)

    def _send(self) -> torch.Tensor:
        _, first, other = self._parts[0]
        width, exact = first.shape[-1], torch.promote_types(self._dtype, torch.float32)
        whole = first.new_zeros((self._tokens, first.shape[1], width + other.shape[-1]), dtype=exact)
        for keys, dk, dv in self._parts:
            whole[keys, :, :width] += dk
            whole[keys, :, width:] += dv
        ready = _permuted(whole.to(self._dtype), self._places[1]).unflatten(0, (self._group.size, -1))
        return _all_to_all(ready, self._group).sum(0, dtype=exact).to(self._dtype)

    def get(self) -> torch.Tensor:
        """`[B * S/n, heads, features of a key and a value]`, summed over the ranks."""
        found = self._sum.get()
        self._parts.clear()
        return found


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, *tables = inputs
    ctx.save_for_backward(query, key, value, *output, *tables[:4])
    ctx.rest = tables[4:]
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: torch.Tensor, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    found = torch.ops.hf_nanotron.attention_cp_backward(grad, *ctx.saved_tensors, *ctx.rest)
    return (*found, *[None] * 9)


_attention_cp.register_autograd(_gradients, setup_context=_keep)


# ---- "heads" ----


def _by_heads(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: DeviceLayout,
    group: Group,
    kernel: str,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    heads, kv_heads, size = query.shape[2], key.shape[2], group.size
    if heads % size or (kv_heads % size and size % kv_heads):
        raise ValueError(
            f"cp_mode='heads' cannot give {size} context-parallel ranks {heads} heads and {kv_heads} key-value heads: "
            f"{size} must divide {heads}, and one of {size} and {kv_heads} the other. Use cp_mode='gather'."
        )
    if kv_heads < size:
        key, value = (x.repeat_interleave(size // kv_heads, 2) for x in (key, value))
    batch, length = query.shape[:2]
    parts = [x.reshape(batch, length, size, -1) for x in (query, key, value)]  # a rank's heads are neighbours
    whole = torch.ops.hf_nanotron.cp_to_heads(torch.cat(parts, -1), layout.places, _name(group))
    of_rank = whole.split([x.shape[-1] for x in parts], -1)
    q, k, v = (x.unflatten(-1, (-1, y.shape[-1])) for x, y in zip(of_rank, (query, key, value), strict=True))
    found = attention(q, k, v, kernel, scale, window, layout.bounds, layout.longest)
    own = torch.ops.hf_nanotron.cp_to_tokens(found.flatten(2), layout.places, _name(group))
    return own.reshape(batch, length, heads, value.shape[-1])


@torch.library.custom_op(
    "hf_nanotron::cp_to_heads", mutates_args=(), schema="(Tensor x, Tensor places, str group) -> Tensor"
)
def _to_heads(x: torch.Tensor, places: torch.Tensor, group: str) -> torch.Tensor:
    """`[B, S/n, n, F]` of this rank's tokens -> `[B, S, F]`, this rank's features of all tokens, in order."""
    batch = x.shape[0]
    joined = _all_to_all(x.flatten(0, 1).transpose(0, 1), _group(group))
    return _permuted(joined.flatten(0, 1), places[0]).unflatten(0, (batch, -1)).contiguous()


@_to_heads.register_fake
def _(x: torch.Tensor, places: torch.Tensor, group: str) -> torch.Tensor:
    batch, length, size, features = x.shape
    return x.new_empty((batch, length * size, features))


@torch.library.custom_op(
    "hf_nanotron::cp_to_tokens", mutates_args=(), schema="(Tensor x, Tensor places, str group) -> Tensor"
)
def _to_tokens(x: torch.Tensor, places: torch.Tensor, group: str) -> torch.Tensor:
    """The reverse of `_to_heads`."""
    batch, ranks = x.shape[0], _group(group)
    ready = _permuted(x.flatten(0, 1), places[1]).unflatten(0, (ranks.size, -1))
    return _all_to_all(ready, ranks).transpose(0, 1).unflatten(0, (batch, -1)).contiguous()


@_to_tokens.register_fake
def _(x: torch.Tensor, places: torch.Tensor, group: str) -> torch.Tensor:
    batch, length, features = x.shape
    size = _group(group).size
    return x.new_empty((batch, length // size, size, features))


def _keep_places(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, places, ctx.group = inputs
    ctx.save_for_backward(places)


def _back_to_tokens(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    return torch.ops.hf_nanotron.cp_to_tokens(grad, *ctx.saved_tensors, ctx.group), None, None


def _back_to_heads(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    return torch.ops.hf_nanotron.cp_to_heads(grad, *ctx.saved_tensors, ctx.group), None, None


_to_heads.register_autograd(_back_to_tokens, setup_context=_keep_places)
_to_tokens.register_autograd(_back_to_heads, setup_context=_keep_places)
