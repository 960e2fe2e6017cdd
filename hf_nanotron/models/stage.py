"""Run one pipeline stage through the stock backbone forward, with taps in the place of absent layers.

A stage calls the backbone that transformers wrote, with the batch's real `input_ids`. Layers of other stages are
stand-ins: the one before the first local layer returns what was received from the previous stage, the one after the
last local layer records what is to be sent. Masks, positions and rotary tables therefore come from the stock forward,
and nothing the backbone does around its layers is applied twice.
"""

from __future__ import annotations

import contextlib
from types import MethodType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from .calling import accepted
from .stock.anatomy import Anatomy, decoder_layers
from .stock.families import CARRIES, RETURNS_TUPLE, row_of
from .stock.foreign import is_foreign_class
from .stock.releases import cache_in

if TYPE_CHECKING:
    from .base import ParallelModel

LOSS_WEIGHT = "loss_weight"  # of a micro-batch: what its loss is multiplied by

Boundary = tuple[torch.Tensor | None, ...]  # hidden states, then what the layers carry along with them


class AbsentLayer(nn.Module):
    """Stands for a decoder layer of another stage: passes on what it gets.

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
        self.carries: str | None = row_of(CARRIES, layer)
        is_known = self.carries is not None or any(cls.__name__ in RETURNS_TUPLE for cls in type(layer).__mro__)
        self.returns_tuple = is_known or getattr(layer, "returns_tuple", False)  # as `selfcheck` has seen
        if isinstance(layer, AbsentLayer):
            self.carries, self.returns_tuple = layer.carries, layer.returns_tuple

    def boundary(self, hidden_states: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Boundary:
        """What a layer here would be handed by the layer before it."""
        if self.carries is None:
            return (hidden_states,)
        return (hidden_states, kwargs[self.carries] if self.carries in kwargs else args[0])

    def result(self, boundary: Boundary) -> Any:
        """`boundary` in the form in which a layer here returns it."""
        if self.carries is not None:
            return boundary
        return (boundary[0], None) if self.returns_tuple else boundary[0]

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        cache = cache_in(kwargs)
        if cache is not None and self.keeps_cache_length:
            lengthen(cache, self.index, hidden_states)
        return self.result(self.boundary(hidden_states, args, kwargs))


def lengthen(cache: Cache, index: int, hidden_states: torch.Tensor) -> None:
    """Let layer `index` of a cache be longer by the tokens of `hidden_states`, `[batch, tokens, ...]`.

    A layer with a recurrent state alone has no length, and only the decoder layer itself looks at its state.
    """
    if index < len(cache.layers) and not isinstance(cache.layers[index], CacheLayerMixin):
        return
    batch, length = hidden_states.shape[:2]
    # One number a token: a cache whose tensors have no elements says that its length is zero.
    filler = hidden_states.new_zeros((batch, 1, length, 1))
    cache.update(filler, filler, index)


class StageInput(AbsentLayer):
    """The stand-in before the first local layer: returns what was received."""

    received: Boundary

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        super().forward(hidden_states, *args, **kwargs)
        return self.result(self.received)


class StageEnd(Exception):
    """Leaves a forward whose remainder is for later stages."""


class StageOutput(AbsentLayer):
    """The stand-in after the last local layer: records what is to be sent.

    Attributes:
        ends: whether the forward is left here, by `StageEnd`.
    """

    recorded: Boundary
    ends = False

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.recorded = self.boundary(hidden_states, args, kwargs)
        if self.ends:
            raise StageEnd
        return super().forward(hidden_states, *args, **kwargs)


class Absent(nn.Module):
    """Stands for a module around the layers, whose result nobody reads on this stage: returns what it gets.

    Attributes:
        shape: of the weight that the stage has which holds the module.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("zero", torch.zeros((), dtype=dtype, device=device), persistent=False)

    @property
    def weight(self) -> torch.Tensor:
        """Zeros without memory: scripts ask an embedding or a head for the size of the vocabulary."""
        return cast(torch.Tensor, self.zero).expand(self.shape)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return next(x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.is_floating_point())


