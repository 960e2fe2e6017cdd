"""How much arithmetic a token costs, and how much a device can do."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch.nn import functional as F

from ..parallel.batch import batch_shape
from .gpus import gpu_of_driver


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of `device` in FLOP/s, or None if it is not in the table."""
    if device.type != "cuda":
        return None
    gpu = gpu_of_driver(torch.cuda.get_device_name(device))
    return None if gpu is None else gpu.bf16


# Names of one thing in the configs of different families.
NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_k", "top_k_experts")

IN_LAYERS = re.compile(r"(^|\.)(layers|h|blocks)\.\d+\.")
NOT_MULTIPLIED = ("bias", "A_log")  # the latter of Mamba: a matrix, but of decay rates
SINGLE_EXPERT = re.compile(r"\.experts\.\d+\.")  # a weight of one expert, in files that hold them one by one


def first_of(config: Any, names: Sequence[str]) -> int | None:
    """The first of these numbers that a config has; of a list with one for each layer, the first."""
    values = (getattr(config, name, None) for name in names)
    value = next((value for value in values if value), None)
    value = value[0] if isinstance(value, list | tuple) else value
    return None if value is None else int(value)


def layer_configs(config: Any) -> list[Any]:
    """The config of each decoder layer. Where layers differ (Gemma 4), the model's own refuses to tell their sizes."""
    if getattr(config, "is_heterogeneous", False):
        return list(config.per_layer_config)
    return [config] * config.num_hidden_layers


def attention_heads(config: Any) -> int:
    """Query heads of a layer: 0 for a model without attention, such as Mamba, whose config has no such number."""
    return getattr(config, "num_attention_heads", None) or 0


def head_dims(config: Any) -> tuple[int, int]:
    """Features of one attention head: of queries and keys, and of values; 0 for a model without attention.

    They differ in latent attention (DeepSeek-AI 2024, arXiv:2405.04434, section 2.1), where queries and keys have a
    part with rotary positions and one without, and `head_dim` means something else.
    """
    heads = attention_heads(config)
    if not heads:  # Mamba 2 has a head_dim, but of its recurrence
        return 0, 0
    plain = getattr(config, "head_dim", None) or config.hidden_size // heads
    nope, rope = (getattr(config, f"qk_{part}_head_dim", None) for part in ("nope", "rope"))
    queries = plain if nope is None or rope is None else nope + rope
    return queries, getattr(config, "v_head_dim", None) or queries


def active_weights(name: str, shape: tuple[int, ...], config: Any) -> float:
    """Elements of a decoder layer's tensor that multiply one token; the mean over tokens for routed experts.

    Of E routed experts of which k are chosen per token, k/E counts, of a stack `[E, a, b]` as of the matrix of one
    expert. Routers, shared experts and other matrices count whole; biases, norms, convolutions and the decay rates of a
    recurrence do not. `config` is that of the text model.
    """
    if not IN_LAYERS.search(name) or name.endswith(NOT_MULTIPLIED):
        return 0.0
    experts, top_k = first_of(config, NUM_EXPERTS), first_of(config, TOP_K)
    if len(shape) == 3 and ("expert" in name or shape[0] == experts):
        stacked = shape[0]
        return min(1.0, (top_k or stacked) / stacked) * prod(shape)
    if len(shape) != 2:
        return 0.0
    if SINGLE_EXPERT.search(name) and experts:
        return min(1.0, (top_k or experts) / experts) * prod(shape)
    return float(prod(shape))


def flops_per_token(shapes: Mapping[str, tuple[int, ...]], config: Any, sequence_length: float) -> float:
    """Forward and backward FLOPs of one token of a decoder, causal attention counted once.

    `6 * (matmul weights of the layers that a token meets + vocabulary * hidden)
    + 3 * sum over layers of heads * (query dim + value dim) * sequence`.

    Of packed documents, `sequence_length` is the sum of `squared_lengths` over the number of tokens: a token attends to
    half of its own document on average.

    Embedding look-up and activation recomputation are not counted (model FLOPs, Chowdhery et al. 2022,
    arXiv:2204.02311). Every layer counts as full causal attention, and none if the config has no attention heads; of
    recurrences (Mamba) the projections count, the scan does not.
    """
    text = config.get_text_config()
    layers = sum(active_weights(name, shape, text) for name, shape in shapes.items())
    attention = sum(attention_heads(layer) * sum(head_dims(layer)) for layer in layer_configs(text))
    return 6.0 * (layers + text.vocab_size * text.hidden_size) + 3.0 * attention * sequence_length


def squared_lengths(batch: Mapping[str, Any]) -> torch.Tensor:
    """Sum over documents of the square of their length, 0-dim; a row without documents is one.

    As in transformers, a document begins where `position_ids` `[B, S]` do not go on by one, and with an
    `attention_mask` there are none. The result is where the positions are: no device is waited for.
    """
    rows, length = batch_shape(batch)
    positions = None if batch.get("attention_mask") is not None else batch.get("position_ids")
    if positions is None or positions.dim() != 2 or positions.shape[1] != length:
        return torch.tensor(rows * length**2)
    places = torch.arange(length, device=positions.device)
    begins = F.pad(positions.diff(dim=-1) != 1, (1, 0), value=True)
    first = torch.where(begins, places, 0).cummax(dim=-1).values
    # The odd numbers up to 2 n - 1 sum up to the square of n.
    return (2 * (places - first) + 1).sum() * (rows // positions.shape[0])
