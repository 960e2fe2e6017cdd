"""Checkpoints: which are written, what they hold, and how runs go on from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import TP2, Flags, Kit, both, check_same, files, heard, lines, ours, outcome, said
from pool import WorkerPool
from safetensors.torch import load_file
from tiny import pad_batch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EarlyStoppingCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.trainer_callback import ExportableState
from transformers.utils import logging as stock_logging


def names(folder: Path) -> list[str]:
    return sorted((path.name for path in folder.glob("checkpoint-*")), key=lambda name: int(name.split("-")[1]))


def tokenizer() -> Any:
    from test_cli import tokenizer

    return tokenizer()


# ---- what is written ----


def written(kit: Kit) -> dict[str, Any]:
    """Checkpoints by steps, of a run with a tokenizer; and the model that is saved at the end."""
    trainer = kit.trainer(max_steps=5, save_strategy="steps", save_steps=2, processing_class=tokenizer())
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    out = kit.folder / "out"
    trainer.accelerator.wait_for_everyone()
    state = json.loads((out / "checkpoint-4" / "trainer_state.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(out / "checkpoint-4")
    return {
        "checkpoints": names(out),
        "in one": files(out / "checkpoint-4"),
        "in the root": [name for name in files(out) if not name.startswith("checkpoint-")],
        "state": sorted(state),
        "steps": [state["global_step"], state["max_steps"], state["train_batch_size"] * kit.replicas],
        "weights": {name: tensor.shape for name, tensor in load_file(out / "checkpoint-4/model.safetensors").items()},
        "sum": sum(parameter.sum() for parameter in model.parameters()),
        "class": json.loads((out / "checkpoint-4" / "config.json").read_text())["architectures"],
        "words": AutoTokenizer.from_pretrained(out / "checkpoint-4")("w5 w6")["input_ids"],
    }


OF_STOCK = {"optimizer.pt", "scheduler.pt"}
OF_OURS = {"training_state", "committed.json"}
OF_A_RUN = {"_metrics.jsonl", "_run.json", "_run.lock"}


def test_what_a_checkpoint_holds(pool: WorkerPool, tmp_path: Path, more: bool) -> None:
    """The same files, but for the optimizer's; transformers loads the same weights. (`test_saving.py` has ranks.)"""
    stock, found = both(pool, written)
    assert set(stock["in one"]) - set(found["in one"]) == OF_STOCK
    assert set(found["in one"]) - set(stock["in one"]) == OF_OURS
    assert set(found["in the root"]) - set(stock["in the root"]) == OF_A_RUN
    assert set(stock["in the root"]) <= set(found["in the root"])
    compared = ("checkpoints", "state", "steps", "weights", "class", "words")
    assert {name: found[name] for name in compared} == {name: stock[name] for name in compared}
    assert found["sum"] == pytest.approx(stock["sum"], rel=1e-4)
    if not more:
        return
    first, _ = ours(pool, written, tmp_path, TP2)
    random_states = {"rng_state.pth", "rng_state_0.pth", "rng_state_1.pth"}
    assert set(first["in one"]) - random_states == set(found["in one"]) - random_states
    assert first["sum"] == pytest.approx(stock["sum"], rel=1e-4) and first["class"] == stock["class"]


def kinds_of_saves(kit: Kit) -> dict[str, Any]:
    runs: dict[str, dict[str, Any]] = {
        "epochs": {"save_strategy": "epoch", "num_train_epochs": 2},
        "a share": {"save_strategy": "steps", "save_steps": 0.5, "max_steps": 4},
        "at most two": {"save_strategy": "steps", "save_steps": 1, "max_steps": 4, "save_total_limit": 2},
        "no": {"save_strategy": "no", "max_steps": 2},
        "the model alone": {"save_strategy": "steps", "save_steps": 2, "max_steps": 2, "save_only_model": True},
    }
    result = {}
    for name, options in runs.items():
        out = kit.folder / name.replace(" ", "_")
        trainer = kit.trainer(output_dir=str(out), **options)
        trainer.train()
        result[name] = names(out)
        if name == "the model alone":
            result["files"] = [each for each in files(out / "checkpoint-2") if each != "committed.json"]
    return result


