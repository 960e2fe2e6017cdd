"""Optimizers and schedules: those of the arguments, those of a user, and what is read of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from contract import DP2, TP2, Kit, both, check_same, lines, ours, said
from pool import WorkerPool
from safetensors.torch import load_file
from tiny import tiny_config
from transformers import (
    LlamaForCausalLM,
    TrainerCallback,
    get_constant_schedule_with_warmup,
    get_polynomial_decay_schedule_with_warmup,
    set_seed,
)


class Clamped(torch.optim.SGD):
    """A user's optimizer, whose step calls torch's: hooks on steps may run twice."""

    elementwise = True

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.clamp_(-0.05, 0.05)
        return loss


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw_torch": {"optim": "adamw_torch", "adam_beta2": 0.9, "weight_decay": 0.1},
    "adamw_torch_fused": {"optim": "adamw_torch_fused"},
    "sgd": {"optim": "sgd", "optim_args": "momentum=0.9,nesterov=true"},
    "sgd without arguments": {"optim": "sgd"},
    "rmsprop": {"optim": "rmsprop", "optim_args": "alpha=0.9,momentum=0.5"},
    "adagrad": {"optim": "adagrad"},
    "a class": {"optimizer_cls_and_kwargs": (torch.optim.Adamax, {"lr": 2e-2})},
    "a class with a schedule": {
        "optimizer_cls_and_kwargs": (torch.optim.AdamW, {"lr": 2e-2, "weight_decay": 0.2}),
        "lr_scheduler_type": "cosine",
    },
    "a class whose step calls that of its base": {"optimizer_cls_and_kwargs": (Clamped, {"lr": 0.1})},
}  # fmt: skip


def optimizers(kit: Kit) -> dict[str, Any]:
    result = {}
    for name, options in OPTIMIZERS.items():
        trainer = kit.trainer(max_steps=3, **options)
        trainer.train()
        result[name] = lines(trainer)
    return result


def test_optimizers_of_arguments(pool: WorkerPool, tmp_path: Path, more: bool) -> None:
    check_same(pool, optimizers, tmp_path, (DP2,) if more else ())


def tuples(kit: Kit) -> dict[str, Any]:
    """`optimizers=`: an optimizer over the model's parameters, with a schedule or without; and groups of its own."""
    result = {}
    for name in ("an optimizer", "with a schedule", "groups", "a schedule of metrics"):
        model = kit.model()
        if name == "groups":
            norms = [p for n, p in model.named_parameters() if "norm" in n]
            others = [p for n, p in model.named_parameters() if "norm" not in n]
            optimizer = torch.optim.AdamW(
                [
                    {"params": norms, "lr": 5e-3, "weight_decay": 0.0},
                    {"params": others, "lr": 2e-2, "weight_decay": 0.3},
                ]
            )
        else:
            optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
        schedule = None
        if name == "with a schedule":
            schedule = get_polynomial_decay_schedule_with_warmup(optimizer, 1, 4, lr_end=1e-3)
        if name == "a schedule of metrics":
            schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        evaluates = (
            {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss"}
            if name == "a schedule of metrics"
            else {}
        )
        trainer = kit.trainer(model=model, optimizers=(optimizer, schedule), max_steps=4, **evaluates)
        trainer.train()
        result[name] = [lines(trainer), sorted(set(trainer.get_learning_rates()))]
    return result


def test_optimizers_of_a_user(pool: WorkerPool, tmp_path: Path, more: bool) -> None:
    check_same(pool, tuples, tmp_path, (DP2,) if more else ())


def of_a_stock_model(kit: Kit) -> str:
    """Sharding a stock model makes other parameters than those that the optimizer was made over."""
    model = kit.model()
    return said(lambda: kit.trainer(model=model, optimizers=(torch.optim.AdamW(model.parameters()), None)))


def test_an_optimizer_over_a_stock_model_that_is_cut(pool: WorkerPool, tmp_path: Path) -> None:
    for message in ours(pool, of_a_stock_model, tmp_path, TP2):
        assert "make the model first (`AutoModelForCausalLM.from_pretrained(..., parallel=args.parallel)`)" in message


def overridden(kit: Kit) -> Any:
    """`create_optimizer` and `create_scheduler` of a subclass."""

    class Own(kit.Trainer):  # type: ignore[misc, name-defined]
        def create_optimizer(self, model: Any = None) -> Any:
            parameters = [p for _, p in self.model.named_parameters() if p.requires_grad]
            self.optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
            return self.optimizer

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            self.lr_scheduler = get_constant_schedule_with_warmup(self.optimizer, num_training_steps)
            return self.lr_scheduler

    trainer = kit.trainer(base=Own, max_steps=3)
    trainer.train()
    return lines(trainer)


def test_methods_that_make_an_optimizer(pool: WorkerPool, tmp_path: Path) -> None:
    check_same(pool, overridden, tmp_path)


def inspected(kit: Kit) -> dict[str, Any]:
    trainer = kit.trainer(max_steps=2, weight_decay=0.1)
    before = trainer.get_num_trainable_parameters()
    decayed = sorted(trainer.get_decay_parameter_names(trainer.model))
    trainer.train()
    return {
        "parameters": before,
        "decayed": decayed,
        "rates": sorted(set(trainer.get_learning_rates())),
        "groups": sorted({group["weight_decay"] for group in trainer.optimizer.param_groups}),
    }


def test_what_an_optimizer_is_asked(pool: WorkerPool, tmp_path: Path) -> None:
    stock, found = both(pool, inspected)
    assert found == stock and stock["groups"] == [0.0, 0.1]
    assert ours(pool, inspected, tmp_path, TP2)[0]["parameters"] == stock["parameters"]


def needs_a_loss_of_its_own(kit: Kit) -> dict[str, str]:
    """Ours alone: what is not element-wise, and a schedule without its optimizer."""
    model = kit.model()
    schedule = torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD(model.parameters(), lr=1), lambda step: 1.0)
    return {
        "a schedule alone": said(lambda: kit.trainer(model=model, optimizers=(None, schedule))),
        "lbfgs": said(lambda: kit.trainer(optimizer_cls_and_kwargs=(torch.optim.LBFGS, {"lr": 1e-2}))),
    }


