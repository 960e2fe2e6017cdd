"""Every parameter's gradient, not only the norm, equals plain autograd through the stock model in one process.

A norm hides what cancels or is small: a bias counted twice, a key-value head summed over the wrong ranks. Here each
rank compares its part of every gradient with the same part of the stock gradient.
"""

from __future__ import annotations

import copy
import gc
import math
import weakref
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from pool import WorkerPool
from tiny import VOCABULARY, local_gradients, tiny_config
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_nanotron import ParallelConfig
from hf_nanotron.models.sharding.parallelize import parallelize
from hf_nanotron.parallel.collectives import all_reduce
from hf_nanotron.parallel.mesh import ParallelMesh
from hf_nanotron.prepare.compile import compile_layers
from hf_nanotron.prepare.shard_weights import shard_weights
from hf_nanotron.prepare.training_state import TrainingState
from hf_nanotron.training.step.train_step import TrainStep

TOLERANCE = 2e-5  # of the largest value of the parameter's gradient
SMALL_BUCKETS = 1000  # bytes: several buckets in every group, so that their order counts
ACCUMULATION = 3
Batch = dict[str, torch.Tensor]


def stock_model(family: str, **overrides: Any) -> PreTrainedModel:
    """Random weights, biases and norms: zeros and ones would hide a wrong slice."""
    attention = overrides.pop("attn_implementation", "sdpa")
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **overrides), attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def plain(index: int) -> Batch:
    """Micro-batches of different lengths, with labels that are ignored here and there, and the padding token inside."""
    generator = torch.Generator().manual_seed(index)
    ids = torch.randint(0, VOCABULARY, (2, 10 + 3 * (index % 3)), generator=generator)
    ids[0, 4] = 0  # the config's pad_token_id: a row of the embedding without gradient
    labels = ids.clone()
    labels[:, : 1 + index % 4] = -100
    return {"input_ids": ids, "labels": labels}


def padded(index: int) -> Batch:
    """Rows of different lengths, filled up on the left in one and on the right in the other, under a mask."""
    batch = plain(index)
    mask = torch.ones_like(batch["input_ids"])
    mask[0, :3] = 0
    mask[1, -4:] = 0
    # Nothing is predicted of filling, nor from it: what a token that may attend to nothing computes is undefined.
    predicted = F.pad(mask[:, :-1] * mask[:, 1:], (1, 0))
    batch["labels"] = batch["labels"].masked_fill(predicted == 0, -100)
    return {**batch, "attention_mask": mask}


def packed(index: int) -> Batch:
    """Two documents in a row, told apart by their positions."""
    batch = {name: tensor[:1] for name, tensor in plain(index).items()}
    length = batch["input_ids"].shape[1]
    positions = torch.cat((torch.arange(6), torch.arange(length - 6)))
    return {**batch, "position_ids": positions.unsqueeze(0)}


BATCHES = {"plain": plain, "padded": padded, "packed": packed}


@dataclass(frozen=True)
class Case:
    """A topology and what is peculiar about the model, its batches or what is trained of it."""

    sizes: dict[str, Any]
    family: str = "llama"
    overrides: dict[str, Any] = field(default_factory=dict)
    batches: str = "plain"
    dp: int = 1
    frozen: tuple[str, ...] = ()
    checkpoint_every: int = 0
    compiled: bool = False
    forget_partial_sums: bool = False

    @property
    def world_size(self) -> int:
        return self.dp * self.sizes.get("tp_size", 1) * self.sizes.get("pp_size", 1)


def gradient_errors(case: Case) -> tuple[dict[str, float], list[str], float]:
    """On one rank: the relative error of every gradient that it holds, the names of all trained parameters, and the
    relative error of the loss."""
    stock = stock_model(case.family, **case.overrides)
    for name, parameter in stock.named_parameters():
        parameter.requires_grad_(not any(part in name for part in case.frozen))
    mesh = ParallelMesh(ParallelConfig(**case.sizes))
    model = parallelize(copy.deepcopy(stock), mesh)
    if case.checkpoint_every:
        model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=case.checkpoint_every)
    if case.forget_partial_sums:
        model.shard_specs = {n: replace(spec, partial_grad=False) for n, spec in model.shard_specs.items()}
    window = [BATCHES[case.batches](index) for index in range(ACCUMULATION * mesh.dp_size)]
    items = torch.tensor(sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in window))

    stock.train()
    expected = torch.zeros(())
    for batch in window:
        loss = stock(**batch, num_items_in_batch=items, use_cache=False).loss
        loss.backward()
        expected += loss.detach()

    weights = shard_weights(model, torch.float32, SMALL_BUCKETS)
    if case.compiled:
        torch._dynamo.reset()
        compile_layers(model, "aot_eager", None)
    own = [{**batch, "num_items_in_batch": items} for batch in window[mesh.dp_rank :: mesh.dp_size]]
    share = TrainStep(TrainingState(model, weights)).run(own, step=0)
    loss = all_reduce(share * (mesh.is_last_stage and mesh.tp_rank == 0), mesh.world)

    whole = {name: parameter.grad for name, parameter in stock.named_parameters() if parameter.requires_grad}
    errors = {}
    for name, gradient in local_gradients(model).items():
        spec = model.shard_specs[name]
        error = (gradient - spec.slice(whole[spec.name])).abs().max() / whole[spec.name].abs().max()
        errors[spec.name] = float(error)
    mesh.close()
    return errors, list(whole), float((loss - expected).abs() / expected)


