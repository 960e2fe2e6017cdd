"""The modules whose weights are needed at the same time, and are therefore gathered together."""

from __future__ import annotations

from torch import nn

from ..models.base import ParallelModel
from ..models.stand_ins import AbsentLayer


def gather_units(model: ParallelModel) -> list[list[nn.Module]]:
    """Every parameter of `model` belongs to exactly one unit, in the order of the forward.

    A unit is a module that is spread over ranks of its own (experts), a decoder layer without such, or a module outside
    the layers that holds parameters itself. Modules that share a parameter, or lie inside each other, are one unit.
    """
    spread = {name.rpartition(".")[0] for name, spec in model.shard_specs.items() if spec.axis == "ep"}
    layers = [layer for _, layer in model.anatomy.numbered_layers() if not isinstance(layer, AbsentLayer)]
    own_units = [model.get_submodule(name) for name in spread]
    tops = {*layers, *own_units}
    inside = {module for top in tops for module in top.modules()}
    units: list[list[nn.Module]] = []
    unit_of: dict[nn.Parameter, list[nn.Module]] = {}
    for module in model.modules():
        if module in tops:
            units.append([module])
        elif module not in inside and module is not model and (own := list(module.parameters(recurse=False))):
            unit = next((unit_of[parameter] for parameter in own if parameter in unit_of), None)
            if unit is None:
                unit = []
                units.append(unit)
            unit.append(module)
            unit_of.update(dict.fromkeys(own, unit))
            inside.update(module.modules())
            for parameter in module.parameters():
                unit_of[parameter] = unit
    return units
