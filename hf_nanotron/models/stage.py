"""Run one pipeline stage through the stock backbone forward, with taps in the place of absent layers.

The layer before the first local one returns what was received, the one after the last records what is to be sent. So
masks, positions and rotary tables come from the stock forward. See `docs/design/models.md`.
"""

from __future__ import annotations

import contextlib
from types import MethodType
from typing import Any

import torch
from torch import nn

from .calling import accepted
from .parts import ModelParts
from .stand_ins import AbsentEmbedding, AbsentLayer, Boundary, put_stand_in, stand_in
from .stock.foreign import is_foreign_class
from .stock.releases import cache_in
from .stock_forward import stock_forward
from .training_loss import MicroBatch

LOSS_WEIGHT = "loss_weight"  # of a micro-batch: what its loss is multiplied by


class StageInput(AbsentLayer):
    """The stand-in before the first local layer: returns what was received."""

    received: Boundary

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        super().forward(hidden_states, *args, **kwargs)
        return self.result(self.received)


class StageEnd(Exception):
    """Leaves a forward whose remainder is for later stages."""


class StageOutput(AbsentLayer):
    """The stand-in after the last local layer: records what is to be sent. `ends`: the forward is left here."""

    recorded: Boundary
    ends = False

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.recorded = self.boundary(hidden_states, args, kwargs)
        if self.ends:
            raise StageEnd
        return super().forward(hidden_states, *args, **kwargs)


