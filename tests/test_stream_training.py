"""A stream of tokens as `train_dataset`: losses of stock Trainer, also after a resume at other sizes."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from pool import WorkerPool
from test_token_stream import stream_of, write_shards
from tiny import History, tiny_config, training_arguments
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

GLOBAL_BATCH, STEPS, SAVED = 4, 5, 3
# Sizes that go on from the checkpoint of the first, with workers; the last two with --full-matrix.
LAYOUTS: list[dict[str, Any]] = [
    {"dp": 2, "dataloader_num_workers": 1},
    {"dp": 1, "per_device_train_batch_size": 2, "dataloader_num_workers": 2},
    {"dp": 1, "tp_size": 2},
    {"dp": 1, "cp_size": 2},
    {"dp": 4},
]


def ranks_of(sizes: dict[str, Any]) -> int:
    return sizes["dp"] * sizes.get("tp_size", 1) * sizes.get("cp_size", 1)


def stream(folder: str, **kwargs: Any) -> Any:
    from datasets import load_dataset

    files = [f"{folder}/{number}.json" for number in range(6)]
    return stream_of(load_dataset("json", data_files=files, split="train", streaming=True), **kwargs)


def train(folder: str, sizes: dict[str, Any], resumes: bool) -> list[float]:
    from hf_nanotron import AutoModelForCausalLM as ParallelAuto, NanotronTrainer, NanotronTrainingArguments

    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # has data workers
    sizes = {"per_device_train_batch_size": 1, **sizes}
    each = sizes.pop("dp") * sizes["per_device_train_batch_size"]
    values: dict[str, Any] = {
        "save_strategy": "no" if resumes else "steps",
        "dataloader_multiprocessing_context": "fork" if sizes.get("dataloader_num_workers") else None,
        "gradient_accumulation_steps": GLOBAL_BATCH // each,
        **sizes,
    }
    args = NanotronTrainingArguments(
        **training_arguments(max_steps=STEPS, output_dir=f"{folder}/out", save_steps=SAVED, **values)
    )
    history = History()
    model = ParallelAuto.from_pretrained(f"{folder}/model", parallel=args.parallel)
    trainer = NanotronTrainer(model=model, args=args, train_dataset=stream(folder), callbacks=[history])
    trainer.train(resume_from_checkpoint=f"{folder}/out/checkpoint-{SAVED}" if resumes else None)
    model.mesh.close()
    return history.losses


def mix(
    folder: str, sizes: dict[str, Any], resumes: bool, grows: bool = False
) -> tuple[list[float], list[dict[str, float]]]:
    """Losses of a mixture, and its last log line."""
    from hf_nanotron import AutoModelForCausalLM as ParallelAuto, NanotronTrainer, NanotronTrainingArguments
    from hf_nanotron.data import StreamMixture

    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    args = NanotronTrainingArguments(
        **training_arguments(
            max_steps=STEPS,
            output_dir=f"{folder}/mix",
            save_steps=SAVED,
            save_strategy="no" if resumes else "steps",
            dataloader_multiprocessing_context="fork" if sizes.get("dataloader_num_workers") else None,
            **sizes,
        )
    )
    model = ParallelAuto.from_pretrained(f"{folder}/model", parallel=args.parallel)
    streams = {name: stream(folder, documents=kept) for name, kept in (("web", "mask"), ("code", "pack"))}
    weights = {"web": 3, "code": 1}
    if grows:
        streams["books"], weights["books"] = stream(folder, seed=1), 4
    mixture = StreamMixture(streams, weights)
    history = History()
    trainer = NanotronTrainer(model=model, args=args, train_dataset=mixture, callbacks=[history])
    trainer.train(resume_from_checkpoint=f"{folder}/mix/checkpoint-{SAVED}" if resumes else None)
    model.mesh.close()
    return history.losses, [line for line in trainer.state.log_history if "loss" in line]


def fail(folder: str) -> str:
    """One rank's lane has a document that is no text."""
    from hf_nanotron import AutoModelForCausalLM as ParallelAuto, NanotronTrainer, NanotronTrainingArguments

    args = NanotronTrainingArguments(**training_arguments(max_steps=9, output_dir=f"{folder}/failed"))
    model = ParallelAuto.from_pretrained(f"{folder}/model", parallel=args.parallel)
    data = stream(folder, lanes=2, shuffle=False)
    rank, content = model.mesh.dp_rank, data.ids.content

    def broken(example: Any) -> Any:
        return content({"text": [7]} if rank == 1 and example["text"] == data.last else example)

    data.last = [example["text"] for example in data.source.dataset.shard(6, 1, contiguous=False)][-1]
    data.ids.content = broken
    trainer = NanotronTrainer(model=model, args=args, train_dataset=data)
    try:
        trainer.train()
    except (ValueError, TypeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        model.mesh.close()
    return ""


def refuse(folder: str) -> list[str]:
    from hf_nanotron import AutoModelForCausalLM as ParallelAuto, NanotronTrainer, NanotronTrainingArguments

    told = []
    for changed in ({"lanes": 3}, {"seed": 9, "shuffle_buffer": 8}, {"epochs": 1}):
        args = NanotronTrainingArguments(**training_arguments(max_steps=STEPS, output_dir=f"{folder}/out"))
        model = ParallelAuto.from_pretrained(f"{folder}/model", parallel=args.parallel)
        trainer = NanotronTrainer(model=model, args=args, train_dataset=stream(folder, **changed))
        try:
            trainer.train(resume_from_checkpoint=f"{folder}/out/checkpoint-{SAVED}")
            told.append("")
        except ValueError as error:
            told.append(str(error))
    try:
        trainer.evaluate(stream(folder))
    except ValueError as error:
        told.append(str(error))
    told.append(str(trainer.evaluate(stream(folder, epochs=1))["eval_loss"]))
    return told


def test_losses_are_those_of_stock_trainer_at_any_sizes(
    pool: WorkerPool, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    folder = str(tmp_path)
    write_shards(tmp_path)
    torch.manual_seed(0)
    stock = AutoModelForCausalLM.from_config(tiny_config(num_hidden_layers=2))
    stock.save_pretrained(tmp_path / "model")
    history = History()
    values = training_arguments(max_steps=STEPS, output_dir=f"{folder}/stock", per_device_train_batch_size=GLOBAL_BATCH)
    trainer = Trainer(
        model=stock,
        args=TrainingArguments(**values, remove_unused_columns=False),
        train_dataset=stream(folder),
        callbacks=[history],
    )
    trainer.train()
    expected = history.losses
    assert len(expected) == STEPS
    for sizes in LAYOUTS[:1]:
        for losses in pool.run(ranks_of(sizes), train, folder, sizes, False):
            assert losses == pytest.approx(expected, rel=2e-5)
    for sizes in LAYOUTS[1:] if pytestconfig.getoption("full_matrix") else LAYOUTS[1:3]:
        for losses in pool.run(ranks_of(sizes), train, folder, sizes, True):
            assert losses == pytest.approx(expected[SAVED:], rel=2e-5), sizes
    lanes, seed, epochs, endless, loss = pool.run(1, refuse, folder)[0]
    assert "lanes=4, but this run has lanes=3" in lanes and "ignore_data_skip=True" in lanes
    assert "seed=5, shuffle_buffer=4, but this run has seed=9, shuffle_buffer=8" in seed
    assert "epochs=None, but this run has epochs=1" in epochs
    assert "has no end: make one with epochs=1" in endless
    assert float(loss) > 1


def test_a_mixture_of_streams_and_a_broken_one(pool: WorkerPool, tmp_path: Path) -> None:
    folder = str(tmp_path)
    write_shards(tmp_path)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config(num_hidden_layers=2)).save_pretrained(tmp_path / "model")
    whole = {"gradient_accumulation_steps": 2, "dataloader_num_workers": 1}
    (expected, lines), *_ = pool.run(2, mix, folder, whole, False)
    rest = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "dataloader_num_workers": 2}
    losses, more = pool.run(1, mix, folder, rest, True)[0]
    assert losses == pytest.approx(expected[SAVED:], rel=2e-5)
    for name in ("web", "code"):
        assert more[-1][f"loss/{name}"] == pytest.approx(lines[-1][f"loss/{name}"], rel=2e-5)
        assert more[-1][f"tokens/{name}"] == lines[-1][f"tokens/{name}"]
    _, grown = pool.run(1, mix, folder, rest, True, True)[0]
    assert grown[-1]["tokens/books"] > 20, "half of eight rows of eight tokens"
    told = pool.run(2, fail, folder)
    assert "RuntimeError" in told[0] and "reading the data failed on rank 1" in told[0]
    assert "ValueError: the column 'text' must hold text, not a list ([7])." in told[1]
