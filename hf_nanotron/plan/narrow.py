"""A small copy of a job: the same layout, layers and schedule; narrow, with short rows."""

from __future__ import annotations

import copy
import dataclasses

from .job import Job, parallel_config

HEAD_DIM, TOKENS = 8, 8
INNER = (
    *("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "ffn_dim", "n_inner"),
    *("ffn_hidden_size", "dense_intermediate_size"),
)


def narrow(job: Job) -> Job:
    """`job` with heads of 8 features and rows of a few tokens. Numbers of layers, heads and experts stay."""
    parallel, config = parallel_config(job), copy.deepcopy(job.config)
    text = config.get_text_config()
    heads = text.num_attention_heads
    if getattr(text, "head_dim", None) is not None:
        text.head_dim = HEAD_DIM
    text.hidden_size = HEAD_DIM * heads
    for name in INNER:
        if getattr(text, name, None) is not None:
            setattr(text, name, 2 * HEAD_DIM * parallel.tp_size)
    length = TOKENS * parallel.tp_size * parallel.cp_size
    return dataclasses.replace(job, config=config, sequence_length=length, documents=None)


def with_fewer_micro_batches(job: Job) -> Job:
    """`job` with as many micro-batches as its schedule takes to come into its period, and out of it again."""
    size = parallel_config(job).pp_size
    enough = max(3, 2 * size + job.micro_batches % size)
    arguments = {**job.arguments, "gradient_accumulation_steps": min(job.micro_batches, enough)}
    return dataclasses.replace(job, arguments=arguments)
