"""The z-loss on every path of the loss, against plain autograd in float64; none in evaluation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from family_runs import tiny_model
from pool import WorkerPool
from tiny import History, message, pad_batch, random_dataset, training_arguments
from transformers import AutoModelForCausalLM as StockAuto, DataCollatorWithFlattening

from hf_nanotron import AutoModelForCausalLM as ParallelAuto, NanotronTrainer, NanotronTrainingArguments

STEPS, SAMPLES, RATE, Z_LOSS = 3, 4, 0.2, 0.05
# Head and loss in one; logits that the model caps, so that its forward makes them.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"tie_word_embeddings": True},
    "gemma2": {"final_logit_softcapping": 3.0, "sliding_window": 64},
}
# family, world size, changes; "packed" joins the rows of a micro-batch
CASES: list[tuple[str, int, dict[str, Any]]] = [
    ("qwen3", 1, {}),
    ("qwen3", 1, {"packed": True}),
    ("gemma2", 1, {}),
    ("qwen3", 2, {"tp_size": 2}),
]
WIDE: list[tuple[str, int, dict[str, Any]]] = [
    ("gemma2", 2, {"tp_size": 2}),
    ("gemma2", 2, {"pp_size": 2}),
    ("qwen3", 2, {"pp_size": 2, "packed": True}),
    ("qwen3", 2, {"cp_size": 2}),
    ("qwen3", 2, {"cp_size": 2, "packed": True}),
    ("qwen3", 2, {"zero_stage": 3}),
    ("qwen3", 2, {"pp_size": 2, "pp_schedule": "zb"}),
    ("qwen3", 4, {"tp_size": 2, "pp_size": 2, "activation_checkpointing": True}),
]


def train(family: str, weights: str, world: int, changes: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Losses of the steps, each over all samples; then that of an evaluation."""
    changes = dict(changes)
    packed = changes.pop("packed", False)
    dp = world // math.prod(changes.get(name, 1) for name in ("tp_size", "pp_size", "cp_size"))
    micro = 2 if dp == 1 else 1
    values = {
        "max_steps": STEPS,
        "optim": "sgd",
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1e9,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": SAMPLES // micro // dp,
        "per_device_eval_batch_size": SAMPLES,
        "z_loss_coefficient": Z_LOSS,
        **changes,
    }
    args = NanotronTrainingArguments(**training_arguments(**values))
    model, history = ParallelAuto.from_pretrained(weights, parallel=args.parallel), History()
    trainer = NanotronTrainer(
        model=model,
        args=args,
        train_dataset=random_dataset(SAMPLES),
        eval_dataset=random_dataset(SAMPLES),
        data_collator=DataCollatorWithFlattening() if packed else pad_batch,
        callbacks=[history],
    )
    trainer.train()
    evaluated = trainer.evaluate()["eval_loss"]
    model.mesh.close()
    return history.losses, [evaluated]


def reference(weights: str) -> tuple[list[float], float]:
    """The same in float64: losses with the z-loss, and the mean cross-entropy of the trained model without it."""
    model = StockAuto.from_pretrained(weights, attn_implementation="eager").double()
    losses, entropy = [], 0.0
    for step in range(STEPS + 1):
        total, z_total, count = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64), 0
        for row in random_dataset(SAMPLES):
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
            targets = torch.tensor(row["labels"])[1:]
            kept = targets != -100
            total = total + F.cross_entropy(logits[kept], targets[kept], reduction="sum")
            z_total = z_total + logits[kept].exp().sum(-1).log().square().sum()
            count += int(kept.sum())
        if step == STEPS:
            entropy = (total / count).item()
            break
        loss = (total + Z_LOSS * z_total) / count
        losses.append(loss.item())
        for parameter, gradient in zip(
            model.parameters(), torch.autograd.grad(loss, [*model.parameters()]), strict=True
        ):
            parameter.data.add_(gradient, alpha=-RATE)
    return losses, entropy


def test_paths(pool: WorkerPool, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    expected = {}
    for family, overrides in FAMILIES.items():
        tiny_model(family, **overrides).save_pretrained(tmp_path / family)
        expected[family] = reference(str(tmp_path / family))
    for case in [*CASES, *(WIDE if request.config.getoption("--full-matrix") else ())]:
        family, world, changes = case
        weights = str(tmp_path / family)
        run = (
            pool.run(world, train, family, weights, world, changes)[0]
            if world > 1
            else train(family, weights, 1, changes)
        )
        losses, entropy = expected[family]
        assert run[0] == pytest.approx(losses, rel=5e-6), case
        assert run[1] == [pytest.approx(entropy, rel=5e-6)], case


@pytest.mark.parametrize("changes", [{"label_smoothing_factor": 0.1}, {"compute_loss_func": True}], ids=str)
def test_losses_without_it_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    changes = dict(changes)
    own = (lambda outputs, labels, num_items_in_batch: outputs.logits.sum()) if "compute_loss_func" in changes else None
    changes.pop("compute_loss_func", None)
    args = NanotronTrainingArguments(**training_arguments(z_loss_coefficient=Z_LOSS, **changes))
    make = lambda: NanotronTrainer(  # noqa: E731
        model=tiny_model("qwen3"), args=args, train_dataset=random_dataset(4), data_collator=pad_batch,
        compute_loss_func=own,
    )  # fmt: skip
    assert "it is a part of the plain loss" in message(make)
