"""What saving and loading ask of a model of which each rank holds a part."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from ...parallel.config import ParallelConfig
from ...parallel.mesh import ParallelMesh
from ...parallel.shard_spec import ShardSpec
from .layout import HubLayout


class ShardedModel(Protocol):
    """A stock model cut over the ranks of a mesh.

    Attributes:
        stock_class: the class of transformers that it stands for.
        shard_specs: parameter name -> which part of the Hub tensor it is, for the parameters of this rank.
        hub_shapes: shape of every tensor of the stock model, in its order.
        hub_owners: pipeline rank that holds (and writes) each of them.
        hub_layout: which tensors of the Hub's files they are.
        weights: what owns weights and gradients while the model trains, or None.
    """

    mesh: ParallelMesh
    config: Any
    generation_config: Any
    stock_class: type[PreTrainedModel]
    shard_specs: dict[str, ShardSpec]
    hub_shapes: dict[str, tuple[int, ...]]
    hub_owners: dict[str, int]
    hub_layout: HubLayout

    @property
    def parallel(self) -> ParallelConfig: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def weights(self) -> object: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def named_buffers(self) -> Iterator[tuple[str, torch.Tensor]]: ...

    def get_parameter(self, target: str) -> nn.Parameter: ...

    def whole_parameter(self, name: str) -> torch.Tensor: ...

    def write_parameter(self, name: str, value: torch.Tensor) -> None: ...

    def check_cut(self) -> None: ...


def held_buffers(model: ShardedModel) -> dict[str, torch.Tensor]:
    """Name -> persistent buffer, for those of this rank; it has them whole."""
    return {name: buffer.detach() for name, buffer in model.named_buffers() if name in model.hub_layout.buffers}