class Stage:
    """One stage of the model: a view that shares every parameter with `model` but holds only this stage's layers."""

    def __init__(self, model: ModelParts, index: int, layers: range, num_stages: int) -> None:
        self.index, self.layers = index, layers
        self.is_first, self.is_last = index == 0, index == num_stages - 1
        self._model, self._view = model, model
        self._copied: list[nn.Module] = [model]
        self._input: StageInput | None = None
        self._output: StageOutput | None = None
        if num_stages > 1:
            self._make_view(layers)

    def _make_view(self, layers: range) -> None:
        """Copy the modules on the way to the parts that differ, and put this stage's parts into the copies."""
        anatomy = self._model.anatomy
        views = {"": _shallow_copy(self._model)}
        path = anatomy.backbone.split(".") if anatomy.backbone else []
        for depth, leaf in enumerate(path):
            owner = views[".".join(path[:depth])]
            views[".".join(path[: depth + 1])] = owner._modules[leaf] = _shallow_copy(owner._modules[leaf])
        self._view, self._copied = views[""], list(views.values())
        assert anatomy.layers is not None
        chosen: list[nn.Module] = []
        for index, layer in enumerate(anatomy.decoder_layers()):
            if index in layers:
                chosen.append(layer)
            elif index == layers.start - 1:
                self._input = StageInput(layer, index)
                chosen.append(self._input)
            elif index == layers.stop:
                self._output = StageOutput(layer, index)
                chosen.append(self._output)
            else:
                chosen.append(AbsentLayer(layer, index))
        owner_name, _, leaf = anatomy.layers.rpartition(".")
        views[owner_name]._modules[leaf] = nn.ModuleList(chosen)
        absent = (*(() if self.is_first else anatomy.first), *(() if self.is_last else anatomy.last))
        for name in absent:
            owner_name, _, leaf = name.rpartition(".")
            owner = views[owner_name]
            put_stand_in(owner, leaf, stand_in(getattr(owner, leaf), self._model.dtype, self._model.mesh.device))

    def forward(self, inputs: dict[str, Any], received: Boundary | None) -> Any:
        """What goes to the next stage, or the causal LM's output on the last one. `labels` count on the last stage
        only.
        """
        output = self._compute(inputs, received)
        micro_batch = self._model.training_loss.micro_batch
        if self.is_last and self._model.training and micro_batch is not None:
            self._note_logits(micro_batch, inputs, output)
            micro_batch.finish(output)
        return output

    def _note_logits(self, micro_batch: MicroBatch, inputs: dict[str, Any], output: Any) -> None:
        """Of a loss from whole logits: what the model thinks of the tokens. `compute_loss` sees to its own."""
        figures = self._model.training_loss.figures
        if figures is None or micro_batch.by_caller or not micro_batch.counts:
            return
        labels = inputs.get("labels") if micro_batch.labels is None else micro_batch.labels
        shift_labels = inputs.get("shift_labels") if micro_batch.shift_labels is None else micro_batch.shift_labels
        figures.note_logits(output.logits, labels, shift_labels, self._model.mesh.alone)

    def _compute(self, inputs: dict[str, Any], received: Boundary | None) -> Any:
        for copied in self._copied:
            copied.training = self._model.training
            for module in copied.children():
                if isinstance(module, AbsentEmbedding):
                    module.dtype = self._model.dtype  # a change of the model's does not reach into views
        mixture = self._model.mixture
        if mixture is None:
            return self._run(inputs, received)
        weight = inputs.get(LOSS_WEIGHT)
        travels = mixture.adds_loss(inputs)
        sums: torch.Tensor | None = None
        if received is not None and travels:
            *boundary, sums = received
            received = tuple(boundary)
        with mixture.recording() as records:
            output = self._run(mixture.without_stock_loss(inputs), received)
        packed = mixture.add(records, sums, inputs, self._model.training)
        if packed is None:
            return output
        if not self.is_last:
            return (*output, packed)
        if mixture.reports_loss:
            output["aux_loss"] = mixture.aux_loss(packed, self._model.training)
            output.move_to_end("aux_loss", last=False)  # before the logits, as stock outputs have it
        else:
            figures = self._model.training_loss.figures
            if figures is not None:
                figures.note_auxiliary(mixture.aux_loss(packed.detach(), self._model.training))
            routers = mixture.loss(packed, self._model.training)
            output.loss = output.loss + (routers if weight is None else routers * weight)
        return output

    def _run(self, inputs: dict[str, Any], received: Boundary | None) -> Any:
        if self._input is not None:
            assert received is not None
            self._input.received = received
        if self.is_last:
            return stock_forward(self._model, self._view, **inputs)
        assert self._output is not None
        model, micro_batch = self._model, self._model.training_loss.micro_batch
        if model.training and micro_batch is not None:
            inputs = micro_batch.fill(inputs)
        if is_foreign_class(model.stock_class):
            # It may change what it hands to its backbone. What it does afterwards is for the last stage.
            self._output.ends = cache_in(inputs) is None
            given = {k: v for k, v in inputs.items() if k != LOSS_WEIGHT and (self._output.ends or k != "labels")}
            with contextlib.suppress(StageEnd):
                model.stock_class.forward(self._view, **accepted(model.stock_class.forward, given))
        else:
            ignored = {"labels", "num_items_in_batch", "shift_labels", "logits_to_keep", "return_dict", LOSS_WEIGHT}
            base = self._view if len(self._copied) == 1 else self._copied[1]
            given = {name: value for name, value in inputs.items() if name not in ignored}
            base(**accepted(type(base).forward, given))
        boundary = self._output.recorded
        del self._output.recorded
        if self._input is not None:
            del self._input.received
        return boundary


def _shallow_copy(module: Any) -> Any:
    """Another module object over the same parameters, buffers, submodules and hooks."""
    copy = module.__class__.__new__(module.__class__)
    copy.__dict__ = module.__dict__.copy()
    for table in ("_modules", "_parameters", "_buffers"):
        copy.__dict__[table] = module.__dict__[table].copy()
    copy.__dict__["_non_persistent_buffers_set"] = set(module._non_persistent_buffers_set)
    forward = copy.__dict__.get("forward")
    if isinstance(forward, MethodType) and forward.__self__ is module:  # the user's own, of this one object
        copy.__dict__["forward"] = MethodType(forward.__func__, copy)
    return copy
