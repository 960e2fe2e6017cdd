"""A run saved on one topology goes on with the same losses on any other.

Four steps without interruption on topology A; the checkpoint of step 2 goes on on topology B, with the short last step
of an epoch and then with another epoch. `--full-matrix` runs every A x B; otherwise each A meets itself and another,
the one in one family and the other in the other.
Experts have topologies of their own, and start over from other weights, so that all that counts is read from the
checkpoint.
"""

from __future__ import annotations

import functools
import hashlib
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from family_runs import tiny_model
from pool import WorkerPool
from safetensors import safe_open
from safetensors.torch import load_file
from test_gradients import stock_model
from tiny import History, pad_batch, random_dataset, training_arguments
from transformers import AutoConfig, AutoModelForCausalLM as StockAuto

from hf_nanotron import AutoModelForCausalLM as ParallelAuto, NanotronTrainer, NanotronTrainingArguments

GLOBAL_BATCH, SAMPLES, STEPS, SAVED = 8, 20, 4, 2
CHECKPOINT, LAST = f"checkpoint-{SAVED}", f"checkpoint-{STEPS}"
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
    "cp2 dp2 zero3": (4, 2, {"cp_size": 2, "zero_stage": 3}),
}
# Dropout is drawn for each micro-batch, and inside attention by each tensor-parallel rank for its own heads: with it,
# tp and the micro-batch stay the same. Over cp there is none.
WITH_DROPOUT = [name for name, (_, _, sizes) in TOPOLOGIES.items() if not sizes.keys() & {"tp_size", "cp_size"}]
DROPOUT = {"attention_dropout": 0.2}
FAMILIES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "llama": (DROPOUT, WITH_DROPOUT),
    "qwen3": ({"tie_word_embeddings": True}, list(TOPOLOGIES)),
}
EXPERT_TOPOLOGIES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "ep2 dp2": (2, 2, {"ep_size": 2}),
    "ep2 dp4 zero2": (4, 1, {"ep_size": 2, "zero_stage": 2}),
    "ep4": (4, 2, {"ep_size": 4, "tp_size": 2, "zero_stage": 0}),
    "tp2 pp2": (4, 2, {"tp_size": 2, "pp_size": 2}),
    "ep4 cp2": (4, 2, {"ep_size": 4, "cp_size": 2}),
    "one process": TOPOLOGIES["one process"],
}
# What the family is saved on -> what it goes on on; the first is the same.
EXPERTS = {
    "qwen3_moe": ("ep2 dp4 zero2", "ep2 dp4 zero2", "tp2 pp2"),
    "deepseek_v3": ("ep2 dp2", "ep2 dp2", "ep4", "ep4 cp2", "one process"),
}
MORE_EXPERTS = {"deepseek_v3": ("tp2 pp2",)}  # with --full-matrix
TITLE = "resume on another topology: worst relative difference from the losses of the uninterrupted run"
ROWS: list[str] = []  # conftest.py prints them when all tests have run
HEADER = f"{'family':11s} {'saved on':22s} resumed on"


@functools.cache
def start(family: str) -> str:
    directory = tempfile.mkdtemp()
    stock_model(family, num_hidden_layers=4, **FAMILIES[family][0]).save_pretrained(directory)  # for four stages
    return directory


