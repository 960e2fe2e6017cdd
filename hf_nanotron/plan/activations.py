"""What a step of a rank keeps and needs on a GPU beside its training state, for compiled layers.

The estimate of a run (`monitor/memory.py`) is for layers that are not compiled, and counts what is kept. This one
follows the schedule's table and adds what a backward needs for itself. Bytes per token were counted on GPUs
(`tests/test_gpu_recompute.py`), temporaries were fitted to peaks of torch's allocator; `docs/plan_accuracy.md` has the
errors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..arguments.recompute import layer_numbers
from ..monitor.flops import NUM_EXPERTS, TOP_K, attention_heads, first_of, head_dims, layer_configs
from ..monitor.memory import gathered_bytes
from ..parallel.config import ParallelConfig
from ..parallel.pipeline.schedule import Action, compute_order
from ..parallel.tp.loss import chunk_size
from ..parallel.tp.transport import GRANULE, TURNS
from .job import Job, parallel_config


@dataclass(frozen=True)
class LayerBytes:
    """Bytes per token of one decoder layer on one rank.

    Args:
        kept: between forward and backward.
        spare: kept where the layer recomputes the rest.
        attention: what the backward of the attention needs for itself.
        outside: the same of the MLP, of tensors that all tokens have at once.
        inside: of tensors as wide as the MLP, which the tokens of one of its blocks have at once.
    """

    kept: float
    spare: float
    attention: float
    outside: float
    inside: float


@dataclass(frozen=True)
class Peak:
    """Bytes of a rank at the fullest moment of a step: `device` beside the training state, and `host` (pinned)."""

    device: int
    host: int


def peak_of_step(job: Job, pp_rank: int, layers: Sequence[int] | None = None) -> Peak:
    """The fullest moment of a step of a pipeline rank.

    Args:
        layers: decoder layers of each stage of the model; balanced if None.
    """
    parallel = parallel_config(job)
    get, tokens = job.arguments.get, job.samples * -(-job.sequence_length // parallel.cp_size)
    text = _widest(job.config)
    layers = layers or _even(text.num_hidden_layers, parallel.num_stages)
    policy = recomputation(job)
    each = layer_bytes(text, parallel, _item(job), policy, get("fp8") is not None)
    block = min(tokens, get("mlp_chunk_tokens") or tokens)
    backward = max(tokens * each.attention, tokens * each.outside + block * each.inside)
    backward += _gathered(job, text, parallel)
    share = recomputed_share(job) if policy else 0.0
    offload = float(get("activation_offload") or 0.0) if policy else 0.0
    of_stage = [_stage_bytes(each, count, share, offload, i == len(layers) - 1) for i, count in enumerate(layers)]
    order = compute_order(parallel.pp_schedule, parallel.pp_size, parallel.pp_virtual_stages, job.micro_batches)[
        pp_rank
    ]
    boundary = text.hidden_size * _item(job) / (parallel.tp_size if parallel.sequence_parallel else 1)
    head = _head_bytes(job, text, parallel, tokens)
    most = away = near = far = 0.0
    held: dict[tuple[int, int], tuple[float, float]] = {}
    frees = "W" if parallel.splits_backward else "B"
    for action in order:
        key = action.stage, action.micro_batch
        if action.kind == "F":
            device, host = of_stage[action.stage]
            held[key] = tokens * (device + (boundary if parallel.pp_size > 1 else 0)), tokens * host
            near, far = near + held[key][0], far + held[key][1]
        away = max(away, far)
        most = max(most, near + _extra(action, backward, head, len(layers)))
        if action.kind == frees:
            device, host = held.pop(key)
            near, far = near - device, far - host
    return Peak(round(most), round(away))


def _extra(action: Action, backward: float, head: tuple[float, float], stages: int) -> float:
    """What an action needs beside what is held."""
    is_last = action.stage == stages - 1
    if action.kind == "F":
        return head[0] if is_last else 0.0
    return backward + (head[1] if is_last else 0.0)


def layer_bytes(text: Any, parallel: ParallelConfig, item: int, policy: str | None, fp8: bool = False) -> LayerBytes:
    """Bytes per token of one layer. `policy`: of recomputation, None without."""
    tp, hidden = parallel.tp_size, text.hidden_size
    cut = tp if parallel.sequence_parallel else 1
    heads, (query_dim, value_dim) = attention_heads(text), head_dims(text)
    kv_heads = heads if hasattr(text, "kv_lora_rank") else getattr(text, "num_key_value_heads", None) or heads
    queries, outputs, keys = heads * query_dim / tp, heads * value_dim / tp, kv_heads * (query_dim + value_dim) / tp
    attention = queries + keys + outputs
    sums = 4 * heads / tp + 8
    # Inputs of both blocks and of their first products, which are gathered with tensor parallelism.
    between = 2 * hidden / cut + 2 * hidden
    experts, top_k = first_of(text, NUM_EXPERTS), first_of(text, TOP_K)
    if experts is None or top_k is None:
        inner = (first_of(text, ("intermediate_size",)) or 4 * hidden) / tp
        mlp, rows = 3 * inner, 0.0
    else:
        routed = (first_of(text, ("moe_intermediate_size", "intermediate_size")) or hidden) * top_k
        count = first_of(text, ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")) or 0
        shared = first_of(text, ("shared_expert_intermediate_size",)) or count * routed / top_k
        inner, rows = routed + shared / tp, 2.0 * top_k * hidden
        mlp, sums = 3 * inner, sums + 8 * experts
    kept = item * (between + attention + mlp + rows) + sums
    if hasattr(text, "qk_norm") or text.model_type.startswith("qwen3"):
        kept += item * (queries + keys / 2)  # queries and keys before their norms
    if fp8:  # inputs of linears in one byte; that of the output projection beside what attention keeps
        kept += -2 * hidden / cut + outputs - (inner if experts is None else 0)
    sent = attention * item if parallel.cp_size > 1 and parallel.cp_mode != "gather" else 0.0
    kept += sent
    gradients = item * (attention + 3 * hidden)  # of the attention, which is kept
    if policy is None:
        return LayerBytes(kept, kept, gradients, item * (rows / 2 + 3 * hidden), item * 3 * inner)
    if policy == "selective":
        spare = item * (2 * hidden / cut + attention + 2 * inner + rows) + sums + sent
        if tp > 1 or experts is not None:
            spare += item * hidden / cut
        return LayerBytes(kept, spare, gradients, item * (rows / 2 + 2 * hidden), item * 3 * inner)
    again = item * (2 * attention + 6 * hidden + rows)  # the attention is computed again as well
    if policy == "full":
        return LayerBytes(kept, item * hidden / cut, again, item * (attention + hidden + rows), item * 5 * inner)
    spare = item * (hidden / cut + outputs) + 4 * heads / tp + sent
    if tp > 1 or experts is not None:
        spare += item * 2 * hidden / cut + (item * top_k * hidden if top_k else 0)
    return LayerBytes(kept, spare, again, item * rows, item * 5 * inner)


def exchange_bytes(job: Job) -> int:
    """Memory that tensor-parallel ranks of a host share, for chunks under way (`parallel/tp/transport.py`)."""
    parallel = parallel_config(job)
    if not parallel.overlaps_tp(torch.device("cuda")):
        return 0
    tokens = job.samples * -(-job.sequence_length // parallel.cp_size)
    chunk = -(-tokens // parallel.tp_size) * job.config.get_text_config().hidden_size * _item(job)
    return TURNS * (parallel.tp_size - 1) * -(-chunk // GRANULE) * GRANULE


def recomputation(job: Job) -> str | None:
    """The policy by which layers recompute; None if they do not."""
    get = job.arguments.get
    switch = get("activation_checkpointing")
    if not (get("gradient_checkpointing") if switch is None else switch):
        return None
    return str(get("activation_checkpointing_policy") or "full")


def recomputed_share(job: Job) -> float:
    """Fraction of the decoder layers that recompute."""
    chosen = layer_numbers(job.arguments.get("activation_checkpointing_layers"))
    return 1.0 if chosen is None else len(chosen) / max(1, job.config.get_text_config().num_hidden_layers)


def _stage_bytes(each: LayerBytes, layers: int, share: float, offload: float, is_last: bool) -> tuple[float, float]:
    """What one micro-batch of a stage keeps per token, on the device and on the host."""
    recomputed = layers * share
    away = max(0.0, min(math.ceil(offload * recomputed), recomputed - is_last)) if offload else 0.0
    near = recomputed - away + min(2.0, away)  # two are being copied
    return near * each.spare + (layers - recomputed) * each.kept, away * each.spare


def _head_bytes(job: Job, text: Any, parallel: ParallelConfig, tokens: int) -> tuple[float, float]:
    """What the last stage needs in the forward, where head and loss are one, and keeps of it in the backward."""
    item, hidden = _item(job), text.hidden_size
    slice_of_vocabulary = -(-text.vocab_size // parallel.tp_size) * item
    chunk = min(tokens, chunk_size(tokens, slice_of_vocabulary)) * slice_of_vocabulary
    states = tokens * hidden * item
    return 3.0 * states + chunk, float(states)


def _gathered(job: Job, text: Any, parallel: ParallelConfig) -> float:
    return float(gathered_bytes(text, job.samples * job.sequence_length, parallel, _item(job)))


def _item(job: Job) -> int:
    return 2 if job.arguments.get("bf16") or job.arguments.get("fp16") else 4


def _widest(config: Any) -> Any:
    """The text model's config, or that of its layer with the widest attention."""
    text = config.get_text_config()
    if not getattr(text, "is_heterogeneous", False):
        return text
    return max(layer_configs(text), key=lambda each: attention_heads(each) * sum(head_dims(each)), default=text)


def _even(layers: int, stages: int) -> list[int]:
    return [layers // stages + (stage < layers % stages) for stage in range(stages)]
