"""Tiny models, data and training runs that the tests share."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    Trainer as StockTrainer,
    TrainerCallback,
    TrainingArguments,
)

VOCABULARY = 120  # divides by every tp_size up to 6 and by 8
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")


def tiny_config(family: str = "llama", **overrides: Any) -> PreTrainedConfig:
    """A model of a few thousand parameters that keeps what is peculiar to its family."""
    peculiar: dict[str, dict[str, Any]] = {
        "mistral": {"sliding_window": 6},
        "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
        "qwen3": {"head_dim": 8},
        "smollm3": {"no_rope_layer_interval": 2},
    }
    values = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.1,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        **peculiar.get(family, {}),
        **overrides,
    }
    return AutoConfig.for_model(family, **values)


def random_dataset(
    samples: int, length: int = 16, seed: int = 0, ragged: bool = False, vocabulary: int = VOCABULARY
) -> Dataset:
    """Random tokens; some labels are ignored, so that samples weigh differently. `ragged` varies the lengths."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(samples):
        size = length - (index % 5 if ragged else 0)
        ids = torch.randint(3, vocabulary, (size,), generator=generator)
        labels = ids.clone()
        labels[: index % 4] = -100
        rows.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return Dataset.from_list(rows)


def pad_batch(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Collate rows of different lengths, without an attention mask."""
    length = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "labels": -100}
    return {
        name: torch.tensor([list(row[name]) + [value] * (length - len(row[name])) for row in rows])
        for name, value in fill.items()
    }


def message(run: Callable[[], Any]) -> str:
    """What the ValueError of `run` says."""
    try:
        run()
    except ValueError as error:
        return str(error)
    return "nothing was raised"


@functools.cache
def checkpoint() -> str:
    """A saved Llama of two layers, made once in a process."""
    directory = tempfile.mkdtemp()
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(tiny_config(num_hidden_layers=2)).save_pretrained(directory)
    return directory


class History(TrainerCallback):
    """Loss and gradient norm of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])
            self.norms.append(logs["grad_norm"])


def training_arguments(**overrides: Any) -> dict[str, Any]:
    return {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": 4,
        "per_device_train_batch_size": 1,
        "learning_rate": 5e-3,
        "weight_decay": 0.1,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 1,
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 7,
        **overrides,
    }


def train_stock(
    checkpoint: str, dataset: Dataset, loss: Any = None, collate: Any = pad_batch, **overrides: Any
) -> History:
    """The reference: stock model, stock Trainer, one process. `loss` is a `compute_loss_func`."""
    history = History()
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    StockTrainer(
        model=model,
        args=TrainingArguments(**training_arguments(**overrides)),
        train_dataset=dataset,
        data_collator=collate,
        callbacks=[history],
        compute_loss_func=loss,
    ).train()
    history.model = model  # type: ignore[attr-defined]
    return history


def train_parallel(
    checkpoint: str, dataset: Dataset, loss: Any = None, collate: Any = pad_batch, **overrides: Any
) -> History:
    """The same run through `NanotronTrainer`; call it on every rank."""
    from hf_nanotron import AutoModelForCausalLM as ParallelAuto, NanotronTrainer, NanotronTrainingArguments

    args = NanotronTrainingArguments(**training_arguments(**overrides))
    history = History()
    model = ParallelAuto.from_pretrained(checkpoint, parallel=args.parallel)
    trainer = NanotronTrainer(
        model=model,
        args=args,
        train_dataset=dataset,
        data_collator=collate,
        callbacks=[history],
        compute_loss_func=loss,
    )
    trainer.train()
    model.mesh.close()
    return history


def local_gradients(model: Any) -> dict[str, torch.Tensor]:
    """This rank's tensor-parallel part of every gradient, joined over the ranks that share the ZeRO shards."""
    from hf_nanotron.parallel.collectives import all_reduce

    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    flat = {name: torch.zeros(model.shard_specs[name].local_shape).flatten() for name in trained}
    for segment in model.weights.segments:
        flat[segment.name][segment.start : segment.stop] += segment.gradient
    return {
        name: all_reduce(gradient, model.mesh.shard).view(model.shard_specs[name].local_shape)
        for name, gradient in flat.items()
    }