def test_kinds_of_saves(pool: WorkerPool, tmp_path: Path) -> None:
    check_same(pool, kinds_of_saves, tmp_path)


def of_a_collator(kit: Kit) -> Any:
    """A tokenizer that only the collator has is saved, too."""

    class Collator:
        tokenizer = tokenizer()

        def __call__(self, rows: Any) -> Any:
            return pad_batch(rows)

    kit.trainer(data_collator=Collator(), max_steps=1, save_strategy="steps", save_steps=1).train()
    return AutoTokenizer.from_pretrained(kit.folder / "out" / "checkpoint-1")("w7")["input_ids"]


def test_the_tokenizer_of_a_collator(pool: WorkerPool, tmp_path: Path) -> None:
    assert check_same(pool, of_a_collator, tmp_path) == [7]


def reports(kit: Kit) -> dict[str, Any]:
    """`save_metrics`, `log_metrics`, and the card of the model."""
    trainer = kit.trainer(max_steps=1, processing_class=tokenizer())
    trainer.train()
    trainer.save_metrics("eval", {"eval_loss": 1.5})
    trainer.save_metrics("train", {"train_loss": 2.5, "train_runtime": 3.0})
    trainer.log_metrics("eval", {"eval_loss": 1.5})
    trainer.create_model_card(model_name="a model", tags="mine", dataset="some text")
    out = kit.folder / "out"
    card = (out / "README.md").read_text()
    return {
        "files": [name for name in files(out) if name not in OF_A_RUN],
        "all": json.loads((out / "all_results.json").read_text()),
        "card": [line for line in card.splitlines() if line.startswith(("#", "- learning_rate", "- mine", "- seed"))],
        "flos": trainer.floating_point_ops({"input_ids": torch.zeros(2, 8)}),
    }


def test_reports(pool: WorkerPool, tmp_path: Path) -> None:
    stock, found = both(pool, reports)
    assert {**found, "card": 0} == {**stock, "card": 0}
    assert "# a model" in stock["card"] and set(stock["card"]) <= set(found["card"])


# ---- resume ----


def resumed(kit: Kit, steps: tuple[int, ...] = (3, 4, 6, 8)) -> dict[str, Any]:
    """A run, and others from its checkpoints: in an epoch, at its end, in the next one, and at the end of the run."""
    options = {"num_train_epochs": 2, "train": 8, "save_strategy": "steps", "save_steps": 1}
    whole = kit.trainer(**options)
    whole.train()
    result: dict[str, Any] = {"whole": lines(whole)}
    for step in steps:
        trainer = kit.trainer(**options)
        trainer.train(resume_from_checkpoint=str(kit.folder / "out" / f"checkpoint-{step}"))
        log = lines(trainer)
        for line in log:
            line.pop("train_loss", None)  # of the steps since
        result[f"from {step}"] = log
    return result


def in_an_epoch(kit: Kit) -> dict[str, Any]:
    return resumed(kit, (3,))


def test_resumed_runs(pool: WorkerPool, tmp_path: Path, more: bool) -> None:
    """Log lines of a resumed run are those of a run that was not broken off. (`test_resume.py` has ranks.)"""
    result = check_same(pool, resumed, tmp_path, (TP2,)) if more else check_same(pool, in_an_epoch, tmp_path)
    assert [line for line in result["from 3"] if "loss" in line] == [line for line in result["whole"] if "loss" in line]


