"""Give every parameter the value it has on every topology.

Each module is initialised whole by the stock `_init_weights`, from a seed derived from its Hub name; then our part is
taken. So values depend on the seed and the name alone, and the peak of memory is one module's own tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from transformers import PreTrainedModel

from ...parallel.dropout_streams import GeneratorState, seed_from, seed_generators
from ...parallel.mesh import ParallelMesh
from ...parallel.shard_spec import ShardSpec
from ..base import ParallelModel
from ..methods import parameter_name
from ..stand_ins import ABSENT

Respread = Callable[[str, torch.Tensor], None]
SMALL = 1 << 16  # elements that a constructor may compute with


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


def initialise(
    model: ParallelModel,
    stock: PreTrainedModel,
    seed: int,
    parameters: bool = True,
    respread: Respread | None = None,
) -> None:
    """Fill `model`, materialised, from the stock initialisation; `seed` is the same on every rank.

    Args:
        stock: the whole model on the meta device, where it is again afterwards.
        parameters: False fills the buffers alone (rotary tables), for a model whose weights come from a file.
        respread: changes a whole weight of this name in place, before this rank takes its part.
    """
    state = GeneratorState()
    inits = Initialisers(stock)
    names = [name for name, _ in stock.named_modules()]
    seed_generators(seed_from(seed, "constructors"))
    built = constructed(stock, {name: inits.untouched(name, parameters) for name in names})
    for source, targets in _targets(model, stock, parameters).items():
        template = stock.get_submodule(source)
        template.to_empty(device=model.mesh.device, recurse=False)
        seed_generators(seed_from(seed, source))
        with torch.no_grad():
            for leaf, value in built.get(source, {}).items():
                getattr(template, leaf).copy_(value)
            inits.run(source)
            weights = {leaf: spec.name for leaf, _, spec in targets if spec is not None}  # tied ones once
            if respread is not None:
                for leaf, name in weights.items():
                    respread(name, getattr(template, leaf))
            for leaf, tensor, spec in targets:
                whole = getattr(template, leaf)
                tensor.copy_(whole if spec is None else spec.slice(whole))
        template.to_empty(device=torch.device("meta"), recurse=False)
    state.restore()


def _targets(
    model: ParallelModel, stock: PreTrainedModel, parameters: bool
) -> dict[str, list[tuple[str, torch.Tensor, ShardSpec | None]]]:
    """What comes from each stock module: the name of its tensor there, ours, and our part of it if it may be cut."""
    targets: dict[str, list[tuple[str, torch.Tensor, ShardSpec | None]]] = {}
    for name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False) if parameters else ():
            spec = model.shard_specs[parameter_name(model, f"{name}.{leaf}", parameter)]
            source, _, there = spec.name.rpartition(".")
            targets.setdefault(source, []).append((there, parameter, spec))
        if isinstance(module, ABSENT):
            continue
        known = stock.get_submodule(name)._buffers
        for leaf, buffer in module.named_buffers(recurse=False):
            if leaf in known:  # else a stand-in
                targets.setdefault(name, []).append((leaf, buffer, None))
    return targets


class Initialisers:
    """Runs what transformers' `initialize_weights` would run on one module, and on no other.

    The `_init_weights` of the innermost `PreTrainedModel` around it, then those of the modules around it, some of which
    set tensors of their children anew; all other tensors are on the meta device, where that does nothing.
    """

    def __init__(self, stock: PreTrainedModel) -> None:
        self._stock = stock

    def run(self, name: str) -> None:
        """Initialise the tensors of the module of this name itself, not of its children."""
        path = name.split(".") if name else []
        chain: list[nn.Module] = [self._stock]
        for part in path:
            chain.append(chain[-1].get_submodule(part))
        owners: list[PreTrainedModel] = []  # for each module of the chain, the model whose `_init_weights` counts
        for module in chain:
            owners.append(module if isinstance(module, PreTrainedModel) else owners[-1])
        for module, owner in zip(reversed(chain), reversed(owners), strict=True):
            if module is chain[-1] or module is not owner:
                owner._init_weights(module)

    def untouched(self, name: str, parameters: bool = True) -> set[str]:
        """Names of a module's own tensors that `run` does not write, tried on the meta device."""
        module = self._stock.get_submodule(name)
        tensors = {**(module._parameters if parameters else {}), **module._buffers}
        versions = {leaf: tensor._version for leaf, tensor in tensors.items() if tensor is not None}
        if not versions:
            return set()
        with torch.no_grad():
            self.run(name)
        return {leaf for leaf, version in versions.items() if getattr(module, leaf)._version == version}


def constructed(stock: PreTrainedModel, leaves: dict[str, set[str]]) -> dict[str, dict[str, torch.Tensor]]:
    """Values that the constructors of stock modules compute, such as initial constants: module -> name -> value.

    The model is constructed once more, on the CPU. A tensor that is neither in `leaves` nor small goes to the meta
    device as soon as its module has it, so at most one of them exists at a time.
    """
    if not any(leaves.values()):
        return {}
    kept = {(type(stock.get_submodule(name)), leaf) for name, names in leaves.items() for leaf in names}
    with _without_large_tensors(kept), torch.device("cpu"):
        built = type(stock)._from_config(copy.deepcopy(stock.config))
    modules = {name: built.get_submodule(name) for name, names in leaves.items() if names}
    return {name: {leaf: getattr(module, leaf).detach() for leaf in leaves[name]} for name, module in modules.items()}


@contextmanager
def _without_large_tensors(kept: set[tuple[type[nn.Module], str]]) -> Iterator[None]:
    """While modules are constructed here: put their tensors on the meta device, but for small ones and those `kept`."""

    def is_kept(module: nn.Module, name: str, tensor: torch.Tensor) -> bool:
        return tensor.numel() <= SMALL or (type(module), name) in kept

    def on_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if is_kept(module, name, parameter):
            return None
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    def on_buffer(module: nn.Module, name: str, buffer: torch.Tensor | None) -> torch.Tensor | None:
        return None if buffer is None or is_kept(module, name, buffer) else buffer.to("meta")

    handles = (
        register_module_parameter_registration_hook(on_parameter),  # type: ignore[arg-type]
        register_module_buffer_registration_hook(on_buffer),  # type: ignore[arg-type]
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def common_seed(mesh: ParallelMesh) -> int:
    """`torch.initial_seed()` of rank 0, on every rank: what `transformers.set_seed` set."""
    if mesh.world_size == 1:
        return torch.initial_seed()
    seed = torch.tensor([torch.initial_seed() % 2**62], device=mesh.device)
    dist.broadcast(seed, 0)
    return int(seed.item())
