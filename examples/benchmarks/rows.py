"""What a row of `throughput.py` trains with: a table of trainers, each a function that trains and tells what it did."""

import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import peer_accelerate_cp
import peer_torchtitan
import torch
import transformers
from clock import Watch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator
from transformers.utils import is_liger_kernel_available

from hf_nanotron import AutoModelForCausalLM, NanotronTrainer, NanotronTrainingArguments
from hf_nanotron.parallel.collectives import all_gather

MICRO, STEPS = "per_device_train_batch_size", "gradient_accumulation_steps"
NUMBER = re.compile(r"-?\d+(\.\d+)?(e-?\d+)?")
OF_THE_ROW = ("trainer", "name", "documents")  # fields that are no arguments of a trainer


@dataclass
class Task:
    """What every row of one call has in common."""

    shape: str
    config: Any
    sequence_length: int
    watch: Watch
    bf16: bool
    directory: Path = field(default_factory=lambda: Path(tempfile.mkdtemp()))
    documents: tuple[int, int] | None = None  # shortest and longest, in tokens; None: each sample is one


@dataclass
class Outcome:
    """What a trainer tells after its last step.

    Attributes:
        sizes: tp, pp, ep and cp, each 1 if the trainer has none.
        shards: over how many devices the optimizer's state is spread.
        notes: fields of the result that only this trainer has.
    """

    world_size: int
    sizes: dict[str, int]
    micro_batch: int
    micro_batches: int
    main: bool
    shards: int = 1
    notes: dict[str, Any] = field(default_factory=dict)


class Record(TrainerCallback):
    """Marks the clock right before each optimizer step, the one place where our trainer has nothing to wait for.

    Loss is logged, which waits for the device, in the first step, after the last timed one, and in the one after.
    """

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self.watch.mark(profile=state.is_world_process_zero)
        control.should_log = len(self.watch.clock) in (1, self.watch.steps - 1, self.watch.steps)
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.watch.losses.append(logs["loss"])


def parse_row(text: str) -> dict[str, Any]:
    """`"tp_size=2,pp_schedule=1f1b"` as keyword arguments."""
    row: dict[str, Any] = {}
    for item in filter(None, text.split(",")):
        name, _, value = item.partition("=")
        row[name] = json.loads(value) if NUMBER.fullmatch(value) or value in ("true", "false") else value
    return row


def label(row: dict[str, Any]) -> str:
    """The row's `name`, or what it was made of."""
    made_of = (f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in row.items())
    return row.get("name") or ",".join(made_of) or "default"


def arguments_of(row: dict[str, Any], task: Task) -> dict[str, Any]:
    """Training arguments that every row has in common."""
    gpu = torch.cuda.is_available()
    return {
        "output_dir": str(task.directory),
        "max_steps": task.watch.steps,
        "learning_rate": 3e-4,
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
        "bf16": gpu or task.bf16,
        "use_cpu": not gpu,
        **({"train_sampling_strategy": "sequential"} if task.documents else {}),
        **row,
    }


def random_tokens(task: Task, samples: int) -> Dataset:
    """As many samples as a run reads, so that no epoch ends within it; labels are the tokens themselves.

    With documents, their positions restart, and no token predicts the first of another one.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, task.config.vocab_size, (samples, task.sequence_length), generator=generator).numpy()
    if task.documents is None:
        return Dataset.from_dict({"input_ids": ids, "labels": ids}).with_format("torch")
    rows = packings(task.documents, task.sequence_length, samples)
    positions = np.stack([np.concatenate([np.arange(length) for length in row]) for row in rows])
    columns = {"input_ids": ids, "labels": np.where(positions == 0, -100, ids), "position_ids": positions}
    return Dataset.from_dict(columns).with_format("torch")


def packings(documents: tuple[int, int], sequence_length: int, samples: int) -> list[list[int]]:
    """Lengths of the documents that fill each sample: log-uniform, the last one cut."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(samples):
        row: list[int] = []
        while (left := sequence_length - sum(row)) > 0:
            row.append(min(left, int(np.exp(rng.uniform(*np.log(documents))))))
        rows.append(row)
    return rows


def seen_length(task: Task, samples_per_step: int) -> float:
    """The sequence length that would have the attention FLOPs of a token in the timed steps.

    Packed samples are read in order, so those of the timed steps are known.
    """
    if task.documents is None:
        return float(task.sequence_length)
    first, count = task.watch.warmup * samples_per_step, task.watch.timed * samples_per_step
    rows = packings(task.documents, task.sequence_length, first + count)[first:]
    return sum(length**2 for row in rows for length in row) / (count * task.sequence_length)


