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
        logger.warning(_message(bad, tensor.numel(), name, where))
    return tensor


def _message(bad: int, of: int, name: str, where: str) -> str:
    return (
        f"{bad} of {of} values of {name!r} in {where} are not finite (nan or inf): the model outputs nan and cannot be "
        "trained. Use an earlier checkpoint."
    )


class NonfiniteCount:
    """Counts on the device while tensors are read part by part, and speaks of all of them in the end."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._bad: dict[str, torch.Tensor] = {}
        self._seen: dict[str, int] = {}

    def look_at(self, name: str, values: torch.Tensor) -> None:
        """At values (1-D) of a tensor."""
        if not values.is_floating_point() or values.element_size() == 1:
            return
        bad = (~values.isfinite()).sum()
        self._bad[name] = self._bad[name] + bad if name in self._bad else bad
        self._seen[name] = self._seen.get(name, 0) + values.numel()

    def warn(self) -> None:
        """Of what was looked at on this rank."""
        if not self._bad:
            return
        for name, bad in zip(self._bad, torch.stack(list(self._bad.values())).tolist(), strict=True):
            if bad:
                logger.warning(_message(bad, self._seen[name], name, self._where))
