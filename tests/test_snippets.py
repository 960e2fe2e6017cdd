"""Python of the pages, run as it stands there; test_docs.py only compiles it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from pool import WorkerPool
from tiny import (
    VOCABULARY,
    History,
    StockTrainer,
    checkpoint,
    pad_batch,
    random_dataset,
    training_arguments,
)
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_nanotron import NanotronTrainer, NanotronTrainingArguments

DOCS = Path(__file__).resolve().parent.parent / "docs"


def snippet(page: str, part: str, **given: Any) -> dict[str, Any]:
    """What is defined by the block of a page that has `part`. `given` are names that the page takes for granted."""
    text = (DOCS / page).read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE) if part in block)
    names = dict(given)
    exec(compile(code, page, "exec"), names)
    return names


def trained(base: type[Trainer], **options: Any) -> tuple[History, Any]:
    """A short run of ours, or of stock Trainer with the same options."""
    history, is_ours = History(), issubclass(base, NanotronTrainer)
    arguments = NanotronTrainingArguments if is_ours else TrainingArguments
    trainer = base(
        model=AutoModelForCausalLM.from_pretrained(checkpoint()),
        args=arguments(
            **training_arguments(max_steps=2, gradient_accumulation_steps=2, weight_decay=0.0, warmup_steps=0)
        ),
        train_dataset=random_dataset(8),
        data_collator=pad_batch,
        callbacks=[history],
        **options,
    )
    return history, trainer


def run(base: type[Trainer], **options: Any) -> list[float]:
    history, trainer = trained(base, **options)
    trainer.train()
    return [*history.losses, *history.norms]


def losses_and_overrides() -> dict[str, list[list[float]]]:
    focal = snippet("losses.md", "def focal")["focal"]
    ours = snippet("overrides.md", "class Shifted")["Shifted"]
    stock = type("Shifted", (StockTrainer,), {})
    stock.training_step = _of_stock(ours.training_step)
    return {
        "focal": [run(base, compute_loss_func=focal) for base in (NanotronTrainer, StockTrainer)],
        "shifted": [run(ours), run(stock), run(StockTrainer)],
    }


def _of_stock(step: Any) -> Any:
    """The same lines, in a class derived from the stock Trainer."""

    def training_step(self: Any, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        cell = type(step.__closure__[0])(type(self))
        function = type(step)(step.__code__, step.__globals__, step.__name__, step.__defaults__, (cell,))
        return function(self, model, inputs, num_items_in_batch)

    return training_step


def test_losses_and_overrides(pool: WorkerPool) -> None:
    """As with stock Trainer."""
    (found,) = pool.run(1, losses_and_overrides)
    for name, (ours, stock, *others) in found.items():
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(stock), rtol=2e-5, atol=1e-6)
        assert all(abs(other[0] - stock[0]) > 1e-3 for other in others), name


def hooks_of_gradients() -> dict[str, Any]:
    """The mask keeps old tokens, and the callback's halved gradients are those of half the learning rate of SGD."""
    page, found = "gradients_and_weights.md", {}
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "torch": torch}
    _, trainer = trained(NanotronTrainer)
    before = trainer.model.model.embed_tokens.weight.detach().clone()
    snippet(page, "mask[:32000]", trainer=trainer, **sizes)
    trainer.train()
    found["all masked"] = torch.equal(trainer.model.model.embed_tokens.weight, before)
    weights = []
    for rate, hooked in ((0.1, True), (0.05, False), (0.1, False)):
        args = NanotronTrainingArguments(
            **training_arguments(max_steps=2, optim="sgd", learning_rate=rate, weight_decay=0.0, warmup_steps=0)
        )
        model = AutoModelForCausalLM.from_pretrained(checkpoint())
        trainer = NanotronTrainer(model=model, args=args, train_dataset=random_dataset(4), data_collator=pad_batch)
        if hooked:
            snippet(page, "class Noise", trainer=trainer, TrainerCallback=TrainerCallback)
        trainer.train()
        weights.append(trainer.model.model.norm.weight.detach().clone())
    found["halved"], found["whole"] = ((weights[0] - other).abs().max().item() for other in weights[1:])
    return found


def test_hooks_of_gradients(pool: WorkerPool) -> None:
    (found,) = pool.run(1, hooks_of_gradients)
    assert found["all masked"]
    assert found["halved"] < 1e-6 < 1e-5 < found["whole"], found
