"""The layouts of a job that the trainer would take, with the global batch that was asked for, by arithmetic alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

from ..monitor.flops import NUM_EXPERTS, first_of
from .job import Job, parallel_config
from .weights import ModelWeights

# How activations are recomputed, from what costs no time to what keeps least.
RECOMPUTATIONS: tuple[dict[str, Any], ...] = (
    {"activation_checkpointing": False},
    {"activation_checkpointing": True, "activation_checkpointing_policy": "selective"},
    {"activation_checkpointing": True, "activation_checkpointing_policy": "all_but_attention"},
    {"activation_checkpointing": True, "activation_checkpointing_policy": "full"},
)

# What a layout decides, so that values of the file are not kept.
DECIDED = (
    "tp_size", "pp_size", "cp_size", "ep_size", "dp_replicate_size", "zero_stage", "pp_schedule", "pp_virtual_stages",
    "pp_layers_per_stage", "tp_overlap", "cp_kv_heads_per_gather", "per_device_train_batch_size",
    "gradient_accumulation_steps", "activation_checkpointing", "activation_checkpointing_policy",
    "activation_checkpointing_layers", "gradient_checkpointing", "gradient_checkpointing_kwargs",
)  # fmt: skip

LONG_ROW = 8192  # tokens of a row, from which on it may be shared among ranks
LEAST_PART = 4096  # tokens of a row that such a rank has
MOST_STAGES = 16
MOST_TOKENS = 131072  # of a micro-batch on a rank: more fill no GPU better


def layouts(job: Job, weights: ModelWeights, rows: int) -> Iterator[Job]:
    """The job in every layout, without a choice of recomputation: sizes, ZeRO stages, schedules and micro-batches.

    tp ranks are on one node. A layout whose sizes the trainer refuses for this model is left out, and one whose global
    batch would not be `rows` rows.
    """
    kept = {name: value for name, value in job.arguments.items() if name not in DECIDED}
    for sizes in _sizes(job, weights):
        layout = replace(job, arguments={**kept, **sizes})
        try:
            parallel = parallel_config(layout)
        except ValueError:
            continue
        copies = parallel.dp_size(job.world_size)
        if rows % copies or weights.why_not(parallel) is not None:
            continue
        for samples in divisors(rows // copies):
            micro_batches = rows // copies // samples
            if samples > 1 and samples * job.sequence_length > MOST_TOKENS * parallel.cp_size:
                break
            if parallel.pp_size > 1 and micro_batches < parallel.pp_size:
                break
            batch = {"per_device_train_batch_size": samples, "gradient_accumulation_steps": micro_batches}
            yield replace(layout, arguments={**layout.arguments, **batch})


def _sizes(job: Job, weights: ModelWeights) -> Iterator[dict[str, Any]]:
    world, text = job.world_size, job.config.get_text_config()
    experts = first_of(text, NUM_EXPERTS) or 1
    in_blocks = job.arguments.get("mlp_chunk_tokens") is not None
    long = job.sequence_length >= LONG_ROW and job.arguments.get("attention") != "stock"
    for tp, cp in product(divisors(job.gpus_per_node), _powers(job.sequence_length // LEAST_PART) if long else [1]):
        if world % (tp * cp):
            continue
        for pp in divisors(world // (tp * cp)):
            if pp > min(text.num_hidden_layers, MOST_STAGES):
                break
            copies = world // (tp * cp * pp) * cp
            schedules = _schedules(pp, text.num_hidden_layers, in_blocks)
            shardings = _zero(copies, tp, job.gpus_per_node)
            for (zero, shards), (schedule, stages), ep in product(shardings, schedules, divisors(experts)):
                if ep > 1 and (shards * tp) % ep or (schedule == "zb" and zero == 3):
                    continue
                if zero == 3 and job.arguments.get("fp8") is not None:
                    continue
                yield {
                    "tp_size": tp, "pp_size": pp, "cp_size": cp, "ep_size": ep, "zero_stage": zero,
                    "dp_replicate_size": copies // shards, "pp_schedule": schedule, "pp_virtual_stages": stages,
                }  # fmt: skip


def _zero(copies: int, tp: int, node: int) -> list[tuple[int, int]]:
    """Stages of ZeRO, and over how many ranks they shard: all copies of a weight, or those inside a node."""
    if copies == 1:
        return [(1, 1)]
    sizes = [copies]
    if (inside := node // tp) > 1 and copies > inside and copies % inside == 0:
        sizes.append(inside)
    return [(stage, size) for size in sizes for stage in (1, 2, 3)]


def _schedules(pp: int, layers: int, in_blocks: bool) -> list[tuple[str, int]]:
    """Schedules of a pipeline, and stages of a rank."""
    if pp == 1:
        return [("1f1b", 1)]
    found = [("1f1b", 1)]
    found += [("interleaved_1f1b", stages) for stages in (2, 4) if pp * stages <= layers]
    return found if in_blocks else [*found, ("zb", 1)]


def divisors(number: int) -> list[int]:
    """All of them, in order."""
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def _powers(most: int) -> list[int]:
    """Powers of two, up to `most` and to 64 ranks that share a row."""
    return [2**n for n in range(7) if n == 0 or 2**n <= most]
