"""`metrics_detail`: the same numbers on every layout as torch finds in the stock model, trained by stock Trainer."""

from __future__ import annotations

import functools
import math
import os
import tempfile
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from pool import WorkerPool
from tiny import pad_batch, random_dataset, tiny_config, training_arguments
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_nanotron import NanotronTrainingArguments

KINDS = ["weights", "gradients", "activations"]
STEPS, EVERY, GLOBAL_BATCH, LENGTH = 4, 2, 8, 16
EXPERTS = {"num_experts_per_tok": 2, "num_experts": 4, "moe_intermediate_size": 24, "norm_topk_prob": True}
TRAINING = {"max_steps": STEPS, "max_grad_norm": 0.5, "weight_decay": 0.1}

Figures = dict[str, float]


@functools.cache
def checkpoint(family: str = "llama", tied: bool = False) -> str:
    directory = tempfile.mkdtemp()
    torch.manual_seed(1)
    own = EXPERTS if family == "qwen3_moe" else {}
    config = tiny_config(family, num_hidden_layers=2, tie_word_embeddings=tied, **own)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def figures(tensors: Sequence[torch.Tensor]) -> Figures:
    """By torch, of all elements of some tensors."""
    flat = torch.cat([tensor.flatten() for tensor in tensors]).double()
    return {
        "norm": float(flat.norm()),
        "rms": float(flat.square().mean().sqrt()),
        "max": float(flat.abs().max()),
        "zeros": float((flat == 0).double().mean()),
    }


