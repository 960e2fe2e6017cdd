"""What was settled when a model was cut, and whether it still holds: a replaced module or a changed size does not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..parallel.shard_spec import ShardSpec
from .stand_ins import ABSENT

# Fields of a config that shapes and ties of weights follow from.
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "tie_word_embeddings",
)


@dataclass
class Cut:
    """What the stock model was when it was sharded.

    Attributes:
        modules: name -> module of this rank, for those that hold weights themselves, and their stand-ins.
        embeddings, frozen: names of those weights, on any rank. A trainer brings `frozen` up to date.
        tried_hooks: (module, hook) inside its backbone, with which the sharded model computes what it did.
    """

    modules: dict[str, nn.Module]
    sizes: dict[str, Any]
    embeddings: frozenset[str]
    frozen: frozenset[str]
    tried_hooks: frozenset[tuple[str, str]] = frozenset()

    @classmethod
    def of(cls, stock: PreTrainedModel) -> Cut:
        """Of a whole model; `modules` is filled in when it has been cut."""
        embeddings = {f"{name}.weight" for name, module in stock.named_modules() if isinstance(module, nn.Embedding)}
        frozen = {name for name, parameter in stock.named_parameters() if not parameter.requires_grad}
        return cls({}, sizes_of(stock.config), frozenset(embeddings), frozenset(frozen))

    def frozen_now(self, model: nn.Module, specs: Mapping[str, ShardSpec]) -> frozenset[str]:
        """`frozen`, with what this rank's own weights say now."""
        held = {specs[name].name: parameter.requires_grad for name, parameter in model.named_parameters()}
        return frozenset(n for n in self.frozen if n not in held) | {n for n, trained in held.items() if not trained}

    def change_message(self, model: PreTrainedModel, specs: Mapping[str, ShardSpec]) -> str | None:
        """The first thing changed in `model` since that its weights could not follow; None if nothing was."""
        for name, size in sizes_of(model.config).items():
            if size != self.sizes[name]:
                return (
                    f"config.{name} is {size}, but the model was sharded with {name}={self.sizes[name]}. Change the "
                    "stock model before it is sharded."
                )
        instead = (
            "Change the stock model before it is sharded; to set weights, write into them (`copy_`, load_state_dict)."
        )
        for name, module in self.modules.items():
            owner_name, _, leaf = name.rpartition(".")
            try:
                same = not name or model.get_submodule(owner_name)._modules.get(leaf) is module
            except AttributeError:
                same = False
            if not same:
                return f"the module {name} was replaced or removed after the model was sharded. {instead}"
        parameters = dict(model.named_parameters())
        for name in sorted(parameters.keys() ^ specs.keys()):
            what = "added to the model" if name in parameters else "removed from the model, or tied to another,"
            return f"the weight {name} was {what} after it was sharded. {instead}"
        for name, parameter in parameters.items():
            if tuple(parameter.shape) != (shape := specs[name].local_shape):
                return f"{name} has shape {tuple(parameter.shape)}; this rank's shard of it is {shape}. {instead}"
        return None


def sizes_of(config: PreTrainedConfig) -> dict[str, Any]:
    text = config.get_text_config()
    return {name: getattr(text, name, None) for name in SIZES}


def holding_weights(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module, for those that hold parameters themselves, and for stand-ins of those."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, ABSENT) or any(True for _ in module.parameters(recurse=False))
    }
