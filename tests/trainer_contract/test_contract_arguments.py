"""Training arguments: what both classes make of a value, and which they refuse."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from contract import TP2, Kit, both, heard, ours, outcome
from pool import WorkerPool
from transformers import HfArgumentParser, TrainingArguments
from transformers.utils import logging as stock_logging

from hf_nanotron import NanotronTrainingArguments

CLASSES = (TrainingArguments, NanotronTrainingArguments)


def made(cls: type[TrainingArguments], folder: Path, **values: Any) -> Any:
    return cls(**{"output_dir": str(folder), "use_cpu": True, "report_to": "none", **values})


# Arguments, and what is read of the object that they make.
TAKEN: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "strategies are enumerations": (
        {"eval_strategy": "steps", "eval_steps": 10, "save_strategy": "epoch", "hub_strategy": "end"},
        ("eval_strategy", "save_strategy", "hub_strategy", "logging_strategy", "lr_scheduler_type"),
    ),
    "evaluation is on": ({"do_eval": False, "eval_strategy": "steps", "eval_steps": 10}, ("do_eval",)),
    "evaluations as often as log lines": ({"eval_strategy": "steps", "logging_steps": 10}, ("eval_steps",)),
    "shares of the steps": ({"logging_steps": 0.5}, ("logging_steps",)),
    "the best by loss": (
        {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"},
        ("metric_for_best_model", "greater_is_better"),
    ),
    "the best by a score": (
        {
            "load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch",
            "metric_for_best_model": "accuracy",
        },
        ("metric_for_best_model", "greater_is_better"),
    ),
    "saves at a multiple of the evaluations": (
        {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 10, "save_steps": 20},
        ("save_steps",),
    ),
    "no reports": ({"report_to": ["none"]}, ("report_to",)),
    "one report": ({"report_to": "tensorboard"}, ("report_to",)),
    "warmup of a share": ({"warmup_steps": 0.5}, ("warmup_steps",)),
    "workers read ahead": (
        {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 2}, ("dataloader_prefetch_factor",)
    ),
    "no pinned memory on the CPU": ({}, ("dataloader_pin_memory", "n_gpu")),
    "tokens seen": ({"include_num_input_tokens_seen": True}, ("include_num_input_tokens_seen",)),
    "no tokens seen": ({"include_num_input_tokens_seen": False}, ("include_num_input_tokens_seen",)),
    "a mapping as JSON": (
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": '{"min_lr": 0.5}'}, ("lr_scheduler_kwargs",)
    ),
    "batches": (
        {"per_device_train_batch_size": 3, "per_device_eval_batch_size": 5}, ("train_batch_size", "eval_batch_size")
    ),
    "no epochs but steps": ({"max_steps": 3}, ("max_steps", "num_train_epochs")),
    "cache emptied": ({"torch_empty_cache_steps": 1}, ("torch_empty_cache_steps",)),
    "no determinism": ({}, ("full_determinism", "seed", "data_seed")),
    "inputs for metrics": ({"include_for_metrics": ["inputs", "loss"]}, ("include_for_metrics",)),
}  # fmt: skip


@pytest.mark.parametrize("name", TAKEN)
def test_both_make_the_same_of(name: str, tmp_path: Path) -> None:
    values, read = TAKEN[name]
    stock, found = (made(cls, tmp_path, **values) for cls in CLASSES)
    assert [getattr(found, each) for each in read] == [getattr(stock, each) for each in read]


REFUSED_BY_BOTH: dict[str, dict[str, Any]] = {
    "an unknown strategy": {"eval_strategy": "invalid"},
    "evaluations at steps without a number": {"eval_strategy": "steps", "logging_steps": 0},
    "no log lines at steps": {"logging_steps": 0},
    "ten and a half steps": {"logging_steps": 10.5},
    "evaluations at ten and a half": {"eval_strategy": "steps", "eval_steps": 10.5},
    "saves at ten and a half": {"save_steps": 10.5},
    "the best of other steps": {
        "load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 10, "save_strategy": "epoch"
    },
    "saves between evaluations": {
        "load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 10, "save_steps": 15
    },
    "two precisions": {"fp16": True, "bf16": True},
    "two precisions of evaluation": {"fp16_full_eval": True, "bf16_full_eval": True},
    "a plateau of nothing": {"lr_scheduler_type": "reduce_lr_on_plateau"},
    "a negative warmup": {"warmup_steps": -1},
    "reading ahead without workers": {"dataloader_prefetch_factor": 2},
    "cache emptied never": {"torch_empty_cache_steps": 0},
    "cache emptied before": {"torch_empty_cache_steps": -1},
    "cache emptied sometimes": {"torch_empty_cache_steps": "none"},
    "an unknown optimizer": {"optim": "adam_of_mine"},
    "an unknown schedule": {"lr_scheduler_type": "sideways"},
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_BY_BOTH)
def test_both_refuse(name: str, tmp_path: Path) -> None:
    for cls in CLASSES:
        kind = outcome(lambda cls=cls: made(cls, tmp_path, **REFUSED_BY_BOTH[name]))
        assert kind in ("ValueError", "TypeError"), f"{cls.__name__}: {kind}"


# Stock takes them; ours says what to use instead.
REFUSED_BY_OURS: dict[str, tuple[dict[str, Any], str]] = {
    "max_steps=0": ({"max_steps": 0}, "max_steps=0 must be at least 1"),
    "auto_find_batch_size": ({"auto_find_batch_size": True}, "a smaller per_device_train_batch_size"),
    "fp16": ({"fp16": True}, "bf16=True"),
    "enable_jit_checkpoint": ({"enable_jit_checkpoint": True}, "save_on_signal"),
    "eval_use_gather_object": ({"eval_use_gather_object": True}, "labels that are tensors"),
    "label_names": ({"label_names": ["start", "end"]}, "a column named labels"),
    "adafactor": ({"optim": "adafactor"}, "one of adamw_torch"),
    "galore": ({"optim": "galore_adamw", "optim_target_modules": ["attn"]}, "whole gradient matrices"),
    "debug": ({"debug": "underflow_overflow"}, "set_detect_anomaly"),
    "split_batches": ({"accelerator_config": {"split_batches": True}}, "a smaller per_device_train_batch_size"),
    "save_on_each_node": ({"save_on_each_node": True}, "an output_dir that all nodes share"),
    "batch_rebalance": ({"train_sampling_strategy": "batch_rebalance"}, "every rank is data-parallel"),
    "use_liger_kernel": ({"use_liger_kernel": True}, "it replaces layers that are sharded"),
}


@pytest.mark.parametrize("name", REFUSED_BY_OURS)
def test_ours_refuses_with_what_to_use(name: str, tmp_path: Path) -> None:
    values, says = REFUSED_BY_OURS[name]
    with pytest.raises(ValueError) as error:  # noqa: PT011
        made(NanotronTrainingArguments, tmp_path, **values)
    assert says in str(error.value)


def test_no_folder_before_it_is_needed(tmp_path: Path) -> None:
    for cls in CLASSES:
        made(cls, tmp_path / "out", save_strategy="steps")
        assert not (tmp_path / "out").exists()
        assert cls(use_cpu=True).output_dir == "trainer_output"
        assert cls(output_dir="~/foo", use_cpu=True).output_dir == os.path.expanduser("~/foo")


def test_arguments_are_json(tmp_path: Path) -> None:
    """`to_json_string`, `to_sanitized_dict` and the parser take what the other has written."""
    stock, found = (json.loads(made(cls, tmp_path, seed=5).to_json_string()) for cls in CLASSES)
    assert {name: found[name] for name in stock if name != "torch_compile"} == {
        name: value for name, value in stock.items() if name != "torch_compile"
    }
    (parsed,) = HfArgumentParser(NanotronTrainingArguments).parse_dict(  # type: ignore[arg-type]
        {"output_dir": str(tmp_path), "use_cpu": True, "learning_rate": "1e-3", "max_steps": 3}
    )
    assert parsed.learning_rate == 1e-3 and parsed.max_steps == 3


def set_methods(cls: type[TrainingArguments], folder: Path) -> dict[str, Any]:
    """`set_training` and the others, which change several fields at once."""
    args = made(cls, folder)
    args = args.set_training(learning_rate=1e-4, batch_size=4, num_epochs=2)
    args = args.set_evaluate(strategy="steps", steps=5, batch_size=3)
    args = args.set_save(strategy="steps", steps=5, total_limit=2)
    args = args.set_logging(strategy="steps", steps=7, report_to="none")
    args = args.set_optimizer(name="adamw_torch", beta1=0.8)
    args = args.set_lr_scheduler(name="cosine", warmup_steps=3)
    args = args.set_dataloader(train_batch_size=6, num_workers=0, drop_last=True)
    names = (
        "learning_rate", "per_device_train_batch_size", "num_train_epochs", "eval_strategy", "eval_steps", "save_steps",
        "save_total_limit", "logging_steps", "optim", "adam_beta1", "lr_scheduler_type", "warmup_steps",
        "dataloader_drop_last", "do_train", "do_eval", "per_device_eval_batch_size",
    )  # fmt: skip
    return {name: getattr(args, name) for name in names}


def test_methods_that_set_arguments(tmp_path: Path) -> None:
    stock, found = (set_methods(cls, tmp_path) for cls in CLASSES)
    assert found == stock


# ---- log levels ----


def levels(kit: Kit) -> dict[str, Any]:
    before, result = stock_logging.get_verbosity(), {}
    for level in ("info", "error", "passive"):
        kit.trainer(max_steps=1, log_level=level, log_level_replica="error")
        result[level] = stock_logging.get_verbosity()
        stock_logging.set_verbosity(before)
    trainer = kit.trainer(max_steps=1)
    result["zero"] = trainer.is_world_process_zero() and trainer.is_local_process_zero()
    result["process"] = [trainer.args.process_index, trainer.args.local_process_index]
    return result


def test_log_levels(pool: WorkerPool, tmp_path: Path) -> None:
    stock, found = both(pool, levels)
    assert found == stock and stock["info"] == logging.INFO
    first, second = ours(pool, levels, tmp_path, TP2)
    assert first["info"] == logging.INFO and second["info"] == second["error"] == logging.ERROR
    assert first["zero"] and not second["zero"] and second["process"] == [1, 1]


# ---- what a trainer refuses ----


def unfit(kit: Kit) -> dict[str, str]:
    """Options of a trainer that cannot train or evaluate, and with what kind of error they end."""
    both_ = {"model": kit.model(), "model_init": kit.model}
    return {
        "no model": outcome(lambda: kit.trainer(model=None)),
        "evaluations of nothing": outcome(lambda: kit.trainer(eval_strategy="epoch", evaluate=None)),
        "evaluate nothing": outcome(lambda: kit.trainer(evaluate=None).evaluate()),
        "train on nothing": outcome(lambda: kit.trainer(train=None).train()),
        "an unknown option": outcome(lambda: kit.Trainer(model=kit.model(), args=kit.args(), unknown=1)),
        "an unknown option of train": outcome(lambda: kit.trainer().train(unknown=1)),
        "a class as a model": outcome(lambda: kit.trainer(model=type(kit.model()))),
        "a length of epochs that is not known": outcome(lambda: kit.trainer(train=iter_rows()).train()),
        "the best of nothing": outcome(lambda: kit.trainer(save_strategy="best", eval_strategy="epoch")),
        "a model and a function": outcome(lambda: kit.trainer(**both_)),
    }


def iter_rows() -> Any:
    from tiny import random_dataset

    return random_dataset(8, length=8).to_iterable_dataset()


def test_both_refuse_what_cannot_train(pool: WorkerPool) -> None:
    stock, found = both(pool, unfit)
    refused = {name for name, kind in stock.items() if kind != "fine"}
    assert len(refused) >= 6
    assert {name for name in refused if found[name] == "fine"} == set(), found


def warned(kit: Kit) -> list[str]:
    """Deprecated names are warned of by both."""
    with heard() as messages:
        args = kit.args(max_steps=1, gradient_checkpointing=True)
        kit.trainer(args=args).train()
    return [str(args.activation_checkpointing), str(any("deprecated" in message for message in messages))]


def test_deprecated_names(pool: WorkerPool) -> None:
    stock, found = both(pool, warned)
    assert found[0] == stock[0]