def train(family: str, directory: str, output: str, topology: str, resume_from: str | None) -> list[float]:
    experts = family in EXPERTS
    world, micro_batch, sizes = (EXPERT_TOPOLOGIES if experts else TOPOLOGIES)[topology]
    if not experts and FAMILIES[family][0] is DROPOUT:
        micro_batch = 2
    dp = world // sizes.get("tp_size", 1) // sizes.get("pp_size", 1) // sizes.get("cp_size", 1)
    args = NanotronTrainingArguments(
        **training_arguments(
            output_dir=output,
            max_steps=STEPS,
            save_strategy="steps",
            save_steps=SAVED,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=GLOBAL_BATCH // (micro_batch * dp),
            **sizes,
        )
    )
    if experts and resume_from is not None:
        model = ParallelAuto.from_config(AutoConfig.from_pretrained(directory), args.parallel)
    else:
        model = ParallelAuto.from_pretrained(directory, parallel=args.parallel)
    history = History()
    trainer = NanotronTrainer(
        model=model, args=args, train_dataset=random_dataset(SAMPLES), data_collator=pad_batch, callbacks=[history]
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


def resumed_by_default(family: str, saved_on: str) -> list[str]:
    """Each topology meets itself once, with dropout where that is possible, and another one.

    With dropout, two of them meet another one: the generators' states are those of micro-batches, not of ranks.
    """
    names = FAMILIES[family][1]
    dropout, index = FAMILIES[family][0] is DROPOUT, names.index(saved_on)
    itself = [saved_on] if dropout or saved_on not in WITH_DROPOUT else []
    return itself + ([names[(index + 5) % len(names)]] if not dropout or saved_on in ("dp2 zero1", "pp2") else [])


# These stages of ZeRO go on on themselves next to another axis too, or are one of two without shards; and dropout does
# not know the stage.
REPEATED = [("llama", name) for name in ("dp2 zero0", "dp2 zero2", "dp2 zero3", "dp4 zero3")]
# These axes are there next to another one, or with more ranks.
REPEATED += [("qwen3", name) for name in ("dp2 zero0", "dp2 zero2", "pp2", "tp2")]


@pytest.mark.parametrize(("family", "saved_on"), [(f, name) for f, (_, names) in FAMILIES.items() for name in names])
def test_resume_on_other_topologies(
    pool: WorkerPool, tmp_path: Path, family: str, saved_on: str, request: pytest.FixtureRequest
) -> None:
    if (family, saved_on) in REPEATED and not request.config.getoption("--full-matrix"):
        pytest.skip("runs with --full-matrix")
    names, directory = FAMILIES[family][1], start(family)
    first = tmp_path / "first"
    losses = pool.run(TOPOLOGIES[saved_on][0], train, family, directory, str(first), saved_on, None)[0]
    assert len(losses) == STEPS
    others = resumed_by_default(family, saved_on)
    if request.config.getoption("--full-matrix"):
        others = names
    for resumed_on in others:
        again = tmp_path / resumed_on.replace(" ", "-")
        results = pool.run(
            TOPOLOGIES[resumed_on][0], train, family, directory, str(again), resumed_on, str(first / CHECKPOINT)
        )
        assert all(result == results[0] for result in results) and len(results[0]) == STEPS - SAVED
        error = max(abs(a - b) / b for a, b in zip(results[0], losses[SAVED:], strict=True))
        ROWS.append(f"{family:11s} {saved_on:22s} {resumed_on:22s} {error:.1e}")
        assert error <= 1e-5, (resumed_on, results[0], losses[SAVED:])
        if resumed_on == saved_on:
            assert results[0] == losses[SAVED:]
            assert contents(again / LAST) == contents(first / LAST)


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_resume_on_other_topologies(
    pool: WorkerPool, tmp_path: Path, family: str, request: pytest.FixtureRequest
) -> None:
    stock = tiny_model(family)
    with torch.no_grad():
        for name, buffer in stock.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.linspace(-0.1, 0.1, len(buffer)))
    stock.save_pretrained(tmp_path / "start")
    (saved_on, *others), first = EXPERTS[family], tmp_path / "first"
    if request.config.getoption("--full-matrix"):
        others = [*MORE_EXPERTS.get(family, ()), *others]
    arguments = (train, family, str(tmp_path / "start"))
    losses = pool.run(EXPERT_TOPOLOGIES[saved_on][0], *arguments, str(first), saved_on, None)[0]
    checkpoint = first / CHECKPOINT
    for resumed_on in others:
        again = tmp_path / resumed_on.replace(" ", "-")
        world = EXPERT_TOPOLOGIES[resumed_on][0]
        results = pool.run(world, *arguments, str(again), resumed_on, str(checkpoint))
        assert all(result == results[0] for result in results) and len(results[0]) == STEPS - SAVED
        error = max(abs(a - b) / b for a, b in zip(results[0], losses[SAVED:], strict=True))
        ROWS.append(f"{family:11s} {saved_on:22s} {resumed_on:22s} {error:.1e}")
        assert error <= 1e-5, (resumed_on, results[0], losses[SAVED:])
        if resumed_on == saved_on:
            assert results[0] == losses[SAVED:]
            assert contents(again / LAST) == contents(first / LAST)
    for name, bias in hub_tensors(tmp_path / "start").items():
        if name.endswith("e_score_correction_bias"):  # a buffer, which this run leaves alone
            assert bias.any() and torch.equal(hub_tensors(again / LAST)[name], bias)
    # The Hub's files: the names of stock's own, and stock reads from them what it would write.
    StockAuto.from_pretrained(checkpoint).save_pretrained(tmp_path / "again")
    assert hub_tensors(tmp_path / "start").keys() == hub_tensors(checkpoint).keys()
    torch.testing.assert_close(hub_tensors(tmp_path / "again"), hub_tensors(checkpoint), rtol=0, atol=0)


def hub_tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}
