"""Long sequences on few devices: offloaded activations, and MLPs over blocks of tokens."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from pool import JobError, WorkerPool
from tiny import History, pad_batch, random_dataset, tiny_config, training_arguments
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from hf_nanotron import AutoModelForCausalLM, NanotronTrainer, NanotronTrainingArguments, ParallelConfig
from hf_nanotron.monitor.memory import MemoryReport, RankStep, offloaded_bytes
from hf_nanotron.ops.gated_mlp import ACTIVATIONS, gated_mlp
from hf_nanotron.ops.host_buffers import HostBuffer, HostBuffers
from hf_nanotron.ops.offload import LayerSaves, Transfers
from hf_nanotron.prepare import setup
from hf_nanotron.prepare.mlp_chunks import ChunkedMLP

ON: dict[str, Any] = {"activation_checkpointing": True}
SELECTIVE = {**ON, "activation_checkpointing_policy": "selective"}
ATTENTION = {**ON, "activation_checkpointing_policy": "all_but_attention"}
OFFLOAD = {"activation_offload": 1}
COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager"}


def alone(layer: LayerSaves) -> None:
    """No layer follows."""


# ---- Host memory -----------------------------------------------------------------------------------------------


def test_buffers_are_used_again_and_bounded() -> None:
    buffers = HostBuffers(torch.device("cpu"))
    first, second = buffers.take(100), buffers.take(60)
    assert (buffers.held, buffers.in_use) == (160, 160)
    buffers.give(first)
    buffers.give(second)
    assert buffers.take(50) is second and buffers.in_use == 60  # the smallest that fits
    assert buffers.take(70) is first
    buffers.give(first)
    buffers.give(second)
    assert buffers.take(200).size == 200  # in the place of the largest that did not fit
    assert buffers.held == 260 and buffers.in_use == 200
    for size in range(300, 400):  # ever longer batches do not fill the host
        buffers.give(buffers.take(size))
    assert buffers.held <= 200 + 60 + 399
    left = buffers.take(7)
    buffers.release()
    assert buffers.held == buffers.in_use == 200 + left.size
    buffers.give(left)  # an error held it longer than the run was
    assert buffers.held == buffers.in_use == 200
    buffers.give(buffers.take(7))
    assert buffers.held == 207, "the next run keeps its buffers"


def test_memory_that_the_host_does_not_give(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MemoryError, match=r"activation_offload: \d+\.00 GiB of host memory .* beside the 0\.00 GiB"):
        HostBuffers(torch.device("cpu")).take(2**62)

    def refused(self: HostBuffer, size: int, device: torch.device) -> None:
        raise MemoryError("cudaHostRegister returned 2")

    monkeypatch.setattr(HostBuffer, "__init__", refused)
    with pytest.raises(MemoryError, match=r"\(cudaHostRegister returned 2\); offload fewer layers"):
        HostBuffers(torch.device("cpu")).take(8)


def test_saved_tensors_come_back_as_they_were() -> None:
    transfers = Transfers(torch.device("cpu"))
    weight = torch.randn(5, 5, requires_grad=True)
    saves = LayerSaves(transfers, alone, False, lambda: {weight.untyped_storage().data_ptr()})
    x = torch.randn(4, 5).t().requires_grad_()  # its strides are not those of its shape
    with saves.hooks():
        y = (x.exp() * weight.t()[:, :4]).sin()
    held = transfers.buffers.in_use
    assert held == 2 * 20 * 4, "exp's result once, sin's input once, and no weight"
    grads = torch.autograd.grad(y.sum(), (x, weight))
    wanted = torch.autograd.grad((x.exp() * weight.t()[:, :4]).sin().sum(), (x, weight))
    assert all(torch.equal(a, b) for a, b in zip(grads, wanted, strict=True))
    del y
    assert transfers.buffers.in_use == 0 and transfers.buffers.held == held
    with LayerSaves(transfers, alone, False, set).hooks():
        dropped = x.exp()
    assert transfers.buffers.in_use == 80
    del dropped  # a graph that no backward has used
    gc.collect()
    assert transfers.buffers.in_use == 0


def test_what_stays_may_not_be_written_to() -> None:
    x = torch.randn(8, requires_grad=True)
    with LayerSaves(Transfers(torch.device("cpu")), alone, True, set).hooks():
        y = x.exp()
        z = y * 2
    y.detach().add_(1)
    with pytest.raises(RuntimeError, match=r"shape \[8\] .* modified in place.*activation_offload=0"):
        z.sum().backward()


# ---- Through the trainer ---------------------------------------------------------------------------------------

Run = tuple[str, dict[str, Any], dict[str, Any]]  # a name, what both runs have, and what only the second has

ALONE: list[Run] = [
    ("full", ON, OFFLOAD),
    ("full, compiled", {**ON, **COMPILED}, OFFLOAD),
    ("half of it", ON, {"activation_offload": 0.5}),
    ("two layers", {**ON, "activation_checkpointing_layers": [1, 2]}, OFFLOAD),
    ("selective", {**SELECTIVE, **COMPILED}, OFFLOAD),
    ("attention", {**ATTENTION, **COMPILED}, OFFLOAD),
    ("bf16", {**ATTENTION, **COMPILED, "bf16": True, "optim_state_dtype": "bfloat16"}, OFFLOAD),
]
PIPELINE = {**ON, "pp_size": 2, "gradient_accumulation_steps": 4, "pp_layers_per_stage": [2, 2]}
TOGETHER: list[Run] = [
    ("pp 2", PIPELINE, OFFLOAD),
    ("pp 2, compiled", {**PIPELINE, **ATTENTION, **COMPILED}, OFFLOAD),
    (
        "interleaved",
        {**PIPELINE, "pp_schedule": "interleaved_1f1b", "pp_virtual_stages": 2, "pp_layers_per_stage": [1] * 4},
        OFFLOAD,
    ),
    ("zero bubble", {**PIPELINE, "pp_schedule": "zb"}, OFFLOAD),
    ("tp 2", {**ON, "tp_size": 2}, OFFLOAD),
    ("tp 2, compiled", {**ATTENTION, **COMPILED, "tp_size": 2}, OFFLOAD),
    ("tp 2, whole sequences", {**ON, "tp_size": 2, "sequence_parallel": False}, OFFLOAD),
    ("cp 2", {**ON, "cp_size": 2}, OFFLOAD),
    ("cp 2, compiled", {**ATTENTION, **COMPILED, "cp_size": 2}, OFFLOAD),
    ("ZeRO-2", {**ON, "zero_stage": 2}, OFFLOAD),
    ("ZeRO-3", {**ON, "zero_stage": 3}, OFFLOAD),
    ("ZeRO-3, compiled", {**ATTENTION, **COMPILED, "zero_stage": 3}, OFFLOAD),
]
DEFAULT = ("full", "half of it", "attention", "pp 2", "tp 2", "ZeRO-3")


class HostMemory(TrainerCallback):
    """Bytes of the host's buffers after each step, and of those in use."""

    trainer: NanotronTrainer

    def __init__(self) -> None:
        self.held: list[int] = []
        self.in_use: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (offload := self.trainer.training_state.offload) is not None:
            self.held.append(offload.buffers.held)
            self.in_use.append(offload.buffers.in_use)