class Reference(TrainerCallback):
    """Looks at the stock model of a stock Trainer, at steps 2, 4, ..."""

    def __init__(self, model: Any) -> None:
        self.found: list[dict[str, Figures]] = []
        self.outputs: dict[str, list[torch.Tensor]] = {}
        self.gradients: dict[str, Figures] = {}
        for name, module in model.named_modules():
            module.register_forward_hook(functools.partial(self.keep, name))

    def keep(self, name: str, module: Any, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if isinstance(hidden, torch.Tensor):
            self.outputs.setdefault(name, []).append(hidden.detach())

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.outputs.clear()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % EVERY == 0:
            weights = {f"weights/{name}": figures([p.detach()]) for name, p in model.named_parameters()}
            outputs = {f"activations/{name}": figures(kept) for name, kept in self.outputs.items()}
            self.found.append(weights | self.gradients | outputs)


class ReferenceTrainer(Trainer):
    """Gradients are looked at before they are clipped."""

    reference: Reference

    def _clip_grad_norm(self, model: Any) -> Any:
        named = [(name, p.grad) for name, p in model.named_parameters()]
        self.reference.gradients = {f"gradients/{name}": figures([grad]) for name, grad in named if grad is not None}
        return super()._clip_grad_norm(model)


@functools.cache
def reference(directory: str, length: int = LENGTH) -> list[dict[str, Figures]]:
    model = AutoModelForCausalLM.from_pretrained(directory)
    watching = Reference(model)
    args = TrainingArguments(**training_arguments(**TRAINING, gradient_accumulation_steps=GLOBAL_BATCH))
    data = random_dataset(STEPS * GLOBAL_BATCH, length)
    trainer = ReferenceTrainer(
        model=model, args=args, train_dataset=data, data_collator=pad_batch, callbacks=[watching]
    )
    trainer.reference = watching
    trainer.train()
    return watching.found


class Reporter(TrainerCallback):
    """Stands for a tracker."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, dict[str, float]]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and any(name.startswith(tuple(KINDS)) for name in logs):
            self.lines.append((state.global_step, dict(logs)))


def watched(directory: str, sizes: dict[str, Any], length: int = LENGTH) -> tuple[Any, list[Any], str]:
    """What a callback is told on this rank, what the history says, and the `output_dir`."""
    from hf_nanotron import AutoModelForCausalLM as ParallelAuto, NanotronTrainer

    world = int(os.environ.get("WORLD_SIZE", "1"))
    replicas = world // math.prod(sizes.get(f"{axis}_size", 1) for axis in ("tp", "pp", "cp"))
    watching = {"metrics_detail": KINDS, "metrics_detail_steps": EVERY}
    micro_batches = {"gradient_accumulation_steps": GLOBAL_BATCH // replicas}
    args = NanotronTrainingArguments(**training_arguments(**{**watching, **TRAINING, **micro_batches, **sizes}))
    reporter = Reporter()
    data = random_dataset(STEPS * GLOBAL_BATCH, length)
    trainer = NanotronTrainer(
        model=ParallelAuto.from_pretrained(directory, parallel=args.parallel),
        args=args,
        train_dataset=data,
        data_collator=pad_batch,
        callbacks=[reporter],
    )
    trainer.train()
    trainer.mesh.close()
    return reporter.lines, trainer.state.log_history, str(args.output_dir)


def compare(told: list[tuple[int, dict[str, float]]], wanted: list[dict[str, Figures]], rel: float = 2e-4) -> None:
    assert [step for step, _ in told] == [EVERY, 2 * EVERY]
    for (_, line), known in zip(told, wanted, strict=True):
        names = {name.rpartition("/")[0] for name in line}
        assert {name for name in known if not name.startswith("activations/")} <= names
        outputs = {name.removeprefix("activations/") for name in names if name.startswith("activations/")}
        layer = "model.layers.1"
        assert {"model.embed_tokens", f"{layer}.self_attn", f"{layer}.mlp", layer, "model.norm"} <= outputs
        for name in names:
            for figure, value in known[name].items():
                got = line[f"{name}/{figure}"]
                assert got == pytest.approx(value, rel=rel, abs=1e-7), f"{name}/{figure}"


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "zero3": (2, {"zero_stage": 3}),
    "tp2 pp2": (4, {"tp_size": 2, "pp_size": 2}),
}
MORE: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "tp2 pp2 zero2": (8, {"tp_size": 2, "pp_size": 2, "zero_stage": 2}),
    "tp2": (2, {"tp_size": 2}),
    "pp2": (2, {"pp_size": 2}),
    "zero0": (2, {"zero_stage": 0}),
    "cp2": (2, {"cp_size": 2}),
    "tp2 without sequence_parallel": (2, {"tp_size": 2, "sequence_parallel": False}),
    "tp4, key heads copied": (4, {"tp_size": 4}),
    "zb": (2, {"pp_size": 2, "pp_schedule": "zb", "pp_virtual_stages": 1}),
    "compiled": (1, {"torch_compile": True, "torch_compile_backend": "eager"}),
    "recomputed": (1, {"activation_checkpointing": True}),
    "recomputed, selective, tp2": (
        2,
        {"activation_checkpointing": True, "activation_checkpointing_policy": "selective", "tp_size": 2},
    ),
    "replicas": (4, {"dp_replicate_size": 2, "zero_stage": 1}),
    "cp2 tp2 pp2": (8, {"cp_size": 2, "tp_size": 2, "pp_size": 2}),
}


@pytest.mark.parametrize("name", [*LAYOUTS, *MORE])
def test_layouts(pool: WorkerPool, name: str, request: pytest.FixtureRequest) -> None:
    """Every weight, gradient and output, on every rank."""
    if name in MORE and not request.config.getoption("full_matrix"):
        pytest.skip("--full-matrix")
    world, sizes = (LAYOUTS | MORE)[name]
    for told, history, _ in pool.run(world, watched, checkpoint(), sizes):
        compare(told, reference(checkpoint()))
        assert not [key for line in history for key in line if key.startswith(tuple(KINDS))]


ODD: dict[str, tuple[int, dict[str, Any], tuple[str, bool], int]] = {
    "tp2, filled rows": (2, {"tp_size": 2}, ("llama", False), 15),
    "cp2, filled rows": (2, {"cp_size": 2}, ("llama", False), 15),
    "pp2, tied": (2, {"pp_size": 2}, ("llama", True), LENGTH),
    "ep2": (2, {"ep_size": 2}, ("qwen3_moe", False), LENGTH),
    "ep2 tp2": (4, {"ep_size": 2, "tp_size": 2}, ("qwen3_moe", False), 15),
}


@pytest.mark.parametrize("name", ODD)
def test_filled_rows_tied_weights_and_experts(pool: WorkerPool, name: str, request: pytest.FixtureRequest) -> None:
    """Tokens that fill a row up count nowhere, a tied weight once, and experts as the stacks that they are."""
    if name not in ("cp2, filled rows", "ep2 tp2") and not request.config.getoption("full_matrix"):
        pytest.skip("--full-matrix")
    world, sizes, model, length = ODD[name]
    for told, _, _ in pool.run(world, watched, checkpoint(*model), sizes, length):
        compare(told, reference(checkpoint(*model), length))
        if model[0] == "qwen3_moe":
            assert "gradients/model.layers.1.mlp.experts.down_proj/zeros" in told[0][1]
