"""Mixtures of experts through the trainer: what a review found, pinned."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from family_runs import tiny_model
from pool import JobError, WorkerPool
from tiny import VOCABULARY, message, pad_batch, random_dataset, tiny_config, training_arguments
from transformers import AutoModelForCausalLM

EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
LOSSES = {"output_router_logits": True, "router_aux_loss_coef": 0.5}


def start(**overrides: Any) -> str:
    """A checkpoint of a small mixture."""
    torch.manual_seed(1)
    directory = tempfile.mkdtemp()
    AutoModelForCausalLM.from_config(tiny_config("qwen3_moe", **EXPERTS, **overrides)).save_pretrained(directory)
    return directory


def train(directory: str, overrides: dict[str, Any], samples: int = 16, length: int = 16, resume: Any = None) -> Any:
    """Losses of a run, and the logged loads."""
    from hf_nanotron import AutoModelForCausalLM as ParallelAuto, NanotronTrainer, NanotronTrainingArguments

    args = NanotronTrainingArguments(**training_arguments(**overrides))
    model = ParallelAuto.from_pretrained(directory, parallel=args.parallel)
    data = random_dataset(samples, length, ragged=length < 16)
    trainer = NanotronTrainer(
        model=model, args=args, train_dataset=data, eval_dataset=random_dataset(4, 8, seed=3), data_collator=pad_batch
    )
    trainer.train(resume_from_checkpoint=resume)
    lines = [line for line in trainer.state.log_history if "loss" in line]
    biases = {n: b.tolist() for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")}
    model.mesh.close()
    return [line["loss"] for line in lines], [line.get("moe/load_max_over_mean") for line in lines], biases


def test_a_bf16_mixture_is_saved_and_resumed(pool: WorkerPool, tmp_path: Path) -> None:
    """Its routers compute in fp32, with weights that stay bf16 parameters."""
    run = {"bf16": True, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "output_dir": str(tmp_path)}
    ((whole, loads, _),) = pool.run(1, train, start(), run)
    assert all(load >= 1 for load in loads)
    ((resumed, _, _),) = pool.run(1, train, start(), run, 16, 16, str(tmp_path / "checkpoint-2"))
    assert resumed[-2:] == whole[-2:]
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    assert stock.dtype == torch.bfloat16


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_filled_up_tokens_do_not_count(pool: WorkerPool, sequence_parallel: bool) -> None:
    """Odd lengths over tensor- and expert-parallel ranks: the router losses of one process, in evaluation too."""
    directory = start(**LOSSES)
    run = {"max_steps": 3, "gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    ((expected, _, _),) = pool.run(1, train, directory, run, 16, 13)
    sizes = {"tp_size": 2, "ep_size": 2, "sequence_parallel": sequence_parallel}
    for losses, _, _ in pool.run(2, train, directory, {**run, **sizes}, 16, 13):
        assert losses == pytest.approx(expected, rel=2e-6)


def test_evaluation_does_not_move_the_biases(pool: WorkerPool, tmp_path: Path) -> None:
    tiny_model("deepseek_v3").save_pretrained(tmp_path)
    run = {"max_steps": 3, "moe_bias_update_rate": 0.01, "learning_rate": 0.0}
    ((_, loads, biases),) = pool.run(1, train, str(tmp_path), run)
    evaluated = {**run, "eval_strategy": "steps", "eval_steps": 1}
    ((_, evaluated_loads, evaluated_biases),) = pool.run(1, train, str(tmp_path), evaluated)
    assert biases == evaluated_biases and loads == evaluated_loads
    assert any(value for bias in biases.values() for value in bias)


def test_capacity_with_a_last_round_that_does_not_reach_every_rank(pool: WorkerPool) -> None:
    run = {"num_train_epochs": 1, "max_steps": -1, "moe_capacity_factor": 1.5, "ep_size": 2, "zero_stage": 1}
    first, second = pool.run(2, train, start(), {**run, "per_device_train_batch_size": 2}, 6, 13)
    assert first[0] == second[0] and len(first[0]) == 2


def refused(overrides: dict[str, Any], sizes: dict[str, Any]) -> str:
    from hf_nanotron import AutoModelForCausalLM as ParallelAuto, ParallelConfig

    with pytest.raises(ValueError) as error:
        ParallelAuto.from_config(tiny_config("mixtral", **overrides), ParallelConfig(**sizes))
    torch.distributed.barrier()
    return str(error.value)


def test_jitter_under_tensor_parallelism_is_refused(pool: WorkerPool) -> None:
    for sentence in pool.run(2, refused, {"router_jitter_noise": 0.1}, {"tp_size": 2}):
        assert "router_jitter_noise=0.1" in sentence and "set router_jitter_noise=0" in sentence


def why_not(directory: str, overrides: dict[str, Any]) -> str:
    return message(lambda: train(directory, overrides))


def test_what_one_stage_refuses_all_ranks_say(pool: WorkerPool) -> None:
    """The second stage alone has routers, and these have no biases."""
    run = {"pp_size": 2, "gradient_accumulation_steps": 2, "moe_bias_update_rate": 0.01}
    first, second = pool.run(2, why_not, start(mlp_only_layers=[0, 1]), run)
    assert first == second and "model.layers.2.mlp.gate of ParallelQwen3MoeForCausalLM has no correction bias" in first


def generate(directory: str) -> list[list[int]]:
    """Each data-parallel rank continues a prompt of its own, by chance, until its own end."""
    from hf_nanotron import AutoModelForCausalLM as ParallelAuto, ParallelConfig

    model = ParallelAuto.from_pretrained(directory, ParallelConfig(ep_size=2))
    prompt = torch.arange(3 + model.mesh.dp_rank)[None] + 5
    torch.manual_seed(model.mesh.rank)
    ends = list(range(3, VOCABULARY, 4))
    tokens = model.generate(prompt, do_sample=True, max_new_tokens=12, eos_token_id=ends, pad_token_id=0)
    return tokens.tolist()


def test_generation_with_experts_of_other_ranks_ends(pool: WorkerPool) -> None:
    first, second = pool.run(2, generate, start())
    assert len(first[0]) > 3 and len(second[0]) > 4


def predict_then_evaluate(directory: str) -> list[float]:
    """The same batch without and with labels, in fp32 and after a trainer has made it bf16."""
    from hf_nanotron import (
        AutoModelForCausalLM as ParallelAuto,
        NanotronTrainer,
        NanotronTrainingArguments,
        ParallelConfig,
    )

    model = ParallelAuto.from_pretrained(directory, ParallelConfig(pp_size=2)).eval()
    ids = torch.arange(8)[None] + 3
    model(input_ids=ids)
    losses = [float(model(input_ids=ids, labels=ids).loss)]
    args = NanotronTrainingArguments(**training_arguments(pp_size=2, bf16=True, gradient_accumulation_steps=2))
    NanotronTrainer(model=model, args=args, train_dataset=random_dataset(8))
    return [*losses, float(model.eval()(input_ids=ids, labels=ids).loss)]


def test_stages_tell_their_layout_anew(pool: WorkerPool) -> None:
    """With a loss over routers one more tensor travels; in bf16 they are of another dtype."""
    directory = start(**LOSSES)
    stock = AutoModelForCausalLM.from_pretrained(directory).eval()
    ids = torch.arange(8)[None] + 3
    expected = float(stock(input_ids=ids, labels=ids, output_router_logits=True).loss)
    for exact, rounded in pool.run(2, predict_then_evaluate, directory):
        assert exact == pytest.approx(expected, rel=1e-6) and rounded == pytest.approx(expected, rel=2e-2)


def test_arguments_for_experts_need_experts(pool: WorkerPool, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(tiny_config("llama")).save_pretrained(tmp_path)
    with pytest.raises(JobError, match="moe_capacity_factor=1.0: ParallelLlamaForCausalLM has no experts"):
        pool.run(1, train, str(tmp_path), {"moe_capacity_factor": 1.0})
