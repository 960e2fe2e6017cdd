"""The tokens of every row that a context-parallel rank has, and whole rows made of them again.

All but attention sees a token with its position, so tokens may lie on the ranks in any order. Which rank has which is
said by `places`, the same on all ranks of the group.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ...ops.host_copy import to_device
from ..collectives import all_gather, gather_sequence
from ..mesh import Group


@dataclass(frozen=True, eq=False)
class RowParts:
    """How the rows of one batch are shared by the ranks of `group`.

    Args:
        places: `[ranks, B, S / ranks]`, int64, on the host: places of each rank's tokens in their rows, in the order in
            which the rank has them.
    """

    group: Group
    places: torch.Tensor
    _copies: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict, repr=False)

    def own(self, whole: torch.Tensor) -> torch.Tensor:
        """`[B, S, ...]` -> this rank's tokens of each row, `[B, S / ranks, ...]`."""
        index, _ = self._indices(whole.device)
        return torch.take_along_dim(whole, index.view(*index.shape, *(1,) * (whole.dim() - 2)), 1)

    def whole(self, own: torch.Tensor) -> torch.Tensor:
        """`[B, S / ranks, ...]` of every rank -> `[B, S, ...]` on all of them. No gradient."""
        return self._in_order(all_gather(own, self.group, 1))

    def join(self, own: torch.Tensor) -> torch.Tensor:
        """`whole`, whose gradient is summed over the ranks: each has that of what it makes of the whole."""
        return self._in_order(gather_sequence(own, self.group, 1))

    def _in_order(self, joined: torch.Tensor) -> torch.Tensor:
        _, index = self._indices(joined.device)
        return torch.take_along_dim(joined, index.view(*index.shape, *(1,) * (joined.dim() - 2)), 1)

    def _indices(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """On `device`: the places of this rank's tokens, and where in the joined parts the tokens of a row are."""
        if device not in self._copies:
            order = self.places.movedim(0, 1).flatten(1).argsort(1)
            self._copies[device] = to_device(self.places[self.group.rank], device), to_device(order, device)
        return self._copies[device]
