"""How the rows of one batch are shared by context-parallel ranks: for their tensors, and for their attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..mesh import ParallelMesh
from .attention import DeviceLayout, cp_attention, device_layout
from .choice import HeadShape, cheaper, divides
from .layout import filled_length, plan
from .rows import RowParts


@dataclass(frozen=True, eq=False)
class ContextPlan:
    """What the attention of every layer knows of a batch.

    Attributes:
        parts: which rank has which tokens of every row.
        layout: the same for kernels, on the device.
        length: tokens of a row before it was filled up.
        modes: `"gather"` or `"heads"`, for each window.
        heads: `ParallelConfig.cp_kv_heads_per_gather`.
        is_choice: whether `modes` are ours, and not the user's.
    """

    parts: RowParts
    layout: DeviceLayout
    length: int
    modes: dict[int | None, str]
    heads: int | None
    is_choice: bool = False

    @property
    def kinds(self) -> set[str]:
        """The ways that layers take."""
        return set(self.modes.values())

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kernel: str,
        scale: float,
        window: int | None = None,
    ) -> torch.Tensor:
        """See `cp_attention`."""
        window = _within(window, query.shape[1] * self.parts.group.size)
        group, mode = self.parts.group, self.modes.get(window, "gather")
        if self.is_choice and not divides(group.size, query.shape[2], key.shape[2]):
            mode = "gather"  # of a layer, or another model, whose heads are not those that were asked for
        return cp_attention(query, key, value, self.layout, group, kernel, scale, window, mode, self.heads)


def make_context_plan(
    mesh: ParallelMesh,
    rows: int,
    length: int,
    bounds: torch.Tensor,
    windows: Sequence[int | None],
    other_work: int = 0,
    shape: HeadShape | None = None,
) -> ContextPlan:
    """Share `rows` of `length` tokens, filled up to `row_length`.

    Args:
        bounds: of documents, `[documents + 1]`, over the tokens of all filled rows, on the host.
        windows: tokens that each layer of the whole model sees, None for all.
        other_work: see `plan`.
        shape: of a layer's attention, by which `cp_mode="auto"` chooses; it gathers without.
    """
    filled = row_length(mesh, length)
    windows = [_within(window, filled) for window in windows]
    layout = plan(bounds, rows, filled, mesh.cp_size, windows, other_work=other_work)
    places = torch.stack([layout.tokens(rank) for rank in range(mesh.cp_size)])
    kinds = tuple(dict.fromkeys((*windows, None)))  # some layers ignore the window that they say they have
    on_device = device_layout(layout, mesh.cp_rank, mesh.device, kinds)
    mode, heads = mesh.parallel.cp_mode, mesh.parallel.cp_kv_heads_per_gather
    modes = dict.fromkeys(kinds, "gather" if mode == "auto" else mode)
    if mode == "auto" and shape is not None:
        tokens = rows * filled // mesh.cp_size
        modes = {kind: cheaper(shape, mesh.cp_size, tokens, on_device.exchanges[kind]) for kind in kinds}
    return ContextPlan(RowParts(mesh.cp, places), on_device, length, modes, heads, mode == "auto")


def row_length(mesh: ParallelMesh, length: int) -> int:
    """Tokens that rows of `length` are filled up to."""
    return filled_length(length, mesh.cp_size, mesh.tp_size if mesh.parallel.sequence_parallel else 1)


def _within(window: int | None, length: int) -> int | None:
    """A window that hides anything in a row of `length`."""
    return None if window is None or window >= length else window
