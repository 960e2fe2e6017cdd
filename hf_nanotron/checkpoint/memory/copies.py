"""Copies of a rank's state in ordinary memory of the host, from which a snapshot is written while training goes on."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..state.file import StatePiece


class StateCopies:
    """One copy of each tensor, in memory that is kept from snapshot to snapshot; pinned for what lies on a GPU."""

    def __init__(self) -> None:
        self._memory: dict[str, torch.Tensor] = {}

    def of(self, pieces: list[StatePiece]) -> list[StatePiece]:
        """The pieces as they are now, complete when this returns. What was returned before is overwritten."""
        copied = []
        for piece in pieces:
            name = f"{piece.spec.name}|{piece.start}"
            tensors = {kind: self._copy(f"{name}|{kind}", tensor) for kind, tensor in piece.tensors.items()}
            scalars = {
                kind: value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else value
                for kind, value in piece.scalars.items()
            }
            copied.append(replace(piece, tensors=tensors, scalars=scalars))
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return copied

    def _copy(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        kept = self._memory.get(name)
        if kept is None or (kept.shape, kept.dtype) != (tensor.shape, tensor.dtype):
            kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._memory[name] = kept
        return kept.copy_(tensor.detach(), non_blocking=True)
