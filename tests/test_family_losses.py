"""The loss of a step by stock Trainer itself and by NanotronTrainer, in one process each, family by family.

`test_families.py` compares below Trainer, which decides what the loss of a window is divided by. Rows have 16 tokens,
not all of them with a label, and a window has two micro-batches.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from family_runs import KNOWN, tiny_model
from pool import WorkerPool
from tiny import History, pad_batch, training_arguments
from transformers import Trainer, TrainingArguments

# What stock Trainer divides by otherwise than by the predicted tokens of the window.
DIFFERENT = {
    "gpt2": "all labels: its class is not named ...ForCausalLM, so that Trainer does not know of the shift",
    "gpt-sw3": "all labels: it is GPT-2",
}
# Families whose loss is made in other ways: a mixture's losses, soft-caps, scaled logits, a loss of their own.
EQUAL = ("llama", "qwen3_moe", "gemma4", "lara_mini", "gemma2", "cohere", "bloom", "mpt", "xglm")
NEEDS_TIMM = ("gemma3n",)
TOLERANCE = {"loss": 1e-5, "norm": 1e-4}
ONE_STEP: dict[str, Any] = {
    "max_steps": 1,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 0.0,
    "warmup_steps": 0,
}


def rows() -> Dataset:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 100, (4, 16), generator=generator).tolist()
    return Dataset.from_list(
        [{"input_ids": row, "labels": [-100] * (3 * index) + row[3 * index :]} for index, row in enumerate(ids)]
    )


def one_step(family: str, trainer_class: Any, arguments_class: Any) -> tuple[float, float]:
    """Loss and gradient norm."""
    history = History()
    trainer = trainer_class(
        model=tiny_model(family),
        args=arguments_class(**training_arguments(**ONE_STEP)),
        train_dataset=rows(),
        data_collator=pad_batch,
        callbacks=[history],
    )
    trainer.train()
    if trainer_class is not Trainer:
        trainer.model.mesh.close()
    return history.losses[0], history.norms[0]


def differences(families: list[str]) -> dict[str, dict[str, float]]:
    """Relative to stock."""
    from hf_nanotron import NanotronTrainer, NanotronTrainingArguments

    found = {}
    for family in families:
        stock = one_step(family, Trainer, TrainingArguments)
        ours = one_step(family, NanotronTrainer, NanotronTrainingArguments)
        pairs = zip(TOLERANCE, ours, stock, strict=True)
        found[family] = {name: abs(mine / theirs - 1) for name, mine, theirs in pairs}
    return found


def test_losses_through_trainer(pool: WorkerPool, pytestconfig: pytest.Config) -> None:
    """Every family trains on the mean over the predicted tokens of a window, which is stock's loss but for a few."""
    everything = pytestconfig.getoption("full_matrix")
    chosen = [name for name in KNOWN if name in (*DIFFERENT, *EQUAL) or everything and name not in NEEDS_TIMM]
    (found,) = pool.run(1, differences, chosen)
    others = {n: errors for n, errors in found.items() if any(errors[kind] > most for kind, most in TOLERANCE.items())}
    assert others.keys() == DIFFERENT.keys(), others
