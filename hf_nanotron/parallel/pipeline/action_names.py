"""What traces and records call the actions of a schedule, such as `forward stage=1 micro_batch=3`, and the way back."""

from __future__ import annotations

import contextlib
import re
from typing import Any

import torch

from .schedule import Action, Kind

KINDS: dict[Kind, str] = {"F": "forward", "B": "backward", "W": "weight_gradients"}
NAME = re.compile(rf"({'|'.join(KINDS.values())}) stage=(\d+) micro_batch=(\d+)$")


def named(action: Action | None) -> contextlib.AbstractContextManager[Any]:
    """Around what is done for an action: a range of `torch.profiler` with its name."""
    if action is None:
        return contextlib.nullcontext()
    name = f"{KINDS[action.kind]} stage={action.stage} micro_batch={action.micro_batch}"
    return torch.autograd.profiler.record_function(name)


def action_of(name: str) -> Action | None:
    """The action whose range has this name; None for another range."""
    found = NAME.match(name)
    if found is None:
        return None
    kind = next(kind for kind, said in KINDS.items() if said == found[1])
    return Action(kind, int(found[2]), int(found[3]))
