"""The table: the same losses and gradient norms on every topology as stock `transformers.Trainer` in one process.

Four optimizer steps in fp32 on the same tokens, with clipping, weight decay, a schedule with warm-up, and samples that
weigh differently. Tolerances are relative: 1e-6 for the first loss, 2e-5 for every loss, 1e-4 for every gradient norm.
A reduction that is left out or done twice misses them by orders of magnitude.
"""

from __future__ import annotations

import functools
import tempfile
from typing import Any

import pytest
import torch
from datasets import Dataset
from pool import WorkerPool
from tiny import History, random_dataset, tiny_config, train_parallel, train_stock
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

TOLERANCE = {"first loss": 1e-6, "loss": 2e-5, "norm": 1e-4}
SAMPLES = 96
TITLE = "relative error against stock Trainer in one process, four steps in fp32"
HEADER = f"{'topology':86s} " + " ".join(f"{name:>10s}" for name in TOLERANCE)
ROWS: list[str] = []  # conftest.py prints them when all tests have run


@functools.cache
def checkpoint(family: str, **overrides: Any) -> str:
    """A Hub checkpoint of random weights."""
    directory = tempfile.mkdtemp()
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(tiny_config(family, **overrides)).save_pretrained(directory)
    return directory


def for_sizes(family: str, sizes: dict[str, Any], **overrides: Any) -> str:
    """One layer, or two in all, on each of the pipeline's stages."""
    layers = max(2, sizes.get("pp_size", 1) * sizes.get("pp_virtual_stages", 1))
    return checkpoint(family, num_hidden_layers=layers, **overrides)


def samples_for(directory: str) -> Dataset:
    """Tokens out of all of the vocabulary."""
    return random_dataset(SAMPLES, vocabulary=AutoConfig.from_pretrained(directory).vocab_size)


@functools.cache
def reference(directory: str, global_batch: int, **overrides: Any) -> History:
    return train_stock(directory, samples_for(directory), gradient_accumulation_steps=global_batch, **overrides)


def train(directory: str, sizes: dict[str, Any], accumulation: int) -> History:
    return train_parallel(directory, samples_for(directory), gradient_accumulation_steps=accumulation, **sizes)


def compare(pool: WorkerPool, label: str, directory: str, dp: int, accumulation: int, **sizes: Any) -> None:
    world = dp * sizes.get("tp_size", 1) * sizes.get("pp_size", 1)
    histories = pool.run(world, train, directory, sizes, accumulation)
    expected = reference(directory, dp * accumulation, **{k: sizes[k] for k in ("loss",) if k in sizes})
    got = histories[0]
    assert len(got.losses) == len(expected.losses) == 4
    assert all(h.losses == got.losses and h.norms == got.norms for h in histories), "ranks report different figures"
    error = {
        "first loss": relative(got.losses[:1], expected.losses[:1]),
        "loss": relative(got.losses, expected.losses),
        "norm": relative(got.norms, expected.norms),
    }
    ROWS.append(f"{label:86s} " + " ".join(f"{error[name]:10.1e}" for name in TOLERANCE))
    assert all(error[name] <= TOLERANCE[name] for name in TOLERANCE), f"{label}: {error}"


def relative(got: list[float], expected: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(got, expected, strict=True))


def llama_for(tp: int, stages: int, **overrides: Any) -> str:
    """Heads that `tp` divides; key-value heads that it divides, or, at tp 4 and 8, that it must replicate."""
    heads = {1: 4, 2: 4, 4: 4, 8: 8, 3: 6, 6: 6, 5: 5, 7: 7}[tp]
    kv_heads = {1: 2, 2: 2, 4: 2, 8: 2, 3: 3, 6: 3, 5: 5, 7: 7}[tp]
    fields = {
        "num_hidden_layers": max(2, stages),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": 8 * heads,
        "vocab_size": 840 if tp == 7 else 120,
        "intermediate_size": 56 if tp == 7 else 60 if tp in (3, 5, 6) else 48,
        "tie_word_embeddings": stages % 2 == 0,
    }
    return checkpoint("llama", **{**fields, **overrides})


