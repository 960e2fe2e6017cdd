"""The reference of the fuzzer: one process of stock Trainer, over a stock model.

What stock Trainer has no argument for is written out here in plain torch: losses of tokens, Lion, the average of the
weights, and documents of their own rows for models that know no borders within one.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from fuzz_axes import STEPS, TOKEN_DATA, Case, unpacks
from fuzz_runs import (
    CLASSES,
    COLLATORS,
    EMA_DECAY,
    NO_DECAY,
    Z_LOSS,
    Plain,
    Watch,
    common_arguments,
    data_of,
    freeze,
    micro_batches,
    predict,
    samples_of,
)  # fmt: skip
from tiny import training_arguments
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.data import default_data_collator

IGNORED = -100
ORDERED = (*TOKEN_DATA, "stream")  # data with an order of its own, of which stock Trainer gets a list


class Lion(torch.optim.Optimizer):
    """Algorithm 2 of arXiv:2302.06675."""

    def __init__(self, parameters: Any, lr: float, betas: tuple[float, float], weight_decay: float = 0.0) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            (first, second), lr = group["betas"], group["lr"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                update = (first * momentum + (1 - first) * weight.grad).sign()
                weight -= lr * (update + group["weight_decay"] * weight)
                momentum.mul_(second).add_(weight.grad, alpha=1 - second)


def loss_function(model: nn.Module, kind: str) -> Callable[..., torch.Tensor]:
    """In the place of the model's: "z-loss", in training alone, or "function"."""

    def loss(
        logits: torch.Tensor, labels: Any, vocab_size: int, num_items_in_batch: Any = None, shift_labels: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:  # fmt: skip
        targets = F.pad(labels, (0, 1), value=IGNORED)[..., 1:] if shift_labels is None else shift_labels
        targets, logits = targets.flatten(), logits.float().flatten(0, -2)
        losses = F.cross_entropy(logits, targets, reduction="none")
        keep = targets != IGNORED
        if kind == "function":
            losses = losses * (1 + 0.1 * losses)
        elif model.training:
            losses = losses + Z_LOSS * logits.logsumexp(-1).square() * keep
        return losses.sum() / (keep.sum() if num_items_in_batch is None else num_items_in_batch)

    return loss


class Average(TrainerCallback):
    """torch's own moving average of the weights."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.average.update_parameters(self.model)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        self.exchange()
        yield
        self.exchange()

    @torch.no_grad()
    def exchange(self) -> None:
        for mine, other in zip(self.model.parameters(), self.average.module.parameters(), strict=True):
            kept = mine.clone()
            mine.copy_(other)
            other.copy_(kept)


class StockRun(Trainer):
    """Stock Trainer, with what a subclass of a user's would change."""

    case: Case
    average: Average | None = None

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        names = super().get_decay_parameter_names(model)
        return [name for name in names if not (self.case["no_weight_decay"] and re.search(NO_DECAY, name))]

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        evaluated = self.average is not None and self.case["average"] == "evaluated"
        with self.average.in_place() if evaluated and self.average is not None else contextlib.nullcontext():
            return super().evaluation_loop(*args, **kwargs)


def documents_apart(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A row for each document of the rows, filled up on the right."""
    targets = batch.get("shift_labels", F.pad(batch["labels"], (0, 1), value=IGNORED)[..., 1:])
    found: dict[str, list[torch.Tensor]] = {"input_ids": [], "shift_labels": [], "attention_mask": []}
    for ids, places, wanted in zip(batch["input_ids"], batch["position_ids"], targets, strict=True):
        borders = [*(places == 0).nonzero().flatten().tolist(), len(ids)]
        for start, stop in itertools.pairwise(borders):
            found["input_ids"].append(ids[start:stop])
            found["shift_labels"].append(wanted[start:stop])
            found["attention_mask"].append(torch.ones_like(ids[start:stop]))
    fill = {"input_ids": 0, "shift_labels": IGNORED, "attention_mask": 0}
    apart = {name: nn.utils.rnn.pad_sequence(found[name], True, value) for name, value in fill.items()}
    return {**apart, "labels": apart["shift_labels"]}


def data(case: Case, folder: Path) -> dict[str, Any]:
    """As `data_of`: the same rows in the same order, as a list of them where the data has an order of its own."""
    found = data_of(case, folder, samples_of(case))
    if case["data"] in ORDERED:
        rows = itertools.islice(iter(found["train_dataset"]), micro_batches(case) * case["rows"] * STEPS)
        found["train_dataset"] = Plain([{name: row[name] for name in row if name != "domain"} for row in rows])
    if unpacks(case):
        collate = COLLATORS.get(case["data"], default_data_collator)
        found["data_collator"] = lambda rows: documents_apart(collate(rows))
    return found


def stock(case: Case, folder: Path, name: str) -> None:
    """Train in this process; leaves what a leg of the fuzzer leaves."""
    torch.set_num_threads(1)
    values = training_arguments(output_dir=str(folder / f"{name}-out"), **common_arguments(case))
    if case["data"] in ORDERED:
        values["dataloader_num_workers"] = 0  # each worker would give all rows
    classes = CLASSES.get(case["optimizer"])
    if case["optimizer"] == "lion_32bit":
        del values["optim"]
        classes = Lion, {"lr": values["learning_rate"], "betas": (0.9, 0.999)}
    args = TrainingArguments(
        **values, gradient_accumulation_steps=micro_batches(case),
        remove_unused_columns=not unpacks(case) and case["data"] not in ORDERED,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(folder / "start", dtype=torch.float32)
    freeze(model, case["frozen"])
    if case["loss"] in ("z-loss", "function"):
        model.loss_function = loss_function(model, case["loss"])
    if case["loss"] == "function" and case["router_loss"]:
        model.router_aux_loss_coef = 0.0  # the function has the outputs, and leaves it out
    trainer = StockRun(
        model=model,
        args=args,
        callbacks=[Watch(folder / f"{name}-0.jsonl", case, "none")],
        optimizer_cls_and_kwargs=classes,
        **data(case, folder),
    )
    trainer.case = case
    if case["average"] != "no":
        trainer.average = Average(model)
        trainer.add_callback(trainer.average)
    trainer.train()
    if case["prediction"]:
        predict(trainer, case, folder / f"{name}.pt")
    trainer.save_model(str(folder / f"{name}-final"))
    if trainer.average is not None:
        trainer.average.average.module.save_pretrained(folder / f"{name}-final" / "ema")
