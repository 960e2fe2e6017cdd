"""The kernel calls of one context-parallel rank: which of its tokens attend to which gathered keys.

A chunk needs the keys from the start of its first document (or of its window) to its own end. So its tokens are the
last ones of the documents in that range, and the causal mask of FlashAttention, aligned at the bottom right, is exact:
nothing is masked, padded or merged. Adjacent chunks of a rank are one stretch.

The stretches of a call are documents of one variable-length call, with bounds for queries and others for keys. Their
keys must not overlap, for a kernel takes them (and writes their gradients) side by side; keys between two stretches
belong to a document without queries. A whole row takes `2 * pairs` calls, since each chunk sees all chunks before it;
short documents, narrow windows and further rows take one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from ...ops.host_copy import to_device
from .layout import Ints, Layout

# Keys without queries cost their zeros in a backward: no more of them than keys with, or than a call costs. By counting
# bytes: about 5 kB for each key and head, so 16384 keys of two heads take the time of starting a call's kernels.
FREE_KEYS = 16384


class Calls(NamedTuple):
    """The kernel calls of a rank and window, as tensors that go through an operator.

    Tables are flat, for a compiler makes code of its own for sizes of 1.

    Attributes:
        bounds: `[2, documents + calls]`, int32, on the device: bounds of the queries and of the keys of all calls, one
            call after another, each from 0.
        calls: `[calls * 6]`, int64, on the host: documents, most queries and most keys of one, first key and end of the
            keys among the tokens of all rows, spans.
        spans: `[spans * 2]`, int64, on the host: first and end of the tokens of the rank, `[rows * tokens]`, that each
            call has.
    """

    bounds: torch.Tensor
    calls: torch.Tensor
    spans: torch.Tensor

    def to(self, device: torch.device) -> Calls:
        return self._replace(bounds=to_device(self.bounds, device))


@dataclass(frozen=True)
class _Stretch:
    """Tokens `[start, end)` of all rows, at `place` among those of the rank; they see keys from `first` on."""

    start: int
    end: int
    place: int
    first: int


def calls_of(layout: Layout, rank: int, window: int | None = None) -> Calls:
    """The calls of `rank` for layers that see `window` tokens including itself, or all before it; on the host."""
    open_calls: list[list[_Stretch]] = []
    for stretch in sorted(_stretches(layout, rank, window), key=lambda each: (each.first, each.start)):
        most = max(stretch.end - stretch.first, FREE_KEYS)
        fits = [call for call in open_calls if 0 <= stretch.first - call[-1].end <= most]
        if fits:
            max(fits, key=lambda call: call[-1].end).append(stretch)
        else:
            open_calls.append([stretch])
    tables = [_table(call, layout.bounds) for call in open_calls]
    numbers = [
        (len(queries) - 1, np.diff(queries).max(), np.diff(keys).max(), call[0].first, call[-1].end, len(call))
        for call, (queries, keys) in zip(open_calls, tables, strict=True)
    ]
    spans = [(each.place, each.place + each.end - each.start) for call in open_calls for each in call]
    bounds = np.concatenate([np.stack(table) for table in tables], axis=1).astype(np.int32)
    return Calls(
        torch.from_numpy(bounds),
        torch.tensor([int(each) for call in numbers for each in call]),
        torch.tensor(spans).flatten(),
    )


def _stretches(layout: Layout, rank: int, window: int | None) -> list[_Stretch]:
    chunk, each = layout.chunk, layout.held.shape[2]
    found = []
    for row, chunks in enumerate(layout.held[rank].tolist()):
        begin = 0
        for index in range(1, each + 1):
            if index < each and chunks[index] == chunks[index - 1] + 1:
                continue
            start, end = (row * layout.length + x * chunk for x in (chunks[begin], chunks[index - 1] + 1))
            document = int(layout.bounds[np.searchsorted(layout.bounds, start, side="right") - 1])
            first = document if window is None else max(document, start - window + 1)
            found.append(_Stretch(start, end, (row * each + begin) * chunk, first))
            begin = index
    return found


def _table(call: list[_Stretch], bounds: Ints) -> tuple[Ints, Ints]:
    """Bounds of the queries and of the keys of a call."""
    queries: list[Ints] = [np.zeros(1, dtype=np.int64)]
    keys: list[Ints] = [np.array([call[0].first])]
    done, end = 0, call[0].first
    for stretch in call:
        if stretch.first > end:
            queries.append(np.array([done]))
            keys.append(np.array([stretch.first]))
        low, high = np.searchsorted(bounds, (stretch.start, stretch.end), side="right")
        cuts = bounds[low:high]
        cuts = np.append(cuts[cuts < stretch.end], stretch.end)
        queries.append(cuts - stretch.start + done)
        keys.append(cuts)
        done, end = done + stretch.end - stretch.start, stretch.end
    return np.concatenate(queries), np.concatenate(keys) - call[0].first