TOPOLOGIES = [(pp, dp, tp) for pp in range(1, 9) for dp in range(1, 9) for tp in range(1, 9) if pp * dp * tp <= 8]
LARGE = {(2, 2, 2), (1, 1, 8), (8, 1, 1), (1, 8, 1)}
SCHEDULES = {"afab": 1, "1f1b": 1, "interleaved_1f1b": 2}


@pytest.mark.parametrize(("pp", "dp", "tp"), TOPOLOGIES)
def test_llama_on_every_topology(pool: WorkerPool, request: pytest.FixtureRequest, pp: int, dp: int, tp: int) -> None:
    """Every (pp, dp, tp) with a product of at most 8, every schedule, sequence parallelism on and off.

    On more than four ranks a choice of them; there and on four stages one schedule, and on eight parts one form, each
    in turn; all with `--full-matrix`.
    """
    full = request.config.getoption("--full-matrix")
    every = full or (pp * dp * tp <= 4 and pp < 4)
    if not every and pp * dp * tp > 4 and (pp, dp, tp) not in LARGE:
        pytest.skip("runs with --full-matrix")
    for index, (schedule, virtual_stages) in enumerate(SCHEDULES.items()):
        if pp == 1 and schedule != "1f1b":
            continue
        if pp > 1 and not every and index != (pp + dp + tp) % len(SCHEDULES):
            continue
        accumulation = max(pp + 1 if schedule == "interleaved_1f1b" else pp, 1 if dp > 3 else 2)
        # Every stage of ZeRO meets every axis; where there is nothing to shard they are the same. Stages 2 and 3, whose
        # many collectives take long on more ranks than cores, meet eight ranks in test_zero.py.
        stages = 4 if pp * dp * tp <= 4 else 2
        zero = (pp + dp + tp + list(SCHEDULES).index(schedule)) % stages if dp > 1 else 1
        sizes = {"pp_size": pp, "tp_size": tp, "pp_schedule": schedule, "pp_virtual_stages": virtual_stages}
        sizes["zero_stage"] = zero
        directory = llama_for(tp, pp * virtual_stages)
        # without sequence parallelism on half of the rows, so that both forms meet every axis
        both = pp * dp == 1 and (tp < 8 or full)
        for sequence_parallel in (True, False) if both else (schedule != "1f1b" or dp > 1 or tp == 8,):
            if tp > 1:
                sizes["sequence_parallel"] = sequence_parallel
            elif not sequence_parallel and pp * dp == 1:
                continue
            label = f"llama pp {pp} dp {dp} tp {tp} {schedule}" + (" sp" if tp > 1 and sequence_parallel else "")
            label += f" zero {zero}" if dp > 1 else ""
            compare(pool, label, directory, dp, accumulation, **sizes)


UNEVEN: list[tuple[int, bool, dict[str, Any]]] = [  # vocabulary, tied, sizes
    (121, False, {"tp_size": 2}),
    (17, False, {"tp_size": 3, "sequence_parallel": False}),  # too few for whole tiles
    (121, True, {"tp_size": 4}),
    (131, True, {"dp": 2, "tp_size": 2, "zero_stage": 3, "sequence_parallel": False}),
    (131, True, {"pp_size": 2, "tp_size": 2}),
    (121, True, {"pp_size": 2, "tp_size": 2, "pp_schedule": "interleaved_1f1b", "pp_virtual_stages": 2}),
    (131, False, {"pp_size": 2, "tp_size": 2, "pp_schedule": "zb"}),
    (131, True, {"pp_size": 2, "dp": 2, "tp_size": 2, "zero_stage": 2}),
]
MORE_UNEVEN: list[tuple[int, bool, dict[str, Any]]] = [  # with --full-matrix
    (131, True, {"tp_size": 2, "sequence_parallel": False}),
    (131, True, {"tp_size": 3}),
    (131, False, {"tp_size": 8}),
    (131, False, {"dp": 2, "tp_size": 2, "zero_stage": 0}),
    (121, True, {"dp": 2, "tp_size": 2, "zero_stage": 1, "sequence_parallel": False}),
    (131, True, {"dp": 2, "tp_size": 2, "zero_stage": 2}),
    (121, False, {"dp": 2, "tp_size": 2, "zero_stage": 3}),
    (121, False, {"pp_size": 2, "tp_size": 2, "pp_schedule": "afab", "sequence_parallel": False}),
]


