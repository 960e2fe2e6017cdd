"""What measurements of saves share: the checkpoint they begin from, a trainer over random rows, the largest value."""

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from datasets import Dataset
from shapes import make_config
from transformers import TrainerCallback, default_data_collator

from hf_nanotron import AutoModelForCausalLM, NanotronTrainer, NanotronTrainingArguments


def write_source(cli: argparse.Namespace, arguments: NanotronTrainingArguments) -> str:
    """Write a Hub checkpoint of the shape into the scratch folder, drawn from a fixed seed; where it is."""
    source: Path = cli.scratch / "source"
    transformers.set_seed(0)
    model = AutoModelForCausalLM.from_config(
        make_config(cli.shape, cli.sequence_length), parallel=arguments.parallel, dtype=torch.bfloat16
    )
    model.save_pretrained(source)
    model.mesh.close()
    return str(source)


def training_arguments(cli: argparse.Namespace, **values: Any) -> NanotronTrainingArguments:
    """Arguments of a run that reports to nobody, with `values` besides."""
    common = {"per_device_train_batch_size": 1, "learning_rate": 1e-4, "report_to": "none", "disable_tqdm": True}
    return NanotronTrainingArguments(**{**common, "bf16": True, "use_cpu": cli.cpu, **values})


def make_trainer(
    model: Any,
    args: NanotronTrainingArguments,
    samples: int,
    sequence_length: int,
    callback: TrainerCallback,
    generator: torch.Generator | None = None,
) -> NanotronTrainer:
    """A trainer over `samples` rows of random ids, which `callback` gets as its `trainer`."""
    ids = torch.randint(0, 1000, (samples, sequence_length), generator=generator).tolist()
    trainer = NanotronTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
        data_collator=default_data_collator,
        callbacks=[callback],
    )
    callback.trainer = trainer
    return trainer


def largest(value: float) -> float:
    """Over all ranks."""
    values: list[Any] = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return max(values)
