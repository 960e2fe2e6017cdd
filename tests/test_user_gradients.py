"""Gradients that a user touches: hooks and callbacks give stock Trainer's figures on every topology, or are refused."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from pool import WorkerPool
from test_bad_input import agree, message_of
from test_gradients import stock_model
from test_parity import checkpoint, relative
from tiny import History, pad_batch, random_dataset, tiny_config, training_arguments
from transformers import (
    AutoModelForCausalLM as StockAuto,
    Trainer as StockTrainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_nanotron import AutoModelForCausalLM, NanotronTrainer, NanotronTrainingArguments
from hf_nanotron.optim.gradients import GradientPart

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DOWN, KEYS = "model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.k_proj.weight"
HOOKED = (EMBEDDING, HEAD, DOWN, KEYS, "model.norm.weight")
ROWS = random_dataset(48, seed=3)
BATCH, STEPS = 4, 4


def mask(shape: tuple[int, ...]) -> torch.Tensor:
    """Zero for a third of the elements, in whole rows and in single columns."""
    values = torch.ones(shape)
    values[: shape[0] // 3] = 0
    values[..., 1::5] = 0
    return values


def arguments(**values: Any) -> dict[str, Any]:
    return training_arguments(**{"max_steps": STEPS, "weight_decay": 0.0, "max_grad_norm": 0.5, **values})


class Scale(TrainerCallback):
    """Changes gradients right before the update: stock's own, or ours."""

    def __init__(self) -> None:
        self.trainer: NanotronTrainer | None = None
        self.names: set[str] = set()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.trainer is None:
            with torch.no_grad():
                model.get_parameter(DOWN).grad.mul_(mask(tuple(model.get_parameter(DOWN).shape)) + 1)
                model.get_parameter(KEYS).grad.zero_()
            return
        for name, part, gradient in self.trainer.gradients():
            self.names.add(name)
            if name == DOWN:
                gradient.mul_(part.of(mask(part.shape)) + 1)
            if name == KEYS:
                gradient.zero_()


@functools.cache
def stock_run(directory: str, callback: bool, **values: Any) -> tuple[History, dict[str, torch.Tensor]]:
    model, history = StockAuto.from_pretrained(directory), History()
    for name in HOOKED if not callback else ():
        weight = dict(model.named_parameters()).get(name)
        if weight is not None:
            weight.register_hook(lambda gradient: gradient * mask(tuple(gradient.shape)).to(gradient))
    StockTrainer(
        model=model,
        args=TrainingArguments(**arguments(gradient_accumulation_steps=BATCH, **values)),
        train_dataset=ROWS,
        data_collator=pad_batch,
        callbacks=[history, *([Scale()] if callback else [])],
    ).train()
    return history, {name: p.detach().clone() for name, p in model.named_parameters()}


def in_place(gradient: torch.Tensor, part: GradientPart) -> None:
    gradient.mul_(part.of(mask(part.shape)))


def parallel_run(directory: str, callback: bool, saved: str, resume: str | None, values: dict[str, Any]) -> Any:
    args = NanotronTrainingArguments(**arguments(**values))
    model, history, scale = AutoModelForCausalLM.from_pretrained(directory, args.parallel), History(), Scale()
    trainer = NanotronTrainer(model=model, args=args, train_dataset=ROWS, data_collator=pad_batch, callbacks=[history])
    if callback:
        scale.trainer = trainer
        trainer.add_callback(scale)
    else:
        for pattern in ("model.embed_tokens.weight", "lm_head.*", "*.1.mlp.down_proj.weight", KEYS):
            trainer.add_gradient_hook(pattern, lambda gradient, part: gradient * part.of(mask(part.shape)))
        trainer.add_gradient_hook("model.norm.weight", in_place)
        trainer.add_gradient_hook("*", lambda gradient, part: gradient.zero_()).remove()
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(saved)
    model.mesh.close()
    return history, scale.names