Seen = tuple[History, tuple[list[int], list[int]], MemoryReport, int]


def train(checkpoint: str, **values: Any) -> Seen:
    """Loss and norm of two steps; the host's memory while it trains, as it was reported, and afterwards."""
    args = NanotronTrainingArguments(**training_arguments(max_steps=2, **values))
    history, memory = History(), HostMemory()
    trainer = NanotronTrainer(
        model=AutoModelForCausalLM.from_pretrained(checkpoint, parallel=args.parallel),
        args=args,
        train_dataset=random_dataset(20),
        data_collator=pad_batch,
        callbacks=[history, memory],
    )
    memory.trainer = trainer
    trainer.train()
    left = 0 if trainer.training_state.offload is None else trainer.training_state.offload.buffers.held
    trainer.mesh.close()
    return history, (memory.held, memory.in_use), trainer.memory_report, left


def train_pairs(checkpoint: str, runs: list[Run]) -> list[Any]:
    results = []
    for _, both, more in runs:
        torch._dynamo.reset()  # the second run has the compiled code of the first, where it can
        results.append((train(checkpoint, **both), train(checkpoint, **both, **more)))
    return results


@pytest.mark.parametrize(("ranks", "runs"), [(1, ALONE), (2, TOGETHER)])
def test_offloading_changes_no_bit(
    pool: WorkerPool, tmp_path: Path, pytestconfig: pytest.Config, ranks: int, runs: list[Run]
) -> None:
    AutoModelForCausalLM.from_config(tiny_config(), parallel=ParallelConfig()).save_pretrained(tmp_path)
    whole = pytestconfig.getoption("full_matrix")
    runs = [run for run in runs if whole or run[0] in DEFAULT]
    for results in pool.run(ranks, train_pairs, str(tmp_path), runs):
        for (name, both, _), ((plain, *_), (history, (held, in_use), report, left)) in zip(runs, results, strict=True):
            assert (history.losses, history.norms) == (plain.losses, plain.norms), name
            assert in_use == [0, 0] and left == 0, f"{name}: buffers were not given back"
            assert held[0] == held[1] > 0, f"{name}: nothing was offloaded, or more in each step"
            if not {"tp_size", "bf16", "pp_virtual_stages"} & set(both):
                assert report.host == pytest.approx(held[0], rel=0.15), name


