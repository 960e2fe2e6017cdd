"""The optimizer over this rank's fp32 weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# Each updates every element by its own gradient and state alone, so a part of a matrix is updated as in the whole.
ELEMENTWISE = ("Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD")


def check_elementwise(optimizer_class: type[torch.optim.Optimizer]) -> None:
    """Refuse an optimizer that would compute something else on a part of a matrix.

    Raises:
        ValueError: naming it and the ones that work.
    """
    if optimizer_class not in {getattr(torch.optim, name) for name in ELEMENTWISE}:
        raise ValueError(
            f"optimizer_cls_and_kwargs: {optimizer_class.__name__} is not known to work element by element, as an "
            f"optimizer over parts of matrices must; use one of torch.optim.{', '.join(ELEMENTWISE)}."
        )


def build_optimizer(
    masters: dict[str, nn.Parameter],
    decayed: set[str],
    weight_decay: float,
    optimizer_class: type[torch.optim.Optimizer],
    optimizer_arguments: dict[str, Any],
) -> torch.optim.Optimizer:
    """Two parameter groups, as in Trainer: those whose name is in `decayed`, and the others without weight decay."""
    trained = {name: master for name, master in masters.items() if master.requires_grad}
    groups = [
        {"params": [p for n, p in trained.items() if n in decayed], "weight_decay": weight_decay},
        {"params": [p for n, p in trained.items() if n not in decayed], "weight_decay": 0.0},
    ]
    return optimizer_class(groups, **optimizer_arguments)