def ways_to_resume(kit: Kit) -> dict[str, Any]:
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    kit.trainer(**options).train()
    result: dict[str, Any] = {}
    for name, source in (("true", True), ("false", False), ("none", None)):
        trainer = kit.trainer(**{**options, "max_steps": 6, "output_dir": str(kit.folder / "out")})
        trainer.train(resume_from_checkpoint=source)
        result[name] = [line["step"] for line in lines(trainer) if "loss" in line]
    empty = kit.trainer(**{**options, "output_dir": str(kit.folder / "empty")})
    result["empty"] = outcome(lambda: empty.train(resume_from_checkpoint=True))
    result["missing"] = outcome(lambda: empty.train(resume_from_checkpoint=str(kit.folder / "out" / "checkpoint-9")))
    return result


def test_ways_to_resume(pool: WorkerPool, tmp_path: Path) -> None:
    result = check_same(pool, ways_to_resume, tmp_path)
    assert result["empty"] == result["missing"] == "ValueError" and result["true"] == [1, 2, 3, 4, 5, 6]


def more_steps(kit: Kit) -> list[float]:
    """A linear schedule of four steps, which is resumed with six: the rates of all steps."""
    options = {"save_strategy": "steps", "save_steps": 4}
    kit.trainer(max_steps=4, **options).train()
    trainer = kit.trainer(max_steps=6, **options)
    trainer.train(resume_from_checkpoint=True)
    return [line["learning_rate"] for line in lines(trainer) if "learning_rate" in line]


def test_rates_of_a_resume_with_more_steps(pool: WorkerPool) -> None:
    """Ours has the rates of the new schedule; stock makes one step more with the last rate of the old one."""
    stock, found = both(pool, more_steps)
    assert found[:4] == stock[:4] and found[5] == stock[5] == pytest.approx(1e-2 / 6)
    assert stock[4] == 0 and found[4] == pytest.approx(1e-2 * 2 / 6)


def other_sizes(kit: Kit) -> dict[str, Any]:
    """A resume with another batch: the new one counts."""
    kit.trainer(max_steps=2, batch=2, save_strategy="steps", save_steps=2, train=16).train()
    trainer = kit.trainer(max_steps=4, batch=4, train=16)
    forget_warnings()
    with heard() as messages:
        trainer.train(resume_from_checkpoint=str(kit.folder / "out" / "checkpoint-2"))
    return {
        "batch": trainer._train_batch_size * kit.replicas,
        "steps": trainer.state.global_step,
        "told": any("per_device_train_batch_size: 4 (from args) != 2" in message for message in messages),
    }


def test_a_resume_with_another_batch(pool: WorkerPool, tmp_path: Path) -> None:
    assert check_same(pool, other_sizes, tmp_path) == {"batch": 4, "steps": 4, "told": True}


def forget_warnings() -> None:
    """transformers says some things once a process."""
    stock_logging.warning_once.cache_clear()


def skipped_data(kit: Kit) -> Any:
    """`ignore_data_skip`: a resumed run begins its epoch anew."""
    options = {"num_train_epochs": 1, "train": 8, "save_strategy": "steps", "save_steps": 2, "seed": 1}
    kit.trainer(**options).train()
    first: list[int] = []

    def collate(rows: Any) -> Any:
        first.extend(row["input_ids"][0] for row in rows)
        return pad_batch(rows)

    trainer = kit.trainer(data_collator=collate, ignore_data_skip=True, **options)
    trainer.train(resume_from_checkpoint=str(kit.folder / "out" / "checkpoint-2"))
    return [first[:4], trainer.state.global_step]


def test_a_resume_that_reads_its_data_anew(pool: WorkerPool, tmp_path: Path) -> None:
    check_same(pool, skipped_data, tmp_path)


# ---- states of callbacks ----


class Stateful(TrainerCallback, ExportableState):
    """A callback whose state is in checkpoints."""

    def __init__(self, value: str = "fresh") -> None:
        self.value, self.steps = value, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps += 1

    def state(self) -> dict[str, Any]:
        return {"args": {"value": self.value}, "attributes": {"steps": self.steps}}


