"""The kernel calls of one context-parallel rank: which of its tokens attend to which of the keys that it receives.

A chunk needs the keys from the start of its first document (or of its window) to its own end. So its tokens are the
last ones of the documents in that range, and the causal mask of FlashAttention, aligned at the bottom right, is exact:
nothing is masked, padded or merged. Adjacent chunks of a rank are one stretch.

A rank receives the keys that its stretches need, in the order of the rows and without what lies between (`Needs`). The
stretches of a call are documents of one variable-length call, with bounds for queries and others for keys. Their keys
must not overlap, for a kernel takes them (and writes their gradients) side by side; keys between two stretches, which
other calls need, belong to a document without queries. A whole row takes `2 * pairs` calls, since each chunk sees all
chunks before it; short documents, narrow windows and further rows take one.
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
            keys among those that the rank receives, spans.
        spans: `[spans * 2]`, int64, on the host: first and end of the tokens of the rank, `[rows * tokens]`, that each
            call has. No two that follow each other are neighbours.
    """

    bounds: torch.Tensor
    calls: torch.Tensor
    spans: torch.Tensor

    def to(self, device: torch.device) -> Calls:
        return self._replace(bounds=to_device(self.bounds, device))


@dataclass(frozen=True)
class _Stretch:
    """Tokens `[start, end)` of all rows, at `place` among those of the rank; they see keys from `first` on, which is at
    `at` among the keys that the rank receives.
    """

    start: int
    end: int
    place: int
    first: int
    at: int = 0

    @property
    def after(self) -> int:
        """The end of its keys among those that the rank receives."""
        return self.at + self.end - self.first


@dataclass(frozen=True)
class Needs:
    """What a rank needs for layers that see `window` tokens, or all.

    Attributes:
        keys: `[ranges, 2]`, ascending and apart: first and end among the tokens of all rows.
        calls: the stretches of each kernel call.
    """

    keys: Ints
    calls: list[list[_Stretch]]


def needs_of(layout: Layout, rank: int, window: int | None = None) -> Needs:
    """The keys and the calls of `rank` for layers that see `window` tokens including itself, or all before it."""
    stretches = sorted(_stretches(layout, rank, window), key=lambda each: (each.first, each.start))
    keys: list[list[int]] = []
    calls: list[list[_Stretch]] = []
    done = 0  # keys of the ranges before the last
    for each in stretches:
        if keys and each.first <= keys[-1][1]:
            keys[-1][1] = max(keys[-1][1], each.end)
        else:
            done += keys[-1][1] - keys[-1][0] if keys else 0
            keys.append([each.first, each.end])
        placed = _Stretch(each.start, each.end, each.place, each.first, done + each.first - keys[-1][0])
        most = max(placed.end - placed.first, FREE_KEYS)
        fits = [call for call in calls if 0 <= placed.at - call[-1].after <= most]
        if fits:
            max(fits, key=lambda call: call[-1].after).append(placed)
        else:
            calls.append([placed])
    return Needs(np.array(keys, dtype=np.int64), calls)


def calls_of(layout: Layout, needs: Needs) -> Calls:
    """The tables of `needs`; on the host."""
    tables = [_table(call, layout.bounds) for call in needs.calls]
    numbers, spans = [], list[list[int]]()
    for call, (queries, keys) in zip(needs.calls, tables, strict=True):
        own = _spans(call)
        spans += own
        longest = int(np.diff(queries).max()), int(np.diff(keys).max())
        numbers += [len(queries) - 1, *longest, call[0].at, call[-1].after, len(own)]
    bounds = np.concatenate([np.stack(table) for table in tables], axis=1).astype(np.int32)
    return Calls(torch.from_numpy(bounds), torch.tensor(numbers), torch.tensor(spans).flatten())


def _spans(call: list[_Stretch]) -> list[list[int]]:
    """First and end of the tokens of the rank that a call has; neighbours are one."""
    spans: list[list[int]] = []
    for each in call:
        if spans and spans[-1][1] == each.place:
            spans[-1][1] += each.end - each.start
        else:
            spans.append([each.place, each.place + each.end - each.start])
    return spans


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
    keys: list[Ints] = [np.array([call[0].at])]
    done, end = 0, call[0].at
    for stretch in call:
        if stretch.at > end:
            queries.append(np.array([done]))
            keys.append(np.array([stretch.at]))
        low, high = np.searchsorted(bounds, (stretch.start, stretch.end), side="right")
        cuts = bounds[low:high]
        cuts = np.append(cuts[cuts < stretch.end], stretch.end)
        queries.append(cuts - stretch.start + done)
        keys.append(cuts - stretch.first + stretch.at)
        done, end = done + stretch.end - stretch.start, stretch.after
    return np.concatenate(queries), np.concatenate(keys) - call[0].at