@pytest.mark.parametrize("row", [*UNEVEN, *MORE_UNEVEN], ids=str)
def test_vocabularies_that_tp_does_not_divide(
    pool: WorkerPool, pytestconfig: pytest.Config, row: tuple[int, bool, dict[str, Any]]
) -> None:
    if row in MORE_UNEVEN and not pytestconfig.getoption("full_matrix"):
        pytest.skip("runs with --full-matrix")
    vocabulary, tied, sizes = row
    pp, dp, tp = (sizes.get(axis, 1) for axis in ("pp_size", "dp", "tp_size"))
    directory = llama_for(tp, pp * sizes.get("pp_virtual_stages", 1), vocab_size=vocabulary, tie_word_embeddings=tied)
    label = f"vocabulary {vocabulary} {'tied' if tied else 'untied'} pp {pp} dp {dp} tp {tp}"
    label += f" {sizes['pp_schedule']}" if "pp_schedule" in sizes else ""
    label += " sp" if sizes.get("sequence_parallel", True) else ""
    label += f" zero {sizes['zero_stage']}" if dp > 1 else ""
    compare(pool, label, directory, dp, max(pp, 3 - dp), **{k: v for k, v in sizes.items() if k != "dp"})


def token_weighted(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """Weighs a token by what the model thinks of it, and penalises logits: neither is a loss over slices."""
    target = F.pad(labels, (0, 1), value=-100)[..., 1:].flatten()
    logits = outputs.logits.flatten(0, 1)
    losses = F.cross_entropy(logits, target, reduction="none")
    return (losses * (-losses).exp().detach().add(0.5)).sum() / num_items_in_batch + 1e-3 * logits.square().mean()


OWN_LOSS = {(1, 1, 2), (2, 1, 1), (1, 2, 1)}


@pytest.mark.parametrize(("pp", "dp", "tp"), TOPOLOGIES)
def test_compute_loss_func(pool: WorkerPool, request: pytest.FixtureRequest, pp: int, dp: int, tp: int) -> None:
    """A loss of the user's, from whole logits; test_custom_loss.py has every way to ask for one."""
    if (pp, dp, tp) not in OWN_LOSS and not request.config.getoption("--full-matrix"):
        pytest.skip("runs with --full-matrix")
    schedules = [name for name in SCHEDULES if pp > 1 or name == "1f1b"]
    schedule = schedules[(pp + dp + tp) % len(schedules)]
    sizes = {"pp_size": pp, "tp_size": tp, "pp_schedule": schedule, "pp_virtual_stages": SCHEDULES[schedule]}
    sizes |= {"zero_stage": (pp + tp) % 4 if dp > 1 else 1, "loss": token_weighted}
    label = f"llama pp {pp} dp {dp} tp {tp} {schedule} compute_loss_func" + (
        f" zero {sizes['zero_stage']}" if dp > 1 else ""
    )
    accumulation = max(pp + 1 if schedule == "interleaved_1f1b" else pp, 2)
    compare(pool, label, llama_for(tp, pp * SCHEDULES[schedule]), dp, accumulation, **sizes)


SPREAD: list[dict[str, Any]] = [
    {"tp_size": 2},
    {"tp_size": 2, "sequence_parallel": False},
    {"pp_size": 2, "dp": 2},
    {"pp_size": 2, "dp": 2, "zero_stage": 3},
    {"tp_size": 4},  # more ranks than key-value heads
    {"tp_size": 2, "pp_size": 2},
    {"pp_size": 2, "pp_schedule": "interleaved_1f1b", "pp_virtual_stages": 2, "tp_size": 2},
]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])  # test_families.py has all, below the trainer
def test_families(pool: WorkerPool, pytestconfig: pytest.Config, family: str, tied: bool) -> None:
    """By default a family with norms of heads; Llama, tied and not, runs on every topology above."""
    if (family, tied) != ("qwen3", False) and not pytestconfig.getoption("full_matrix"):
        pytest.skip("runs with --full-matrix")
    for row in SPREAD if pytestconfig.getoption("full_matrix") else SPREAD[3:5] + SPREAD[6:]:
        sizes = dict(row)
        directory = for_sizes(family, sizes, tie_word_embeddings=tied)
        dp = sizes.pop("dp", 1)
        label = f"{family} {'tied' if tied else 'untied'} dp {dp} " + " ".join(f"{k}={v}" for k, v in sizes.items())
        compare(pool, label, directory, dp, 2, **sizes)


