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
    _own: dict[torch.device, torch.Tensor] = field(default_factory=dict, repr=False)
    _order: dict[torch.device, torch.Tensor] = field(default_factory=dict, repr=False)

    def own(self, whole: torch.Tensor) -> torch.Tensor:
        """`[B, S, ...]` -> this rank's tokens of each row, `[B, S / ranks, ...]`."""
        if whole.device not in self._own:
            self._own[whole.device] = to_device(self.places[self.group.rank], whole.device)
        return _taken(whole, self._own[whole.device])

    def whole(self, own: torch.Tensor) -> torch.Tensor:
        """`[B, S / ranks, ...]` of every rank -> `[B, S, ...]` on all of them. No gradient."""
        return self._in_order(all_gather(own, self.group, 1))

    def join(self, own: torch.Tensor) -> torch.Tensor:
        """`whole`, whose gradient is summed over the ranks: each has that of what it makes of the whole."""
        return self._in_order(gather_sequence(own, self.group, 1))

    def _in_order(self, joined: torch.Tensor) -> torch.Tensor:
        """The parts of all ranks, one after another, in the order of the rows."""
        if joined.device not in self._order:
            places = self.places.movedim(0, 1).flatten(1)
            here = torch.arange(places.shape[1]).expand_as(places)
            self._order[joined.device] = to_device(torch.empty_like(places).scatter_(1, places, here), joined.device)
        return _taken(joined, self._order[joined.device])


def _taken(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The tokens at `places` `[B, tokens]` of `x` `[B, S, ...]`."""
    return torch.take_along_dim(x, places.view(*places.shape, *(1,) * (x.dim() - 2)), 1)
