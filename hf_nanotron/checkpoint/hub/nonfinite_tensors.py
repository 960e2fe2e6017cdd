"""A warning for weights that are not numbers, where they are read: a run that starts from them trains nothing."""

from __future__ import annotations

from math import isfinite

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)

CHUNK = 1 << 24  # elements that are looked at in one go, so that a copy of a large tensor never exists


def warn_nonfinite(name: str, tensor: torch.Tensor, where: str) -> torch.Tensor:
    """Say so if `tensor` has nan or inf; returns it."""
    if not tensor.is_floating_point() or tensor.is_meta or tensor.numel() == 0:
        return tensor
    flat = tensor.detach().reshape(-1)
    if isfinite(float(flat.sum(dtype=torch.float64 if flat.dtype == torch.float64 else torch.float32))):
        return tensor  # nan and inf stay in a sum; what is left is a sum that is too large
    bad = sum(int((~part.isfinite()).sum()) for part in flat.split(CHUNK))
    if bad:
        logger.warning(
            f"{bad} of {tensor.numel()} values of {name!r} in {where} are not finite (nan or inf): the model outputs "
            "nan and cannot be trained. Use an earlier checkpoint."
        )
    return tensor