ZB = {"pp_schedule": "zb"}
ZERO_BUBBLE: dict[str, tuple[int, int, dict[str, Any]]] = {  # data-parallel ranks, micro-batches, arguments
    "pp 2": (1, 3, {"pp_size": 2}),
    "pp 4": (1, 6, {"pp_size": 4}),
    "pp 2 virtual 2": (1, 4, {"pp_size": 2, "pp_virtual_stages": 2}),
    "pp 2 tp 2": (1, 2, {"pp_size": 2, "tp_size": 2}),
    "pp 2 dp 2 zero 1": (2, 2, {"pp_size": 2, "zero_stage": 1}),
    "pp 2 dp 2 zero 2": (2, 3, {"pp_size": 2, "zero_stage": 2}),
    "pp 2 checkpointed": (1, 2, {"pp_size": 2, "gradient_checkpointing": True}),
    "pp 2 compiled": (1, 2, {"pp_size": 2, "torch_compile": True, "torch_compile_backend": "aot_eager"}),
    "pp 2 dp 2 tp 2 zero 2": (2, 4, {"pp_size": 2, "tp_size": 2, "zero_stage": 2}),
}


@pytest.mark.parametrize("row", ZERO_BUBBLE)
def test_zero_bubble(pool: WorkerPool, request: pytest.FixtureRequest, row: str) -> None:
    if row != "pp 2 dp 2 zero 2" and not request.config.getoption("--full-matrix"):
        pytest.skip("runs with --full-matrix")
    dp, accumulation, sizes = ZERO_BUBBLE[row]
    directory = for_sizes("llama", sizes, tie_word_embeddings="zero" in row)
    compare(pool, f"llama {row} zb", directory, dp, accumulation, **sizes, **ZB)


def test_a_wrong_reduction_cannot_pass(pool: WorkerPool) -> None:
    """Norm gradients that are not summed over tensor-parallel ranks miss the tolerance by far."""
    directory = checkpoint("llama", num_hidden_layers=2)
    expected = reference(directory, 2)
    got = pool.run(2, _train_without_partial_sums, directory)[0]
    assert relative(got.norms, expected.norms) > 10 * TOLERANCE["norm"]


def _train_without_partial_sums(directory: str) -> History:
    import dataclasses

    from tiny import pad_batch, training_arguments

    from hf_nanotron import AutoModelForCausalLM as ParallelAuto, NanotronTrainer, NanotronTrainingArguments

    args = NanotronTrainingArguments(**training_arguments(tp_size=2, gradient_accumulation_steps=2))
    model = ParallelAuto.from_pretrained(directory, parallel=args.parallel)
    model.shard_specs = {n: dataclasses.replace(s, partial_grad=False) for n, s in model.shard_specs.items()}
    history = History()
    NanotronTrainer(
        model=model, args=args, train_dataset=random_dataset(SAMPLES), data_collator=pad_batch, callbacks=[history]
    ).train()
    return history