def train(trainer_class: type[Trainer], model: Any, args: Any, task: Task, cp_size: int = 1) -> tuple[Trainer, Outcome]:
    """Train with a Trainer of transformers' or ours."""
    sizes = {name: getattr(args, f"{name}_size", 1) for name in ("tp", "pp", "ep")}
    sizes["cp"] = getattr(args, "cp_size", cp_size)
    copies = args.world_size // (sizes["tp"] * sizes["pp"] * sizes["cp"])
    micro_batch, micro_batches = args.per_device_train_batch_size, args.gradient_accumulation_steps
    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=random_tokens(task, micro_batch * micro_batches * copies * task.watch.steps),
        data_collator=default_data_collator,
        callbacks=[Record(task.watch)],
    )
    trainer.train()
    return trainer, Outcome(args.world_size, sizes, micro_batch, micro_batches, trainer.is_world_process_zero())


def nanotron(row: dict[str, Any], task: Task) -> Outcome:
    args = NanotronTrainingArguments(**arguments_of(row, task))
    model = AutoModelForCausalLM.from_config(task.config, parallel=args.parallel)
    trainer, outcome = train(NanotronTrainer, model, args, task)
    assert isinstance(trainer, NanotronTrainer)
    report, cut = trainer.memory_report, outcome.sizes["tp"] * outcome.sizes["pp"]
    outcome.shards = cut * (outcome.world_size // cut if args.zero_stage else 1)
    outcome.notes = {
        "zero_stage": args.zero_stage,
        "estimated_state_bytes_per_parameter": round(report.state * cut / trainer.model.num_parameters(), 3),
        "estimated_total_gib": round(report.total / 2**30, 2),
        "by_rank": by_rank(trainer),
    }
    if torch.cuda.is_available():
        outcome.notes["peak_memory_gib"] = max(outcome.notes["by_rank"]["peak_gib"])
    trainer.mesh.close()
    return outcome


def by_rank(trainer: NanotronTrainer) -> dict[str, list[float]]:
    """Of each rank: the estimates of its memory, in bytes, and its peak in GiB. All ranks together."""
    report, gpu = trainer.memory_report, torch.cuda.is_available()
    own = [report.state, report.activations, torch.cuda.max_memory_allocated() if gpu else 0]
    every = all_gather(torch.tensor([own], dtype=torch.int64, device=trainer.mesh.device), trainer.mesh.world, 0)
    state, activations, peak = every.t().tolist()
    peaks = {"peak_gib": [round(bytes_ / 2**30, 2) for bytes_ in peak]} if gpu else {}
    return {"estimated_state": state, "estimated_activations": activations, **peaks}


def stock(row: dict[str, Any], task: Task) -> Outcome:
    """Nothing of ours: the stock classes, on the device from the start; bf16 autocast over weights in fp32."""
    row = dict(row)
    choices: dict[str, Any] = {
        "dtype": getattr(torch, row.pop("dtype", "float32")),
        "attn_implementation": row.pop("attn_implementation", "sdpa"),
    }
    if hasattr(task.config, "num_experts") or "experts_implementation" in row:
        choices["experts_implementation"] = row.pop("experts_implementation", "grouped_mm")
    if row.get("activation_checkpointing"):
        row["activation_checkpointing_kwargs"] = {"use_reentrant": False}
    args = TrainingArguments(**arguments_of({"optim": "adamw_torch_fused", **row}, task))
    with args.device:
        model = transformers.AutoModelForCausalLM.from_config(task.config, **choices)
    return train(Trainer, model, args, task)[1]


def liger(row: dict[str, Any], task: Task) -> Outcome:
    """The stock row with Liger's kernels, among them its head and loss in one."""
    if not is_liger_kernel_available():
        raise ValueError("trainer=liger needs the package liger-kernel, and it is not installed.")
    return stock({"use_liger_kernel": True, **row}, task)


def accelerate_cp(row: dict[str, Any], task: Task) -> Outcome:
    """The stock row, its samples divided over ranks; see `peer_accelerate_cp.py`."""
    args = TrainingArguments(**arguments_of(peer_accelerate_cp.arguments(row), task))
    with args.device:
        model = transformers.AutoModelForCausalLM.from_config(task.config, attn_implementation="sdpa")
    outcome = train(Trainer, model, args, task, cp_size=row["cp_size"])[1]
    outcome.shards = outcome.world_size
    return outcome


def torchtitan(row: dict[str, Any], task: Task) -> Outcome:
    """torchtitan's own Trainer; see `peer_torchtitan.py`."""
    return Outcome(**peer_torchtitan.train(row, task.config, task.sequence_length, task.watch, task.directory))


TRAINERS: dict[str, Callable[[dict[str, Any], Task], Outcome]] = {
    "nanotron": nanotron,
    "stock": stock,
    "liger": liger,
    "accelerate_cp": accelerate_cp,
    "torchtitan": torchtitan,
}
# Packages besides torch and transformers whose versions belong to a result.
PACKAGES = {"nanotron": ("hf-nanotron", "flash-attn-4"), "liger": ("liger-kernel",), "torchtitan": ("torchtitan",)}