def states(kit: Kit) -> dict[str, Any]:
    saves = {
        "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2,
        "load_best_model_at_end": True, "metric_for_best_model": "loss",
    }  # fmt: skip
    callbacks = [Stateful("first"), Stateful("second"), EarlyStoppingCallback(5, 0.2)]
    kit.trainer(callbacks=callbacks, max_steps=2, **saves).train()
    result: dict[str, Any] = {}
    for name, restores in (("restored", True), ("not restored", False)):
        fresh = [Stateful(), EarlyStoppingCallback(), Stateful()]
        restoring = {"restore_callback_states_from_checkpoint": restores}
        trainer = kit.trainer(callbacks=fresh, max_steps=4, **saves, **restoring)
        trainer.train(resume_from_checkpoint=str(kit.folder / "out" / "checkpoint-2"))
        found = trainer.callback_handler.callbacks
        result[name] = [
            [each.value, each.steps] if isinstance(each, Stateful) else each.early_stopping_patience
            for each in found
            if isinstance(each, Stateful | EarlyStoppingCallback)
        ]
    with heard() as messages:
        trainer = kit.trainer(max_steps=2, restore_callback_states_from_checkpoint=True, **saves)
        trainer.train(resume_from_checkpoint=str(kit.folder / "out" / "checkpoint-2"))
    result["missing"] = any("EarlyStoppingCallback" in message for message in messages)
    state = TrainerState.load_from_json(str(kit.folder / "out" / "checkpoint-2" / "trainer_state.json"))
    result["saved"] = sorted(state.stateful_callbacks)
    result["control"] = TrainerControl(**state.stateful_callbacks["TrainerControl"]["args"]).should_training_stop
    return result


def test_states_of_callbacks(pool: WorkerPool, tmp_path: Path) -> None:
    result = check_same(pool, states, tmp_path)
    assert result["restored"] == [5, ["first", 2], ["second", 2]] and result["missing"]


# ---- runs that end early ----


def broken_off(kit: Kit) -> dict[str, Any]:
    """An error of a callback leaves what was saved, and a new trainer goes on from there."""

    class Fails(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                raise RuntimeError("the machine is gone")

    options = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2}
    failed = said(kit.trainer(callbacks=[Fails()], **options).train)
    trainer = kit.trainer(**options)
    trainer.train(resume_from_checkpoint=True)
    stopped = kit.trainer(callbacks=[Flags({("on_step_end", 1): {"should_training_stop": True, "should_save": True}})])
    stopped.train()
    return {"failed": failed, "log": lines(trainer)[:-1], "saved": names(kit.folder / "out")}


def test_runs_that_are_broken_off(pool: WorkerPool, tmp_path: Path, more: bool) -> None:
    result = check_same(pool, broken_off, tmp_path, (TP2,) if more else ())
    assert result["failed"] == "RuntimeError: the machine is gone" and result["saved"][0] == "checkpoint-1"


def weights_of_stock(kit: Kit) -> Any:
    """Ours does not go on from a checkpoint of stock, whose optimizer is a pickle; it starts from the weights."""
    stock = Kit(False, kit.folder / "stock")
    stock.trainer(max_steps=1, save_strategy="steps", save_steps=1).train()
    source = kit.folder / "stock" / "out" / "checkpoint-1"
    refused = said(lambda: kit.trainer(max_steps=2).train(resume_from_checkpoint=str(source)))
    model = AutoModelForCausalLM.from_pretrained(source)
    return [
        refused,
        kit.trainer(model=model).evaluate()["eval_loss"],
        stock.trainer(model=model).evaluate()["eval_loss"],
    ]


def test_a_checkpoint_of_stock(pool: WorkerPool) -> None:
    refused, found, expected = pool.run(1, of_ours, weights_of_stock)[0]
    assert refused.startswith("ValueError: ") and "from_pretrained" in refused
    assert found == pytest.approx(expected, rel=1e-5)


def of_ours(scenario: Any) -> Any:
    import tempfile

    return scenario(Kit(True, Path(tempfile.mkdtemp())))
