"""Give every parameter the value it has on every topology.

Each module is initialised whole by the stock `_init_weights`, one at a time, from a seed derived from its Hub name;
then our part is cut out. So the values depend on the seed and the name alone, and the peak is one whole module.
"""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from ..parallel.mesh import ParallelMesh
from ..parallel.random import GeneratorState, seed_from, seed_generators
from .base import ParallelModel
from .stage import ABSENT


def materialise(model: ParallelModel, device: torch.device) -> None:
    """Replace meta parameters and buffers by uninitialised ones on `device`, keeping ties."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                if parameter not in made:
                    empty = torch.empty_like(parameter, device=device)
                    made[parameter] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                module._parameters[name] = made[parameter]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device=device)


def initialise(model: ParallelModel, stock: PreTrainedModel, seed: int, parameters: bool = True) -> None:
    """Fill `model` from the stock initialisation.

    Args:
        model: this rank's part, materialised.
        stock: the whole stock model on the meta device, whose modules say how each is initialised.
        seed: the same on every rank.
        parameters: False fills the buffers alone (rotary tables), for a model whose weights come from a file.
    """
    whole = dict(stock.named_modules())
    state = GeneratorState()
    for name, module in model.named_modules():
        own_parameters = dict(module.named_parameters(recurse=False)) if parameters else {}
        own_buffers = {} if isinstance(module, ABSENT) else dict(module.named_buffers(recurse=False))
        if not own_parameters and not own_buffers:
            continue
        specs = {leaf: model.shard_specs[_held_name(model, name, leaf)] for leaf in own_parameters}
        source = next(iter(specs.values())).name.rpartition(".")[0] if specs else name
        template = copy.deepcopy(whole[source]).to_empty(device=model.mesh.device)
        seed_generators(seed_from(seed, source))
        with torch.no_grad():
            stock._init_weights(template)
            for leaf, parameter in own_parameters.items():
                parameter.copy_(specs[leaf].slice(template.get_parameter(leaf)))
            for leaf, buffer in own_buffers.items():
                buffer.copy_(template.get_buffer(leaf))
    state.restore()


def _held_name(model: ParallelModel, module: str, leaf: str) -> str:
    """Key of `shard_specs` for a parameter that may be listed under the name it is tied to."""
    name = f"{module}.{leaf}"
    if name in model.shard_specs:
        return name
    parameter = model.get_parameter(name)
    return next(other for other, candidate in model.named_parameters() if candidate is parameter)


def common_seed(mesh: ParallelMesh) -> int:
    """`torch.initial_seed()` of rank 0, on every rank: what `transformers.set_seed` set."""
    if mesh.world_size == 1:
        return torch.initial_seed()
    seed = torch.tensor([torch.initial_seed() % 2**62], device=mesh.device)
    dist.broadcast(seed, 0)
    return int(seed.item())