def test_optimizers_that_are_refused(pool: WorkerPool) -> None:
    found = both(pool, needs_a_loss_of_its_own)[1]
    assert "Pass both, or `lr_scheduler_type`" in found["a schedule alone"]
    assert found["lbfgs"].startswith("ValueError: ") and "LBFGS" in found["lbfgs"]


def frozen(kit: Kit) -> Any:
    model = kit.model()
    model.get_input_embeddings().weight.requires_grad_(False)
    trainer = kit.trainer(model=model, max_steps=3, weight_decay=0.1)
    trainer.train()
    return [lines(trainer), trainer.get_num_trainable_parameters()]


def test_frozen_weights(pool: WorkerPool, tmp_path: Path, more: bool) -> None:
    check_same(pool, frozen, tmp_path, (TP2,) if more else ())


class Freezes(TrainerCallback):
    """Freezes the embedding in an event, as scripts do that train layers one after the other."""

    def __init__(self, event: str, step: int) -> None:
        def freeze(args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == step:
                model.get_input_embeddings().weight.requires_grad_(False)

        setattr(self, event, freeze)


def frozen_later(kit: Kit) -> dict[str, str]:
    events = (("on_train_begin", 0), ("on_epoch_begin", 0), ("on_step_begin", 1), ("on_step_end", 2))
    return {event: said(kit.trainer(max_steps=4, callbacks=[Freezes(event, step)]).train) for event, step in events}


def test_weights_that_callbacks_freeze(pool: WorkerPool) -> None:
    """The optimizer would go on to update them, by its moments and weight decay; stock leaves them alone."""
    stock, found = both(pool, frozen_later)
    assert set(stock.values()) == {"nothing was raised"}
    for event, message in found.items():
        assert "requires_grad of model.embed_tokens.weight (1 parameters) was changed" in message, event


class Shared(LlamaForCausalLM):
    """The up projections of both layers are one weight."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {
        "lm_head.weight": "model.embed_tokens.weight",
        "model.layers.1.mlp.up_proj.weight": "model.layers.0.mlp.up_proj.weight",
    }


def shared(kit: Kit) -> dict[str, Any]:
    """Ties that a class declares, and one that a script makes: what is trained, and what is saved."""
    found = {}
    for name in ("declared", "made"):
        set_seed(0)
        config = tiny_config(num_hidden_layers=2, hidden_size=16, tie_word_embeddings=name == "declared")
        model = Shared(config) if name == "declared" else LlamaForCausalLM(config)
        if name == "made":
            model.lm_head.weight = model.model.embed_tokens.weight
            model.config.tie_word_embeddings = True
        trainer = kit.trainer(model=model, max_steps=2, weight_decay=0.1)
        trainer.train()
        trainer.save_model(str(kit.folder / name))
        weights = load_file(kit.folder / name / "model.safetensors")
        norms = {key: weights[key].norm().item() for key in sorted(weights)}
        found[name] = [norms, trainer.get_num_trainable_parameters()]
    return found


def test_shared_weights(pool: WorkerPool, tmp_path: Path, more: bool) -> None:
    expected = check_same(pool, shared, tmp_path, (TP2,) if more else ())
    assert "model.layers.1.mlp.up_proj.weight" not in expected["declared"][0]
    assert "lm_head.weight" not in expected["made"][0]


def again(kit: Kit) -> dict[str, Any]:
    """`train` twice goes on from the weights, with a new schedule; `model_init` begins anew."""
    trainer = kit.trainer(max_steps=2)
    trainer.train()
    first = lines(trainer)
    trainer.train()
    fresh = kit.trainer(model_init=lambda: kit.model(), max_steps=2)
    logs = []
    for _ in range(2):
        fresh.train()
        logs.append([line["loss"] for line in lines(fresh) if "loss" in line])
    return {"first": first, "second": lines(trainer), "model_init": logs}


def test_a_trainer_trains_again(pool: WorkerPool, tmp_path: Path) -> None:
    result = check_same(pool, again, tmp_path)
    assert (
        result["model_init"][0]
        == result["model_init"][1]
        == pytest.approx([line["loss"] for line in result["first"] if "loss" in line], rel=1e-5)
    )
