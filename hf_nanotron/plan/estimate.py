"""What a rank will take of its GPU, by arithmetic alone: microseconds a layout, so that a search can ask thousands.

State (parameters, gradients, masters, moments) is exact but for padding of ZeRO's buckets; activations are the estimate
that a run logs (`monitor/memory.py`), for layers that are not compiled.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from ..arguments.recompute import layer_numbers
from ..monitor.memory import RankStep, activation_bytes, gathered_bytes, offloaded_bytes
from ..parallel.config import ParallelConfig
from .job import Job, parallel_config
from .memory import RankMemory
from .weights import ModelWeights

# fp32 tensors of optimizer state for each element, by the beginning of the optimizer's name; others count as AdamW's.
STATE_TENSORS = {"lion": 1, "rmsprop": 1, "adagrad": 1, "sgd": 0, "muon": 1}


class Estimator:
    """Estimates memory for one model in many layouts.

    Attributes:
        weights: how many each rank has.

    Raises:
        ValueError: for a config that is not of a causal language model.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        self.weights = ModelWeights(config)
        self._config = _Quick(config)
        self._activations: dict[Any, tuple[int, int]] = {}

    def fullest(self, job: Job) -> RankMemory:
        """Of the fullest rank: of the first stage, the last, or one between."""
        last = parallel_config(job).pp_size - 1
        return max((self.memory(job, rank) for rank in sorted({0, min(1, last), last})), key=lambda memory: memory.total)

    def memory(self, job: Job, pp_rank: int) -> RankMemory:
        """Bytes of the fullest rank of a pipeline rank.

        Raises:
            ValueError: as the trainer does, for sizes that do not fit the model or the number of processes.
        """
        get, parallel = job.arguments.get, parallel_config(job)
        held = self.weights.held(parallel, pp_rank)
        expert_shards = parallel.expert_copies(job.world_size) if parallel.ep_size > 1 else 1
        own = held.dense / parallel.shard_size(job.world_size) + held.experts / expert_shards
        whole, stage, is_bf16 = held.dense + held.experts, parallel.zero_stage, bool(get("bf16"))
        item = 2 if is_bf16 else 4
        parameters = 4 * own if stage == 3 else item * whole
        if stage == 3:  # the layer that computes, the one that is gathered meanwhile, and a gradient that is reduced
            layer = self.weights.largest_layer(parallel)
            parameters += (2 * item + 4) * (layer.dense + layer.experts)
        if get("fp8") is not None:
            parameters += whole
        masters = 4 * own if is_bf16 and stage < 3 else 0
        moments = state_bytes(job) * own
        away = float(get("optim_offload") or 0)
        activations, host = self._of_step(rank_step(job, self._config, parallel, pp_rank))
        return RankMemory(
            parameters=round(parameters),
            gradients=round(4 * (own if stage >= 2 else whole)),
            masters=round((1 - away) * masters),
            moments=round((1 - away) * moments),
            activations=activations,
            buffers=0,
            average=round(4 * own) if get("ema_decay") is not None else 0,
            host=round(away * (masters + moments)) + host,
        )

    def _of_step(self, step: RankStep) -> tuple[int, int]:
        """Bytes of activations on the device, and on the host."""
        sizes = step.parallel
        of_sizes = (sizes.tp_size, sizes.cp_size, sizes.pp_size, sizes.pp_schedule, sizes.pp_virtual_stages)
        key = (of_sizes, step.pp_rank, step.tokens, step.micro_batches, step.recomputed, step.policy)
        if key not in self._activations:
            cut = step.tokens * step.parallel.cp_size
            kept = activation_bytes(step, fused_head=True) + gathered_bytes(self._config, cut, step.parallel, step.item)
            self._activations[key] = kept, offloaded_bytes(step)
        return self._activations[key]


class _Quick:
    """A config whose values are looked up once: transformers' own takes microseconds for each."""

    def __init__(self, config: Any) -> None:
        self._config, self._absent = config, set[str]()
        text = config.get_text_config()
        self._text = self if text is config else _Quick(text)

    def __getattr__(self, name: str) -> Any:
        if name in self._absent:
            raise AttributeError(name)
        try:
            value = getattr(self._config, name)
        except AttributeError:
            self._absent.add(name)
            raise
        vars(self)[name] = value
        return value

    def get_text_config(self) -> _Quick:
        return self._text


def state_bytes(job: Job) -> int:
    """Bytes of optimizer state for an element of the masters."""
    name = str(job.arguments.get("optim") or "adamw")
    tensors = next((count for start, count in STATE_TENSORS.items() if name.startswith(start)), 2)
    return tensors * (2 if job.arguments.get("optim_state_dtype") == "bfloat16" else 4)


def rank_step(job: Job, config: Any, parallel: ParallelConfig, pp_rank: int) -> RankStep:
    """What a step of a rank runs."""
    get = job.arguments.get
    return RankStep(
        config,
        job.samples * -(-job.sequence_length // parallel.cp_size),
        parallel,
        pp_rank,
        job.micro_batches,
        2 if get("bf16") else 4,
        recomputed_share(job),
        get("activation_checkpointing_policy") or "full",
        float(get("activation_offload") or 0),
        get("mlp_chunk_tokens"),
    )


def recomputed_share(job: Job) -> float:
    """Fraction of the decoder layers that recompute their activations."""
    get = job.arguments.get
    switch = get("activation_checkpointing")
    if not (get("gradient_checkpointing") if switch is None else switch):
        return 0.0
    count = max(1, job.config.get_text_config().num_hidden_layers)
    layers = layer_numbers(get("activation_checkpointing_layers"))
    return 1.0 if layers is None else len(layers) / count
