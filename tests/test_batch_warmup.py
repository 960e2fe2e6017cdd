"""A global batch that grows with the tokens: its samples are those of a run without, on any layout, also resumed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pool import WorkerPool
from test_ordered_training import StopAt, token_set, write_corpus
from tiny import History, message, random_dataset, tiny_config, training_arguments
from transformers import AutoModelForCausalLM as StockAuto, TrainerCallback

from hf_nanotron import AutoModelForCausalLM as ParallelAuto, NanotronTrainer, NanotronTrainingArguments
from hf_nanotron.data import Mixture, Stage, Stages
from hf_nanotron.data.tokens.batch_warmup import warm_up_batch_size

LENGTH, STEPS, FULL = 16, 6, 8
# 4 samples until 128 tokens are read, 6 (and 2 of them less) until 256, then 8
WARMUP = {"batch_size_warmup_tokens": 16 * LENGTH, "batch_size_warmup_start": 4, "batch_size_warmup_increment": 2}
SIZES = [4, 4, 6, 6, 8, 8]
LAYOUTS: list[tuple[int, dict[str, Any]]] = [(2, {"pp_size": 2})]
WIDE: list[tuple[int, dict[str, Any]]] = [
    (2, {}),
    (2, {"tp_size": 2}),
    (2, {"cp_size": 2}),
    (4, {"pp_size": 2, "zero_stage": 2}),
    (2, {"zero_stage": 3}),
    (4, {"tp_size": 2, "pp_size": 2}),
]


class Sizes(TrainerCallback):
    def __init__(self) -> None:
        self.sizes: list[float] = []
        self.rates: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.sizes.append(logs["batch_size"])
            self.rates.append(logs["learning_rate"])


def data(folder: str) -> Any:
    sets = {name: token_set(folder, name, LENGTH, documents="cross", seed=5) for name in ("web", "code")}
    return Mixture(sets, {"web": 0.7, "code": 0.3}, max_epochs=4, when_exhausted="redistribute")


def train(folder: str, output: str, sizes: dict[str, Any], resume: str | None, until: int) -> tuple[Any, ...]:
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    dp = world // math.prod(sizes.get(name, 1) for name in ("tp_size", "pp_size", "cp_size"))
    values = training_arguments(output_dir=output, max_steps=STEPS, gradient_accumulation_steps=FULL // dp)
    args = NanotronTrainingArguments(**{**values, "lr_scheduler_type": "linear", **WARMUP, **sizes})
    model = ParallelAuto.from_pretrained(f"{folder}/model", parallel=args.parallel)
    history, told = History(), Sizes()
    trainer = NanotronTrainer(
        model=model, args=args, train_dataset=data(folder), callbacks=[history, told, StopAt(until)]
    )
    trainer.train(resume_from_checkpoint=resume)
    rows = sum(trainer._data_order.consumed.rows.values())
    assert args.gradient_accumulation_steps == FULL // dp
    model.mesh.close()
    return history.losses, told.sizes, told.rates, rows


def reference(folder: str) -> tuple[list[float], list[float]]:
    """Losses and rates of a plain loop over the samples of the mixture alone, in order."""
    model = StockAuto.from_pretrained(f"{folder}/model")
    decayed = [p for n, p in model.named_parameters() if "norm" not in n]
    others = [p for n, p in model.named_parameters() if "norm" in n]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=5e-3)
    source, losses, rates, first = data(folder), [], [], 0
    for step, size in enumerate(SIZES):
        rates.append(5e-3 * min(step, (STEPS - step) / (STEPS - 1)))
        for group in optimizer.param_groups:
            group["lr"] = rates[-1]
        total, count = torch.zeros(()), 0
        for row in source.__getitems__(list(range(first, first + size))):
            columns = {name: torch.as_tensor(value)[None] for name, value in row.items() if name != "domain"}
            logits = model(input_ids=columns["input_ids"], position_ids=columns.get("position_ids")).logits
            targets = columns.get("shift_labels")
            if targets is None:
                targets = torch.nn.functional.pad(columns["labels"], (0, 1), value=-100)[:, 1:]
            total = total + torch.nn.functional.cross_entropy(logits[0], targets[0], reduction="sum")
            count += int((targets != -100).sum())
        first += size
        optimizer.zero_grad()
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append((total / count).item())
    return losses, rates


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("corpus")
    write_corpus(directory)
    return str(directory)


def test_losses(pool: WorkerPool, folder: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Of one process, and of layouts: those of a plain loop with these batches; killed and resumed on the next."""
    losses, rates = reference(folder)
    one = train(folder, str(tmp_path / "one"), {}, None, STEPS)
    assert one[0] == pytest.approx(losses, rel=2e-5)
    assert one[1] == SIZES and one[2] == pytest.approx(rates) and one[3] == sum(SIZES)
    before: dict[str, Any] = {}
    for world, sizes in [*LAYOUTS, *(WIDE if request.config.getoption("--full-matrix") else ())]:
        output = str(tmp_path / f"{world}-{sizes}".replace(" ", ""))
        for kill in (1, 3) if request.config.getoption("--full-matrix") else (3,):
            pool.run(world, train, folder, output, sizes, None, kill)
            again = train(folder, f"{output}-one-{kill}", {}, f"{output}/checkpoint-{kill}", STEPS)
            assert again[0] == pytest.approx(losses[kill:], rel=2e-5) and again[1] == SIZES[kill:]
        if before:
            there = pool.run(world, train, folder, f"{output}-there", sizes, before["checkpoint"], STEPS)[0]
            assert there[0] == pytest.approx(losses[3:], rel=2e-5) and there[3] == sum(SIZES)
        before["checkpoint"] = f"{output}/checkpoint-3"


