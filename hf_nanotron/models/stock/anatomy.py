"""Where the parts of a stock causal LM are: its embedding, its decoder layers, its head, and what else has weights."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn
from transformers import PreTrainedModel

from .families import EVERY_STAGE, FIRST_STAGE, LAYERS
from .foreign import is_foreign


@dataclass(frozen=True)
class Anatomy:
    """Names of modules inside `model`, and where the parts outside the decoder layers belong in a pipeline.

    Layers are looked up anew each time: they may be replaced.

    Attributes:
        backbone: the module that owns the embedding and the layers, such as `"model"` or `"model.language_model"`.
        layers: the stack of decoder layers; None if there is no single one.
        first: modules (or bare parameters) with weights that are used before the layers.
        last: those that are used after them, the head among them.
        everywhere: those that every stage uses for its own layers, or whose use is not known.
        is_foreign: whether code around the layers is not transformers' own: everything there then sees all tokens.
    """

    model: PreTrainedModel = field(repr=False)
    backbone: str
    layers: str | None
    embedding: str
    head: str
    first: tuple[str, ...]
    last: tuple[str, ...]
    everywhere: tuple[str, ...]
    is_foreign: bool = False

    def place(self, name: str) -> str | None:
        """The entry of `first`, `last` or `everywhere` that a parameter belongs to; None inside the layers."""
        for place in (*self.first, *self.last, *self.everywhere):
            if name == place or name.startswith(place + "."):
                return place
        return None

    def decoder_layers(self) -> nn.ModuleList:
        """The decoder layers, stand-ins of absent ones among them."""
        if self.layers is None:
            raise ValueError(
                f"{type(self.model).__name__} has no single stack of decoder layers (one of {', '.join(LAYERS)} in "
                f"{self.backbone or 'the model'!r}); use tp_size=1 and pp_size=1."
            )
        layers = self.model.get_submodule(self.layers)
        assert isinstance(layers, nn.ModuleList)
        return layers

    def layer_stacks(self) -> list[tuple[str, nn.ModuleList]]:
        """Every stack of decoder layers below the backbone by name: one for nearly all models."""
        if self.layers is not None:
            return [(self.layers, self.decoder_layers())]
        return [
            (join(self.backbone, name), module)
            for name, module in self.model.get_submodule(self.backbone).named_modules()
            if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] in LAYERS
        ]

    def numbered_layers(self) -> list[tuple[int, nn.Module]]:
        """All decoder layers, stand-ins among them, by their numbers in the whole model."""
        return list(enumerate(layer for _, stack in self.layer_stacks() for layer in stack))

    def blocks(self) -> list[tuple[str, nn.Module]]:
        """The modules that the layers here consist of (attention, MLP, norms), by name."""
        return [
            (f"{stack}.{index}.{name}", block)
            for stack, layers in self.layer_stacks()
            for index, layer in enumerate(layers)
            for name, block in blocks_of(layer).items()
        ]


def join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def module_name(model: nn.Module, module: nn.Module | None) -> str | None:
    """Name of `module` inside `model`, or None."""
    return next((name for name, candidate in model.named_modules() if candidate is module), None)


def dissect(model: PreTrainedModel) -> Anatomy:
    """Find the parts of a whole stock model."""
    embedding = module_name(model, model.get_input_embeddings()) or ""
    head = module_name(model, model.get_output_embeddings()) or ""
    backbone = embedding.rpartition(".")[0]
    layers = _find_layers(model, backbone)
    owners = [join(*backbone.split(".")[:depth]) for depth in range(len(backbone.split(".")), -1, -1)]
    places = []
    for name in model.state_dict(keep_vars=True):
        if layers is not None and name.startswith(layers + "."):
            continue
        owner = next(owner for owner in owners if not owner or name.startswith(owner + "."))
        start = len(owner) + 1 if owner else 0
        places.append(name[:start] + name[start:].split(".")[0])
    first, last, everywhere = [], [], []
    foreign = [owner for owner in owners if is_foreign(model.get_submodule(owner))]
    per_layer = any(place.rpartition(".")[2] in EVERY_STAGE for place in places)
    for place in dict.fromkeys(places):
        leaf = place.rpartition(".")[2]
        inside = bool(backbone) and place.startswith(backbone + ".")
        if per_layer and (leaf in EVERY_STAGE or place == embedding):
            everywhere.append(place)
        elif place == head:
            last.append(place)
        elif place != embedding and place not in owners and place.rpartition(".")[0] in foreign:
            everywhere.append(place)  # used before the layers, after them, or both
        elif place == embedding or leaf in FIRST_STAGE or (backbone and not inside) or place in owners[:-1]:
            first.append(place)
        else:
            last.append(place)
    return Anatomy(
        model, backbone, layers, embedding, head, tuple(first), tuple(last), tuple(everywhere), bool(foreign)
    )


def _find_layers(model: PreTrainedModel, backbone: str) -> str | None:
    owner = model.get_submodule(backbone)
    for name in LAYERS:
        if isinstance(getattr(owner, name, None), nn.ModuleList):
            return join(backbone, name)
    return None


def blocks_of(layer: nn.Module) -> dict[str, nn.Module]:
    """The modules that one decoder layer consists of, by their names in it."""
    found: dict[str, nn.Module] = {}
    for name, child in layer.named_children():
        if isinstance(child, nn.ModuleList):
            found.update({f"{name}.{index}": item for index, item in enumerate(child)})
        else:
            found[name] = child
    return found
