"""Norm, root mean square, largest value and fraction of zeros of whole tensors, from the parts that ranks hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from ..parallel.collectives import all_reduce
from ..parallel.mesh import Group

SUMMED = ("squares", "zeros", "count")
FIGURES = ("norm", "rms", "max", "zeros")


class TensorStatistics:
    """Sums over the elements of tensors, by name, on the device; nothing waits for it before `over`.

    Args:
        names: the same, in the same order, on all ranks that `over` joins.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self.names = list(names)
        self._row = {name: row for row, name in enumerate(self.names)}
        self._sums = torch.zeros(len(self.names), len(SUMMED), dtype=torch.float64, device=device)
        self._most = torch.zeros(len(self.names), dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Count all elements of `tensor`, each of which one rank of the job counts."""
        if not tensor.numel():
            return
        norm = torch.linalg.vector_norm(tensor, dtype=torch.float32)
        most = torch.linalg.vector_norm(tensor, math.inf, dtype=torch.float32)
        zeros = tensor.numel() - tensor.count_nonzero()
        self._add(name, norm.double().square(), most, zeros, torch.tensor(tensor.numel()))

    @torch.no_grad()
    def add_tokens(self, name: str, tensor: torch.Tensor, counts: torch.Tensor) -> None:
        """Count the elements of the tokens where `counts` is not 0.

        Args:
            tensor: `[B, S, ...]`.
            counts: `[B, S]`.
        """
        rows, counts = tensor.flatten(2), counts != 0
        norms = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32).where(counts, 0.0)
        most = torch.linalg.vector_norm(rows, math.inf, dim=-1, dtype=torch.float32).where(counts, 0.0)
        zeros = (rows.shape[-1] - rows.count_nonzero(dim=-1)).where(counts, 0)
        self._add(name, norms.double().square().sum(), most.max(), zeros.sum(), counts.sum() * rows.shape[-1])

    def _add(self, name: str, *values: torch.Tensor) -> None:
        squares, most, zeros, count = (value.to(self._sums.device, torch.float64) for value in values)
        row = self._row[name]
        self._sums[row] += torch.stack([squares, zeros, count])
        self._most[row] = torch.maximum(self._most[row], most)


def over(group: Group, statistics: Mapping[str, TensorStatistics]) -> dict[str, float]:
    """`KIND/NAME/FIGURE` of all tensors that some rank has counted. Two sums of all kinds at once; all ranks together.

    `statistics`: by kind, such as "weights".
    """
    held = list(statistics.values())
    sums = all_reduce(torch.cat([each._sums for each in held]), group)
    most = all_reduce(torch.cat([each._most for each in held]), group, dist.ReduceOp.MAX)
    labels = [f"{kind}/{name}" for kind, each in statistics.items() for name in each.names]
    found: dict[str, float] = {}
    for label, (squares, zeros, count), largest in zip(labels, sums.tolist(), most.tolist(), strict=True):
        if count:
            values = (math.sqrt(squares), math.sqrt(squares / count), largest, zeros / count)
            found |= {f"{label}/{figure}": value for figure, value in zip(FIGURES, values, strict=True)}
    return found
