"""The weights of a checkpoint, read into a model that trains: of its training state, or of the Hub's files."""

from __future__ import annotations

from pathlib import Path

import torch

from ..checkpoint.files.repository import AVERAGE_FOLDER
from ..checkpoint.hub.load import load_hub_weights
from ..checkpoint.state.buffers import load_buffers
from ..checkpoint.state.index import StateIndex
from ..checkpoint.state.training_state import load_masters
from ..models.base import ParallelModel
from ..optim.ema import WeightAverage
from ..parallel.collectives import all_reduce
from ..parallel.zero.segment import ShardedWeights


def load_weights(checkpoint: str, model: ParallelModel, weights: ShardedWeights, index: StateIndex | None) -> None:
    """Those that are not in the training state of this `index`, which follows with the optimizer: the frozen ones, or
    all.
    """
    if index is None:
        load_hub_weights(model, checkpoint)
        weights.read_from_model()
        return
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
