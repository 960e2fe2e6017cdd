"""A plan: the real trainer says what each rank takes and sends, measured rates say how long that takes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..monitor.gpus import GPU, find_gpu
from ..parallel.together import on_first_rank
from ..redaction import redacted
from ..training_args import NanotronTrainingArguments
from .deadlock import find_faults
from .default_rates import default_rates, refuse_other_gpu
from .estimate import Estimator
from .job import Job
from .layer_work import WorkTable
from .long_step import long_step_time
from .memory import rank_memory
from .processes import rehearse
from .rates import Rates, load_rates
from .result import GIB, Plan, RankPlan, steps_for, usable_bytes
from .roles import roles
from .search import Found, cheapest_change, search

NOT_GIVEN = ("output_dir", "logging_dir", "use_cpu", "local_rank", "report_to", "run_name")
NODE = 8  # GPUs of a node, where nothing is said
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
        ValueError: in the trainer's words, for a job that it refuses; for rates of another GPU.
    """
    refuse_other_gpu(rates, gpu)
    every = roles(job)
    estimator = Estimator(job.config)
    if run:
        done = rehearse(job, every, trainer_class)
        ranks = tuple(RankPlan(each.trace.role, rank_memory(job, each)) for each in done)
        faults: tuple[str, ...] | None = tuple(find_faults([each.trace for each in done]))
    else:
        ranks = tuple(RankPlan(each, estimator.memory(job, each.coordinates.pp)) for each in every)
        faults = None
    if tokens is not None:
        steps = steps_for(tokens, job.tokens_per_step)
    works = WorkTable(estimator.weights)
    plan = Plan(job, gpu, rates, ranks, long_step_time(job, rates, works), faults, steps=steps)
    return plan if plan.fits else replace(plan, change=cheapest_change(job, gpu, rates, estimator))


def search_and_plan(job: Job, rows: int, gpu: GPU, rates: Rates, planned: Callable[[Job], Plan]) -> tuple[Found, Plan]:
    """The fastest layouts of a job with `rows` rows a step, and the plan of the first that the trainer takes.

    Args:
        planned: `make_plan` of a layout, on this GPU at these rates.

    Raises:
        ValueError: if no layout fits, with the memory of that which takes least; for rates of another GPU.
    """
    refuse_other_gpu(rates, gpu)
    found = search(job, gpu, rates, rows)
    if not found.best:
        raise ValueError(
            f"no layout of {job.world_size} {gpu.name} fits with {rows} rows a step: the smallest takes "
            f"{found.least_gib:.1f} GiB on its fullest rank, and a run may take {usable_bytes(gpu) / GIB:.1f}. Use "
            "more GPUs, shorter rows, optim_state_dtype=bfloat16, or optim_offload=1."
        )
    refused: list[str] = []
    for candidate in found.best[:TRIES]:
        try:
            plan = planned(candidate.job)
        except ValueError as error:
            refused.append(str(error))
        else:
            if plan.fits and not plan.faults:
                return replace(found, refused=tuple(refused)), plan
            refused.append(
                plan.faults[0] if plan.faults else f"it takes {plan.peak_memory_gib:.1f} GiB on its fullest rank"
            )
        found = found.without(candidate)
    raise ValueError(f"the {len(refused)} fastest layouts that fit by arithmetic do not run; the first: {refused[0]}")


def plan_of_trainer(trainer: Any, *asked: Any, **options: Any) -> Plan:
    """What a trainer's run costs, by its model and arguments. See `NanotronTrainer.plan`.

    Raises:
        ValueError: as `make_plan`; for a GPU that is not in the table, and for rows whose length is not known.
    """
    trainer.mesh.assemble("plan")
    return on_first_rank(trainer.mesh, "planning", partial(_plan_of_trainer, trainer, *asked, **options))


def _plan_of_trainer(
    trainer: Any,
    trainer_class: type,
    gpu: str | None = None,
    gpus: int | None = None,
    gpus_per_node: int | None = None,
    rates: str | Path | None = None,
    sequence_length: int | None = None,
    run: bool = True,
) -> Plan:
    device = trainer.args.device
    found = None if rates is None else load_rates(rates)
    if gpu is None and found is not None:
        gpu = found.gpu
    if gpu is None and device.type != "cuda":
        raise ValueError("plan needs gpu, such as gpu='h100': this process has none.")
    row = find_gpu(torch.cuda.get_device_name(device) if gpu is None else gpu)
    for name, value in (("gpus", gpus), ("gpus_per_node", gpus_per_node), ("sequence_length", sequence_length)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{name}={value!r} must be an integer of at least 1, or None.")
    world_size = trainer.args.world_size if gpus is None else gpus
    node = min(NODE, world_size) if gpus_per_node is None else gpus_per_node
    length = sample_length(trainer.train_dataset) if sequence_length is None else sequence_length
    if length is None:
        raise ValueError("plan needs sequence_length: the training data do not say how many tokens a row has.")
    job = Job(trainer.model.config, given_arguments(trainer.args), world_size, node, length)
    copy.copy(trainer.args).check(world_size)
    steps = trainer.args.max_steps if trainer.args.max_steps > 0 else None
    return make_plan(job, row, found or default_rates(row), trainer_class, run=run, steps=steps)


def given_arguments(args: NanotronTrainingArguments) -> dict[str, Any]:
    """The training arguments that are not the defaults, without `output_dir` and without secrets.

    A class derived from NanotronTrainingArguments may have other defaults, and fields that a job has not.
    `torch_compile` counts as not given where it is what it would have become by itself on this device: a plan is made
    for another one.
    """
    given: dict[str, Any] = {}
    by_itself = bool(args.bf16 and args.device.type == "cuda")
    compiles = (args.torch_compile, args.torch_compile_backend, args.torch_compile_mode)
    unsaid = (*NOT_GIVEN, *(["torch_compile"] if compiles == (by_itself, None, None) else []))
    for entry in fields(NanotronTrainingArguments):
        value = getattr(args, entry.name)
        value = value.value if isinstance(value, Enum) else value
        default = entry.default.value if isinstance(entry.default, Enum) else entry.default
        if entry.init and entry.name not in unsaid and value != default and redacted(entry.name, value) == value:
            given[entry.name] = value
    return given


def sample_length(dataset: Any) -> int | None:
    """Tokens of a row, as the data says or its first row has; None if that is not known."""
    length = getattr(dataset, "sequence_length", None)
    if length is None and hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and len(dataset):
        row = dataset[0]
        length = len(row["input_ids"]) if isinstance(row, Mapping) and "input_ids" in row else None
    return None if length is None else int(length)
