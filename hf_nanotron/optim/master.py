"""fp32 weights that the optimizer updates, beside the weights that the model computes with."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class MasterWeights:
    """fp32 masters of a model's parameters. A parameter that is fp32 already is its own master.

    Args:
        parameters: name -> parameter of the model.
        compute_dtype: what the model computes in; the parameters are cast, the masters keep their values.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], compute_dtype: torch.dtype) -> None:
        self.parameters = parameters
        self.masters: dict[str, nn.Parameter] = {}
        for name, parameter in parameters.items():
            if compute_dtype == torch.float32:
                parameter.data = parameter.data.float()
                self.masters[name] = parameter
            else:
                master = parameter.detach().to(torch.float32, copy=True)
                self.masters[name] = nn.Parameter(master, requires_grad=parameter.requires_grad)
                parameter.data = parameter.data.to(compute_dtype)

    def attach(self, optimizer: torch.optim.Optimizer, gradients: dict[str, torch.Tensor]) -> None:
        """Make `optimizer`, built over the masters, read `gradients` and write the model's parameters."""

        def before(*_: Any) -> None:
            for name, gradient in gradients.items():
                self.masters[name].grad = gradient

        def after(*_: Any) -> None:
            for name in gradients:
                self.masters[name].grad = None
            self.write_back()

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)

    def _pairs(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        names = [name for name, master in self.masters.items() if master is not self.parameters[name]]
        return [self.masters[n].data for n in names], [self.parameters[n].data for n in names]

    def write_back(self) -> None:
        """Round the masters into the model's parameters."""
        masters, parameters = self._pairs()
        if masters:
            torch._foreach_copy_(parameters, masters)

    def read_from_model(self) -> None:
        """Take over parameters that were loaded into the model."""
        masters, parameters = self._pairs()
        if masters:
            torch._foreach_copy_(masters, parameters)
