"""What a plan says: memory by rank, the time of a step and its parts, and whether all ranks agree on what they send."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..monitor.gpus import GPU
from ..parallel.config import ParallelConfig
from .default_rates import assumed_links
from .job import Job, parallel_config
from .memory import RankMemory
from .rates import Rates
from .roles import Role
from .step_time import StepTime

GIB = 2**30

# Of a GPU's memory, what a plan may take. The rest is for CUDA's context, kernels, and holes between the allocator's
# blocks.
USABLE = 0.95


@dataclass(frozen=True)
class RankPlan:
    """The memory of the ranks that have one role."""

    role: Role
    memory: RankMemory


@dataclass(frozen=True)
class Change:
    """Other arguments with which a run fits that does not.

    Args:
        arguments: by their names in `training`.
        peak_memory_gib: of the fullest rank with them, by arithmetic.
        step_seconds: of an optimizer step with them.
    """

    arguments: Mapping[str, Any]
    peak_memory_gib: float
    step_seconds: float

    def __str__(self) -> str:
        return ", ".join(f"{name}: {yaml_value(value)}" for name, value in self.arguments.items())


@dataclass(frozen=True)
class Plan:
    """What a run costs in one layout. Made by `hf_nanotron.plan.make.make_plan`.

    Args:
        job: what is planned.
        gpu: on which GPU.
        rates: of the GPU and its links.
        ranks: memory by role, in the order of ranks.
        step: the time of an optimizer step.
        faults: what would stop the ranks from agreeing on what they send, in sentences: none if nothing deadlocks.
            None if they were not compared.
        change: the cheapest other arguments with which the run fits, if it does not.
        steps: optimizer steps of the run; None if unknown.
    """

    job: Job
    gpu: GPU
    rates: Rates
    ranks: tuple[RankPlan, ...]
    step: StepTime
    faults: tuple[str, ...] | None = None
    change: Change | None = None
    steps: int | None = None

    @property
    def parallel(self) -> ParallelConfig:
        """The sizes."""
        return parallel_config(self.job)

    @property
    def layout(self) -> dict[str, Any]:
        """Sizes, batch, ZeRO, schedule and recomputation, by the names of the training arguments, and `dp_size`."""
        return layout_of(self.job)

    @property
    def fullest(self) -> RankPlan:
        """The ranks that take the most memory."""
        return max(self.ranks, key=lambda rank: rank.memory.total)

    @property
    def peak_memory_gib(self) -> float:
        """GiB of the fullest rank."""
        return self.fullest.memory.total / GIB

    @property
    def fits(self) -> bool:
        """Whether the fullest rank fits in what a GPU has for a run."""
        return self.fullest.memory.total <= usable_bytes(self.gpu)

    @property
    def step_seconds(self) -> float:
        """Seconds of an optimizer step."""
        return self.step.seconds

    @property
    def mfu(self) -> float | None:
        """Model FLOPs over those of the GPUs at their dense bf16 peak, as the log's `mfu`; None if unknown."""
        return self.step.mfu

    @property
    def not_measured(self) -> str | None:
        """Which links of the job are taken from data sheets, in a sentence; None if all were measured."""
        return assumed_links(self.rates, self.job.world_size, self.job.gpus_per_node)

    @property
    def deadlock_free(self) -> bool | None:
        """Whether all ranks agree on what they send, and in which order; None if that was not looked at."""
        return None if self.faults is None else not self.faults

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all GPUs together."""
        return self.job.tokens_per_step / self.step.seconds

    @property
    def hours(self) -> float | None:
        """Of all steps, without evaluations, saves and restarts; None if their number is not known."""
        return None if self.steps is None else self.steps * self.step.seconds / 3600

    @property
    def gpu_hours(self) -> float | None:
        """`hours` of all GPUs together."""
        return None if self.hours is None else self.hours * self.job.world_size

    def as_json(self) -> dict[str, Any]:
        """Everything as one object of plain values; memory in GiB and times in seconds."""
        return {
            "layout": self.layout,
            "gpu": self.gpu.name,
            "gpus": self.job.world_size,
            "nodes": self.job.world_size // self.job.gpus_per_node,
            "rates": self.rates.source,
            "not_measured": self.not_measured,
            "sequence_length": self.job.sequence_length,
            "tokens_per_step": self.job.tokens_per_step,
            "peak_memory_gib": self.peak_memory_gib,
            "usable_memory_gib": usable_bytes(self.gpu) / GIB,
            "fits": self.fits,
            "change": None if self.change is None else asdict(self.change),
            "step_seconds": self.step.seconds,
            "mfu": self.step.mfu,
            "bubble": self.step.bubble,
            "exposed_communication_seconds": self.step.exposed_communication,
            "tokens_per_second": self.tokens_per_second,
            "tokens_per_second_per_device": self.step.tokens_per_second_per_device,
            "deadlock_free": self.deadlock_free,
            "faults": None if self.faults is None else list(self.faults),
            "steps": self.steps,
            "hours": self.hours,
            "gpu_hours": self.gpu_hours,
            "parts": {
                "step_seconds": dict(self.step.parts),
                "memory_gib": [
                    {
                        "rank": rank.role.rank,
                        "ranks": rank.role.count,
                        "pp_rank": rank.role.coordinates.pp,
                        **{name: size / GIB for name, size in parts(rank.memory).items()},
                        "total": rank.memory.total / GIB,
                        "host": rank.memory.host / GIB,
                    }
                    for rank in self.ranks
                ],
            },
        }


def parts(memory: RankMemory) -> dict[str, int]:
    """Bytes on the GPU by what they are for."""
    return {entry.name: getattr(memory, entry.name) for entry in fields(memory) if entry.name != "host"}


def usable_bytes(gpu: GPU) -> float:
    """What a run may take of a GPU."""
    return USABLE * gpu.bytes_


def layout_of(job: Job) -> dict[str, Any]:
    """What is called a layout, by the names of the training arguments, with `dp_size`; what is off is left out."""
    parallel, get = parallel_config(job), job.arguments.get
    layout: dict[str, Any] = {
        "tp_size": parallel.tp_size,
        "cp_size": parallel.cp_size,
        "pp_size": parallel.pp_size,
        "dp_size": parallel.dp_size(job.world_size),
        "ep_size": parallel.ep_size,
        "zero_stage": parallel.zero_stage,
        "dp_replicate_size": parallel.dp_replicate_size,
        "per_device_train_batch_size": job.samples,
        "gradient_accumulation_steps": job.micro_batches,
    }
    if parallel.pp_size > 1:
        layout |= {"pp_schedule": parallel.pp_schedule, "pp_virtual_stages": parallel.pp_virtual_stages}
    switch = get("activation_checkpointing")
    layout["activation_checkpointing"] = bool(get("gradient_checkpointing") if switch is None else switch)
    if layout["activation_checkpointing"]:
        layout["activation_checkpointing_policy"] = get("activation_checkpointing_policy") or "full"
    offs: dict[str, Any] = {
        "activation_checkpointing_layers": None,
        "activation_offload": 0,
        "mlp_chunk_tokens": None,
        "fp8": None,
    }
    offs |= {"optim_offload": 0, "optim_state_dtype": "float32", "sequence_parallel": True}
    return layout | {name: get(name) for name, off in offs.items() if get(name, off) not in (off, None)}


def yaml_value(value: Any) -> str:
    """As it is written in YAML."""
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def steps_for(tokens: float, tokens_per_step: int) -> int:
    """Optimizer steps that a budget of tokens takes."""
    return math.ceil(tokens / tokens_per_step)
