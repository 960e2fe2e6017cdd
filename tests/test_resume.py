"""A run saved on one topology goes on with the same losses on any other.

Twelve steps without interruption on topology A; the checkpoint of step 6 goes on on topology B. `--full-matrix` runs
every A x B; otherwise each A meets itself and another.
"""

from __future__ import annotations

import functools
import hashlib
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from pool import WorkerPool
from safetensors import safe_open
from test_gradients import stock_model
from tiny import History, pad_batch, random_dataset, training_arguments

from hf_nanotron import AutoModelForCausalLM as ParallelAuto, NanotronTrainer, NanotronTrainingArguments

GLOBAL_BATCH = 8
INTERLEAVED = {"pp_size": 2, "pp_schedule": "interleaved_1f1b", "pp_virtual_stages": 2}
# world size, samples of a micro-batch, sizes; the number of micro-batches follows from the global batch
TOPOLOGIES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "one process": (1, 2, {}),
    "dp2 zero0": (2, 2, {"zero_stage": 0}),
    "dp2 zero1": (2, 1, {"zero_stage": 1}),
    "dp2 zero2": (2, 4, {"zero_stage": 2}),
    "dp2 zero3": (2, 2, {"zero_stage": 3}),
    "dp4 zero1 replicas2": (4, 1, {"zero_stage": 1, "dp_replicate_size": 2}),
    "dp4 zero3": (4, 2, {"zero_stage": 3}),
    "pp2": (2, 2, {"pp_size": 2}),
    "pp2 interleaved": (2, 1, INTERLEAVED),
    "pp2 dp2 zero3": (4, 1, {"pp_size": 2, "zero_stage": 3}),
    "tp2": (2, 4, {"tp_size": 2}),
    "tp2 dp2 zero2": (4, 2, {"tp_size": 2, "zero_stage": 2, "sequence_parallel": False}),
    "tp4": (4, 4, {"tp_size": 4}),
    "tp2 pp2 interleaved": (4, 2, {"tp_size": 2, **INTERLEAVED}),
}
# Dropout is drawn for each micro-batch, and inside attention by each tensor-parallel rank for its own heads: with it,
# tp and the micro-batch stay the same.
WITH_DROPOUT = [name for name, (_, _, sizes) in TOPOLOGIES.items() if "tp_size" not in sizes]
DROPOUT = {"attention_dropout": 0.2}
FAMILIES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "llama": (DROPOUT, WITH_DROPOUT),
    "qwen3": ({"tie_word_embeddings": True}, list(TOPOLOGIES)),
}
TITLE = "resume on another topology: worst relative difference from the losses of the uninterrupted run"
ROWS: list[str] = []  # conftest.py prints them when all tests have run
HEADER = f"{'family':8s} {'saved on':22s} resumed on"


@functools.cache
def start(family: str) -> str:
    directory = tempfile.mkdtemp()
    stock_model(family, **FAMILIES[family][0]).save_pretrained(directory)
    return directory


def train(family: str, directory: str, output: str, topology: str, resume_from: str | None) -> list[float]:
    world, micro_batch, sizes = TOPOLOGIES[topology]
    if FAMILIES[family][0] is DROPOUT:
        micro_batch = 1
    dp = world // sizes.get("tp_size", 1) // sizes.get("pp_size", 1)
    args = NanotronTrainingArguments(
        **training_arguments(
            output_dir=output,
            max_steps=12,
            save_strategy="steps",
            save_steps=6,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=GLOBAL_BATCH // (micro_batch * dp),
            **sizes,
        )
    )
    model = ParallelAuto.from_pretrained(directory, parallel=args.parallel)
    history = History()
    trainer = NanotronTrainer(
        model=model, args=args, train_dataset=random_dataset(60), data_collator=pad_batch, callbacks=[history]
    )
    trainer.train(resume_from_checkpoint=resume_from)
    model.mesh.close()
    return history.losses


def contents(checkpoint: Path) -> dict[str, str]:
    """Digest of every tensor of the checkpoint, and of the generators' states."""
    digests = {}
    for path in sorted(checkpoint.rglob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                tensor = file.get_tensor(name)
                data = tensor.flatten().view(torch.uint8).numpy().tobytes()
                digests[f"{path.relative_to(checkpoint)} {name}"] = hashlib.sha256(data).hexdigest()
    for path in sorted(checkpoint.glob("rng_state*")):
        state = torch.load(path, weights_only=False)["cpu"]  # numpy's and Python's states are in it: written by us
        digests[path.name] = hashlib.sha256(state.numpy().tobytes()).hexdigest()
    return digests


@pytest.mark.parametrize(("family", "saved_on"), [(f, name) for f, (_, names) in FAMILIES.items() for name in names])
def test_resume_on_other_topologies(
    pool: WorkerPool, tmp_path: Path, family: str, saved_on: str, request: pytest.FixtureRequest
) -> None:
    names, directory = FAMILIES[family][1], start(family)
    first = tmp_path / "first"
    losses = pool.run(TOPOLOGIES[saved_on][0], train, family, directory, str(first), saved_on, None)[0]
    assert len(losses) == 12
    index = names.index(saved_on)
    others = [names[(index + offset) % len(names)] for offset in (0, 5)]
    if request.config.getoption("--full-matrix"):
        others = names
    for resumed_on in others:
        again = tmp_path / resumed_on.replace(" ", "-")
        results = pool.run(
            TOPOLOGIES[resumed_on][0], train, family, directory, str(again), resumed_on, str(first / "checkpoint-6")
        )
        assert all(result == results[0] for result in results) and len(results[0]) == 6
        error = max(abs(a - b) / b for a, b in zip(results[0], losses[6:], strict=True))
        ROWS.append(f"{family:8s} {saved_on:22s} {resumed_on:22s} {error:.1e}")
        assert error <= 1e-5, (resumed_on, results[0], losses[6:])
        if resumed_on == saved_on:
            assert results[0] == losses[6:]
            assert contents(again / "checkpoint-12") == contents(first / "checkpoint-12")
