"""What a rank holds is what the formula of its ZeRO stage says, and what is reported before the first step."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from family_runs import tiny_model
from pool import WorkerPool
from tiny import VOCABULARY, random_dataset, training_arguments
from torch._subclasses import FakeTensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    TrainerCallback,
)

from hf_nanotron import AutoModelForCausalLM, NanotronTrainer, NanotronTrainingArguments, ParallelConfig
from hf_nanotron.monitor.flops import flops_per_token
from hf_nanotron.monitor.memory import MemoryReport, RankStep, activation_bytes

SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 2048,
}
RANKS = 2
# Bytes a parameter in bf16: weights + fp32 gradients + fp32 masters + two fp32 moments, divided where they are sharded.
FORMULA = {0: 2 + 4 + 4 + 8, 1: 2 + 4 + (4 + 8) / RANKS, 2: 2 + (4 + 4 + 8) / RANKS, 3: (4 + 4 + 8) / RANKS}


def tensor_bytes() -> int:
    """Of all tensors that Python can see, each piece of memory once. What a compiler has left has none."""
    sizes = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and not isinstance(thing, FakeTensor) and not thing.is_meta:
            storage = (thing._local_tensor if hasattr(thing, "_local_tensor") else thing).untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


class Held(TrainerCallback):
    """Bytes while nothing of a forward is alive, but gradients are."""

    def __init__(self) -> None:
        self.bytes = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert not gc.isenabled()  # by `pool.py`, so that the trainer hides nothing from `get_objects`
        gc.collect()
        self.bytes = tensor_bytes()


def held_and_reported(sizes: dict[str, Any]) -> tuple[float, MemoryReport, int]:
    gc.collect()
    before, held = tensor_bytes(), Held()
    args = NanotronTrainingArguments(**training_arguments(max_steps=2, bf16=True, **sizes))
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE), parallel=args.parallel)
    trainer = NanotronTrainer(model=model, args=args, train_dataset=random_dataset(8), callbacks=[held])
    trainer.train()
    report, parameters = trainer.memory_report, model.num_parameters()
    trainer.mesh.close()
    return held.bytes - before, report, parameters


@pytest.mark.parametrize("stage", FORMULA)
def test_bytes_per_parameter(pool: WorkerPool, stage: int) -> None:
    for held, report, parameters in pool.run(RANKS, held_and_reported, {"zero_stage": stage}):
        assert held / parameters == pytest.approx(FORMULA[stage], rel=0.05)
        assert report.state / parameters == pytest.approx(FORMULA[stage], rel=0.05)
        assert report.activations > 0 and report.total == report.state + report.activations
        assert "GiB" in str(report) and "moments" in str(report)


def test_bf16_moments_halve(pool: WorkerPool) -> None:
    for held, report, parameters in pool.run(RANKS, held_and_reported, {"optim_state_dtype": "bfloat16"}):
        assert held / parameters == pytest.approx(2 + 4 + (4 + 4) / RANKS, rel=0.05)
        assert report.moments / parameters == pytest.approx(4 / RANKS, rel=0.05)


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
def test_the_estimate_of_activations(checkpointed: bool) -> None:
    """Against what autograd keeps of a stock forward: its saved tensors, each piece of memory once."""
    config = LlamaConfig(**SHAPE, attn_implementation="sdpa")
    model = LlamaForCausalLM(config).to(torch.bfloat16).train()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch, length = 2, 128
    ids = torch.randint(0, config.vocab_size, (batch, length))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.model(input_ids=ids, use_cache=False).last_hidden_state.sum()
    one_stage = ParallelConfig(zero_stage=0)
    estimate = activation_bytes(RankStep(config, batch * length, one_stage, 0, 1, 2, checkpointed))
    estimate -= batch * length * config.vocab_size * 12  # of the logits, which the backbone has not made
    if checkpointed:  # one layer's recomputation comes with its backward
        one, none = (LlamaConfig(**{**SHAPE, "num_hidden_layers": count}) for count in (1, 0))
        estimate -= activation_bytes(RankStep(one, batch * length, one_stage, 0, 1, 2, False))
        estimate += activation_bytes(RankStep(none, batch * length, one_stage, 0, 1, 2, False))
    assert estimate == pytest.approx(sum(saved.values()), rel=0.25)


EXPERTS = {**SHAPE, "num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 128}


def test_the_estimate_of_experts() -> None:
    """Against what autograd keeps of a stock forward, whose activation keeps a fourth tensor of the inner size."""
    config = Qwen3MoeConfig(**EXPERTS, head_dim=32, attn_implementation="sdpa", experts_implementation="grouped_mm")
    model = Qwen3MoeForCausalLM(config).to(torch.bfloat16).train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = 256
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.model(input_ids=torch.randint(0, 2048, (2, 128)), use_cache=False).last_hidden_state.sum()
    estimate = activation_bytes(RankStep(config, tokens, ParallelConfig(zero_stage=0), 0, 1, 2, False))
    fourth = tokens * 4 * 4 * 128 * 2  # layers, experts of a token, inner size, bytes
    assert estimate - tokens * config.vocab_size * 12 + fourth == pytest.approx(sum(saved.values()), rel=0.25)


def test_recomputation_keeps_what_heads_have_sent() -> None:
    """As measured: 1.25 GiB a layer of an 8B at 131,072 tokens over two ranks."""
    config = LlamaConfig(hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, num_hidden_layers=10)
    found = {}
    for mode in ("gather", "heads", "auto"):
        sizes = ParallelConfig(cp_size=2, cp_mode=mode)
        found[mode] = activation_bytes(RankStep(config, 65536, sizes, 0, 1, 2, 1.0, "all_but_attention"))
    # One layer at a time also has what it does not keep.
    assert found["heads"] - found["gather"] == found["auto"] - found["gather"] == 9 * 1.25 * 2**30


def test_a_fused_head_keeps_one_chunk_of_logits() -> None:
    config, sizes = LlamaConfig(**SHAPE), ParallelConfig(pp_size=2)
    whole, fused = (
        [activation_bytes(RankStep(config, 8192, sizes, r, 2, 2, False), kind) for r in (0, 1)] for kind in (0, 1)
    )
    assert whole[0] == fused[0]
    # bf16 logits, an fp32 copy and both gradients of 8,192 tokens, against bf16 logits of 4,096 and a bf16 gradient.
    assert whole[1] - fused[1] == 8192 * 2048 * 12 - 4096 * 2048 * 2 - 8192 * 256 * 2


def test_a_model_without_attention_heads_trains_and_reports(pool: WorkerPool) -> None:
    """The report comes before the first step. Keys and queries do not count, where selective layers keep them too."""
    config = MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=VOCABULARY, state_size=8)
    (activations,) = pool.run(1, reported_activations, config)
    tokens, inner, item = 16, 64, 4
    layer = 2 * 32 * (4 + item) + 2 * 32 * item + 4 * inner * item
    assert activations > 2 * tokens * layer
    plain = activation_bytes(RankStep(config, tokens, ParallelConfig(), 0, 1, item, 0.0))
    assert activations <= plain
    assert 0 < activation_bytes(RankStep(config, tokens, ParallelConfig(), 0, 1, item, 1.0, policy="selective")) < plain


def test_a_model_whose_layers_differ_trains_and_reports(pool: WorkerPool) -> None:
    """Every other layer of Gemma 4 has heads twice as wide, and its config refuses to tell one size."""
    config = tiny_model("gemma4_text").config
    (activations,) = pool.run(1, reported_activations, config)
    layers = [(4, 16, 2), (4, 32, 2)] * 3  # heads, their features, key-value heads
    assert [(c.num_attention_heads, c.head_dim, c.num_key_value_heads) for c in config.per_layer_config] == layers
    with_none, with_some = (flops_per_token({}, config, length) for length in (0, 64))
    assert with_some - with_none == 3 * 64 * sum(heads * 2 * dim for heads, dim, _ in layers)
    assert activations > 6 * 16 * (4 * 3 * 32 + 2 * 2 * 32) * 4 > 0  # 16 tokens, as wide as the widest


def reported_activations(config: PreTrainedConfig) -> int:
    args = NanotronTrainingArguments(**training_arguments(max_steps=1))
    model = AutoModelForCausalLM.from_config(config, parallel=args.parallel)
    trainer = NanotronTrainer(model=model, args=args, train_dataset=random_dataset(4))
    trainer.train()
    model.mesh.close()
    return trainer.memory_report.activations


def test_pipelines_keep_more_on_their_first_stage() -> None:
    config = LlamaConfig(**SHAPE)
    sizes = ParallelConfig(pp_size=4)
    kept = [activation_bytes(RankStep(config, 64, sizes, rank, 8, 2, False)) for rank in range(4)]
    assert kept[0] > kept[1] > kept[2]
    everything = ParallelConfig(pp_size=4, pp_schedule="afab")
    assert activation_bytes(RankStep(config, 64, everything, 0, 8, 2, False)) == 2 * kept[0]
    # A micro-batch holds memory until its weight gradients: on every rank as many as on the first.
    split = ParallelConfig(pp_size=4, pp_schedule="zb")
    assert [activation_bytes(RankStep(config, 64, split, rank, 8, 2, False)) for rank in (0, 2)] == [kept[0], kept[0]]
    recomputed = [activation_bytes(RankStep(config, 64, split, rank, 8, 2, True)) for rank in (0, 2)]
    assert activation_bytes(RankStep(config, 64, sizes, 0, 8, 2, True)) < recomputed[0] < recomputed[1]
