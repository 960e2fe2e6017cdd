"""transformers' own switches of recomputation, as the user of a model has set them.

A training run turns them on and off by its arguments, and puts them back at its end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..models.parts import ModelParts

SWITCH, FUNCTION = "gradient_checkpointing", "_gradient_checkpointing_func"
HOOKS = "_require_grads_hooks"  # of transformers, which make what the embedding returns require a gradient
NAME = "checkpointing switches"  # among the decorations of a model


@dataclass(frozen=True)
class Switches:
    """The switches of a model at one time: of each module what its instance holds (the class says the rest), and
    `HOOKS`.
    """

    of: dict[nn.Module, dict[str, Any]]
    hooks: list[Any]

    def restore(self, model: nn.Module) -> None:
        for module, values in self.of.items():
            for name in (SWITCH, FUNCTION):
                module.__dict__.pop(name, None)
            module.__dict__.update(values)
        for hook in getattr(model, HOOKS, ()):
            if hook not in self.hooks:
                hook.remove()
        setattr(model, HOOKS, self.hooks)


def note_switches(model: ModelParts) -> None:
    """A training run begins; `restore_switches` is for its end."""
    of = {
        module: {name: vars(module)[name] for name in (SWITCH, FUNCTION) if name in vars(module)}
        for module in model.modules()
        if hasattr(module, SWITCH)
    }
    model.decorations.add(NAME, Switches(of, list(getattr(model, HOOKS, ()))).restore)


def restore_switches(model: ModelParts) -> None:
    model.decorations.remove(NAME, model)
