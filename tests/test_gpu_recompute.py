"""Recomputation on a GPU, in bf16 with fused attention, eager and compiled: gradients, and the memory of a forward."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SHAPE = {
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 512,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 1024, "head_dim": 64}
TOKENS = 4096


@pytest.fixture(scope="module")
def mesh() -> Any:
    import torch.distributed as dist

    from hf_nanotron.parallel.config import ParallelConfig
    from hf_nanotron.parallel.mesh import ParallelMesh

    torch.cuda.set_device(0)
    if not dist.is_initialized():
        dist.init_process_group("nccl", rank=0, world_size=1, store=dist.HashStore())
    return ParallelMesh(ParallelConfig())


def run(mesh: Any, experts: bool, policy: str | None, backend: str | None, dropout: float) -> tuple[torch.Tensor, int]:
    """Gradients of the second step, and the bytes that its forward leaves."""
    from hf_nanotron.models.sharding.parallelize import parallelize
    from hf_nanotron.prepare.compile import compile_layers
    from hf_nanotron.prepare.recompute import chosen_layers, recompute_selectively, recompute_wholly
    from hf_nanotron.prepare.shard_weights import shard_weights
    from hf_nanotron.prepare.training_state import TrainingState
    from hf_nanotron.training.step.train_step import TrainStep

    torch._dynamo.reset()
    torch.manual_seed(0)
    common = {**SHAPE, "attn_implementation": "sdpa", "attention_dropout": dropout}
    stock = (
        Qwen3MoeForCausalLM(Qwen3MoeConfig(**common, **EXPERTS)) if experts else LlamaForCausalLM(LlamaConfig(**common))
    )
    model = parallelize(stock, mesh)
    model.to(mesh.device)
    weights = shard_weights(model, torch.bfloat16, 25 << 20)
    chosen = chosen_layers(model, None)
    if policy == "selective":
        recompute_selectively(model, chosen, {})
    elif policy == "full":
        recompute_wholly(model, chosen, {})
    if backend is not None:
        compile_layers(model, backend, None)
    step, left = TrainStep(TrainingState(model, weights)), [0]
    ids = torch.randint(0, SHAPE["vocab_size"], (1, TOKENS), device=mesh.device)
    batch = {"input_ids": ids, "labels": ids, "num_items_in_batch": torch.tensor(TOKENS, device=mesh.device)}
    step.run([batch], 0)
    gc.collect()  # an earlier model goes now, and not in between
    before = torch.cuda.memory_allocated()
    hook = model.model.norm.register_forward_pre_hook(lambda *_: left.append(torch.cuda.memory_allocated() - before))
    step.run([batch], 1)
    hook.remove()
    gradients = torch.cat([segment.gradient.clone() for segment in weights.segments])
    return gradients, left[-1]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("backend", [None, "inductor"])
@pytest.mark.parametrize("experts", [False, True])
def test_gradients_and_memory(mesh: Any, experts: bool, backend: str | None, dropout: float) -> None:
    plain, all_of_it = run(mesh, experts, None, backend, dropout)
    again, _ = run(mesh, experts, None, backend, dropout)
    noise = float((again - plain).norm() / plain.norm())  # of kernels that add in any order
    selective, less = run(mesh, experts, "selective", backend, dropout)
    full, least = run(mesh, experts, "full", backend, dropout)
    per_token = [round(size / TOKENS / SHAPE["num_hidden_layers"]) for size in (all_of_it, less, least)]
    print(f"bytes a token and layer: none {per_token[0]}, selective {per_token[1]}, full {per_token[2]}")
    # Compiled, bf16 values that another kernel computes again may be rounded otherwise; and where a last bit changes
    # (attention's backward adds in any order), a token between two experts may go to the other. Other masks are 0.1.
    limit = max(4 * noise, 2e-2 if backend or experts else 1e-3)
    errors = [float((gradients - plain).norm() / plain.norm()) for gradients in (selective, full)]
    print(f"gradients: noise {noise:.1e}, selective {errors[0]:.1e}, full {errors[1]:.1e}, limit {limit:.1e}")
    if backend is None or not dropout:  # compiled code draws other masks for each graph
        assert max(errors) < limit
    assert least < less < all_of_it
