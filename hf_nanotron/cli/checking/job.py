"""What one rank of one layout does: make the model, train a few steps, and write down what it has seen."""

from __future__ import annotations

import contextlib
import io
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from transformers import PreTrainedConfig, PrinterCallback, Trainer, set_seed
from transformers.utils import logging

from ...models.auto import AutoModelForCausalLM
from ...trainer import NanotronTrainer
from ...training_args import NanotronTrainingArguments
from ..data import collate
from .processes import Begun
from .recorder import Recorder
from .records import Record
from .rows import Row
from .script import function, keywords, load_script


@dataclass(frozen=True)
class Job:
    """The same for every layout, but for `arguments`.

    Attributes:
        config: of the model.
        arguments: of `NanotronTrainingArguments`, without output_dir.
        options: for the model's class, such as attn_implementation.
        rows: to train on, in this order or the sampler's.
        script: see `script.py`.
        folder: of this layout, to write into.
        weights: where to write the initial weights as a Hub repository, or None.
    """

    config: PreTrainedConfig
    arguments: dict[str, Any]
    options: dict[str, Any]
    rows: list[Row]
    folder: Path
    script: Path | None = None
    weights: Path | None = None

    def with_arguments(self, folder: Path, **arguments: Any) -> Job:
        return replace(self, folder=folder, arguments={**self.arguments, **arguments})


def train_rank(job: Job) -> Path:
    """Run the layout on this rank; where its `Record` is. All ranks together."""
    quieten()
    script = None if job.script is None else load_script(job.script)
    args = NanotronTrainingArguments(**job.arguments, output_dir=str(job.folder / "out"))
    set_seed(args.seed)  # as train does
    if (make := function(script, "make_model")) is not None:
        model: Any = make(job.config)
    else:
        model = AutoModelForCausalLM.from_config(
            job.config, parallel=args.parallel, parametrization=args.spectral, **job.options
        )
    given = {"data_collator": collate, **keywords(script, model, args)}
    trainer = NanotronTrainer(model=model, args=args, train_dataset=Dataset.from_list(job.rows), **given)
    if job.weights is not None:
        trainer.model.save_pretrained(job.weights)
    recorder = Recorder(trainer)
    train_silently(trainer)
    return write_record(recorder.record, job.folder)


def train_silently(trainer: Trainer) -> None:
    """Train, and print nothing: what is printed is the result of `check`.

    Raises:
        Begun: from what training raised, which is no refusal of its arguments.
    """
    trainer.remove_callback(PrinterCallback)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train()
    except Exception as error:
        raise Begun from error


def quieten() -> None:
    """What libraries say of a few steps is not for the user."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()


def write_record(record: Record, folder: Path) -> Path:
    """Write it under another name first: whoever finds the file finds all of it."""
    path = folder / f"rank_{record.rank}.pt"
    unfinished = path.with_suffix(".part")
    torch.save(record, unfinished)
    os.replace(unfinished, path)
    return path


def read_record(path: Path) -> Record:
    found: Record = torch.load(path, weights_only=False)  # written by a process of ours, into a folder of ours
    return found
