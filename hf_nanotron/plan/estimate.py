"""What a rank will take of its GPU, by arithmetic alone: microseconds a layout, so that a search can ask thousands.

State (parameters, gradients, masters, moments) is exact but for padding of ZeRO's buckets; activations are the same
arithmetic as in a plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from transformers import PretrainedConfig

from ..parallel.config import ParallelConfig
from .activations import Peak, exchange_bytes, peak_of_step
from .job import Job, parallel_config
from .memory import RankMemory
from .weights import ModelWeights

ROUNDS = 3  # of a pipeline, after which no schedule but afab keeps more
BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps", "mlp_chunk_tokens", "fp8")

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
        self._activations: dict[Any, Peak] = {}

    def memory(self, job: Job, pp_rank: int) -> RankMemory:
        """Bytes of the fullest rank of a pipeline rank.

        Raises:
            ValueError: as the trainer does, for sizes that do not fit the model or the number of processes.
        """
        parallel = parallel_config(job)
        return self._with_activations(self._state(job, parallel, pp_rank), job, parallel, pp_rank)

    def fullest(self, job: Job) -> RankMemory:
        """Of the fullest rank: of the first pipeline rank, the last, or one between."""
        return self.least(job, [{}], 0.0)[1]

    def least(
        self, job: Job, choices: Sequence[Mapping[str, Any]], usable: float
    ) -> tuple[Mapping[str, Any], RankMemory]:
        """The first of some arguments for activations with which the fullest rank fits, and that rank's memory.

        If it fits with none, the arguments with which it takes least.
        """
        parallel = parallel_config(job)
        last = parallel.pp_size - 1
        states = {rank: self._state(job, parallel, rank) for rank in sorted({0, min(1, last), last})}
        found: list[tuple[Mapping[str, Any], RankMemory]] = []
        for choice in choices:
            chosen = replace(job, arguments={**job.arguments, **choice}) if choice else job
            each = (self._with_activations(state, chosen, parallel, rank) for rank, state in states.items())
            found.append((choice, max(each, key=lambda memory: memory.total)))
            if found[-1][1].total <= usable:
                return found[-1]
        return min(found, key=lambda each: each[1].total)

    def _with_activations(self, state: RankMemory, job: Job, parallel: ParallelConfig, pp_rank: int) -> RankMemory:
        activations = self._of_step(job, parallel, pp_rank)
        return replace(state, activations=activations.device, host=state.host + activations.host)

    def _state(self, job: Job, parallel: ParallelConfig, pp_rank: int) -> RankMemory:
        """Everything but activations."""
        get = job.arguments.get
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
        return RankMemory(
            parameters=round(parameters),
            gradients=round(4 * (own if stage >= 2 else whole)),
            masters=round((1 - away) * masters),
            moments=round((1 - away) * moments),
            activations=0,
            buffers=exchange_bytes(job),
            average=round(4 * own) if get("ema_decay") is not None else 0,
            host=round(away * (masters + moments)),
        )

    def _of_step(self, job: Job, parallel: ParallelConfig, pp_rank: int) -> Peak:
        """Activations. Layouts that differ in other things have the same."""
        rounds = job.micro_batches if parallel.pp_schedule == "afab" else ROUNDS * parallel.pp_size
        arguments = {**job.arguments, "gradient_accumulation_steps": min(job.micro_batches, rounds)}
        sizes = (parallel.tp_size, parallel.cp_size, parallel.pp_size, parallel.pp_schedule, parallel.pp_virtual_stages)
        names = (*BATCH, "activation_checkpointing", "activation_checkpointing_policy", "activation_offload")
        key = (*sizes, parallel.pp_layers_per_stage, pp_rank, *(arguments.get(name) for name in names))
        if key not in self._activations:
            quick = replace(job, config=cast(Any, self._config), arguments=arguments)
            layers = [len(layers) for layers in self.weights.stages(parallel)]
            self._activations[key] = peak_of_step(quick, pp_rank, layers)
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
