"""What `parametrization` goes with."""

from __future__ import annotations

from typing import Any

from .muon import MUON

SPECTRAL_OPTIMIZERS = ("adamw", "lion", "muon")


def check_parametrization(args: Any) -> None:
    """
    Raises:
        ValueError: for a base without the spectral parametrization, that without a base, or another optimizer.
    """
    optim = str(getattr(args.optim, "value", args.optim))
    if args.parametrization != "spectral":
        for name in ("base_hidden_size", "base_sizes"):
            if getattr(args, name) is not None:
                raise ValueError(f"{name}={getattr(args, name)!r} needs parametrization='spectral'.")
        return
    if args.base_hidden_size is None:
        raise ValueError(
            "parametrization='spectral' needs base_hidden_size: the width of the small model whose learning_rate "
            "is carried over."
        )
    if not optim.startswith(SPECTRAL_OPTIMIZERS):
        raise ValueError(
            f"parametrization='spectral' with optim={optim!r}: its rule of learning rates is for updates whose "
            "size does not depend on the gradient's; use optim='adamw_torch_fused' or 'lion_32bit'."
        )
    if optim == MUON and args.muon_scale != "spectral":
        raise ValueError(
            f"parametrization='spectral' with optim='muon' and muon_scale={args.muon_scale!r}: the size of its "
            "updates does not follow the shapes of matrices in the same way; use muon_scale='spectral'."
        )
