"""How much arithmetic a token costs, and how much a device can do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

# Dense bf16 FLOP/s from the vendors' data sheets, by a part of the name that the driver reports.
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H800": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of `device` in FLOP/s, or None if it is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def flops_per_token(shapes: Mapping[str, tuple[int, ...]], config: Any, sequence_length: int) -> float:
    """Forward and backward FLOPs of one token of a dense decoder, causal attention counted once.

    `6 * (matmul weights of the layers + vocabulary * hidden) + 6 * layers * heads * head_dim * sequence`. The embedding
    look-up and the recomputation of activations are not counted (model FLOPs, Chowdhery et al. 2022, arXiv:2204.02311).

    Args:
        shapes: name -> shape of every tensor of the model.
        sequence_length: tokens in a sample.
    """
    text = config.get_text_config()
    layers = sum(shape[0] * shape[1] for name, shape in shapes.items() if len(shape) == 2 and ".layers." in name)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    attention = text.num_hidden_layers * text.num_attention_heads * head_dim * sequence_length
    return 6.0 * (layers + text.vocab_size * text.hidden_size) + 6.0 * attention