CHUNKS = {"mlp_chunk_tokens": 5}  # of 16 tokens: the last block is smaller
ALL_OF_IT = {**ATTENTION, **OFFLOAD, **CHUNKS}
CHUNKED: list[tuple[int, Run]] = [
    (1, ("one", {}, CHUNKS)),
    (1, ("compiled, all of it", COMPILED, {**ALL_OF_IT})),
    (1, ("bf16", {"bf16": True}, CHUNKS)),
    (2, ("tp 2", {"tp_size": 2}, CHUNKS)),
    (2, ("tp 2, compiled, all of it", {"tp_size": 2, **COMPILED}, ALL_OF_IT)),
    (2, ("pp 2", {"pp_size": 2, "gradient_accumulation_steps": 2}, ALL_OF_IT)),
    (2, ("cp 2", {"cp_size": 2}, ALL_OF_IT)),
    (2, ("ZeRO-2", {"zero_stage": 2}, CHUNKS)),
    (2, ("ZeRO-3", {"zero_stage": 3}, ALL_OF_IT)),
    (2, ("ZeRO-3, compiled", {"zero_stage": 3, **COMPILED}, ALL_OF_IT)),
]
CHUNKED_DEFAULT = ("one", "compiled, all of it", "tp 2", "ZeRO-3")


@pytest.mark.parametrize("ranks", [1, 2])
def test_mlps_over_blocks_of_tokens(pool: WorkerPool, tmp_path: Path, pytestconfig: pytest.Config, ranks: int) -> None:
    AutoModelForCausalLM.from_config(tiny_config(), parallel=ParallelConfig()).save_pretrained(tmp_path)
    whole = pytestconfig.getoption("full_matrix")
    runs = [run for count, run in CHUNKED if count == ranks and (whole or run[0] in CHUNKED_DEFAULT)]
    for results in pool.run(ranks, train_pairs, str(tmp_path), runs):
        for (name, both, _), ((plain, *_), (history, *_)) in zip(runs, results, strict=True):
            exact = 2e-3 if both.get("bf16") else 1e-6
            assert history.losses == pytest.approx(plain.losses, rel=exact), name
            assert history.norms == pytest.approx(plain.norms, rel=10 * exact), name


