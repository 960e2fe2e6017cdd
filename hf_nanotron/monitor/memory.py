"""What the training state and the activations of a rank will take, said before the first step."""

from __future__ import annotations

import math
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
        average: the moving average of the weights.
        host: pinned host memory, no part of `total`: the optimizer's state, and an estimate of offloaded activations.
    """

    parameters: int
    gradients: int
    masters: int
    moments: int
    activations: int
    host: int = 0
    average: int = 0

    @property
    def state(self) -> int:
        """Everything on the device but activations."""
        return self.total - self.activations

    @property
    def total(self) -> int:
        """Everything on the device."""
        return sum(astuple(self)) - self.host

    def __str__(self) -> str:
        shown = {"average": bool(self.average), "host": False}
        on_device = [entry.name for entry in fields(self) if shown.get(entry.name, True)]
        parts = [f"{name} {getattr(self, name) / 2**30:.2f}" for name in on_device]
        host = f", and {self.host / 2**30:.2f} GiB of host memory" if self.host else ""
        return f"{' + '.join(parts)} = {self.total / 2**30:.2f} GiB{host}"


def state_tensors(optimizer: torch.optim.Optimizer) -> tuple[int, torch.dtype]:
    """How many tensors of a parameter's size the optimizer's state has, zero for a class that is not in the table, and
    their dtype.
    """
    tensors = STATE_TENSORS.get(type(optimizer).__name__, 0)
    tensors += sum(bool(optimizer.defaults.get(name)) for name in ADDS_TENSOR if tensors or name == "momentum")
    dtype: torch.dtype = getattr(optimizer, "state_dtype", torch.float32)
    return tensors, dtype


def moment_bytes(optimizer: torch.optim.Optimizer, weights: ShardedWeights) -> int:
    """Bytes of the optimizer's state tensors on this rank; zero for a class that is not in the table.

    An optimizer of matrices (`optim/matrix_optimizer.py`) has one fp32 tensor for matrices, and AdamW's for the rest.
    """
    tensors, dtype = state_tensors(optimizer)
    if any("kind" in group for group in optimizer.param_groups):
        sizes = [(group["kind"], sum(p.numel() for p in group["params"])) for group in optimizer.param_groups]
        each = {"matrix": 4, "adamw": STATE_TENSORS["AdamW"] * dtype.itemsize}
        return sum(each[kind] * size for kind, size in sizes)
    return tensors * dtype.itemsize * sum(segment.master.numel() for segment in weights.segments)


@dataclass(frozen=True)
class RankStep:
    """What an optimizer step of one rank runs, as far as its memory depends on it.

    Args:
        tokens: of one micro-batch.
        micro_batches: of a step.
        item: bytes of an element of the compute dtype.
        recomputed: fraction of the layers that recompute their activations.
        policy: what they keep (`prepare/recompute.py`): `"full"`, `"selective"` or `"all_but_attention"`.
        offload: fraction of them that keep it on the host (`prepare/offload.py`).
        mlp_tokens: tokens of a block of the MLPs, None for all at once (`prepare/mlp_chunks.py`).
    """

    config: Any
    tokens: int
    parallel: ParallelConfig
    pp_rank: int
    micro_batches: int
    item: int
    recomputed: float
    policy: str = "full"
    offload: float = 0.0
    mlp_tokens: int | None = None

    @property
    def text(self) -> Any:
        """The config of the text model, or of its layer with the widest attention."""
        return _widest(self.config.get_text_config())

    @property
    def in_blocks(self) -> bool:
        """Whether the MLPs take blocks of tokens."""
        return self.mlp_tokens is not None and not first_of(self.text, NUM_EXPERTS)

    @property
    def between(self) -> int:
        """Bytes of a token between two layers."""
        cut = self.parallel.tp_size if self.parallel.sequence_parallel else 1
        return int(self.text.hidden_size * self.item // cut)

    @property
    def less(self) -> int:
        """Bytes of a token that a layer keeps which recomputes the rest."""
        if self.policy == "full":
            return self.between
        return _kept_bytes(self.text, self.parallel, self.item, self.policy, self.in_blocks)

    @property
    def layers(self) -> int:
        """Of a stage."""
        return -(-self.text.num_hidden_layers // self.parallel.num_stages)

    @property
    def away(self) -> float:
        """Layers of a stage that offload: the last of the model stays on the device."""
        recomputed, is_last = self.layers * self.recomputed, self.pp_rank == self.parallel.pp_size - 1
        if not self.offload:
            return 0.0
        return max(0.0, min(math.ceil(self.offload * recomputed), recomputed - is_last))


def activation_bytes(step: RankStep, fused_head: bool = False, whole_logits: bool = False) -> int:
    """Estimate of what one rank keeps for backward, of a decoder run layer by layer with fused attention.

    Per token and layer: both norms keep their input in fp32 and their output, the attention its input, queries, keys,
    values and output (again as the input of the output projection), the MLP its input and `_mlp_elements`. The last
    stage adds the final norm, the logits, their fp32 copy and both gradients; where head and loss are one, the gradient
    of the head's input and the logits of one chunk of tokens. A layer that recomputes keeps its input, and one layer at
    a time the rest; with another policy, `_kept_bytes`. A deferred weight gradient keeps what was recomputed for it.
    Layers that offload keep nothing, but for two that are being copied. An MLP over blocks of tokens keeps its input.
    All layers of a model with experts count as such, with an even load, and as the one with the widest attention. A
    recurrence (Mamba) counts as an MLP, without what its scan keeps.

    Args:
        fused_head: whether the head computes the loss itself (`models/head.py`).
        whole_logits: whether the slices of the vocabulary are joined for the loss (`models/logits.py`).
    """
    text, parallel, item, tokens = step.text, step.parallel, step.item, step.tokens
    tp, hidden, layers, recomputed = parallel.tp_size, text.hidden_size, step.layers, step.recomputed
    cut = tp if parallel.sequence_parallel else 1
    mlp = 0 if step.in_blocks else _mlp_elements(text) * item // tp
    layer = 2 * hidden * (4 + item) // cut + 2 * hidden * item
    layer += _attention_elements(text) * item // tp + mlp
    layer += 2 * hidden * (first_of(text, TOP_K) or 0) * item + 8 * (first_of(text, NUM_EXPERTS) or 0)
    chunks, less, away = _chunks_in_flight(parallel, step.pp_rank, step.micro_batches), step.less, step.away
    kept = round(chunks * ((layers * recomputed - away) * less + layers * (1 - recomputed) * layer))
    kept += round(min(2, away) * less)
    if recomputed:
        kept += layer if step.policy == "full" else layer - less
        if parallel.splits_backward:
            behind = (parallel.pp_size - step.pp_rank - 1) * (1 if parallel.pp_virtual_stages == 1 else 2)
            kept += round(max(1, chunks - behind) * layers * layer * recomputed)
    if step.pp_rank != parallel.pp_size - 1:
        return tokens * kept
    norm, vocabulary = hidden * (4 + item) // cut, -(-text.vocab_size // tp)
    if whole_logits:  # beside our slice; in 16 bits, the loss is computed from a copy in fp32
        whole = text.vocab_size * (item + 8 if item == 4 else 2 * item + 12)
        return tokens * (kept + norm + whole + (vocabulary * 2 * item if tp > 1 else 0))
    if not fused_head:
        return tokens * (kept + norm + vocabulary * (2 * item + 8))
    row = vocabulary * item
    return tokens * (kept + norm + hidden * item) + min(tokens, chunk_size(tokens, row)) * row


def offloaded_bytes(step: RankStep) -> int:
    """Estimate of the host memory of one rank's offloaded activations.

    Of compiled layers: others keep attention's output on the device (`ops/keep.py`).
    """
    chunks = _chunks_in_flight(step.parallel, step.pp_rank, step.micro_batches, until_weights=False)
    return round(step.tokens * chunks * step.away * step.less)


def gathered_bytes(config: Any, tokens: int, parallel: ParallelConfig, item: int) -> int:
    """What context-parallel attention gathers in the backward of a layer: keys and values of `tokens`, those of a
    micro-batch on all ranks, for some of the heads, while the next arrive and are put in order, and their gradients,
    which are put in order, too.
    """
    if parallel.cp_size == 1 or parallel.cp_mode == "heads":
        return 0
    text = _widest(config.get_text_config())
    elements = _key_value_elements(text)
    heads = max(1, elements // max(1, sum(head_dims(text))) // parallel.tp_size)
    at_once = min(heads, parallel.cp_kv_heads_per_gather or -(-heads // 4))
    return tokens * at_once * sum(head_dims(text)) * 5 * item


def _kept_bytes(config: Any, parallel: ParallelConfig, item: int, policy: str, mlp_in_blocks: bool = False) -> int:
    """Bytes per token of one layer that keeps attention, and with `policy="selective"` matmuls.

    The output of the attention and its sums; queries, keys, values, gate and up. A layer recomputed as a whole also
    keeps its input, and with matmuls the outputs of its two blocks (the last only if not compiled); one recomputed
    block by block (with tensor parallelism or experts) the inputs of norms and blocks, and with matmuls their outputs.
    Context parallelism by heads also keeps what it sends; `cp_mode="auto"` counts as such.
    """
    tp, hidden, top_k = parallel.tp_size, config.hidden_size, first_of(config, TOP_K) or 0
    heads, (_, value_dim) = attention_heads(config), head_dims(config)
    if policy == "selective":
        inside = (_attention_elements(config) - heads * value_dim) * item
        inside += 0 if mlp_in_blocks else _mlp_elements(config, selective=True) * item
        outside, blocks = 3 * hidden, 4 * hidden + 2 * hidden * top_k
    else:
        inside, outside, blocks = heads * (value_dim * item + 4), hidden, (2 + top_k) * hidden
    if parallel.cp_size > 1 and parallel.cp_mode != "gather":  # what was sent: there, and back
        inside += (_attention_elements(config) - heads * value_dim) * item
    if tp == 1 and not top_k:
        return outside * item + inside
    cut = tp if parallel.sequence_parallel else 1
    return (2 * hidden // cut + blocks) * item + inside // tp + 8 * (first_of(config, NUM_EXPERTS) or 0)


def _widest(text: Any) -> Any:
    """The config of the layer with the widest attention."""
    if not getattr(text, "is_heterogeneous", False):
        return text
    return max(layer_configs(text), key=_attention_elements, default=text)


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


def _chunks_in_flight(parallel: ParallelConfig, pp_rank: int, micro_batches: int, until_weights: bool = True) -> int:
    """Forwards of one stage that wait for their backward, or for the weight gradients after it, at the most."""
    stages = parallel.pp_virtual_stages
    pp_rank = 0 if parallel.splits_backward and until_weights else pp_rank
    if parallel.pp_schedule == "afab":
        return micro_batches * stages
    behind = parallel.pp_size - pp_rank - 1
    if stages == 1:
        return min(micro_batches, behind + 1)
    return min(micro_batches * stages, 2 * behind + (stages - 1) * parallel.pp_size + 1)


def fullest(report: MemoryReport, mesh: ParallelMesh) -> tuple[int, MemoryReport]:
    """The rank with the largest total and its report. All ranks together."""
    own = torch.tensor([astuple(report)], dtype=torch.int64, device=mesh.device)
    every = all_gather(own, mesh.world, 0)
    totals = every.sum(1) - every[:, [entry.name for entry in fields(report)].index("host")]
    rank = int(totals.argmax())  # of the first, if several have as much
    return rank, MemoryReport(*every[rank].tolist())
