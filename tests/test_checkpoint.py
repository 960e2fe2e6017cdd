"""What is saved is the model, in the Hub's format; what is resumed is the run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pool import WorkerPool
from safetensors import safe_open
from test_gradients import stock_model
from tiny import History, pad_batch, random_dataset, tiny_config, training_arguments
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_nanotron import AutoModelForCausalLM as ParallelAuto, NanotronTrainer, NanotronTrainingArguments, ParallelConfig
from hf_nanotron.checkpoint.hub.load import load_hub_weights
from hf_nanotron.checkpoint.hub.model import save_hub_model

Weights = dict[str, torch.Tensor]
INTERLEAVED = {"pp_size": 2, "pp_schedule": "interleaved_1f1b", "pp_virtual_stages": 2}


def stock_weights(directory: str | Path) -> Weights:
    """What stock transformers reads, and that it had nothing to complain about."""
    model, report = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(report.values()), report
    return model.state_dict()


def equal(first: Weights, second: Weights) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# ---- Hub files ----


def copy_checkpoint(sizes: dict[str, Any], source: str, target: str, max_shard_size: int | str) -> int:
    """Load and save; bytes read here."""
    model = ParallelAuto.from_pretrained(source, parallel=ParallelConfig(**sizes))
    save_hub_model(model, target, max_shard_size)
    read = load_hub_weights(model, source)
    model.mesh.close()
    return read


@pytest.mark.parametrize(
    ("world_size", "sizes", "family", "overrides"),
    [
        (4, {"tp_size": 2, "pp_size": 2}, "llama", {"attention_bias": True, "mlp_bias": True}),
        (4, {"tp_size": 2, **INTERLEAVED}, "qwen3", {"tie_word_embeddings": True}),
        (4, {"tp_size": 4}, "qwen2", {"num_key_value_heads": 1}),
        (2, {}, "smollm3", {"tie_word_embeddings": True}),
    ],
)
def test_a_copy_is_equal(
    pool: WorkerPool, tmp_path: Path, world_size: int, sizes: dict[str, Any], family: str, overrides: dict[str, Any]
) -> None:
    source, one_file, several = str(tmp_path / "source"), tmp_path / "one", tmp_path / "several"
    stock_model(family, **overrides).save_pretrained(source)
    pool.run(world_size, copy_checkpoint, sizes, source, str(several), "20KB")
    files = sorted(several.glob("*.safetensors"))
    assert len(files) > 3
    for path in files:
        with safe_open(path, "pt") as file:
            assert path.stat().st_size <= 22_000 or len(file.keys()) == 1
    index = json.loads((several / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in files}
    assert equal(stock_weights(several), stock_weights(source))

    # A second save leaves nothing of the first behind.
    read = sum(pool.run(world_size, copy_checkpoint, sizes, str(several), str(one_file), "5GB"))
    total = index["metadata"]["total_size"]
    assert read == total or (read < 2 * total and sizes.get("pp_size") and overrides.get("tie_word_embeddings"))
    pool.run(world_size, copy_checkpoint, sizes, source, str(several), "5GB")
    names = {path.name for path in several.iterdir()}
    assert names == {path.name for path in one_file.iterdir()}
    assert len([name for name in names if name.endswith(".safetensors")]) == sizes.get("pp_size", 1)
    assert equal(stock_weights(several), stock_weights(source))


def fresh_weights(sizes: dict[str, Any], family: str, tied: bool, target: str) -> None:
    config = tiny_config(family, tie_word_embeddings=tied, num_key_value_heads=2)
    parallel = ParallelConfig(**sizes)
    torch.manual_seed(9 if torch.distributed.is_initialized() and torch.distributed.get_rank() else 7)
    model = ParallelAuto.from_config(config, parallel=parallel)
    save_hub_model(model, target)
    model.mesh.close()


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("qwen3", True)])
def test_fresh_weights_do_not_depend_on_the_topology(pool: WorkerPool, tmp_path: Path, family: str, tied: bool) -> None:
    """`from_config` follows the seed of rank 0 alone."""
    digests = set()
    topologies = [(1, {}), (2, {"pp_size": 2}), (2, {}), (4, {"tp_size": 4}), (4, {"tp_size": 2, **INTERLEAVED})]
    for number, (world_size, sizes) in enumerate(topologies):
        directory = tmp_path / str(number)
        pool.run(world_size, fresh_weights, sizes, family, tied, str(directory))
        weights = stock_weights(directory)
        digests.add(hashlib.sha256(b"".join(t.numpy().tobytes() for _, t in sorted(weights.items()))).hexdigest())
    assert len(digests) == 1


# ---- the run ----


def run_steps(output: str, overrides: dict[str, Any], resume: bool = False, stock: bool = False) -> list[float]:
    """Train to step 4, saving at 2 and 4."""
    values = training_arguments(output_dir=output, max_steps=4, save_strategy="steps", save_steps=2, **overrides)
    args = NanotronTrainingArguments(**values)
    if stock:
        model = stock_model("llama", num_hidden_layers=2)
    else:
        model = ParallelAuto.from_pretrained(str(Path(output).parent / "start"), parallel=args.parallel)
    history = History()
    trainer = NanotronTrainer(
        model=model, args=args, train_dataset=random_dataset(64), data_collator=pad_batch, callbacks=[history]
    )
    trainer.train(resume_from_checkpoint=f"{output}/checkpoint-2" if resume else None)
    trainer.model.mesh.close()
    return history.losses


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [
        (2, {"tp_size": 2, "bf16": True, "gradient_accumulation_steps": 2}),
        (2, {"gradient_accumulation_steps": 1}),
        (
            4,
            {
                "tp_size": 2,
                "pp_size": 2,
                "gradient_accumulation_steps": 2,
                "optim": "sgd",
                "optim_args": "momentum=0.9",
            },
        ),
    ],
    ids=["tp2-bf16", "dp2", "tp2-pp2"],
)
def test_resume_is_exact(pool: WorkerPool, tmp_path: Path, world_size: int, overrides: dict[str, Any]) -> None:
    output = tmp_path / "out"
    stock_model("llama", num_hidden_layers=2).save_pretrained(tmp_path / "start")
    losses = pool.run(world_size, run_steps, str(output), overrides)[0]
    expected = stock_weights(output / "checkpoint-4")
    assert not equal(expected, stock_weights(output / "checkpoint-2"))
    resumed = pool.run(world_size, run_steps, str(output), overrides, True)[0]
    assert resumed == losses[2:]
    assert equal(stock_weights(output / "checkpoint-4"), expected)


def test_resume_with_another_dp(pool: WorkerPool, tmp_path: Path) -> None:
    """Two data-parallel ranks go on as one, at the same global batch: the same samples, the same weights."""
    output = tmp_path / "out"
    stock_model("llama", num_hidden_layers=2).save_pretrained(tmp_path / "start")
    losses = pool.run(2, run_steps, str(output), {"gradient_accumulation_steps": 1})[0]
    expected = stock_weights(output / "checkpoint-4")
    resumed = pool.run(1, run_steps, str(output), {"gradient_accumulation_steps": 2}, True)[0]
    assert resumed == pytest.approx(losses[2:], rel=1e-5)
    got = stock_weights(output / "checkpoint-4")
    assert all(torch.allclose(got[name], expected[name], rtol=0, atol=1e-5) for name in expected)


def test_a_stock_model_is_cut_in_place(pool: WorkerPool, tmp_path: Path) -> None:
    stock_model("llama", num_hidden_layers=2).save_pretrained(tmp_path / "start")
    overrides = {"tp_size": 2, "gradient_accumulation_steps": 2}
    loaded = pool.run(2, run_steps, str(tmp_path / "out"), overrides)
    handed_over = pool.run(2, run_steps, str(tmp_path / "other"), overrides, False, True)
    assert loaded == handed_over
    assert equal(stock_weights(tmp_path / "out/checkpoint-4"), stock_weights(tmp_path / "other/checkpoint-4"))


def train_twice(sizes: dict[str, Any]) -> list[float]:
    history = History()
    arguments = training_arguments(max_steps=3, gradient_accumulation_steps=2, **sizes)
    stock = not sizes
    trainer = (Trainer if stock else NanotronTrainer)(
        model=stock_model("llama"),
        args=(TrainingArguments if stock else NanotronTrainingArguments)(**arguments),
        train_dataset=random_dataset(64),
        data_collator=pad_batch,
        callbacks=[history],
    )
    trainer.train()
    trainer.train()
    return history.losses


@pytest.mark.parametrize("sizes", [{"tp_size": 2}, {"pp_size": 2}], ids=["tp2", "pp2"])
def test_training_twice(pool: WorkerPool, sizes: dict[str, Any]) -> None:
    """A second `train()` goes on from the weights of the first, as stock Trainer's does."""
    expected = train_twice({})
    assert len(expected) == 6
    for losses in pool.run(2, train_twice, sizes):
        assert losses == pytest.approx(expected, rel=2e-5)
