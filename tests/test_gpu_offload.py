"""Activations and the optimizer's state in host memory, on a GPU: the numbers of a run without, and less memory."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from segments_alone import SegmentsAlone
from test_gpu_recompute import SHAPE, mesh
from transformers import LlamaConfig, LlamaForCausalLM, default_data_collator

from hf_nanotron import AutoModelForCausalLM, NanotronTrainer, NanotronTrainingArguments
from hf_nanotron.checkpoint.state.finite_weights import _largest
from hf_nanotron.models.sharding.parallelize import parallelize
from hf_nanotron.ops.host_buffers import HostBuffers
from hf_nanotron.ops.offload import COPYING, Transfers
from hf_nanotron.optim.adamw import AdamW
from hf_nanotron.optim.lion import Lion
from hf_nanotron.optim.offload import ALIGNMENT, StateOnHost
from hf_nanotron.optim.optimizer_link import OptimizerLink
from hf_nanotron.parallel.shard_spec import ShardSpec
from hf_nanotron.parallel.zero.segment import Segment
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


def test_a_run_gives_its_pinned_buffers_back(mesh: Any) -> None:
    """Also what is given back after the end, as by a step that an error has broken off."""
    transfers = Transfers(mesh.device)
    kept = [transfers.send(torch.randn(2**20, device="cuda")) for _ in range(3)]
    transfers.settle()
    transfers.buffers.give(kept.pop())
    transfers.release()
    assert transfers.buffers.held == transfers.buffers.in_use == 2 * 2**22
    while kept:
        transfers.buffers.give(kept.pop())
    assert transfers.buffers.held == 0


# ---- The optimizer's state --------------------------------------------------------------------------------------


SIZES = (5_000_001, 300, 9_000_000, 4096, 2_000_000, 7)


def make(kind: str) -> tuple[list[Segment], torch.optim.Optimizer]:
    generator = torch.Generator("cuda").manual_seed(0)
    segments = []
    for index, size in enumerate(SIZES):
        master = torch.nn.Parameter(torch.randn(size, device="cuda", generator=generator))
        gradient, weight = torch.empty_like(master), master.detach().bfloat16()
        segments.append(Segment(f"w{index}", ShardSpec(f"w{index}", (size,)), 0, size, master, gradient, weight))
    masters = [segment.master for segment in segments]
    if kind == "fused":
        return segments, torch.optim.AdamW(masters, lr=0.1, fused=True)
    if kind == "Lion":
        return segments, Lion(masters, lr=0.1)
    rounded = {segment.master: segment.weight for segment in segments if segment.weight is not None}
    return segments, AdamW(masters, lr=0.1, state_dtype=getattr(torch, kind), rounded=rounded)


def steps(kind: str, fraction: float) -> tuple[list[torch.Tensor], int, int]:
    """All numbers after four steps, one of them skipped by the device; bytes at rest, and the most within a step."""
    gc.collect()
    before = torch.cuda.memory_allocated()
    segments, optimizer = make(kind)
    device = torch.device("cuda", torch.cuda.current_device())
    host = StateOnHost(segments, device, fraction, 2**22) if fraction else None
    link = OptimizerLink(optimizer, SegmentsAlone(segments), host)  # type: ignore[arg-type]
    generator = torch.Generator("cuda").manual_seed(1)
    for step in range(4):
        for segment in segments:
            segment.gradient.normal_(generator=generator)
        norm = torch.tensor(float("inf") if step == 2 else 3.0, device="cuda")
        if link.skips_on_device:
            link.clip(norm, 1.0)
            link.skip_unless_finite(norm)
        at_rest = torch.cuda.memory_allocated() - before
        torch.cuda.reset_peak_memory_stats()
        optimizer.step()
        if step == 0:  # a state that is loaded is beside the masters, its step too
            optimizer.load_state_dict(optimizer.state_dict())
    most = torch.cuda.max_memory_allocated() - before
    numbers = [x for s in segments for x in (s.master, s.weight, *optimizer.state[s.master].values()) if x is not None]
    if fraction == 1.0:
        tensors = [x for s in segments for x in (s.master.data, *optimizer.state[s.master].values()) if x.dim()]
        assert all(x.device.type == "cpu" and x.is_pinned() for x in tensors)
        largest = _largest([x.float() for x in tensors[:2]] + [segments[0].gradient], device)
        assert all(x.is_cuda for x in largest) and float(largest[0]) == float(segments[0].master.abs().max())
    return [x.detach().cpu() for x in numbers], at_rest, most


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "fused", "Lion"])
def test_the_optimizers_state_on_the_host(kind: str) -> None:
    plain, everything, _ = steps(kind, 0.0)
    for fraction in (0.5, 1.0):
        numbers, at_rest, most = steps(kind, fraction)
        assert all(torch.equal(one, other) for one, other in zip(numbers, plain, strict=True))
        assert at_rest < everything
    state = sum(SIZES) * {"float32": 12, "bfloat16": 8, "fused": 12, "Lion": 8}[kind]
    assert at_rest <= everything - 0.99 * state
    largest = (SIZES[0] + 2 * ALIGNMENT + SIZES[2] + SIZES[3]) * state // sum(SIZES)
    assert most <= at_rest + 1.05 * largest + 2**22, "two parts are on the device at the most"


def test_the_optimizers_state_of_a_run(mesh: Any, tmp_path: Any) -> None:
    """Losses and norms of a trainer on the GPU, resumed on the way."""
    wanted = train(tmp_path / "plain", 0.0, None)
    whole = train(tmp_path / "moved", 1.0, None)
    resumed = train(tmp_path / "again", 1.0, str(tmp_path / "moved" / "checkpoint-2"))
    assert whole == pytest.approx(wanted, rel=1e-4)  # attention's backward adds in any order
    assert resumed == pytest.approx(wanted[2:], rel=1e-4)


def train(output: Any, fraction: float, resume: str | None) -> list[float]:
    torch.manual_seed(0)
    args = NanotronTrainingArguments(
        output_dir=str(output), max_steps=4, save_steps=2, logging_steps=1, bf16=True, torch_compile=False,
        optim_state_dtype="bfloat16", optim_offload=fraction, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    config = LlamaConfig(**SHAPE | {"num_hidden_layers": 2})  # type: ignore[arg-type]
    rows = [{"input_ids": torch.arange(256) * (3 + i) % 500, "labels": torch.arange(256) % 500} for i in range(64)]
    model = AutoModelForCausalLM.from_config(config, parallel=args.parallel)
    trainer = NanotronTrainer(model=model, args=args, train_dataset=rows, data_collator=default_data_collator)
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-4 if resume is None else -2 :]