def test_samples_are_those_of_the_data(folder: str) -> None:
    """In the same order, whatever the sizes."""
    plain = data(folder)
    for start, full, tokens, increment in ((2, 9, 900, 3), (1, 8, 300, 1), (3, 12, 16, 2)):
        staged = warm_up_batch_size(data(folder), start, full, tokens, increment)
        legs = staged.plan(full, 30)
        assert legs[0].batch == start and legs[-1].batch == full and len(legs) > 1
        read = 0
        for leg in legs[:-1]:
            assert leg.batch == start + increment * (read * -(-(full - start) // increment) // tokens)
            read += (leg.stop - leg.first) * LENGTH
        assert read >= tokens
        places = list(range(legs[-1].stop))
        for one, other in zip(staged.__getitems__(places), plain.__getitems__(places), strict=True):
            assert torch.equal(torch.as_tensor(one["input_ids"]), torch.as_tensor(other["input_ids"]))


def test_refusals(folder: str, tmp_path: Path) -> None:
    make = lambda **values: NanotronTrainingArguments(**training_arguments(**values))  # noqa: E731
    assert "batch_size_warmup_tokens=9 needs batch_size_warmup_start" in message(
        lambda: make(batch_size_warmup_tokens=9)
    )
    assert "batch_size_warmup_tokens=256 needs max_steps" in message(lambda: make(**WARMUP, max_steps=-1))
    assert "batch_size_warmup_start=0 must be at least 1" in message(lambda: make(batch_size_warmup_start=0))
    args = make(**{**WARMUP, "gradient_accumulation_steps": 4})
    model = StockAuto.from_config(tiny_config())
    with_data = lambda rows: message(lambda: NanotronTrainer(model=model, args=args, train_dataset=rows))  # noqa: E731
    assert "with a Dataset: it needs a TokenDataset or a Mixture" in with_data(random_dataset(4))
    assert "batch_size_warmup_start=4 must be at least 1 and below" in with_data(data(folder))
    staged = Stages([Stage(data(folder))])
    assert "batch_size_warmup_tokens=3 in Stages" in message(lambda: warm_up_batch_size(staged, 1, 2, 3, 1))
    output = str(tmp_path / "run")
    train(folder, output, {}, None, 3)
    resumed = message(lambda: train(folder, output, {"batch_size_warmup_increment": 4}, f"{output}/checkpoint-3", 6))
    assert "batch_size_warmup_tokens=256, of which each size is a stage: stage 1 has been trained on" in resumed
    assert "resumes with the batch_size_warmup arguments and the full batch that it began with" in resumed
