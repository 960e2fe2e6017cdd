"""Initial weights of the spectral parametrization: the stock ones of the base model, spread as each shape asks.

The stock initialisation runs as always. Then each weight is multiplied so that its standard deviation is the factor of
its shape times the one that the same weight has in the base model, which is initialised for that, one module at a time.
Most families take one deviation at any width; some divide it by the root of the inputs themselves.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ...parallel.dropout_streams import GeneratorState, seed_from, seed_generators
from ..spectral.scales import WeightScale
from ..weight_roles import WeightRole
from .initialize import Initialisers, constructed


class Respread:
    """Called with the name and the whole value of a weight, which it changes in place.

    Args:
        base: the base model on the meta device, where it is again after each call.
        scales: by name in the stock model.
        roles: of the model at hand.
        seed: the same on every rank.
        device: where the weights of one module of `base` may be.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        scales: dict[str, WeightScale],
        roles: dict[str, WeightRole],
        seed: int,
        device: torch.device,
    ) -> None:
        self._base, self._scales, self._roles = base, scales, roles
        self._seed, self._device = seed, device
        self._inits = Initialisers(base)
        names = [name for name, _ in base.named_modules()]
        state = GeneratorState()
        seed_generators(seed_from(seed, "constructors"))
        self._built = constructed(base, {name: self._inits.untouched(name) for name in names})
        state.restore()

    @torch.no_grad()
    def __call__(self, name: str, whole: torch.Tensor) -> None:
        scale, role = self._scales[name], self._roles[name]
        if role.kind == "norm" and name.endswith("weight") and not whole.any():
            whole.fill_(scale.multiplier - 1)  # norms that multiply by 1 + weight
            return
        factors = [scale.multiplier * factor for factor in scale.spread]
        if role.fan_in > 1:
            change = self._deviation(name) / float(whole.double().std()) if whole.any() else 1.0
            # The deviations of two samples of one distribution differ by chance.
            if abs(change - 1) > CHANCE * whole.numel() ** -0.5 + CHANCE * self._numel(name) ** -0.5:
                factors = [change * factor for factor in factors]
        if all(factor == 1.0 for factor in factors):
            return
        parts = role.parts if len(factors) > 1 else None
        if parts is None:
            whole.mul_(factors[0])
            return
        for ranges, factor in zip(parts, factors, strict=True):
            for start, stop in ranges:
                whole.narrow(role.out_dim, start, stop - start).mul_(factor)

    def _numel(self, name: str) -> int:
        return self._base.get_parameter(name).numel()

    def _deviation(self, name: str) -> float:
        """The standard deviation that a weight of the base model is given."""
        source, _, leaf = name.rpartition(".")
        module = self._base.get_submodule(source)
        state = GeneratorState()
        seed_generators(seed_from(self._seed, source))  # at the base's own sizes, the very values of the model
        module.to_empty(device=self._device, recurse=False)
        for built, value in self._built.get(source, {}).items():
            getattr(module, built).copy_(value)
        self._inits.run(source)
        deviation = float(getattr(module, leaf).double().std())
        module.to_empty(device=torch.device("meta"), recurse=False)
        state.restore()
        return deviation


CHANCE = 3.0  # standard errors, of which that of a deviation is at most (2 n)^-1/2 for bell-shaped samples and flatter