class Largest(TorchDispatchMode):
    """The most elements of a tensor that was made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_gated_mlp_is_that_of_autograd(activation: str) -> None:
    hidden, inner, rows, tokens = 8, 24, 4, 30
    generator = torch.Generator().manual_seed(0)
    of = ACTIVATIONS[activation].forward

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    x, gate, up, down = leaf(2, tokens // 2, hidden), leaf(inner, hidden), leaf(inner, hidden), leaf(hidden, inner)
    grad = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    wanted = (of(x @ gate.T) * (x @ up.T)) @ down.T
    largest = Largest()
    with largest:
        out = gated_mlp(x, (gate, up, down), (None, None, None), rows, activation)
        found = torch.autograd.grad(out, (x, gate, up, down), grad)
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
    for got, want in zip(found, torch.autograd.grad(wanted, (x, gate, up, down), grad), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert largest.elements == tokens * hidden < tokens * inner


def test_a_sum_over_blocks_is_not_rounded_to_bf16() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4096, 16, generator=generator).bfloat16().requires_grad_()
    weights = [
        torch.randn(shape, generator=generator).bfloat16().requires_grad_() for shape in ((32, 16), (32, 16), (16, 32))
    ]
    exact = [x.detach().double().requires_grad_(), *(w.detach().double().requires_grad_() for w in weights)]
    gated_mlp(x, tuple(weights), (None, None, None), 8, "silu").sum().backward()  # type: ignore[arg-type]
    torch.autograd.backward(gated_mlp(exact[0], tuple(exact[1:]), (None, None, None), 4096, "silu").sum())  # type: ignore[arg-type]
    for weight, wanted in zip(weights, exact[1:], strict=True):
        assert weight.grad is not None and wanted.grad is not None
        error = (weight.grad.double() - wanted.grad).norm() / wanted.grad.norm()
        assert error < 4e-3  # 512 sums in bf16 would be off by 3e-2


def test_copies_and_later_trainers_are_plain(pool: WorkerPool) -> None:
    for before, after, twin, evaluation in pool.run(1, train_and_copy):
        assert before == twin == after and evaluation[0] == evaluation[1]


def train_and_copy() -> Any:
    """Forwards and classes of the layers: of a fresh model, after a later trainer, of a copy; and two losses."""

    def marks(model: Any) -> list[Any]:
        return [
            (sorted(vars(m).keys() & {"forward", "chunk_tokens", "activation"}), type(m).__name__)
            for m in model.modules()
        ]

    def trainer(**values: Any) -> NanotronTrainer:
        args = NanotronTrainingArguments(**training_arguments(max_steps=1, per_device_eval_batch_size=2, **values))
        data = random_dataset(4)
        return NanotronTrainer(model=model, args=args, train_dataset=data, eval_dataset=data, data_collator=pad_batch)

    model = AutoModelForCausalLM.from_config(tiny_config(), parallel=ParallelConfig())
    trainer().train()
    before = marks(model)
    first = trainer(**ALL_OF_IT)
    assert marks(model) != before
    first.train()
    losses = [first.evaluate()["eval_loss"]]
    twin = marks(copy.deepcopy(model))
    last = trainer()
    losses.append(last.evaluate()["eval_loss"])
    after = marks(model)
    model.mesh.close()
    return before, after, twin, losses


# ---- Refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"activation_offload": 1}, "activation_offload=1.* has no effect without activation_checkpointing=True"),
        ({**ON, "activation_offload": 1.5}, "must be a fraction of the layers that recompute"),
        ({**ON, "activation_offload": "all"}, "activation_offload='all' must be a number"),
        (
            {**ON, **OFFLOAD, "activation_checkpointing_kwargs": {"debug": True}},
            "activation_offload=1.* with debug=True",
        ),
        ({**ON, "activation_checkpointing_kwargs": {"offload": True}}, "Use activation_offload=1"),
        (
            {**ATTENTION, "activation_checkpointing_kwargs": {"debug": True}},
            "'all_but_attention' sets its own context_fn",
        ),
        ({"mlp_chunk_tokens": 0}, "mlp_chunk_tokens=0 must be at least 1"),
        (
            {"mlp_chunk_tokens": 8, "fp8": "tensorwise", "bf16": True},
            "mlp_chunk_tokens=8 with fp8='tensorwise'.*fp8=None",
        ),
        ({"mlp_chunk_tokens": 8, "tp_overlap": True}, "with tp_overlap=True: .* use tp_overlap=False"),
        ({"mlp_chunk_tokens": 8, "pp_schedule": "zb"}, "with pp_schedule='zb': .* use pp_schedule='1f1b'"),
    ],
)
def test_refusals(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NanotronTrainingArguments(**training_arguments(**values))


def test_a_hook_that_would_not_be_called() -> None:
    args = NanotronTrainingArguments(**training_arguments(max_steps=1, **CHUNKS))
    model = AutoModelForCausalLM.from_config(tiny_config(), parallel=args.parallel)
    trainer = NanotronTrainer(model=model, args=args, train_dataset=random_dataset(4), data_collator=pad_batch)
    seen: list[str] = []
    mlp = model.get_submodule("model.layers.1.mlp")
    mlp.register_forward_hook(lambda *_: seen.append("mlp"))
    inside = mlp.up_proj.register_forward_hook(lambda *_: seen.append("up_proj"))  # type: ignore[union-attr, operator]
    with pytest.raises(ValueError, match=r"mlp_chunk_tokens=5: model.layers.1.mlp has a hook on up_proj .*not be call"):
        trainer.train()
    inside.remove()
    trainer.train()
    assert seen == ["mlp"]
    model.mesh.close()


def test_models_whose_mlps_cannot_be_divided(pool: WorkerPool) -> None:
    with pytest.raises(JobError, match=r"mlp_chunk_tokens=8: no MLP of .*GPTNeoX.* forward of LlamaMLP") as failed:
        pool.run(2, train_other, "gpt_neox")
    assert failed.value.kinds == {0: "ValueError", 1: "ValueError"}


def test_a_stage_without_such_mlps(pool: WorkerPool) -> None:
    """Of two layers of experts the first is dense: only its stage has something to divide."""
    sizes = {"pp_size": 2, "gradient_accumulation_steps": 2}
    assert pool.run(2, train_other, "qwen3_moe", {"mlp_only_layers": [0], "num_hidden_layers": 2}, sizes) == [1, 0]


def train_other(family: str, fields: dict[str, Any] | None = None, sizes: dict[str, Any] | None = None) -> int:
    """How many MLPs are computed over blocks on this rank."""
    from family_runs import tiny_model

    from hf_nanotron.models.sharding.parallelize import parallelize
    from hf_nanotron.parallel.mesh import ParallelMesh

    args = NanotronTrainingArguments(**training_arguments(mlp_chunk_tokens=8, **(sizes or {})))
    model = parallelize(tiny_model(family, **(fields or {})), ParallelMesh(args.parallel))
    NanotronTrainer(model=model, args=args, train_dataset=random_dataset(4), data_collator=pad_batch)
    chunked = sum(isinstance(module, ChunkedMLP) for module in model.modules())
    model.mesh.close()
    return chunked


def test_a_policy_that_finds_no_attention_to_keep() -> None:
    model = AutoModelForCausalLM.from_config(tiny_config(), parallel=ParallelConfig(), attn_implementation="eager")
    data = {"train_dataset": random_dataset(4), "data_collator": pad_batch}
    with mock.patch.object(setup.logger, "warning") as warning:
        for values in (ON, SELECTIVE, ATTENTION):
            assert not warning.called
            NanotronTrainer(model=model, args=NanotronTrainingArguments(**training_arguments(**values)), **data)
    assert "recompute as with 'full'" in warning.call_args.args[0]
    model.mesh.close()


def test_the_report_of_host_memory() -> None:
    config, one = tiny_config(), ParallelConfig()
    sizes = [offloaded_bytes(RankStep(config, 64, one, 0, 4, 2, 1.0, "full", share)) for share in (0.0, 0.5, 1.0)]
    layer = 64 * config.hidden_size * 2
    assert sizes == [0, 2 * layer, 3 * layer]  # of four layers, the last stays
    two = ParallelConfig(pp_size=2)
    assert [offloaded_bytes(RankStep(config, 64, two, rank, 4, 2, 1.0, "full", 1.0)) for rank in (0, 1)] == [
        4 * layer,
        layer,
    ]
    assert ", and 2.00 GiB of host memory" in str(MemoryReport(1, 2, 3, 4, 5, host=2**31))
    assert MemoryReport(1, 2, 3, 4, 5, host=2**31).total == 15
