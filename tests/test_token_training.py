"""A mixture of tokenized corpora as `train_dataset`: the first loss by hand, then layouts against one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pool import WorkerPool
from tiny import VOCABULARY, History, tiny_config, training_arguments
from token_files import documents, write_ds
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

LENGTH = 16
LAYOUTS: list[dict[str, Any]] = [{"tp_size": 2}, {"pp_size": 2}, {}]
COLUMNS = ("input_ids", "labels", "shift_labels", "position_ids")


def rows_of(folder: str, kept_apart: str) -> Any:
    from hf_nanotron.data import Mixture, TokenDataset

    sets = {
        name: TokenDataset([f"{folder}/{name}.ds"], LENGTH, documents=kept_apart, token_size=2, seed=3)
        for name in ("web", "code")
    }
    return Mixture(sets, {"web": 0.7, "code": 0.3}, max_epochs=2)


def train(folder: str, kept_apart: str, sizes: dict[str, Any]) -> list[float]:
    from hf_nanotron import AutoModelForCausalLM as ParallelAuto, NanotronTrainer, NanotronTrainingArguments

    values = training_arguments(max_steps=3)
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    replicas = world // (sizes.get("tp_size", 1) * sizes.get("pp_size", 1))
    args = NanotronTrainingArguments(**values, **sizes, gradient_accumulation_steps=4 // replicas)
    history = History()
    model = ParallelAuto.from_pretrained(f"{folder}/model", parallel=args.parallel)
    trainer = NanotronTrainer(model=model, args=args, train_dataset=rows_of(folder, kept_apart), callbacks=[history])
    trainer.train()
    model.mesh.close()
    return history.losses


@pytest.mark.parametrize("kept_apart", ["cross", "mask", "pack"])
def test_layouts_agree(pool: WorkerPool, tmp_path: Path, kept_apart: str) -> None:
    for seed, name in enumerate(("web", "code")):
        write_ds(tmp_path / f"{name}.ds", documents(60, seed, vocabulary=VOCABULARY))
    torch.manual_seed(0)
    stock = AutoModelForCausalLM.from_config(tiny_config(num_hidden_layers=2))
    stock.save_pretrained(tmp_path / "model")
    expected, *_ = pool.run(1, train, str(tmp_path), kept_apart, {})
    rows = rows_of(str(tmp_path), kept_apart)
    total, count = torch.zeros(()), 0
    for place in range(4):
        row = {name: torch.as_tensor(rows[place][name])[None] for name in COLUMNS if name in rows[place]}
        targets = row.pop("shift_labels")[0]
        positions = row.get("position_ids", torch.arange(LENGTH)[None])[0]
        starts = [*torch.nonzero(positions == 0).flatten().tolist(), LENGTH]
        for start, stop in zip(starts, starts[1:], strict=False):  # each document by itself
            logits = stock(input_ids=row["input_ids"][:, start:stop]).logits[0]
            total = total + F.cross_entropy(logits, targets[start:stop], ignore_index=-100, reduction="sum").detach()
        count += int(targets.ne(-100).sum())
    assert expected[0] == pytest.approx(float(total) / count, rel=1e-5)
    for sizes in LAYOUTS:
        for losses in pool.run(2, train, str(tmp_path), kept_apart, sizes):
            assert losses == pytest.approx(expected, rel=2e-5)
