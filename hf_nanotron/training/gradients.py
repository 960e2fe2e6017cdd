"""The part of the trainer for users who touch gradients and weights: hooks, reading gradients, weights set in place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from transformers import Trainer, TrainerCallback
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
from .same_on_all_ranks import compare_ranks

logger = logging.get_logger(__name__)


class GradientTrainer(Trainer):
    """Gives gradients to hooks and callbacks, and takes over what others write into weights."""

    model: ParallelModel
    mesh: ParallelMesh
    weights: ShardedWeights
    _link: OptimizerLink | None
    _hooks: GradientHooks | None = None

    def add_gradient_hook(self, name: str, hook: GradientHook) -> HookHandle:
        """Have `hook(gradient, part)` called in each optimizer step, before the gradient is measured and clipped.

        It stands for `weight.register_hook`, on any topology; add it on every rank. Each rank calls it for what it
        holds of the weights: `gradient` is a flat fp32 tensor `[elements]`, summed over micro-batches and ranks, and
        `part` says which elements they are (`GradientPart`; `part.of(whole)` takes the same ones out of a tensor of the
        whole weight's shape, such as a mask). The hook may change `gradient` in place, or return another of its shape.
        Several ranks may hold copies of the same elements, and are to change them alike. Weight decay goes by the
        weights, not by their gradients, as in torch.

        Args:
            name: of a weight in the stock model, or a pattern of names with `*`.

        Returns:
            A handle; `remove()` takes the hook away.

        Raises:
            ValueError: for a name or pattern that no trainable weight has.
        """
        if not callable(hook):
            raise ValueError(f"add_gradient_hook takes a function hook(gradient, part), not {hook!r}.")
        frozen = self.model.cut.frozen
        trainable = {weight: weight not in frozen for weight in self.model.weight_shapes}
        self._hooks = self._hooks or GradientHooks()
        return self._hooks.add(chosen_weights(name, trainable, self.model.hub_layout.tied), hook)

    def gradients(self) -> Iterator[tuple[str, GradientPart, torch.Tensor]]:
        """What this rank holds of the step's gradients, in `on_pre_optimizer_step`: (name, part, gradient).

        As there in stock training they are summed over micro-batches and ranks, and clipped; changes in place take
        effect on the update. Each gradient is a flat fp32 tensor `[elements]`, and `part` says which elements of the
        weight they are (see `add_gradient_hook`). The parameters' own `grad` is None.

        Raises:
            ValueError: where there are no gradients: before a step's backwards, and after its update.
        """
        if self._link is None or not self._link.holds_gradients:
            raise ValueError(
                "there are no gradients now: they are there between a step's backwards and its update, in "
                "on_pre_optimizer_step; add_gradient_hook changes them before they are clipped."
            )
        self._reads_gradients = True
        self._link.apply_clipping()
        return ((part.name, part, gradient) for gradient, part in parts_of(self.weights.segments))

    # ---- called by the trainer ----

    _reads_gradients: bool = False

    def _run_gradient_hooks(self) -> None:
        """The gradients of a step are complete; hooks first, then the norm."""
        assert self._link is not None
        if self._hooks is not None:
            self._hooks.run(self.weights.segments)
        self._link.holds_gradients = True

    def _check_model(self) -> None:
        """Refuse hooks on gradients, and changes of the model that its weights cannot follow. All ranks together.

        Raises:
            ValueError: on every rank.
        """
        self.model.check_cut()
        divided = None if self.mesh.pp_size == 1 else self.model.anatomy.backbone
        refuse_together(self.mesh, hook_message(self.model, self.mesh.tp_size, divided))

    def _note_frozen(self) -> None:
        """Let every rank know which weights of the whole model are frozen. All ranks together."""
        model, names = self.model, list(self.model.weight_shapes)
        frozen = model.frozen_now()
        held = {model.shard_specs[name].name for name in model.shard_specs}
        says = [float(name in held) - 2 * float(name in held and name in frozen) for name in names]
        told = all_reduce(torch.tensor(says, device=self.mesh.device), self.mesh.world).tolist()
        model.cut.frozen = frozenset(name for name, votes in zip(names, told, strict=True) if votes < 0)

    def _take_written(self) -> None:
        """Train on what was written into the weights so far. All ranks together.

        Raises:
            ValueError: on every rank, for data that they cannot have, and for copies that differ.
        """
        self._check_model()
        message = None
        try:
            self._check_slots()
            self.weights.take_written(compare=True)
        except ValueError as error:
            message = str(error)
        refuse_together(self.mesh, message)
        differing = differing_weights(self.model.named_parameters(), self.model.shard_specs, self.mesh)
        message = None
        if differing:
            message = (
                f"{differing[0]} ({len(differing)} weights) has other values on another rank that holds a copy: it was "
                "set on some ranks alone, or with other random numbers on each. Set weights on every rank alike."
            )
        refuse_together(self.mesh, message)

    def _note_weights(self) -> None:
        """Which parameters the trainer has taken, and where they are in the model's modules."""
        self._slots = [
            (name, self.model.get_submodule(name.rpartition(".")[0])._parameters, name.rpartition(".")[2], parameter)
            for name, parameter in self.model.named_parameters(remove_duplicate=False)
        ]

    _slots: list[tuple[str, dict[str, Any], str, Any]]

    def _check_slots(self) -> None:
        """Before a step, on the host alone: weights that a callback has replaced, or put hooks on.

        Raises:
            ValueError: naming the first.
        """
        for name, slots, leaf, parameter in self._slots:
            if slots.get(leaf) is not parameter:
                raise ValueError(
                    f"{name} was replaced by another parameter after the trainer was made; write into it instead "
                    "(`with torch.no_grad(): weight.copy_(value)`)."
                )
        if message := weight_hook_message((name, parameter) for name, _, _, parameter in self._slots):
            raise ValueError(message)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        self._take_written()  # of callbacks at the begin of the run or the epoch
        hooked = [] if self._hooks is None else self._hooks.weights()
        compare_ranks(self.mesh, {"what add_gradient_hook was called for": hooked})
        self._reads_gradients = False
        try:
            return super()._run_epoch(*args, **kwargs)
        finally:
            self._say_that_gradients_were_not_read()

    def _say_that_gradients_were_not_read(self) -> None:
        if self._reads_gradients:
            return
        for callback in users_callbacks(self.callback_handler.callbacks, "on_pre_optimizer_step"):
            logger.warning_once(
                f"{type(callback).__name__}.on_pre_optimizer_step: the parameters of a parallel model have no `grad` "
                "there. If it is to see or change gradients, use NanotronTrainer.gradients(), or add_gradient_hook."
            )


def users_callbacks(callbacks: Iterable[TrainerCallback], event: str) -> list[TrainerCallback]:
    """Those that a user has written, and that do something at `event`."""
    return [
        callback
        for callback in callbacks
        if type(callback).__module__.partition(".")[0] not in ("transformers", "hf_nanotron")
        and getattr(type(callback), event) is not getattr(TrainerCallback, event)
    ]
