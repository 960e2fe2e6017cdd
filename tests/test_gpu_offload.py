"""Offloaded activations on a GPU: the gradients of a run without, less memory, and buffers that are given back."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from test_gpu_recompute import SHAPE, mesh
from transformers import LlamaConfig, LlamaForCausalLM

from hf_nanotron.models.sharding.parallelize import parallelize
from hf_nanotron.ops.host_buffers import HostBuffers
from hf_nanotron.ops.offload import COPYING
from hf_nanotron.prepare.compile import compile_layers
from hf_nanotron.prepare.mlp_chunks import chunk_mlps
from hf_nanotron.prepare.offload import offload_layers
from hf_nanotron.prepare.recompute import CONTEXTS, chosen_layers, recompute_selectively, recompute_wholly
from hf_nanotron.prepare.shard_weights import shard_weights
from hf_nanotron.prepare.training_state import TrainingState
from hf_nanotron.training.step.train_step import TrainStep

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
__all__ = ["mesh"]  # a fixture

TOKENS, LAYERS = 8192, 8


def run(mesh: Any, policy: str, backend: str | None, share: float, rows: int | None) -> tuple[torch.Tensor, int, int]:
    """Gradients of the second step, the bytes that its forward leaves on the GPU, and those on the host."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = parallelize(
        LlamaForCausalLM(LlamaConfig(**SHAPE | {"num_hidden_layers": LAYERS}, attn_implementation="sdpa")), mesh
    )
    model.to(mesh.device)
    weights = shard_weights(model, torch.bfloat16, 25 << 20)
    if rows is not None:
        chunk_mlps(model, rows)
    chosen = chosen_layers(model, None)
    if policy in CONTEXTS:
        recompute_selectively(model, chosen, {}, policy)
    elif not share:
        recompute_wholly(model, chosen, {})
    if backend is not None:
        compile_layers(model, backend, None, chosen)
    transfers = offload_layers(model, chosen, share, policy, {}) if share else None
    step, left, host = TrainStep(TrainingState(model, weights, recomputed=chosen, offload=transfers)), [0], [0]
    ids = torch.randint(0, SHAPE["vocab_size"], (1, TOKENS), device=mesh.device)
    batch = {"input_ids": ids, "labels": ids, "num_items_in_batch": torch.tensor(TOKENS, device=mesh.device)}
    step.run([batch], 0)
    gc.collect()
    before = torch.cuda.memory_allocated()

    def look(*_: Any) -> None:
        left.append(torch.cuda.memory_allocated() - before)
        host.append(0 if transfers is None else transfers.buffers.in_use)

    hook = model.model.norm.register_forward_pre_hook(look)
    step.run([batch], 1)
    hook.remove()
    assert transfers is None or transfers.buffers.in_use == 0
    return torch.cat([segment.gradient.clone() for segment in weights.segments]), left[-1], host[-1]


@pytest.mark.parametrize("backend", [None, "inductor"])
@pytest.mark.parametrize("policy", ["full", "all_but_attention"])
def test_gradients_and_memory(mesh: Any, policy: str, backend: str | None) -> None:
    plain, all_of_it, _ = run(mesh, policy, backend, 0.0, None)
    again, _, _ = run(mesh, policy, backend, 0.0, None)
    noise = float((again - plain).norm() / plain.norm())  # of attention, whose backward adds in any order
    gradients, less, host = run(mesh, policy, backend, 1.0, None)
    boundary = TOKENS * SHAPE["hidden_size"] * 2
    kept = 2 if policy == "all_but_attention" and backend is not None else 1  # eager, attention's output stays
    assert host >= (LAYERS - 1) * kept * boundary, "all layers but the last are on the host"
    # Those of the last `COPYING` layers may still be on their way.
    assert less <= all_of_it - (LAYERS - 1 - COPYING - 1) * boundary
    assert float((gradients - plain).norm() / plain.norm()) <= max(4 * noise, 1e-6)
    chunked, _, _ = run(mesh, policy, backend, 1.0, 1000)
    assert float((chunked - plain).norm() / plain.norm()) < max(4 * noise, 2e-2)


def test_pinned_buffers_copy_without_waiting() -> None:
    device = torch.device("cuda")
    buffers = HostBuffers(device)
    buffer = buffers.take(3_000_001)
    assert buffer.bytes.is_pinned() and buffer.bytes.numel() == 3_000_001
    buffers.give(buffer)
    buffers.release()
    assert buffers.held == 0
