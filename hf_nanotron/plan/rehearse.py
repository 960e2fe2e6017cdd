"""Run the real trainer as one rank of a job, on tensors without memory."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from ..arguments.snapshots import SHARED_MEMORY
from ..models.auto import AutoModelForCausalLM
from ..monitor.memory import MemoryReport
from ..parallel.mesh import ParallelMesh
from ..training_args import NanotronTrainingArguments
from .fake_world import fake_world
from .job import Job, parallel_config
from .narrow import narrow, with_fewer_micro_batches
from .outline import Outline
from .roles import Role
from .trace import JOB, Event, Recorder, RoleTrace

# What a run writes, reports, reads and evaluates besides its steps is no part of a plan.
PLANNED = {
    "max_steps": 1, "use_cpu": True, "report_to": "none", "save_strategy": "no", "eval_strategy": "no",
    "memory_snapshot_steps": None, "memory_snapshot_dir": SHARED_MEMORY,
    "logging_strategy": "steps", "logging_steps": 1, "disable_tqdm": True, "push_to_hub": False,
    "load_best_model_at_end": False, "remote_checkpoints": None, "save_on_signal": 0.0, "torch_compile": False,
    "dataloader_num_workers": 0, "dataloader_pin_memory": False, "async_save": False, "do_eval": False,
    "optim_offload": 0.0, "batch_size_warmup_tokens": None, "log_level": "error", "batch_size_warmup_start": None,
    "batch_size_warmup_increment": None, "lr_scheduler_type": "constant", "lr_scheduler_kwargs": None,
    "warmup_steps": 0, "wsd_decay_steps": None, "dataloader_persistent_workers": False,
    "dataloader_prefetch_factor": None, "run_log": False, "profile_steps": None, "profile_ranks": None,
    "metrics_detail": None, "metrics_detail_steps": None,
}  # fmt: skip
HELD = "stage 2: "  # what ranks are told in the second rehearsal of ZeRO stage 3


@dataclass(frozen=True)
class Rehearsal:
    """What a rank of a role has done in one optimizer step.

    Args:
        trace: what it said to others.
        report: bytes of its training state, from the real one; activations are an estimate for layers that are not
            compiled.
        live: bytes of all tensors when the step began.
        peak: the most bytes of tensors at a time, on the way of layers that are not compiled.
        told: contents of the messages that describe others.
        layers: decoder layers of each stage of the whole model.
    """

    trace: RoleTrace
    report: MemoryReport
    live: int
    peak: int
    told: Mapping[str, torch.Tensor]
    layers: tuple[int, ...]


def rehearse_role(
    job: Job, role: Role, trainer_class: type[Any], told: Mapping[str, torch.Tensor] | None = None
) -> Rehearsal:
    """Train one optimizer step as `role.rank`, in this process.

    Of more micro-batches than a period of the schedule takes, as many are run. ZeRO stage 3 is torch's `fully_shard`,
    which takes no tensors without memory: what its ranks say is that of a narrow copy of the job, and what they hold is
    that of stage 2, sharded as well.

    Args:
        trainer_class: `NanotronTrainer`, or a subclass of it that takes its arguments.
        told: messages that describe others, of a rank that was rehearsed before.

    Raises:
        ValueError: for what the trainer refuses, with its sentence.
        RuntimeError: in a process that is a rank of a job.
    """
    with fake_world(role.rank, job.world_size, job.gpus_per_node), tempfile.TemporaryDirectory() as folder:
        NanotronTrainingArguments(folder, **{**job.arguments, "use_cpu": True})  # refuses what a run would refuse
    job = with_fewer_micro_batches(job)
    if parallel_config(job).zero_stage < 3:
        done = _run(job, role, trainer_class, told)
        return replace(done, report=_with_state_on_host(done.report, job))
    there = {name.removeprefix(HELD): x for name, x in (told or {}).items() if name.startswith(HELD)}
    held = _run(replace(job, arguments={**job.arguments, "zero_stage": 2}), role, trainer_class, there)
    said = _run(narrow(job), role, trainer_class, told, has_values=True)
    report = replace(held.report, parameters=held.report.masters or held.report.parameters, masters=0)
    report = _with_state_on_host(report, job)
    both = {**said.told, **{HELD + name: x for name, x in held.told.items()}}
    return replace(held, trace=said.trace, told=both, report=report)


def _run(
    job: Job,
    role: Role,
    trainer_class: type[Any],
    told: Mapping[str, torch.Tensor] | None,
    has_values: bool = False,
) -> Rehearsal:
    recorder = Recorder(dict(told or {}))
    outline = Outline(recorder.watch, recorder.label, has_values)
    with fake_world(role.rank, job.world_size, job.gpus_per_node), tempfile.TemporaryDirectory() as folder:
        overlaps = parallel_config(job).overlaps_tp(torch.device("cuda"))
        optim = str(job.arguments.get("optim") or "adamw_torch").removesuffix("_fused")
        planned = {**PLANNED, "tp_overlap": overlaps, "optim": optim}
        args = NanotronTrainingArguments(folder, **{**job.arguments, **planned})
        with outline:
            model = AutoModelForCausalLM.from_config(job.config, parallel=args.parallel, parametrization=args.spectral)
            watcher = _Watcher(recorder, outline)
            trainer = trainer_class(model=model, args=args, train_dataset=Rows(job), callbacks=[watcher])
            for callback in (PrinterCallback, ProgressCallback):
                trainer.remove_callback(callback)
            trainer.train()
        trace = RoleTrace(role, *_by_axis(recorder.events, trainer.mesh))
        layers = tuple(map(len, trainer.model.layers_of_stage))
        return Rehearsal(trace, trainer.memory_report, watcher.live, outline.peak, recorder.told, layers)


def _with_state_on_host(report: MemoryReport, job: Job) -> MemoryReport:
    """Of `optim_offload`: this much of masters and moments is in pinned memory, which has no place in a rehearsal."""
    away = float(job.arguments.get("optim_offload") or 0.0)
    masters, moments = round(away * report.masters), round(away * report.moments)
    left = {"masters": report.masters - masters, "moments": report.moments - moments}
    return replace(report, **left, host=report.host + masters + moments)


class Rows(Dataset[dict[str, torch.Tensor]]):
    """As many rows as an optimizer step reads, of ids that any vocabulary has."""

    def __init__(self, job: Job) -> None:
        self._rows = job.tokens_per_step // job.sequence_length
        self._length, self._documents = job.sequence_length, job.documents

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.zeros(self._length, dtype=torch.int64)
        row = {"input_ids": ids, "labels": ids}
        if self._documents is not None:
            row["position_ids"] = torch.cat([torch.arange(length) for length in self._documents])
        return row


class _Watcher(TrainerCallback):
    """Tells the recorder when a step begins."""

    def __init__(self, recorder: Recorder, outline: Outline) -> None:
        self._recorder, self._outline, self.live = recorder, outline, 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._recorder.step = state.global_step + 1
        self.live = self._outline.peak = self._outline.live


def _by_axis(events: list[Event], mesh: ParallelMesh) -> tuple[tuple[Event, ...], dict[str, Any]]:
    """The events with the names of their groups, and the ranks of all groups of these names."""
    names = dict[str, str]()
    for name, group in mesh.groups.items():
        if group.connection is not None and group.connection.made is not None:
            names.setdefault(group.connection.made.group_name, name)
    named = tuple(replace(event, group=names.get(event.channel, JOB)) for event in events)
    groups = {name: mesh.partition(name) for name in {event.group for event in named} - {JOB}}
    return named, {**groups, JOB: (tuple(range(mesh.world_size)),)}
