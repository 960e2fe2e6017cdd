"""Writes down what a rank of a `NanotronTrainer` computes: activations, gradients, weights, losses."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from ...models.calling import CONTEXT
from ...models.stand_ins import Absent
from ...models.stock.anatomy import Anatomy, blocks_of
from ...optim.gradients import GradientPart
from ...parallel.batch import batch_shape
from ...parallel.cp.plan import ContextPlan
from ...parallel.shard_spec import ShardSpec
from ...trainer import NanotronTrainer
from .records import Activation, Piece, Record


class Recorder(TrainerCallback):
    """Is put on a trainer before it trains; `record` is complete when the run has ended.

    It is a `ForwardObserver` of the training state, so that it knows which tokens a module is called for.
    """

    def __init__(self, trainer: NanotronTrainer) -> None:
        mesh, model = trainer.mesh, trainer.model
        where = {axis: getattr(mesh.coordinates, axis) for axis in ("tp", "cp", "pp", "dp", "ep")}
        sizes = {"tp": mesh.tp_size, "cp": mesh.cp_size, "pp": mesh.pp_size, "dp": mesh.dp_size, "ep": mesh.ep_size}
        where = {axis: rank for axis, rank in where.items() if sizes[axis] > 1}
        self.record = Record(mesh.rank, where, [stage.index for stage in model.stages])
        self.record.has_own_loss = trainer.compute_loss_func is not None
        self.trainer = trainer
        self._place: int | None = None
        self._columns = torch.empty(0, dtype=torch.int64)
        self._handles = [
            module.register_forward_hook(functools.partial(self.note, name))
            for name, module in recorded_modules(model.anatomy)
        ]
        trainer.training_state.observers.append(self)
        trainer.add_callback(self)
        if any(parameter.requires_grad for parameter in model.parameters()):
            trainer.add_gradient_hook("*", self.note_gradient)

    # ---- of the training state ----

    @contextlib.contextmanager
    def over(self, step: int, micro_batches: Sequence[Mapping[str, Any]]) -> Iterator[None]:
        """Weights are written down before the forward: callbacks and the optimizer have done what they do."""
        self.note_weights()
        self.record.activations.append({})
        self.record.gradients.append([])
        yield

    def begin_forward(self, micro_batch: int, inputs: Mapping[str, Any]) -> None:
        rows, tokens = batch_shape(inputs)
        plan: ContextPlan | None = inputs.get(CONTEXT)
        if plan is None:
            self._columns = torch.arange(tokens).expand(rows, tokens)
        else:
            self._columns = plan.parts.places[plan.parts.group.rank].view(rows, -1)
        mesh = self.trainer.mesh
        self._place = micro_batch * mesh.dp_size + mesh.dp_rank  # among all of the step

    def end_forward(self) -> None:
        self._place = None

    # ---- hooks ----

    def note(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """The first tensor that `module` returns, if it has one row of features for each token."""
        first = output[0] if isinstance(output, tuple) and output else output
        if self._place is None:
            return
        if (found := with_columns(first, self._columns, self.trainer.mesh.tp)) is None:
            if name not in self.record.shapeless:
                self.record.shapeless.append(name)
            return
        columns, values = found
        if name not in self.record.modules:
            self.record.modules.append(name)
        noted = Activation(self._place, columns.clone(), values.detach().float().cpu().clone())
        self.record.activations[-1].setdefault(name, []).append(noted)

    def note_gradient(self, gradient: torch.Tensor, part: GradientPart) -> None:
        self.record.gradients[-1].append(piece_of(part.spec, part.start, part.stop, gradient))

    def note_weights(self) -> None:
        pieces = [piece_of(s.spec, s.start, s.stop, s.master) for s in self.trainer.weights.segments]
        self.record.weights.append(pieces)
        self.record.buffers.append(buffers_of(self.trainer.model))

    # ---- of the loop ----

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.record.losses.append(float(logs["loss"]))
            self.record.norms.append(float(logs["grad_norm"]))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.weights.wait()
        self.trainer.weights.take_written(compare=True)  # by a callback after the last step
        self.note_weights()
        for handle in self._handles:
            handle.remove()
        self.trainer.training_state.observers.remove(self)


def recorded_modules(anatomy: Anatomy) -> Iterable[tuple[str, nn.Module]]:
    """What is outside of the layers, but the head; the layers; and their blocks. Those that this rank has."""
    model = anatomy.model
    outside = [*anatomy.first, *anatomy.everywhere, *anatomy.last]
    named = [(name, model.get_submodule(name)) for name in outside if name != anatomy.head and _is_module(model, name)]
    for stack, layers in anatomy.layer_stacks():
        for index, layer in enumerate(layers):
            named += [(f"{stack}.{index}.{name}", block) for name, block in blocks_of(layer).items()]
            named.append((f"{stack}.{index}", layer))
    return [(name, module) for name, module in named if not isinstance(module, Absent)]


def buffers_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the buffers with fractions: counters count what a rank has done, which depends on the layout."""
    found = {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    return {name: buffer.detach().float().cpu().clone() for name, buffer in found.items()}


def _is_module(model: nn.Module, name: str) -> bool:
    owner, _, leaf = name.rpartition(".")
    return leaf in model.get_submodule(owner)._modules


def with_columns(output: Any, columns: torch.Tensor, tp: Any = None) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(columns, values `[B, tokens, H]`) of an output that has a row of features for each token; None for others.

    Args:
        columns: `[B, tokens]`, of the micro-batch as the model is called with it.
        tp: the tensor-parallel group; with sequence parallelism each of its ranks has a part of the tokens.
    """
    if not isinstance(output, torch.Tensor) or not output.is_floating_point():
        return None
    rows, tokens = columns.shape
    if output.dim() == 2 and output.shape[0] % rows == 0:
        output = output.view(rows, -1, output.shape[-1])
    if output.dim() != 3 or output.shape[0] not in (1, rows):
        return None
    if output.shape[1] == tokens:
        return columns[: output.shape[0]], output
    if tp is not None and output.shape[1] * tp.size == tokens:
        return columns[: output.shape[0]].chunk(tp.size, dim=1)[tp.rank], output
    return None


def piece_of(spec: ShardSpec, start: int, stop: int, values: torch.Tensor) -> Piece:
    ranges = spec.ranges if spec.dim is not None else ()
    shape = tuple(spec.global_shape)
    return Piece(spec.name, shape, spec.dim, tuple(ranges), start, stop, values.detach().float().cpu().clone())
