"""What a rank computes in one decoder layer and in the head: the sizes of its parts of the model's matrices."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from math import prod
from typing import Any

from ..monitor.flops import (
    NOT_MULTIPLIED,
    NUM_EXPERTS,
    TOP_K,
    attention_heads,
    first_of,
    flops_per_token,
    head_dims,
    layer_configs,
)
from ..parallel.config import ParallelConfig
from .weights import ModelWeights

MIXES = re.compile(r"attn|attention|mixer|mamba|ssm|conv", re.IGNORECASE)


@dataclass(frozen=True)
class LayerWork:
    """A rank's part of a decoder layer; sizes of matrices are (out, in).

    Args:
        mixing: matrices of attention, or of what takes its place.
        mlp: other matrices that see every token.
        last: of them, that which writes the layer's output: nothing needs it again in a backward.
        expert: one routed expert's matrices.
        experts: routed experts that the rank holds.
        all_experts: of the layer.
        top_k: experts of a token.
        heads: query heads of the rank.
        kv_heads: key-value heads of the rank.
        key_width: features of a query or key of a head.
        value_width: features of a value of a head.
        window: tokens that a token sees, None for all before it.
        dense: elements of weights that ZeRO shards over the data-parallel ranks.
        routed: elements of the routed experts.
    """

    mixing: tuple[tuple[int, int], ...]
    mlp: tuple[tuple[int, int], ...]
    last: tuple[int, int] | None
    expert: tuple[tuple[int, int], ...]
    experts: int
    all_experts: int
    top_k: int
    heads: int
    kv_heads: int
    key_width: int
    value_width: int
    window: int | None
    dense: int
    routed: int

    @property
    def activated(self) -> int:
        """Features that enter the activation of the MLP, gate and up together, of one token."""
        return sum(out for out, _ in self.mlp if (out, _) != self.last)

    @property
    def expert_activated(self) -> int:
        """The same of one expert."""
        return max((out for out, _ in self.expert), default=0) if len(self.expert) < 3 else 2 * self.expert[0][0]


@dataclass(frozen=True)
class ModelWork:
    """A rank's part of the model.

    Args:
        layers: each of the whole model.
        stages: layers of each stage.
        head: (out, in) of the rank's part.
        embedding: elements of the rank's part.
        tied: whether the embedding is the head.
        hidden: features between layers.
    """

    layers: tuple[LayerWork, ...]
    stages: tuple[range, ...]
    head: tuple[int, int]
    embedding: int
    tied: bool
    hidden: int


class WorkTable:
    """Works of one model, for any sizes; made once for many layouts."""

    def __init__(self, weights: ModelWeights) -> None:
        self.weights = weights
        self.shapes = {name: tuple(parameter.shape) for name, parameter in weights.model.named_parameters()}
        self._flops: dict[float, float] = {}
        self._found: dict[tuple[Any, ...], tuple[tuple[LayerWork, ...], tuple[int, int], int]] = {}

    def flops(self, length: float) -> float:
        """FLOPs of a token of the whole model, in rows of `length` (`flops_per_token`)."""
        if length not in self._flops:
            self._flops[length] = flops_per_token(self.shapes, self.weights.config, length)
        return self._flops[length]

    def of(self, parallel: ParallelConfig) -> ModelWork:
        """The work of the fullest rank.

        Raises:
            ValueError: as the trainer does, for sizes that do not fit the model.
        """
        key = (parallel.tp_size, parallel.ep_size, parallel.sequence_parallel, parallel.pp_size > 1)
        if key not in self._found:
            self._found[key] = self._count(parallel)
        layers, head, embedding = self._found[key]
        stages = self.weights.stages(parallel)
        hidden = self.weights.config.get_text_config().hidden_size
        return ModelWork(layers, stages, head, embedding, self.weights.is_tied, hidden)

    def _count(self, parallel: ParallelConfig) -> tuple[tuple[LayerWork, ...], tuple[int, int], int]:
        weights, anatomy = self.weights, self.weights.anatomy
        specs = weights.specs(parallel)
        text = weights.config.get_text_config()
        configs, start = layer_configs(text), 0
        found: list[LayerWork] = []
        for name, stack in anatomy.layer_stacks():
            for index in range(len(stack)):
                prefix = f"{name}.{index}."
                own = {key: spec for key, spec in specs.items() if key.startswith(prefix)}
                shapes = {key.removeprefix(prefix): spec.longest_shape for key, spec in own.items()}
                spread = {key.removeprefix(prefix) for key, spec in own.items() if spec.axis == "ep"}
                number = start + index
                config = configs[number] if number < len(configs) else text
                found.append(_layer_work(shapes, spread, config, text, number, parallel))
            start += len(stack)
        head = next((spec for key, spec in specs.items() if key == f"{anatomy.head}.weight"), None)
        embedding = specs.get(f"{anatomy.embedding}.weight")
        vocabulary = -(-text.vocab_size // parallel.tp_size)
        shape = head.longest_shape if head is not None else (vocabulary, text.hidden_size)
        looked_up = prod(embedding.longest_shape) if embedding is not None else vocabulary * text.hidden_size
        return tuple(found), (shape[0], shape[-1]), looked_up


def _layer_work(
    shapes: dict[str, tuple[int, ...]],
    spread: set[str],
    config: Any,
    text: Any,
    number: int,
    parallel: ParallelConfig,
) -> LayerWork:
    experts, top_k = first_of(config, NUM_EXPERTS) or 0, first_of(config, TOP_K) or 0
    mixing, mlp, expert = [], [], []
    held = dense = routed = 0
    last = None
    for name, shape in shapes.items():
        size = prod(shape)
        if len(shape) == 3 and ("expert" in name or (experts and name in spread)):
            held, routed = shape[0], routed + size
            expert.append((shape[1], shape[2]))
            continue
        dense += size
        if len(shape) != 2 or name.endswith(NOT_MULTIPLIED):
            continue
        matrix = (shape[0], shape[1])
        if MIXES.search(name):
            mixing.append(matrix)
        else:
            mlp.append(matrix)
            last = matrix if shape[0] == text.hidden_size else last
    heads = attention_heads(config)
    groups = getattr(config, "num_key_value_heads", None) or heads
    groups = heads if hasattr(config, "kv_lora_rank") else groups
    keys, values = head_dims(config)
    tp = parallel.tp_size
    return LayerWork(
        tuple(mixing),
        tuple(mlp),
        last,
        tuple(expert),
        held,
        experts if expert else 0,
        top_k if expert else 0,
        -(-heads // tp) if mixing else 0,
        max(1, -(-groups // tp)) if heads else 0,
        keys,
        values,
        _window(config, number),
        dense,
        routed,
    )


def _window(config: Any, number: int) -> int | None:
    """Tokens that a layer's attention sees; None for all."""
    window = getattr(config, "sliding_window", None)
    if not window or getattr(config, "use_sliding_window", True) is False:
        return None
    kinds = getattr(config, "layer_types", None)
    if kinds and number < len(kinds):
        return int(window) if "sliding" in kinds[number] else None
    return int(window)


@functools.lru_cache(maxsize=64)
def seen_keys(documents: tuple[int, ...], window: int | None) -> float:
    """Pairs of a token and one before it, or itself, that causal attention computes."""
    total = 0.0
    for length in documents:
        inside = min(length, window or length)
        total += inside * inside / 2.0 + (length - inside) * inside
    return total