BIASES = {"attention_bias": True, "mlp_bias": True}
TIED = {"tie_word_embeddings": True}
LOWER_HALF = ("embed_tokens", "layers.0.", "layers.1.")
INTERLEAVED = {"pp_schedule": "interleaved_1f1b", "pp_virtual_stages": 2}
ZERO_BUBBLE = {"pp_schedule": "zb", "pp_size": 2}
CASES = {
    "tp2": Case({"tp_size": 2}, batches="padded"),
    # Row-parallel biases get a gradient on one tensor-parallel rank alone: buckets must still be reduced in one order.
    "tp2-biases": Case({"tp_size": 2}, overrides=BIASES),
    "tp2-biases-no-sp": Case({"tp_size": 2, "sequence_parallel": False}, overrides={**BIASES, **TIED}),
    "tp2-biases-dp2": Case({"tp_size": 2}, overrides=BIASES, dp=2),
    "tp4-two-kv-heads": Case({"tp_size": 4}, "qwen2", TIED, "packed"),
    "tp4-one-kv-head": Case({"tp_size": 4}, "qwen3", {"num_key_value_heads": 1}, "padded"),
    "tp2-one-kv-head-dp2": Case({"tp_size": 2}, "qwen3", {"num_key_value_heads": 1, **TIED}, dp=2),
    "pp2-biases": Case({"pp_size": 2}, overrides=BIASES, batches="padded"),
    "pp2-tied-dp2": Case({"pp_size": 2, "pp_schedule": "afab"}, "smollm3", TIED, dp=2),
    "tp2-pp2-tied": Case({"tp_size": 2, "pp_size": 2}, "qwen3", TIED, "packed"),
    "tp2-pp2-interleaved": Case({"tp_size": 2, "pp_size": 2, **INTERLEAVED}, "smollm3", TIED, "padded"),
    "tp2-pp2-eager": Case(
        {"tp_size": 2, "pp_size": 2}, "mistral", {"attn_implementation": "eager"}, "padded", checkpoint_every=1
    ),
    "tp2-checkpointed": Case({"tp_size": 2}, "qwen2", checkpoint_every=2, frozen=("embed_tokens", "layernorm")),
    "pp2-frozen-stage": Case({"pp_size": 2}, frozen=LOWER_HALF),
    "pp2-frozen-last": Case({"pp_size": 2}, frozen=("layers.2.", "layers.3.", "model.norm", "lm_head")),
    "tp2-pp2-frozen": Case({"tp_size": 2, "pp_size": 2}, overrides={"num_key_value_heads": 1}, frozen=LOWER_HALF),
    "pp2-zb-tied-dp2-zero2": Case({**ZERO_BUBBLE, "zero_stage": 2}, "smollm3", TIED, dp=2),
    "pp2-zb-interleaved-zero0": Case({**ZERO_BUBBLE, "pp_virtual_stages": 2, "zero_stage": 0}, overrides=BIASES),
    "tp2-pp2-zb-checkpointed": Case({"tp_size": 2, **ZERO_BUBBLE}, "qwen3", batches="padded", checkpoint_every=1),
    "pp2-zb-frozen-stage": Case(ZERO_BUBBLE, frozen=LOWER_HALF),
    # The stage that trains no key-value head takes part in making their groups.
    "tp4-pp2-frozen": Case({"tp_size": 4, "pp_size": 2}, frozen=LOWER_HALF),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_gradients(pool: WorkerPool, case: Case) -> None:
    results = pool.run(case.world_size, gradient_errors, case)
    trained = set(results[0][1])
    assert set().union(*(errors for errors, _, _ in results)) == trained, "a gradient is on no rank"
    wrong = {name: error for errors, _, _ in results for name, error in errors.items() if not error <= TOLERANCE}
    assert not wrong, wrong
    assert all(loss <= 1e-5 for _, _, loss in results)


def test_a_missing_sum_is_seen(pool: WorkerPool) -> None:
    results = pool.run(2, gradient_errors, Case({"tp_size": 2}, forget_partial_sums=True))
    wrong = {name for errors, _, _ in results for name, error in errors.items() if not error <= TOLERANCE}
    assert wrong == {name for name in results[0][1] if "norm" in name}


def weights_and_freed(sizes: dict[str, int]) -> tuple[dict[str, torch.Tensor], int, int]:
    """A stock model that each rank drew for itself, cut: its weights here, and tensors freed and kept of the rest."""
    mesh = ParallelMesh(ParallelConfig(**sizes))
    torch.manual_seed(100 + mesh.rank)
    stock = AutoModelForCausalLM.from_config(tiny_config("llama"))
    whole = {name: weakref.ref(parameter) for name, parameter in stock.named_parameters()}
    model = parallelize(stock, mesh)
    gc.collect()
    held = dict(model.named_parameters())
    kept = sum(reference() is not None for name, reference in whole.items() if name not in held)
    assert sum(parameter.untyped_storage().nbytes() for parameter in held.values()) == sum(
        4 * math.prod(model.shard_specs[name].local_shape) for name in held
    )
    weights = {name: parameter.detach().clone() for name, parameter in held.items()}
    mesh.close()
    return weights, len(whole) - len(held), kept


def test_a_stock_model_is_the_same_on_every_rank(pool: WorkerPool) -> None:
    """Nothing seeded the ranks alike; stock data-parallel training takes rank 0's weights, and so do we."""
    first, second = (weights for weights, _, _ in pool.run(2, weights_and_freed, {}))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_weights_of_other_stages_are_freed(pool: WorkerPool) -> None:
    for _, left_out, kept in pool.run(2, weights_and_freed, {"pp_size": 2}):
        assert left_out > 15 and kept == 0
