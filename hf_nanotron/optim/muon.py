"""Muon: momentum whose matrices are made orthogonal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ..ops.newton_schulz import COEFFICIENTS, SCALES, flops, orthogonalize
from .matrix_optimizer import MatrixOptimizer


class Muon(MatrixOptimizer):
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) for matrices and AdamW for all else.

    Matrices are updated as by `torch.optim.Muon`: Nesterov momentum, five steps of Newton-Schulz in bfloat16, decoupled
    weight decay. The update has singular values near 1; `muon_scale` says what multiplies it.

    Args:
        parameters: as for `MatrixOptimizer`.
        lr, weight_decay, momentum, nesterov: as there.
        ns_steps: steps of Newton-Schulz.
        ns_coefficients: of its polynomial.
        scale: `"match_rms_adamw"` (0.2 sqrt(max(out, in)): elements move as far as with AdamW, so its learning rate and
            decay serve; Liu et al. 2025, arXiv:2502.16982), `"original"` (sqrt(max(1, out / in))) or `"spectral"`
            (sqrt(out / in): a learning rate that transfers between widths; Bernstein 2025,
            https://jeremybernste.in/writing/deriving-muon). torch calls the last one `"spectral_unclamped"`.

    Raises:
        ValueError: for a value out of range.
    """

    def __init__(
        self,
        parameters: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        *,
        ns_steps: int = 5,
        ns_coefficients: tuple[float, float, float] = COEFFICIENTS,
        scale: str = "match_rms_adamw",
        **more: Any,
    ) -> None:
        if scale not in SCALES:
            raise ValueError(f"scale={scale!r} is not one of {', '.join(map(repr, SCALES))}.")
        if not 1 <= ns_steps < 100:
            raise ValueError(f"ns_steps={ns_steps} is not from 1 to 99.")
        own = {"ns_steps": ns_steps, "ns_coefficients": tuple(ns_coefficients), "scale": scale}
        super().__init__(parameters, lr, weight_decay, momentum, nesterov, matrix_defaults=own, **more)

    def direction(self, matrices: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        return orthogonalize(matrices, group["ns_steps"], group["ns_coefficients"])

    def scale(self, fan_out: int, fan_in: int, group: dict[str, Any]) -> float:
        return SCALES[group["scale"]](fan_out, fan_in)

    def cost(self, fan_out: int, fan_in: int) -> int:
        return flops(fan_out, fan_in)
