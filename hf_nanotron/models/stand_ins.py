"""Stand-ins for the modules of other pipeline stages, in a model of which this rank holds a part."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from .stock.families import CARRIES, RETURNS_TUPLE, row_of
from .stock.releases import cache_in

Boundary = tuple[torch.Tensor | None, ...]  # hidden states, then what the layers carry along with them


class AbsentLayer(nn.Module):
    """Stands for a decoder layer of another stage: passes on what it gets.

    It keeps the plain attributes that backbones read from their layers, and the length of the layer's key-value cache,
    from which backbones derive positions and masks, unless another stage of this rank holds `layer`.
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
        cache = cache_in(kwargs, args)
        if cache is not None and self.keeps_cache_length:
            lengthen(cache, self.index, hidden_states)
        return self.result(self.boundary(hidden_states, args, kwargs))


def lengthen(cache: Cache, index: int, hidden_states: torch.Tensor) -> None:
    """Let layer `index` of a cache be longer by the tokens of `hidden_states`, `[batch, tokens, ...]`.

    A layer with only a recurrent state has no length.
    """
    if index < len(cache.layers) and not isinstance(cache.layers[index], CacheLayerMixin):
        return
    batch, length = hidden_states.shape[:2]
    # One number a token: a cache whose tensors have no elements says that its length is zero.
    filler = hidden_states.new_zeros((batch, 1, length, 1))
    cache.update(filler, filler, index)


class Absent(nn.Module):
    """Stands for a module around the layers: returns what it gets. `shape` is that of the weight on its own stage."""

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
