"""A linear layer with a low-rank term: `x @ W.T + scaling * x @ A.T @ B.T` (Hu et al. 2021, arXiv:2106.09685).

It holds for the parts of a layer that is cut over ranks, with no communication of its own. If output features are cut,
`A` is whole on every rank and `B` is cut. If input features are, `A` is cut and `B` is whole: each rank adds `B` of its
partial `A x`, and who sums the layer's partial outputs sums that, too.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch

from .linear import Linear


class AdaptedLinear(Linear):
    """Some `Linear` with a trained low-rank term.

    Attributes:
        lora_A: `[in, rank]` features.
        lora_B: `[rank, out]` features.
        scaling: of the term.
    """

    lora_A: Linear
    lora_B: Linear
    scaling: float

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        term: torch.Tensor = self.lora_B(self.lora_A(input.to(self.lora_A.weight.dtype)))
        output = super().forward(input)
        return output + (term * self.scaling).to(output.dtype)


@functools.cache
def adapted_class(base: type[Linear]) -> type[AdaptedLinear]:
    """`AdaptedLinear` over what a kind of `Linear` computes."""
    return cast(type[AdaptedLinear], type(f"Adapted{base.__name__}", (AdaptedLinear, base), {}))


def adapt(module: Linear, a: torch.Tensor, b: torch.Tensor, scaling: float) -> None:
    """Give `module` the term of `a` `[rank, in]` and `b` `[out, rank]`, in place."""
    module.__class__ = adapted_class(cast(Any, type(module)))
    adapted = cast(AdaptedLinear, module)
    for name, weight in (("lora_A", a), ("lora_B", b)):
        linear = Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = torch.nn.Parameter(weight)
        setattr(adapted, name, linear)
    adapted.scaling = scaling