TOPOLOGIES: list[dict[str, Any]] = [
    {},
    {"tp_size": 2},
    {"zero_stage": 2},
    {"zero_stage": 3},
    {"pp_size": 2},
    {"tp_size": 2, "pp_size": 2, "tie": True},
    {"tp_size": 4},
    {"tp_size": 2, "zero_stage": 1},
]


def label(sizes: dict[str, Any]) -> str:
    return " ".join(f"{name} {value}" for name, value in sizes.items()) or "one process"


def world_of(sizes: dict[str, Any]) -> tuple[int, int]:
    model = sizes.get("tp_size", 1) * sizes.get("pp_size", 1)
    dp = 2 if "zero_stage" in sizes else 1
    return model * dp, dp


# The parts of these ranks are those of "tp_size 2 zero_stage 1", of "zero_stage 3" and of "tp_size 2 pp_size 2".
REPEATED = ({"tp_size": 2}, {"zero_stage": 2}, {"pp_size": 2})


@pytest.mark.parametrize(
    "sizes",
    [pytest.param(sizes, marks=[pytest.mark.full_matrix] * (sizes in REPEATED)) for sizes in TOPOLOGIES],
    ids=label,
)
def test_hooks_freeze_rows_as_in_stock(pool: WorkerPool, tmp_path: Path, sizes: dict[str, Any]) -> None:
    """Masked gradients: the figures and weights of stock's `register_hook`; masked elements keep every bit."""
    sizes = dict(sizes)
    directory = checkpoint("llama", tie_word_embeddings=sizes.pop("tie", False))
    world, dp = world_of(sizes)
    values = {**sizes, "gradient_accumulation_steps": BATCH // dp}
    got, _ = pool.run(world, parallel_run, directory, False, str(tmp_path), None, values)[0]
    expected, weights = stock_run(directory, False)
    compare(got, expected, tmp_path, weights)
    before = dict(StockAuto.from_pretrained(directory).named_parameters())
    for name, weight in StockAuto.from_pretrained(tmp_path).named_parameters():
        if name in HOOKED:
            frozen = mask(tuple(weight.shape)) == 0
            assert torch.equal(weight[frozen], before[name][frozen]), name
            assert not torch.equal(weight[~frozen], before[name][~frozen]), name


@pytest.mark.parametrize("sizes", [TOPOLOGIES[i] for i in (0, 3, 5)], ids=label)
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_callbacks_change_gradients_as_in_stock(
    pool: WorkerPool, tmp_path: Path, sizes: dict[str, Any], optim: str, pytestconfig: pytest.Config
) -> None:
    """`on_pre_optimizer_step` comes after clipping and before the update, in stock Trainer and here."""
    if sizes and optim == "adamw_torch" and not pytestconfig.getoption("full_matrix"):
        pytest.skip("runs with --full-matrix")
    sizes = dict(sizes)
    directory = checkpoint("llama", tie_word_embeddings=sizes.pop("tie", False))
    world, dp = world_of(sizes)
    values = {**sizes, "gradient_accumulation_steps": BATCH // dp, "optim": optim}
    ranks = pool.run(world, parallel_run, directory, True, str(tmp_path), None, values)
    expected, weights = stock_run(directory, True, optim=optim)
    compare(ranks[0][0], expected, tmp_path, weights)
    assert set().union(*(names for _, names in ranks)) == set(weights)


def compare(got: History, expected: History, saved: Path, weights: dict[str, torch.Tensor]) -> None:
    assert relative(got.losses[:1], expected.losses[:1]) <= 1e-6
    assert relative(got.losses, expected.losses) <= 2e-5
    assert relative(got.norms, expected.norms) <= 1e-4
    for name, weight in StockAuto.from_pretrained(saved).named_parameters():
        torch.testing.assert_close(
            weight.detach(), weights[name], rtol=1e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_hooks_after_a_resume_on_another_topology(pool: WorkerPool, tmp_path: Path) -> None:
    directory = checkpoint("llama")
    saving = {
        "output_dir": str(tmp_path / "run"),
        "save_strategy": "steps",
        "save_steps": 2,
        "gradient_accumulation_steps": BATCH,
    }
    pool.run(2, parallel_run, directory, False, str(tmp_path / "first"), None, {"tp_size": 2, **saving})
    resume = str(tmp_path / "run" / "checkpoint-2")
    values = {"pp_size": 2, "zero_stage": 1, "gradient_accumulation_steps": BATCH // 2}
    got, _ = pool.run(4, parallel_run, directory, False, str(tmp_path / "second"), resume, values)[0]
    expected, weights = stock_run(directory, False)
    assert relative(got.losses, expected.losses[2:]) <= 2e-5
    for name, weight in StockAuto.from_pretrained(tmp_path / "second").named_parameters():
        torch.testing.assert_close(weight.detach(), weights[name], rtol=1e-3, atol=2e-4)


# ---- refused ----


class Hooks(TrainerCallback):
    """Puts a hook on a weight at an event."""

    def __init__(self, event: str) -> None:
        setattr(self, event, self._put)

    def _put(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for name, weight in model.named_parameters():
            if name.endswith("layers.0.mlp.up_proj.weight"):
                weight.register_hook(lambda gradient: gradient * 0)


def trainer_of(model: Any, sizes: dict[str, Any], *callbacks: Any) -> NanotronTrainer:
    args = NanotronTrainingArguments(**arguments(max_steps=2, **sizes))
    return NanotronTrainer(model=model, args=args, train_dataset=ROWS, data_collator=pad_batch, callbacks=[*callbacks])


def refusals(sizes: dict[str, Any], names: list[str]) -> dict[str, str | None]:
    args = NanotronTrainingArguments(**arguments(**sizes))

    def cut() -> Any:
        return AutoModelForCausalLM.from_config(tiny_config(num_hidden_layers=2), args.parallel)

    def stock() -> None:
        model = stock_model("llama", num_hidden_layers=2)
        model.model.layers[0].mlp.up_proj.weight.register_hook(lambda gradient: None)
        trainer_of(model, sizes)

    def accumulated() -> None:
        model = cut()
        for name, weight in model.named_parameters():
            if "layers.0.mlp.up_proj" in name:
                weight.register_post_accumulate_grad_hook(lambda weight: None)
        trainer_of(model, sizes)

    def between() -> None:
        trainer = trainer_of(cut(), sizes)
        Hooks("on_train_begin").on_train_begin(None, None, None, model=trainer.model)  # type: ignore[arg-type]
        trainer.train()

    def at(event: str) -> None:
        trainer_of(cut(), sizes, Hooks(event)).train()

    def head() -> None:
        model = cut()
        model.get_output_embeddings().register_full_backward_hook(lambda *_: None)
        trainer_of(model, sizes)

    def layer() -> None:
        model = cut()
        for layer in model.model.layers:
            layer.register_full_backward_hook(lambda *_: None)
        trainer_of(model, sizes)

    def wrong_name() -> None:
        trainer_of(cut(), sizes).add_gradient_hook("model.nothing.*", lambda gradient, part: None)

    def no_gradients() -> None:
        trainer_of(cut(), sizes).gradients()

    def wrong_shape() -> None:
        trainer = trainer_of(cut(), sizes)
        trainer.add_gradient_hook("*", lambda gradient, part: gradient[:1])
        trainer.train()

    def frozen() -> None:
        model = cut()
        for name, weight in model.named_parameters():
            weight.requires_grad_("layers.0.mlp" not in name)
        trainer_of(model, sizes).add_gradient_hook("*.layers.0.mlp.*", lambda gradient, part: None)

    cases = {
        "stock": stock, "accumulated": accumulated, "between": between,
        "begin": lambda: at("on_train_begin"), "step": lambda: at("on_step_begin"),
        "head": head, "layer": layer, "wrong name": wrong_name, "no gradients": no_gradients,
        "wrong shape": wrong_shape, "frozen": frozen,
    }  # fmt: skip
    return {name: message_of(case) for name, case in cases.items() if name in names}


HOOK = ["model.layers.0.mlp.up_proj.weight has a gradient hook", "add_gradient_hook"]
MESSAGES: dict[str, list[str]] = {
    "stock": HOOK, "accumulated": HOOK, "between": HOOK, "begin": HOOK, "step": HOOK,
    "head": ["lm_head", "tp_size=2", "backward hook", "Remove"],
    "layer": ["model.layers.0", "tp_size=2", "backward hook"],
    "wrong name": ["'model.nothing.*'", "matches no weight", "model.embed_tokens.weight"],
    "no gradients": ["no gradients now", "on_pre_optimizer_step"],
    "wrong shape": ["returned shape (1,)", "part.of(whole)"],
    "frozen": ["is frozen", "layers.0.mlp"],
}  # fmt: skip
ANYWHERE = [name for name in MESSAGES if name not in ("head", "layer")]
ALIKE = [name for name in ANYWHERE if name != "wrong shape"]  # where each rank has other parts
BY_PARTS = ["accumulated", "between", "step", "wrong shape", "frozen"]  # what looks at a rank's own parts
BY_STAGES = ["stock", "between", "begin", "wrong name", "frozen"]  # what a rank may not have, or not alone


@pytest.mark.parametrize(
    ("sizes", "names"),
    [
        ({}, ANYWHERE),
        ({"tp_size": 2}, list(MESSAGES)),
        pytest.param({"zero_stage": 1}, ALIKE, marks=pytest.mark.full_matrix),
        ({"zero_stage": 3}, BY_PARTS),
        ({"pp_size": 2, "gradient_accumulation_steps": 2}, BY_STAGES),
    ],
    ids=["alone", "tp2", "dp2", "zero3", "pp2"],
)
def test_hooks_that_would_be_lost_are_refused(pool: WorkerPool, sizes: dict[str, Any], names: list[str]) -> None:
    messages = agree(pool.run(2 if sizes else 1, refusals, sizes, names))
    for name in names:
        assert all(part in messages[name] for part in MESSAGES[name]), f"{name}: {messages[name]}"


def test_a_callback_that_sees_no_gradients_is_told(caplog: pytest.LogCaptureFixture) -> None:
    class Silent(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            pass

    from transformers.utils import logging

    logging.enable_propagation()
    try:
        trainer_of(stock_model("llama", num_hidden_layers=2), {"output_dir": tempfile.mkdtemp()}, Silent()).train()
    finally:
        logging.disable_propagation()
    assert "Silent.on_pre_optimizer_step" in caplog.text and "NanotronTrainer.gradients()" in caplog.text


def seen_by_the_head(directory: str, sizes: dict[str, Any] | None) -> list[float]:
    """What a backward hook on the head is given in each micro-batch, and the norms of the gradients."""
    seen: list[float] = []
    model = StockAuto.from_pretrained(directory)
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits * 3)
    model.lm_head.register_full_backward_hook(lambda module, inputs, outputs: seen.append(float(outputs[0].norm())))
    values = arguments(max_steps=2, gradient_accumulation_steps=2)
    history = History()
    kind, args = StockTrainer, TrainingArguments(**values)
    if sizes is not None:
        kind, args = NanotronTrainer, NanotronTrainingArguments(**values, **sizes)
    kind(model=model, args=args, train_dataset=ROWS, data_collator=pad_batch, callbacks=[history]).train()
    return [*seen, *history.norms]


def test_hooks_on_the_head(pool: WorkerPool) -> None:
    """One forwards and one backwards: both see what they see in stock Trainer."""
    wanted = seen_by_the_head(checkpoint("llama"), None)
    assert pool.run(1, seen_by_the_head, checkpoint("llama"), {})[0] == pytest.approx(wanted, rel=1e-4)
    assert pool.run(2, seen_by_the_head, checkpoint("llama"), {"pp_size": 2})[1] == pytest.approx(wanted, rel=1e-4)