class AbsentEmbedding(Absent):
    """Zeros of the embedding's shape, without memory: every stage reads the batch's ids, one looks them up."""

    def __init__(self, dtype: torch.dtype, device: torch.device, shape: tuple[int, ...]) -> None:
        super().__init__(dtype, device, shape)
        self.dtype = dtype

    def forward(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        zero = torch.zeros((), dtype=self.dtype, device=input_ids.device)
        return zero.expand(*input_ids.shape, self.shape[-1])


def stand_in(part: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """What stands for a module, or a bare parameter, that another stage holds."""
    weight = getattr(part, "weight", None)
    shape = tuple(weight.shape) if isinstance(weight, torch.Tensor) else ()
    if isinstance(part, (nn.Embedding, AbsentEmbedding)):
        return AbsentEmbedding(dtype, device, shape)
    if isinstance(part, nn.ModuleList):
        return nn.ModuleList(Absent(dtype, device) for _ in part)
    if isinstance(part, torch.Tensor):
        return torch.zeros(part.shape, dtype=part.dtype, device=device)
    return Absent(dtype, device, shape)


def put_stand_in(owner: nn.Module, leaf: str, part: Any) -> None:
    """Put what `stand_in` returned in the place of a module or of a bare parameter or buffer."""
    if isinstance(part, nn.Module):
        owner._modules[leaf] = part
    else:
        owner._parameters.pop(leaf, None)
        owner._buffers.pop(leaf, None)
        owner.register_buffer(leaf, part, persistent=False)


ABSENT = (Absent, AbsentEmbedding, AbsentLayer)


class Stage:
    """One stage of the model: a view that shares every parameter with `model` but holds only this stage's layers.

    Args:
        model: this rank's part of the model, whose absent layers are `AbsentLayer`s.
        anatomy: names of the parts.
        index: which stage, in model order.
        layers: the decoder layers of this stage.
        num_stages: stages in the whole model.
    """

    def __init__(self, model: ParallelModel, anatomy: Anatomy, index: int, layers: range, num_stages: int) -> None:
        self.index, self.layers = index, layers
        self.is_first, self.is_last = index == 0, index == num_stages - 1
        self._model, self._view = model, model
        self._copied: list[nn.Module] = [model]
        self._input: StageInput | None = None
        self._output: StageOutput | None = None
        if num_stages > 1:
            self._make_view(anatomy, layers)

    def _make_view(self, anatomy: Anatomy, layers: range) -> None:
        """Copy the modules on the way to the parts that differ, and put this stage's parts into the copies."""
        views = {"": _shallow_copy(self._model)}
        path = anatomy.backbone.split(".") if anatomy.backbone else []
        for depth, leaf in enumerate(path):
            owner = views[".".join(path[:depth])]
            views[".".join(path[: depth + 1])] = owner._modules[leaf] = _shallow_copy(owner._modules[leaf])
        self._view, self._copied = views[""], list(views.values())
        assert anatomy.layers is not None
        chosen: list[nn.Module] = []
        for index, layer in enumerate(decoder_layers(self._model, anatomy)):
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
        """Compute what goes to the next stage, or the causal LM's output on the last stage.

        Args:
            inputs: keyword arguments of the stock `forward`; `labels` count on the last stage only.
            received: what the previous stage sent (None on the first).
        """
        output = self._compute(inputs, received)
        if self.is_last and self._model.training and self._model.micro_batch is not None:
            self._model.micro_batch.finish(output)
        return output

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
        else:
            routers = mixture.loss(packed, self._model.training)
            output.loss = output.loss + (routers if weight is None else routers * weight)
        return output

    def _run(self, inputs: dict[str, Any], received: Boundary | None) -> Any:
        if self._input is not None:
            assert received is not None
            self._input.received = received
        if self.is_last:
            return self._model.stock_forward(self._view, **inputs)
        assert self._output is not None
        model = self._model
        if model.training and model.micro_batch is not None:
            inputs = model.micro_batch.fill(inputs)
        if is_foreign_class(model.stock_class):
            # It may change what it hands to its backbone. What it does afterwards is for the last stage.
            self._output.ends = inputs.get("past_key_values") is None
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
