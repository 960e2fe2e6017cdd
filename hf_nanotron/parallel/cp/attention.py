"""Causal attention over rows whose tokens are sharded over a context-parallel group.

Two ways, exact to rounding, whatever the layout (`Layout`), the documents and the window:

- `"gather"` (`gather.py`): each rank receives the keys and values that its own queries see (Llama 3, arXiv:2407.21783,
  3.3.2), some key-value heads at a time.
- `"heads"` (`heads.py`): an all-to-all gives each rank all tokens of some heads, another brings the outputs back
  (DeepSpeed-Ulysses, arXiv:2309.14509). Key-value heads are repeated where there are fewer than ranks.

Received by a rank for a layer with "gather", with E the features of a key and a value of all heads together, S the
tokens of all rows, n the ranks, for each gathering of keys and values and each sending of their gradients: (n - 1) / n
* S * E numbers by an all-gather; or, where ranks need few of the others' tokens, those that a rank needs, by an
all-to-all (`exchange.py`). Each group of heads is a collective of the forward, and two of the backward.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...ops.host_copy import to_device
from ..mesh import Group
from .calls import Calls, calls_of, needs_of
from .exchange import Exchange, exchange_of
from .gather import name_of
from .heads import attend_by_heads
from .layout import Layout

MODES = ("gather", "heads")


@dataclass(frozen=True, eq=False)
class DeviceLayout:
    """What attention on one rank needs of a `Layout`.

    Attributes:
        calls, exchanges: for each window of a layer (None: it sees all tokens), the kernel calls of "gather", and what
            it sends and receives.
        places: `[2, chunks of all rows]`, int64, on the device: `Layout.places`.
        bounds: `[documents + 1]`, int32, on the device, counted over the tokens of all rows, for "heads"; None where
            each row is a document.
        longest: tokens of the longest document, a tensor on the host; None as `bounds`.
    """

    calls: dict[int | None, Calls]
    exchanges: dict[int | None, Exchange]
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
    needs = {
        window: [needs_of(layout, each, window) for each in range(layout.size)] for window in dict.fromkeys(windows)
    }
    made = DeviceLayout(
        {window: calls_of(layout, each[rank]).to(device) for window, each in needs.items()},
        {window: exchange_of(layout, rank, each, device) for window, each in needs.items()},
        to_device(torch.stack(layout.places()), device),
        to_device(bounds, device) if packed else None,
        bounds.diff().max() if packed else None,
    )
    # Or another number of documents, calls or chunks would be compiled anew.
    changing = [(made.places, 1)] + ([] if made.bounds is None else [(made.bounds, 0)])
    for calls in made.calls.values():
        changing += [(calls.bounds, 1), (calls.calls, 0), (calls.spans, 0)]
    for exchange in made.exchanges.values():
        changing += [(exchange.order, 0), (exchange.send, 0)]
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
            fill the GPU better. None: see `gather.groups_of_heads`.

    Raises:
        ValueError: if `layout` was not made for `window`; if `mode` is another; if `kv_heads_per_gather` is less than
            1; in `"heads"`, if the ranks do not divide the heads, or neither of ranks and key-value heads divides the
            other.
    """
    if mode == "heads":
        rows = layout.places, layout.bounds, layout.longest
        return attend_by_heads(query, key, value, *rows, group, kernel, scale, window)
    if mode != "gather":
        raise ValueError(f"cp_mode={mode!r} is not one of {', '.join(MODES)}.")
    if window not in layout.calls:
        raise ValueError(f"the context-parallel layout was made for windows {list(layout.calls)}, not for {window}.")
    if kv_heads_per_gather is not None and kv_heads_per_gather < 1:
        raise ValueError(
            f"cp_kv_heads_per_gather={kv_heads_per_gather}: at least 1 key-value head is gathered at once."
        )
    tables = *layout.calls[window], *layout.exchanges[window]
    inputs = (*tables, scale, window, kernel, kv_heads_per_gather, name_of(group))
    output, _ = torch.ops.hf_nanotron.attention_cp(query, key, value, *inputs)
    return output
