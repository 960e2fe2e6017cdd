"""Gradients and weights in the user's hands: hooks, reading gradients, weights set in place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.utils import logging

from ..models.base import ParallelModel
from ..models.stock.torch_hooks import hook_message, weight_hook_message
from ..optim.gradients import GradientHook, GradientHooks, GradientPart, HookHandle, chosen_weights, parts_of
from ..optim.optimizer_link import OptimizerLink
from ..parallel.collectives import all_reduce
from ..parallel.mesh import ParallelMesh
from ..parallel.together import refuse_together
from ..parallel.zero.copies import differing_weights
from ..parallel.zero.segment import ShardedWeights
from .agreement.values import compare_ranks

logger = logging.get_logger(__name__)


class GradientAccess:
    """Gives the gradients of a step to hooks and callbacks. It outlives the model that `model_init` replaces."""

    def __init__(self) -> None:
        self._hooks = GradientHooks()
        self._reads = False

    def add_hook(self, model: ParallelModel, name: str, hook: GradientHook) -> HookHandle:
        """See `NanotronTrainer.add_gradient_hook`."""
        if not callable(hook):
            raise ValueError(f"add_gradient_hook takes a function hook(gradient, part), not {hook!r}.")
        trainable = {weight: weight not in model.cut.frozen for weight in model.weight_shapes}
        return self._hooks.add(chosen_weights(name, trainable, model.hub_layout.tied), hook)

    def read(self, link: OptimizerLink | None) -> Iterator[tuple[str, GradientPart, torch.Tensor]]:
        """See `NanotronTrainer.gradients`."""
        if link is None or not link.holds_gradients:
            raise ValueError(
                "there are no gradients now: they are available between a step's backwards and its update, in "
                "on_pre_optimizer_step; add_gradient_hook changes them before they are clipped."
            )
        self._reads = True
        link.apply_clipping()
        return ((part.name, part, gradient) for gradient, part in parts_of(link.weights.segments))

    def run_hooks(self, link: OptimizerLink) -> None:
        """The gradients of a step are complete: hooks first, then the norm."""
        self._hooks.run(link.weights.segments)
        link.hold_gradients()

    @contextlib.contextmanager
    def watching(self, mesh: ParallelMesh, callbacks: Iterable[TrainerCallback]) -> Iterator[None]:
        """During an epoch. Warns in the end of callbacks that looked for gradients where there are none."""
        compare_ranks(mesh, {"what add_gradient_hook was called for": self._hooks.weights()})
        self._reads = False
        try:
            yield
        finally:
            for callback in [] if self._reads else users_callbacks(callbacks, "on_pre_optimizer_step"):
                logger.warning_once(
                    f"{type(callback).__name__}.on_pre_optimizer_step: the parameters of a parallel model have no "
                    "`grad` there. To see or change gradients, use NanotronTrainer.gradients(), or add_gradient_hook."
                )


class WrittenWeights:
    """Takes over what others write into the weights of a model, and refuses what its shards cannot follow."""

    def __init__(self, model: ParallelModel, weights: ShardedWeights) -> None:
        self.model, self.weights = model, weights
        self._slots: list[tuple[str, dict[str, Any], str, Any]] = [
            (name, model.get_submodule(name.rpartition(".")[0])._parameters, name.rpartition(".")[2], parameter)
            for name, parameter in model.named_parameters(remove_duplicate=False)
        ]
        self._trained = [(name, parameter, parameter.requires_grad) for name, _, _, parameter in self._slots]

    def take(self) -> None:
        """Train on what was written into the weights so far. All ranks together."""
        check_model(self.model)
        mesh, message = self.model.mesh, None
        try:
            self.check_slots()
            self.weights.take_written(compare=True)
        except ValueError as error:
            message = str(error)
        refuse_together(mesh, message)
        differing = differing_weights(self.model.named_parameters(), self.model.shard_specs, mesh)
        message = None
        if differing:
            message = (
                f"{differing[0]} ({len(differing)} weights) has other values on another rank that holds a copy: it was "
                "set on some ranks alone, or with other random numbers on each. Set weights on every rank alike."
            )
        refuse_together(mesh, message)

    def check_slots(self) -> None:
        """Before a step, on the host alone: weights that a callback has replaced, frozen, or put hooks on."""
        for name, slots, leaf, parameter in self._slots:
            if slots.get(leaf) is not parameter:
                raise ValueError(
                    f"{name} was replaced by another parameter after the trainer was made; write into it instead "
                    "(`with torch.no_grad(): weight.copy_(value)`)."
                )
        changed = [name for name, parameter, is_trained in self._trained if parameter.requires_grad is not is_trained]
        if changed:
            raise ValueError(
                f"requires_grad of {changed[0]} ({len(changed)} parameters) was changed after the trainer was made, "
                "which has already sharded the trainable parameters, and goes on to update these ones; change it "
                "before the trainer is made, and give each part of a run that trains others a trainer of its own."
            )
        if message := weight_hook_message((name, parameter) for name, _, _, parameter in self._slots):
            raise ValueError(message)


def check_model(model: ParallelModel) -> None:
    """Refuse hooks on gradients, and changes of the model that its weights cannot follow. All ranks together."""
    model.check_cut()
    divided = None if model.mesh.pp_size == 1 else model.anatomy.backbone
    refuse_together(model.mesh, hook_message(model, model.mesh.tp_size, divided))


def note_frozen(model: ParallelModel) -> None:
    """Let every rank know which weights of the whole model are frozen. All ranks together."""
    names, frozen = list(model.weight_shapes), model.frozen_now()
    held = {model.shard_specs[name].name for name in model.shard_specs}
    says = [float(name in held) - 2 * float(name in held and name in frozen) for name in names]
    told = all_reduce(torch.tensor(says, device=model.mesh.device), model.mesh.world).tolist()
    model.cut.frozen = frozenset(name for name, votes in zip(names, told, strict=True) if votes < 0)


def may_write_weights(callbacks: Iterable[TrainerCallback]) -> bool:
    """Whether a user's callback is called between an update and the next forward."""
    events = ("on_optimizer_step", "on_step_end", "on_step_begin", "on_epoch_begin", "on_epoch_end", "on_save")
    every = list(callbacks)
    return any(users_callbacks(every, event) for event in events)


def users_callbacks(callbacks: Iterable[TrainerCallback], event: str) -> list[TrainerCallback]:
    """Those that a user has written, and that do something at `event`."""
    return [
        callback
        for callback in callbacks
        if type(callback).__module__.partition(".")[0] not in ("transformers", "hf_nanotron")
        and getattr(type(callback), event) is not getattr(TrainerCallback, event)
    ]
