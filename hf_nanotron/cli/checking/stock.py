"""The same few steps by transformers alone: its model, its Trainer, one process."""

from __future__ import annotations

import functools
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from ...models.stock.anatomy import dissect
from ..data import collate
from .job import Job, quieten, train_silently, write_record
from .recorder import buffers_of, recorded_modules, with_columns
from .records import Activation, Piece, Record
from .script import function, keywords, load_script

# Without a counterpart in transformers: key -> the value that asks for nothing.
OURS_ALONE: dict[str, Any] = {
    "z_loss_coefficient": 0.0, "moe_bias_update_rate": 0.0, "moe_capacity_factor": None, "no_weight_decay": None,
    "parametrization": "standard",
}  # fmt: skip


def refuse_ours(training: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: for a setting that transformers does not have, naming it.
    """
    for key, off in OURS_ALONE.items():
        if training.get(key, off) != off:
            raise ValueError(
                f"--against transformers: {key}={training[key]!r} is not in transformers, so its losses differ; leave "
                f"it out with --set {key} {'null' if off is None else off}, or compare with one process."
            )
    if training.get("optim") == "muon":
        raise ValueError(
            "--against transformers: optim='muon' is not in transformers; use --set optim adamw_torch, or compare with "
            "one process."
        )


def train_stock(job: Job) -> Path:
    """Train the model of `job.weights` with transformers' Trainer; where its `Record` is."""
    quieten()
    script = None if job.script is None else load_script(job.script)
    names = {entry.name for entry in fields(TrainingArguments)}
    known = {name: value for name, value in job.arguments.items() if name in names}
    # Recomputation changes no number, and would call the hooks again.
    known |= {"activation_checkpointing": False, "gradient_checkpointing": False}
    known = {name: value for name, value in known.items() if name in names}
    args = TrainingArguments(**known, output_dir=str(job.folder / "out"))
    set_seed(args.seed)
    assert job.weights is not None
    if (make := function(script, "make_model")) is not None:
        model: PreTrainedModel = make(job.config)
    else:
        model = AutoModelForCausalLM.from_pretrained(job.weights, dtype=torch.float32, **job.options)
    recorder = StockRecorder(model, args.max_grad_norm)
    given = {"data_collator": collate, **keywords(script, model, args)}
    callbacks = [*(given.pop("callbacks", None) or ()), recorder]
    trainer = Trainer(model=model, args=args, train_dataset=Dataset.from_list(job.rows), callbacks=callbacks, **given)
    train_silently(trainer)
    return write_record(recorder.record, job.folder)


class StockRecorder(TrainerCallback):
    """`Recorder`, for a stock model."""

    def __init__(self, model: PreTrainedModel, max_norm: float | None) -> None:
        self.model, self.max_norm = model, max_norm
        self.record = Record(0, {}, [0])
        self._place, self._columns = -1, torch.empty(0, dtype=torch.int64)
        for name, module in recorded_modules(dissect(model)):
            module.register_forward_hook(functools.partial(self.note, name))
        model.register_forward_pre_hook(self.begin_forward, with_kwargs=True)

    def begin_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows, tokens = kwargs["input_ids"].shape
        self._place += 1
        self._columns = torch.arange(tokens).expand(rows, tokens)

    def note(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        first = output[0] if isinstance(output, tuple) and output else output
        if (found := with_columns(first, self._columns)) is None:
            if name not in self.record.shapeless:
                self.record.shapeless.append(name)
            return
        if name not in self.record.modules:
            self.record.modules.append(name)
        noted = Activation(self._place, found[0].clone(), found[1].detach().float().clone())
        self.record.activations[-1].setdefault(name, []).append(noted)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.note_weights()
        self.record.activations.append({})
        self.record.gradients.append([])
        self._place = -1

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gradients are clipped by then; the norm, which is logged later, says by how much."""
        named = [(name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        self.record.gradients[-1] = [
            _whole(name, torch.zeros_like(p) if p.grad is None else p.grad) for name, p in named
        ]

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        self.record.losses.append(float(logs["loss"]))
        self.record.norms.append(float(logs["grad_norm"]))
        norm, most = self.record.norms[-1], self.max_norm
        if most and norm > most:
            for piece in self.record.gradients[len(self.record.norms) - 1]:
                piece.values.mul_((norm + 1e-6) / most)  # as torch's clip_grad_norm_ has divided

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.note_weights()

    def note_weights(self) -> None:
        named = self.model.named_parameters()
        self.record.weights.append([_whole(name, parameter) for name, parameter in named if parameter.requires_grad])
        self.record.buffers.append(buffers_of(self.model))


def _whole(name: str, values: torch.Tensor) -> Piece:
    flat = values.detach().float().reshape(-1).clone()
    return Piece(name, tuple(values.shape), None, (), 0, flat.numel(), flat)
