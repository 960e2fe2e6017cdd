"""Run one pipeline stage through the stock backbone forward, with taps in the place of absent layers.

A stage calls the backbone that transformers wrote, with the batch's real `input_ids`. Layers of other stages are
stand-ins: the one before the first local layer returns the tensor received from the previous stage, the one after the
last local layer records what is to be sent. Masks, positions and rotary tables therefore come from the stock forward,
and nothing the backbone does around its layers is applied twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from .plan import PipelinePlan

if TYPE_CHECKING:
    from .base import ParallelModel


class AbsentLayer(nn.Module):
    """Stands for a decoder layer of another stage: passes hidden states on.

    It keeps the plain attributes that backbones read from their layers. It also keeps the length of the layer's
    key-value cache, from which backbones derive positions and masks, unless `layer` is held by another stage of this
    rank, which fills the cache itself.
    """

    def __init__(self, layer: nn.Module, index: int) -> None:
        super().__init__()
        for name, value in vars(layer).items():
            if not name.startswith("_") and name != "training":
                setattr(self, name, value)
        self.index = index
        self.keeps_cache_length = isinstance(layer, AbsentLayer)

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, past_key_values: Any = None, **kwargs: Any
    ) -> torch.Tensor:
        if past_key_values is not None and self.keeps_cache_length:
            batch, length = hidden_states.shape[:2]
            # One number a token: a cache whose tensors have no elements says that its length is zero.
            filler = hidden_states.new_zeros((batch, 1, length, 1))
            past_key_values.update(filler, filler, self.index)
        return hidden_states


class StageInput(AbsentLayer):
    """The stand-in before the first local layer: returns what was received."""

    received: torch.Tensor

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        super().forward(hidden_states, *args, **kwargs)
        return self.received


class StageOutput(AbsentLayer):
    """The stand-in after the last local layer: records what is to be sent."""

    recorded: torch.Tensor

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.recorded = hidden_states
        return super().forward(hidden_states, *args, **kwargs)


class AbsentEmbedding(nn.Module):
    """Zeros of the embedding's shape, without memory: every stage reads the batch's ids, one looks them up."""

    def __init__(self, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.hidden_size, self.dtype = hidden_size, dtype

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        zero = torch.zeros((), dtype=self.dtype, device=input_ids.device)
        return zero.expand(*input_ids.shape, self.hidden_size)


class Absent(nn.Module):
    """Stands for a module after the layers, whose result nobody reads on this stage."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states


class Stage:
    """One stage of the model: a view that shares every parameter with `model` but holds only this stage's layers.

    Args:
        model: this rank's part of the model, whose absent layers are `AbsentLayer`s.
        plan: names of the parts.
        index: which stage, in model order.
        layers: the decoder layers of this stage.
        num_stages: stages in the whole model.
    """

    def __init__(self, model: ParallelModel, plan: PipelinePlan, index: int, layers: range, num_stages: int) -> None:
        self.index, self.layers = index, layers
        self.is_first, self.is_last = index == 0, index == num_stages - 1
        self._model, self._view, self._backbone = model, model, model
        self._input: StageInput | None = None
        self._output: StageOutput | None = None
        if num_stages > 1:
            self._make_view(plan, layers)

    def _make_view(self, plan: PipelinePlan, layers: range) -> None:
        self._view = view = _shallow_copy(self._model)
        backbone = _shallow_copy(self._model.get_submodule(plan.backbone)) if plan.backbone else view
        if plan.backbone:
            view._modules[plan.backbone] = backbone
        self._backbone = backbone
        name = plan.layers.rpartition(".")[2]
        chosen: list[nn.Module] = []
        for index, layer in enumerate(cast(nn.ModuleList, self._model.get_submodule(plan.layers))):
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
        backbone._modules[name] = nn.ModuleList(chosen)
        if not self.is_first:
            hidden_size = self._model.config.get_text_config().hidden_size
            for full in plan.first:
                backbone._modules[full.rpartition(".")[2]] = AbsentEmbedding(hidden_size, self._model.dtype)
        if not self.is_last:
            for full in plan.last:
                owner = backbone if plan.backbone and full.startswith(plan.backbone + ".") else view
                owner._modules[full.rpartition(".")[2]] = Absent()

    def forward(self, inputs: dict[str, Any], received: torch.Tensor | None) -> Any:
        """Compute the boundary tensor for the next stage, or the causal LM's output on the last stage.

        Args:
            inputs: keyword arguments of the stock `forward`; `labels` count on the last stage only.
            received: the boundary tensor of the previous stage (None on the first).
        """
        self._view.training = self._backbone.training = self._model.training
        for module in self._backbone.children():
            if isinstance(module, AbsentEmbedding):
                module.dtype = self._model.dtype  # a change of the model's does not reach into views
        if self._input is not None:
            assert received is not None
            self._input.received = received
        if self.is_last:
            return self._model.stock_forward(self._view, **inputs)
        ignored = ("labels", "num_items_in_batch", "shift_labels", "logits_to_keep", "return_dict")
        self._backbone(**{name: value for name, value in inputs.items() if name not in ignored})
        assert self._output is not None
        boundary = self._output.recorded
        del self._output.recorded
        if self._input is not None:
            del self._input.received
        return boundary


def _shallow_copy(module: Any) -> Any:
    """Another module object over the same parameters, buffers, submodules and hooks."""
    copy = module.__class__.__new__(module.__class__)
    copy.__dict__ = module.__dict__.copy()
    copy._modules = module._modules.copy()
    return copy
