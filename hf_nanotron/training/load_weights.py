"""The weights of a checkpoint, read into a model that trains: of its training state, or of the Hub's files."""

from __future__ import annotations

from pathlib import Path

import torch

from ..checkpoint.files.repository import AVERAGE_FOLDER
from ..checkpoint.hub.load import load_hub_weights
from ..checkpoint.state.buffers import load_buffers
from ..checkpoint.state.file import MASTER
from ..checkpoint.state.index import StateIndex
from ..checkpoint.state.training_state import load_masters
from ..models.base import ParallelModel
from ..optim.ema import WeightAverage
from ..parallel.collectives import all_reduce
from ..parallel.zero.segment import ShardedWeights


def load_weights(checkpoint: str, model: ParallelModel, weights: ShardedWeights, index: StateIndex | None) -> None:
    """Those that are not in the training state of this `index`, which follows with the optimizer: the frozen ones, or
    all.

    Raises:
        ValueError: on every rank, if the state holds tensors that the model does not have.
    """
    if index is None:
        load_hub_weights(model, checkpoint)
        weights.read_from_model()
        return
    pieces = (piece for of_file in index.pieces_of.values() for piece in of_file)
    stored = {piece["name"] for piece in pieces if MASTER in piece["tensors"]}
    if lost := sorted(stored - model.hub_shapes.keys()):
        raise ValueError(
            f"{checkpoint} holds {', '.join(lost[:3])}{', ...' if len(lost) > 3 else ''} ({len(lost)} tensors), which "
            "the model does not have, and which would be lost: resume with the config of the checkpoint, or begin "
            "another model with from_pretrained."
        )
    trained = {segment.name for segment in weights.segments}
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad and name not in trained]
    has_frozen = all_reduce(torch.tensor(float(bool(frozen)), device=model.mesh.device), model.mesh.world)
    if has_frozen:  # on another stage, too
        load_hub_weights(model, checkpoint, frozen)


def load_rest(
    checkpoint: str,
    model: ParallelModel,
    weights: ShardedWeights,
    average: WeightAverage | None,
    index: StateIndex | None,
) -> None:
    """After `load_weights`, where no optimizer goes on: what the training state has, and the average."""
    if index is not None:
        load_masters(checkpoint, model.mesh, weights.segments, average, index)
        load_buffers(checkpoint, model, index)
        weights.publish()
        weights.wait()
    elif average is not None and (folder := Path(checkpoint) / AVERAGE_FOLDER).is_dir():
        with average.in_place():
            load_weights(str(folder), model, weights, None)
    elif average is not None:
        average.restart()
