"""Persistent buffers (bias corrections of routers, say) in a training state: they have no master, and no optimizer.

They are stored like parameters, under their names, as the kind `buffer` and in their own dtype.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ...parallel.shard_spec import ShardSpec
from ...parallel.together import all_or_none
from ..hub.model import is_writer
from ..hub.sharded_model import ShardedModel, held_buffers
from .file import BUFFER, StatePiece
from .index import StateIndex
from .read import StoredState
from .slices import Slice
from .training_state import DIRECTORY


def buffer_piece(name: str, buffer: torch.Tensor) -> StatePiece:
    """A whole buffer of the training state."""
    spec = ShardSpec(name, tuple(buffer.shape))
    return StatePiece(spec, 0, buffer.numel(), {BUFFER: buffer.detach().reshape(-1)})


def buffer_pieces(model: ShardedModel) -> list[StatePiece]:
    """What this rank writes of the buffers: one rank of the pipeline stage that has them, all of them."""
    if not is_writer(model):
        return []
    owners, rank = model.hub_owners, model.mesh.pp_rank
    return [buffer_piece(name, buffer) for name, buffer in held_buffers(model).items() if owners[name] == rank]


def load_buffers(directory: str | os.PathLike[str], model: ShardedModel, index: StateIndex | None = None) -> None:
    """Restore the persistent buffers of `model` from the training state of a checkpoint. All ranks together.

    `index`: of that state, if it has been read.
    """

    def load() -> None:
        if not model.hub_layout.buffers:
            return
        with StoredState(Path(directory) / DIRECTORY, model.mesh.rank == 0, index) as stored:
            for name, buffer in held_buffers(model).items():
                buffer.copy_(read_buffer(stored, name, tuple(buffer.shape)))

    all_or_none(model.mesh, "loading the buffers", load)


def read_buffer(stored: StoredState, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A buffer of a training state, in the dtype in which it was stored."""
    whole = Slice.whole(name, shape)
    stored.check(whole, BUFFER)
    values = torch.empty(whole.numel, dtype=stored.kinds(name)[BUFFER])
    stored.fill(whole, BUFFER, values)
    return values.view(shape)
