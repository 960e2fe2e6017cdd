"""What the training state and the activations of a rank will take, said before the first step."""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields
from typing import Any

import torch

from ..parallel.collectives import all_gather
from ..parallel.config import ParallelConfig
from ..parallel.mesh import ParallelMesh
from ..parallel.tp.loss import chunk_size
from ..parallel.zero.segment import ShardedWeights
from .flops import NUM_EXPERTS, TOP_K, attention_heads, first_of, head_dims, layer_configs

# Tensors of optimizer state for each element, where no argument adds one.
STATE_TENSORS = {
    "Adadelta": 2,
    "Adagrad": 1,
    "Adam": 2,
    "AdamW": 2,
    "Adamax": 2,
    "Lion": 1,
    "NAdam": 2,
    "RAdam": 2,
    "RMSprop": 1,
    "Rprop": 2,
    "SGD": 0,
}
ADDS_TENSOR = ("amsgrad", "momentum", "centered")  # arguments of torch's optimizers, where they are true


@dataclass(frozen=True)
class MemoryReport:
    """Bytes of one rank.

    Args:
        parameters: what the model computes with (the fp32 shards themselves at stage 3).
        gradients: fp32, as kept over a step.
        masters: fp32 weights in addition to the parameters; zero where the parameters are fp32.
        moments: optimizer state.
        activations: an estimate of the maximum that a step keeps for its backwards; see `activation_bytes`.
    """

    parameters: int
    gradients: int
    masters: int
    moments: int
    activations: int

    @property
    def state(self) -> int:
        """Everything but activations."""
        return sum(astuple(self)) - self.activations

    @property
    def total(self) -> int:
        return sum(astuple(self))

    def __str__(self) -> str:
        parts = [f"{entry.name} {getattr(self, entry.name) / 2**30:.2f}" for entry in fields(self)]
        return f"{' + '.join(parts)} = {self.total / 2**30:.2f} GiB"


def moment_bytes(optimizer: torch.optim.Optimizer, weights: ShardedWeights) -> int:
    """Bytes of the optimizer's state tensors on this rank; zero for a class that is not in the table."""
    tensors = STATE_TENSORS.get(type(optimizer).__name__, 0)
    tensors += sum(bool(optimizer.defaults.get(name)) for name in ADDS_TENSOR if tensors or name == "momentum")
    dtype: torch.dtype = getattr(optimizer, "state_dtype", torch.float32)
    return tensors * dtype.itemsize * sum(segment.master.numel() for segment in weights.segments)


