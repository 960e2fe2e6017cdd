"""torch's own gradient hooks, which a parallel model cannot call, and the sentences that say so."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from .hooks import BACKWARD, users_hooks

INSTEAD = (
    "Gradients are summed in fp32 over micro-batches and sharded over ranks, so torch would call the hook with a part "
    "of that sum, or with None. Remove it and use NanotronTrainer.add_gradient_hook(name, hook)."
)


def has_hook(parameter: nn.Parameter) -> bool:
    """Whether it has a `register_hook` or a `register_post_accumulate_grad_hook`. (torch has no public question.)"""
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)


def weight_hook_message(parameters: Iterable[tuple[str, nn.Parameter]]) -> str | None:
    """Why the gradient hooks of weights are refused; None if there are none."""
    if names := [name for name, parameter in parameters if has_hook(parameter)]:
        return f"{names[0]} has a gradient hook ({len(names)} weights have one). {INSTEAD}"
    return None


def module_hook_message(model: nn.Module, tp_size: int, divided: str | None) -> str | None:
    """Why backward hooks of modules are refused; None if each sees what it sees in the stock model.

    `divided`: a module that no rank calls as a whole, nor those around it.
    """
    for name, module in model.named_modules():
        if not users_hooks(module, BACKWARD):
            continue
        where = f"{name or 'the model'} ({type(module).__name__}) has a backward hook"
        if not name or (divided is not None and f"{divided}.".startswith(f"{name}.")):
            return (
                f"{where}, but is not called as one module during training: torch would not call the hook. Remove it."
            )
        if tp_size > 1:
            return (
                f"{where}: with tp_size={tp_size} it would get this rank's shard of the gradient only. Remove it, "
                "or use tp_size=1; for weights use NanotronTrainer.add_gradient_hook."
            )
    return None


def hook_message(model: nn.Module, tp_size: int, divided: str | None) -> str | None:
    """Why hooks on gradients of `model` are refused; None if it has none that would not be called as in stock."""
    return weight_hook_message(model.named_parameters()) or module_hook_message(model, tp_size, divided)
