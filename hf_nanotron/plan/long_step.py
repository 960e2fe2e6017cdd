"""The time of a step of many micro-batches, from two shorter ones: each further round of a pipeline takes as long."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from .job import Job, parallel_config
from .layer_work import WorkTable
from .rates import Rates
from .step_time import COMMUNICATION, StepTime, step_time

ROUNDS = 2, 3  # micro-batches of the shorter steps, by the pipeline's ranks
EXACT = 12  # rounds, up to which a step is played as it is


def long_step_time(
    job: Job, rates: Rates, works: WorkTable, exact: int = EXACT, rounds: tuple[int, int] = ROUNDS
) -> StepTime:
    """`step_time` of a job with any number of micro-batches.

    Beyond `exact` rounds of the pipeline, seconds, parts and idle time are extended in proportion to the number of
    micro-batches, from steps of `rounds`. The timeline is then that of the longer of two short steps.

    Raises:
        ValueError: as `step_time`.
    """
    ranks = max(2, parallel_config(job).pp_size)
    if job.micro_batches <= exact * ranks:
        return step_time(job, rates, works)
    short, long = (count * ranks for count in rounds)
    first, second = (
        step_time(replace(job, arguments={**job.arguments, "gradient_accumulation_steps": count}), rates, works)
        for count in (short, long)
    )

    def extended(of: Callable[[StepTime], float]) -> float:
        before, after = of(first), of(second)
        return max(0.0, after + (after - before) / (long - short) * (job.micro_batches - long))

    seconds = extended(lambda step: step.seconds)
    names = [*second.parts, *(name for name in first.parts if name not in second.parts)]
    parts = {name: extended(lambda step, name=name: step.parts.get(name, 0.0)) for name in names}  # type: ignore[misc]
    faster = second.seconds / seconds * job.micro_batches / long
    return StepTime(
        seconds=seconds,
        mfu=None if second.mfu is None else second.mfu * faster,
        tokens_per_second_per_device=second.tokens_per_second_per_device * faster,
        bubble=extended(lambda step: step.bubble * step.seconds) / seconds,
        exposed_communication=sum(parts.get(name, 0.0) for name in COMMUNICATION),
        parts={name: value for name, value in parts.items() if value > 0.0},
        timeline=second.timeline,
    )
