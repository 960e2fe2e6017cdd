"""The modules whose weights are needed at the same time, and are therefore gathered together."""

from __future__ import annotations

from torch import nn

from .base import ParallelModel
from .plan import decoder_layers
from .stage import AbsentLayer


def gather_units(model: ParallelModel) -> list[list[nn.Module]]:
    """Every parameter of `model` belongs to exactly one unit, in the order of the forward.

    A unit is a decoder layer, or a module outside the layers that holds parameters itself (embedding, final norm,
    head). Modules that share a parameter (a tied embedding and head) are one unit.
    """
    try:
        layers = [layer for layer in decoder_layers(model)[1] if not isinstance(layer, AbsentLayer)]
    except ValueError:  # a family that keeps them somewhere unusual, and is therefore not cut
        layers = []
    inside = {module for layer in layers for module in layer.modules()}
    units: list[list[nn.Module]] = []
    unit_of: dict[nn.Parameter, list[nn.Module]] = {}
    for module in model.modules():
        if module in layers:
            units.append([module])
        elif module not in inside and (own := list(module.parameters(recurse=False))):
            unit = next((unit_of[parameter] for parameter in own if parameter in unit_of), None)
            if unit is None:
                unit = []
                units.append(unit)
            unit.append(module)
            unit_of.update(dict.fromkeys(own, unit))
    return units
