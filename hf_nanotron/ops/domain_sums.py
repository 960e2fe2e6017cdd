"""Sums over the tokens of each domain: of their losses, and of those that are predicted."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .cross_entropy import IGNORE_INDEX

ELEMENTS = 2**22  # numbers of domains x tokens that are held at a time


def domain_sums(losses: torch.Tensor, counts: torch.Tensor, domain: torch.Tensor, number: int) -> torch.Tensor:
    """`[number, 2]` in fp64: the summed loss and the predicted tokens of each domain.

    Each domain has a masked sum of its own instead of additions at its place, whose order differs from run to run on
    CUDA. Nothing is read back.

    Args:
        losses: `[B * S]`, zero where nothing is predicted.
        counts: `[B * S]` bool, whether a token is predicted.
        domain: `[B]` of whole rows, or `[B, S]` of tokens; in `[0, number)`, or `IGNORE_INDEX` for none.
    """
    values = torch.stack((losses, counts.to(losses.dtype)))
    if domain.dim() == 1:
        values = values.view(2, len(domain), -1).sum(-1, dtype=torch.float64)
    domain = domain.flatten().to(losses.device)
    numbers = torch.arange(number, device=losses.device)
    total = torch.zeros(number, 2, dtype=torch.float64, device=losses.device)
    step = max(1, ELEMENTS // max(1, number))
    for own, some in zip(values.split(step, 1), domain.split(step), strict=True):
        mine = (some == numbers[:, None])[:, None]  # [domains, 1, tokens]
        total += torch.where(mine, own, 0.0).sum(-1, dtype=torch.float64)  # not a product: a loss may be infinite
    return total


def filled_up(domain: torch.Tensor, length: int) -> torch.Tensor:
    """`domain`, of rows that were filled up to `length` tokens."""
    missing = length - domain.shape[1] if domain.dim() > 1 else 0
    if missing < 0:
        raise ValueError(f"the column `domain` is {tuple(domain.shape)}, for rows of {length} tokens.")
    return F.pad(domain, (0, missing), value=IGNORE_INDEX) if missing else domain
