"""A plan: the real trainer says what each rank takes and sends, measured rates say how long that takes."""

from __future__ import annotations

from dataclasses import replace

from ..monitor.gpus import GPU
from .deadlock import find_faults
from .estimate import Estimator
from .job import Job
from .layer_work import WorkTable
from .long_step import long_step_time
from .memory import rank_memory
from .processes import rehearse
from .rates import Rates
from .result import GIB, Plan, RankPlan, steps_for, usable_bytes
from .roles import roles
from .search import Found, cheapest_change, search
from .weights import ModelWeights

TRIES = 3  # layouts of a search that are run: arithmetic may have missed why one is refused, or some GiB


def make_plan(
    job: Job,
    gpu: GPU,
    rates: Rates,
    trainer_class: type,
    *,
    run: bool = True,
    steps: int | None = None,
    tokens: float | None = None,
) -> Plan:
    """What a job costs on a GPU, in its own layout.

    Args:
        trainer_class: `NanotronTrainer`, which is above this room.
        run: whether it runs as each role. Otherwise memory is arithmetic, and ranks are not compared.
        steps: optimizer steps of the run, for its hours.
        tokens: of the run, instead of `steps`.

    Raises:
        ValueError: in the trainer's words, for a job that it refuses.
    """
    every = roles(job)
    if run:
        done = rehearse(job, every, trainer_class)
        ranks = tuple(RankPlan(each.trace.role, rank_memory(job, each)) for each in done)
        faults: tuple[str, ...] | None = tuple(find_faults([each.trace for each in done]))
    else:
        estimator = Estimator(job.config)
        ranks = tuple(RankPlan(each, estimator.memory(job, each.coordinates.pp)) for each in every)
        faults = None
    if tokens is not None:
        steps = steps_for(tokens, job.tokens_per_step)
    step = long_step_time(job, rates, WorkTable(ModelWeights(job.config)))
    plan = Plan(job, gpu, rates, ranks, step, faults, steps=steps)
    return plan if plan.fits else replace(plan, change=cheapest_change(job, gpu, rates))


def search_and_plan(
    job: Job,
    rows: int,
    gpu: GPU,
    rates: Rates,
    trainer_class: type,
    *,
    run: bool = True,
    steps: int | None = None,
    tokens: float | None = None,
) -> tuple[Found, Plan]:
    """The fastest layouts of a job with `rows` rows a step, and the plan of the first that the trainer takes.

    Raises:
        ValueError: if no layout fits, with the memory of that which takes least.
    """
    found = search(job, gpu, rates, rows)
    if not found.best:
        raise ValueError(
            f"no layout of {job.world_size} {gpu.name} fits: the smallest takes {found.least_gib:.1f} GiB on its "
            f"fullest rank, and a run may take {usable_bytes(gpu) / GIB:.1f}. Use more GPUs, shorter rows, "
            "optim_state_dtype=bfloat16, or optim_offload=1."
        )
    refused: list[str] = []
    for candidate in found.best[:TRIES]:
        try:
            plan = make_plan(candidate.job, gpu, rates, trainer_class, run=run, steps=steps, tokens=tokens)
        except ValueError as error:
            refused.append(str(error))
        else:
            if plan.fits and plan.deadlock_free is not False:
                return replace(found, refused=tuple(refused)), plan
            refused.append(
                f"{plan.peak_memory_gib:.1f} GiB on its fullest rank when it runs" if not plan.fits else plan.faults[0]
            )
        found = found.without(candidate)
    raise ValueError(f"the {len(refused)} fastest layouts that fit by arithmetic do not run; the first: {refused[0]}")
