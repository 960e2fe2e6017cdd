"""Attention of all tokens by some heads on each context-parallel rank: one all-to-all there, and one back.

For a compiler both are operators, each the other's backward.
"""

from __future__ import annotations

from typing import Any

import torch

from ...ops.attention import attention
from ..mesh import Group
from .exchange import all_to_all, permute_chunks
from .gather import group_of, name_of


def attend_by_heads(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    places: torch.Tensor,
    bounds: torch.Tensor | None,
    longest: torch.Tensor | None,
    group: Group,
    kernel: str,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """`cp_attention` with `mode="heads"`; `places` are `Layout.places`, bounds and longest those of `DeviceLayout`."""
    heads, kv_heads, size = query.shape[2], key.shape[2], group.size
    if heads % size or (kv_heads % size and size % kv_heads):
        raise ValueError(
            f"cp_mode='heads' cannot give {size} context-parallel ranks {heads} heads and {kv_heads} key-value heads: "
            f"{size} must divide {heads}, and one of {size} and {kv_heads} the other. Use cp_mode='gather'."
        )
    if kv_heads < size:
        key, value = (x.repeat_interleave(size // kv_heads, 2) for x in (key, value))
    batch, length = query.shape[:2]
    # A rank's heads are neighbours; in memory its features lie together, as they are sent.
    parts = [x.reshape(batch, length, size, -1).permute(2, 0, 1, 3) for x in (query, key, value)]
    whole = to_heads(torch.cat(parts, -1).permute(1, 2, 0, 3), places, name_of(group))
    of_rank = whole.split([x.shape[-1] for x in parts], -1)
    q, k, v = (x.unflatten(-1, (-1, y.shape[-1])) for x, y in zip(of_rank, (query, key, value), strict=True))
    found = attention(q, k, v, kernel, scale, window, bounds, longest)
    own = to_tokens(found.flatten(2), places, name_of(group))
    return own.reshape(batch, length, heads, value.shape[-1]).contiguous()


def to_heads(x: torch.Tensor, places: torch.Tensor, group: str) -> torch.Tensor:
    """`[B, S/n, n, F]` of this rank's tokens -> `[B, S, F]`, this rank's features of all tokens, in order."""
    found: torch.Tensor = torch.ops.hf_nanotron.cp_to_heads(x, places, group)
    return found


def to_tokens(x: torch.Tensor, places: torch.Tensor, group: str) -> torch.Tensor:
    """The reverse of `to_heads`."""
    found: torch.Tensor = torch.ops.hf_nanotron.cp_to_tokens(x, places, group)
    return found


@torch.library.custom_op(
    "hf_nanotron::cp_to_heads", mutates_args=(), schema="(Tensor x, Tensor places, str group) -> Tensor"
)
def _to_heads(x: torch.Tensor, places: torch.Tensor, group: str) -> torch.Tensor:
    """See `to_heads`."""
    batch = x.shape[0]
    joined = all_to_all(x.flatten(0, 1).transpose(0, 1), group_of(group))
    return permute_chunks(joined.flatten(0, 1), places[0]).unflatten(0, (batch, -1)).contiguous()


@_to_heads.register_fake
def _(x: torch.Tensor, places: torch.Tensor, group: str) -> torch.Tensor:
    batch, length, size, features = x.shape
    return x.new_empty((batch, length * size, features))


@torch.library.custom_op(
    "hf_nanotron::cp_to_tokens", mutates_args=(), schema="(Tensor x, Tensor places, str group) -> Tensor"
)
def _to_tokens(x: torch.Tensor, places: torch.Tensor, group: str) -> torch.Tensor:
    """See `to_tokens`; in memory, `[n, B, S/n, F]`, as it arrives."""
    batch, ranks = x.shape[0], group_of(group)
    ready = permute_chunks(x.flatten(0, 1), places[1]).unflatten(0, (ranks.size, -1))
    return all_to_all(ready, ranks).unflatten(1, (batch, -1)).permute(1, 2, 0, 3)


@_to_tokens.register_fake
def _(x: torch.Tensor, places: torch.Tensor, group: str) -> torch.Tensor:
    batch, length, features = x.shape
    size = group_of(group).size
    return x.new_empty((size, batch, length // size, features)).permute(1, 2, 0, 3)


def _keep_places(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, places, ctx.group = inputs
    ctx.save_for_backward(places)


def _back_to_tokens(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    return torch.ops.hf_nanotron.cp_to_tokens(grad, *ctx.saved_tensors, ctx.group), None, None


def _back_to_heads(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    return torch.ops.hf_nanotron.cp_to_heads(grad, *ctx.saved_tensors, ctx.group), None, None


_to_heads.register_autograd(_back_to_tokens, setup_context=_keep_places)
_to_tokens.register_autograd(_back_to_heads, setup_context=_keep_places)
