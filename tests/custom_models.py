"""Models of a user's own, and what users do to stock ones, for the tests of what is handed to the trainer."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from tiny import VOCABULARY, tiny_config
from torch import nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM, LlamaModel, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm


class M(LlamaForCausalLM):
    """A name that says nothing."""


class OldForCausalLM(LlamaForCausalLM):
    """A `forward` as older remote code has it: few arguments, none of them for the loss."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, inputs_embeds=None):  # type: ignore
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds)[0]
        logits = self.lm_head(hidden)
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits)


class TupleForCausalLM(LlamaForCausalLM):
    """Returns a tuple."""

    def forward(self, input_ids=None, labels=None):  # type: ignore
        logits = self.lm_head(self.model(input_ids=input_ids)[0])
        return (logits,) if labels is None else (self.loss_function(logits, labels, VOCABULARY), logits)


class HeedlessForCausalLM(LlamaForCausalLM):
    """Takes `num_items_in_batch` and does not use it: stock adds up the means of the micro-batches."""

    def forward(self, input_ids=None, labels=None, **kwargs):  # type: ignore
        logits = self.lm_head(self.model(input_ids=input_ids)[0])
        loss = None if labels is None else self.loss_function(logits, labels, VOCABULARY)
        return CausalLMOutputWithPast(loss=loss, logits=logits)


class DenyingForCausalLM(LlamaForCausalLM):
    accepts_loss_kwargs = False


class LouderForCausalLM(LlamaForCausalLM):
    """Hands embeddings of its own to its backbone."""

    def forward(self, input_ids=None, labels=None, **kwargs):  # type: ignore
        return super().forward(inputs_embeds=self.model.embed_tokens(input_ids) * 2, labels=labels, **kwargs)


class ValuesForCausalLM(LlamaForCausalLM):
    """A second head with a loss of its own."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.value_head = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def forward(self, input_ids=None, labels=None, **kwargs):  # type: ignore
        hidden = self.model(input_ids=input_ids)[0]
        logits, loss = self.lm_head(hidden), None
        if labels is not None:
            loss = self.loss_function(logits, labels, VOCABULARY, **kwargs)
            loss = loss + 0.1 * (self.value_head(hidden) - 1).square().mean()
        return CausalLMOutputWithPast(loss=loss, logits=logits)


class Scratch(PreTrainedModel):
    """A model that descends from none of transformers'."""

    config_class = type(tiny_config())
    base_model_prefix = "model"
    _supports_sdpa = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = LlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    forward = OldForCausalLM.forward


class NormedLayer(LlamaDecoderLayer):
    def __init__(self, config: Any, index: int) -> None:
        super().__init__(config, index)
        self.extra = nn.LayerNorm(config.hidden_size)

    def forward(self, hidden_states, *args, **kwargs):  # type: ignore
        return self.extra(super().forward(hidden_states, *args, **kwargs))


class Looks(nn.Module):
    """Looks at the token before: a block that mixes tokens, though its name does not say so."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(F.pad(x, (0, 0, 1, 0))[:, :-1])


class LookingLayer(LlamaDecoderLayer):
    def __init__(self, config: Any, index: int) -> None:
        super().__init__(config, index)
        self.adapter = Looks(config.hidden_size)

    def forward(self, hidden_states, *args, **kwargs):  # type: ignore
        hidden = super().forward(hidden_states, *args, **kwargs)
        return hidden + self.adapter(hidden)


class ResidualMLP(LlamaMLP):
    """Adds to what tensor parallelism sums."""

    def forward(self, x):  # type: ignore
        return super().forward(x) + x


class NormedEmbeddings(LlamaModel):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embed_norm = LlamaRMSNorm(config.hidden_size)
        self.post_init()

    def forward(self, input_ids=None, inputs_embeds=None, **kwargs):  # type: ignore
        embeds = self.embed_norm(self.embed_tokens(input_ids)) if inputs_embeds is None else inputs_embeds
        return super().forward(inputs_embeds=embeds, **kwargs)


class TupleLayer(LlamaDecoderLayer):
    """Returns a tuple, as layers once did."""

    def forward(self, *args, **kwargs):  # type: ignore
        return (super().forward(*args, **kwargs),)


class OfTuples(LlamaModel):
    """Takes the first of what its layers return."""

    def forward(self, input_ids=None, **kwargs):  # type: ignore
        hidden = self.embed_tokens(input_ids)
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        tables = self.rotary_emb(hidden, positions)
        for layer in self.layers:
            hidden = layer(hidden, position_ids=positions, position_embeddings=tables)[0]
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))


class EmbeddingsEverywhere(LlamaModel):
    """Adds the embeddings in front of every layer: a later stage of a pipeline has none."""

    def forward(self, input_ids=None, **kwargs):  # type: ignore
        hidden = first = self.embed_tokens(input_ids)
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        tables = self.rotary_emb(hidden, positions)
        for layer in self.layers:
            hidden = layer(hidden + 0.3 * first, position_ids=positions, position_embeddings=tables)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))


def make(cls: type[PreTrainedModel] = LlamaForCausalLM, change: Callable[[Any], Any] | None = None) -> Any:
    """A tiny model with the same weights every time, after `change`."""
    torch.manual_seed(3)
    model = cls(tiny_config())
    changed = change(model) if change is not None else None
    return model if changed is None else changed


def with_layers(cls: type[nn.Module]) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for index in range(len(model.model.layers)):
            model.model.layers[index] = cls(model.config, index)
        model.post_init()

    return change


def with_tuples(model: Any) -> None:
    with_backbone(OfTuples)(model)
    with_layers(TupleLayer)(model)


def with_mlp(cls: type[nn.Module]) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for layer in model.model.layers:
            layer.mlp = cls(model.config)
        model.post_init()

    return change


def with_backbone(cls: type[nn.Module]) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        model.model = cls(model.config)
        model.post_init()

    return change


def compile_everywhere(model: Any) -> Any:
    layers = model.model.layers
    layers[0] = torch.compile(layers[0], backend="eager")
    layers[1].forward = torch.compile(layers[1].forward, backend="eager")
    layers[2].compile(backend="eager")
    return torch.compile(model, backend="eager")


def wrap(model: Any) -> Any:
    """In `DistributedDataParallel`, on a rank."""
    return nn.parallel.DistributedDataParallel(model) if torch.distributed.is_initialized() else None


def patch_forward(model: Any) -> None:
    model.forward = types.MethodType(OldForCausalLM.forward, model)


def train_only(part: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad = part in name

    return change


def share(first: int, second: int) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        model.model.layers[second].mlp = model.model.layers[first].mlp

    return change


def embedded_dataset(samples: int = 5, length: int = 16) -> Dataset:
    """Rows of embeddings in the place of ids."""
    generator = torch.Generator().manual_seed(1)
    return Dataset.from_list(
        [
            {
                "inputs_embeds": torch.randn(length, 32, generator=generator).tolist(),
                "labels": torch.randint(3, VOCABULARY, (length,), generator=generator).tolist(),
            }
            for _ in range(samples)
        ]
    )


def stack(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