def activation_bytes(
    config: Any,
    tokens: int,
    parallel: ParallelConfig,
    pp_rank: int,
    micro_batches: int,
    item: int,
    recomputed: float,
    fused_head: bool = False,
    selective: bool = False,
    whole_logits: bool = False,
) -> int:
    """Estimate of what one rank keeps for backward, of a decoder run layer by layer with fused attention.

    Per token and layer: both norms keep their input in fp32 and their output, the attention its input, queries, keys,
    values and output (again as the input of the output projection), the MLP its input and `_mlp_elements`. The last
    stage adds the final norm, the logits, their fp32 copy and both gradients; where head and loss are one, the gradient
    of the head's input and the logits of one chunk of tokens. A layer that recomputes keeps its input, and one layer at
    a time the rest; with `selective`, `_selective_bytes`. A deferred weight gradient keeps what was recomputed for it.
    All layers of a model with experts count as such, with an even load, and as the one with the widest attention. A
    recurrence (Mamba) counts as an MLP, without what its scan keeps.

    Args:
        tokens: of one micro-batch.
        micro_batches: of a step.
        item: bytes of an element of the compute dtype.
        recomputed: fraction of the layers that recompute their activations.
        selective: they keep matmuls and attention (`prepare/recompute.py`).
        fused_head: whether the head computes the loss itself (`models/head.py`).
        whole_logits: whether the slices of the vocabulary are joined for the loss (`models/logits.py`).
    """
    text, tp = config.get_text_config(), parallel.tp_size
    text = max(layer_configs(text), key=_attention_elements, default=text)
    hidden = text.hidden_size
    cut = tp if parallel.sequence_parallel else 1
    between = hidden * item // cut
    layer = 2 * hidden * (4 + item) // cut + 2 * hidden * item
    layer += (_attention_elements(text) + _mlp_elements(text)) * item // tp
    layer += 2 * hidden * (first_of(text, TOP_K) or 0) * item + 8 * (first_of(text, NUM_EXPERTS) or 0)
    layers = -(-text.num_hidden_layers // parallel.num_stages)
    chunks = _chunks_in_flight(parallel, pp_rank, micro_batches)
    less = _selective_bytes(text, parallel, item) if selective else between
    kept = round(chunks * layers * (recomputed * less + (1 - recomputed) * layer))
    if recomputed:
        kept += layer - less if selective else layer
        if parallel.splits_backward:
            behind = (parallel.pp_size - pp_rank - 1) * (1 if parallel.pp_virtual_stages == 1 else 2)
            kept += round(max(1, chunks - behind) * layers * layer * recomputed)
    if pp_rank != parallel.pp_size - 1:
        return tokens * kept
    norm, vocabulary = hidden * (4 + item) // cut, -(-text.vocab_size // tp)
    if whole_logits:  # beside our slice; in 16 bits, the loss is computed from a copy in fp32
        whole = text.vocab_size * (item + 8 if item == 4 else 2 * item + 12)
        return tokens * (kept + norm + whole + (vocabulary * 2 * item if tp > 1 else 0))
    if not fused_head:
        return tokens * (kept + norm + vocabulary * (2 * item + 8))
    row = vocabulary * item
    return tokens * (kept + norm + hidden * item) + min(tokens, chunk_size(tokens, row)) * row


def gathered_bytes(config: Any, tokens: int, parallel: ParallelConfig, item: int) -> int:
    """What context-parallel attention gathers in the backward of a layer: keys and values of `tokens`, those of a
    micro-batch on all ranks, for some of the heads, while the next arrive, and their gradients, summed in fp32.
    """
    if parallel.cp_size == 1 or parallel.cp_mode != "gather":
        return 0
    text = max(layer_configs(config.get_text_config()), key=_attention_elements, default=config.get_text_config())
    elements = _key_value_elements(text)
    heads = max(1, elements // max(1, sum(head_dims(text))) // parallel.tp_size)
    at_once = min(heads, parallel.cp_kv_heads_per_gather or -(-heads // 4))
    return tokens * at_once * sum(head_dims(text)) * (2 * item + 4 + item)


def _selective_bytes(config: Any, parallel: ParallelConfig, item: int) -> int:
    """Bytes per token of one layer that keeps matmuls and attention.

    Queries, keys, values and the output of the attention once, gate and up. A layer recomputed as a whole also keeps
    its input and the outputs of its two blocks (the last only if not compiled); one recomputed block by block (with
    tensor parallelism or experts) the inputs of norms and blocks, and their outputs.
    """
    tp, hidden, top_k = parallel.tp_size, config.hidden_size, first_of(config, TOP_K) or 0
    _, value_dim = head_dims(config)
    products = _attention_elements(config) - attention_heads(config) * value_dim
    products += _mlp_elements(config, selective=True)
    if tp == 1 and not top_k:
        return (3 * hidden + products) * item
    cut = tp if parallel.sequence_parallel else 1
    between = 2 * hidden // cut + 4 * hidden + 2 * hidden * top_k
    return (between + products // tp) * item + 8 * (first_of(config, NUM_EXPERTS) or 0)


def _attention_elements(config: Any) -> int:
    """Queries, keys, values, and twice the output of one token; none without attention heads."""
    query_dim, value_dim = head_dims(config)
    return attention_heads(config) * (query_dim + 2 * value_dim) + _key_value_elements(config)


def _key_value_elements(config: Any) -> int:
    """Keys and values of one token. Latent attention makes them for every head."""
    heads = attention_heads(config)
    grouped = heads if hasattr(config, "kv_lora_rank") else getattr(config, "num_key_value_heads", None) or heads
    return grouped * sum(head_dims(config))


def _mlp_elements(config: Any, selective: bool = False) -> int:
    """Elements of the inner size that an MLP keeps per token.

    Four tensors: gate, up, the activated gate and the product; the first two if the others are recomputed. Routed
    experts: three per expert of the token, since the activation is recomputed (`ops/gated.py`), or two. The caller
    counts what has the outer size: the rows that experts read and write.
    """
    inner = first_of(config, ("intermediate_size",)) or 4 * config.hidden_size
    top_k = first_of(config, TOP_K)
    if first_of(config, NUM_EXPERTS) is None or top_k is None:
        return (2 if selective else 4) * inner
    routed = first_of(config, ("moe_intermediate_size",)) or inner
    count = first_of(config, ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")) or 0
    shared = first_of(config, ("shared_expert_intermediate_size",)) or count * routed
    return (2 if selective else 3) * top_k * routed + (2 if selective else 4) * shared


def _chunks_in_flight(parallel: ParallelConfig, pp_rank: int, micro_batches: int) -> int:
    """Forwards of one stage that wait for their backward, or for the weight gradients after it, at the most."""
    stages = parallel.pp_virtual_stages
    pp_rank = 0 if parallel.splits_backward else pp_rank
    if parallel.pp_schedule == "afab":
        return micro_batches * stages
    behind = parallel.pp_size - pp_rank - 1
    if stages == 1:
        return min(micro_batches, behind + 1)
    return min(micro_batches * stages, 2 * behind + (stages - 1) * parallel.pp_size + 1)


def fullest(report: MemoryReport, mesh: ParallelMesh) -> tuple[int, MemoryReport]:
    """The rank with the largest total and its report. All ranks together."""
    own = torch.tensor([astuple(report)], dtype=torch.int64, device=mesh.device)
    every = [MemoryReport(*row) for row in all_gather(own, mesh.world, 0).tolist()]
    rank = max(range(len(every)), key=lambda rank: every[rank].total)
    return rank, every[rank]
