"""Every method of Trainer is in the table, and the table is true."""

from __future__ import annotations

import types
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from pool import WorkerPool
from tiny import pad_batch, random_dataset, tiny_config, training_arguments
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, Trainer as StockTrainer, TrainingArguments, set_seed

from hf_nanotron.training.trainer_methods import CALLED, IRRELEVANT, OURS, calls_next, methods, walk


def test_every_method_is_in_one_table() -> None:
    """A new transformers fails here: say in the tables what its new methods mean."""
    print(walk())
    listed = [*CALLED, *OURS, *IRRELEVANT]
    assert len(listed) == len(set(listed))
    assert set(listed) == set(methods())
    assert "not known" not in walk()


def counting(base: type, pipeline: bool) -> type:
    """A subclass that counts calls of every method that may be overridden, and does what `base` does."""
    calls: Counter[str] = Counter()
    shared: dict[str, Any] = {"calls": calls, "Base": base}
    namespace: dict[str, Any] = {"calls": calls}
    for name in (*CALLED, *OURS):  # as a user would write it
        if pipeline and name == "compute_loss":  # refused there
            continue
        is_static = name == "get_optimizer_cls_and_kwargs"
        arguments, parent = ("", "Base") if is_static else ("self, ", "super(Counting, self)")
        exec(
            f"def {name}({arguments}*args, **kwargs):\n"
            f"    calls[{name!r}] += 1\n"
            f"    return {parent}.{name}(*args, **kwargs)",
            shared,
        )
        namespace[name] = staticmethod(shared[name]) if is_static else shared[name]
    shared["Counting"] = type("Counting", (base,), namespace)
    return shared["Counting"]


def script(trainer_class: type, args: Any) -> tuple[Counter[str], dict[str, Any]]:
    """What many scripts do with a trainer: how often each of its methods was called, and a few results."""
    set_seed(0)
    trainer = counting(trainer_class, getattr(args, "pp_size", 1) > 1)(
        model=AutoModelForCausalLM.from_config(tiny_config(num_hidden_layers=2)),
        args=args,
        train_dataset=random_dataset(8, length=8),
        eval_dataset=random_dataset(5, length=8),
        data_collator=pad_batch,
        compute_metrics=lambda prediction: {"rows": float(len(prediction.predictions))},
    )
    trainer.train()
    evaluated = trainer.evaluate()
    predicted = trainer.predict(random_dataset(3, length=8))
    trainer.save_model()
    trainer.save_state()
    trainer.save_metrics("eval", evaluated)
    trainer.create_model_card()
    results = {
        "rows": evaluated["eval_rows"],
        "loss": evaluated["eval_loss"],
        "predictions": torch.tensor(predicted.predictions).sum().item(),
        "parameters": trainer.get_num_trainable_parameters(),
        "rates": trainer.get_learning_rates(),
        "flos": trainer.state.total_flos,
        "card": Path(args.output_dir, "README.md").read_text() if trainer.is_world_process_zero() else None,
    }
    calls = Counter(trainer.calls)
    trainer.train(resume_from_checkpoint=f"{args.output_dir}/checkpoint-4")
    results["resumed"] = Counter(trainer.calls) - calls
    return calls, results


SETTINGS = {
    "max_steps": 4,
    "gradient_accumulation_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
    "include_num_input_tokens_seen": "all",
    "per_device_eval_batch_size": 2,
}


def stock_script(directory: str) -> Any:
    return script(StockTrainer, TrainingArguments(**training_arguments(**SETTINGS, output_dir=directory)))


def our_script(directory: str, sizes: dict[str, int]) -> Any:
    from hf_nanotron import NanotronTrainer, NanotronTrainingArguments

    args = NanotronTrainingArguments(**training_arguments(**SETTINGS, output_dir=directory), **sizes)
    return script(NanotronTrainer, args)


# Stock calls them elsewhere: what it writes for one process, ours writes for many.
ELSEWHERE = {
    "_prepare_input",  # recurses into batches
    "_prepare_inputs",
    "compute_loss",
    "_get_num_items_in_batch",
    "_move_model_to_device",
    "add_callback",
    "is_world_process_zero",
    "get_tp_size",
    "get_total_train_batch_size",
    "store_flos",
    "get_optimizer_cls_and_kwargs",
    "save_model",
    "_save",
    "create_optimizer",
    "num_examples",
    "get_decay_parameter_names",
}


@pytest.mark.parametrize("sizes", [{}, {"tp_size": 2, "pp_size": 2}], ids=["one", "tp2-pp2"])
def test_overrides_take_effect(sizes: dict[str, int], pool: WorkerPool, tmp_path: Path) -> None:
    """A subclass that wraps every method: each is called as often as stock Trainer calls it."""
    stock, wanted = stock_script(str(tmp_path / "stock" / "run"))
    (ours, got), *_ = pool.run(4 if sizes else 1, our_script, str(tmp_path / "ours" / "run"), sizes)
    for name in (*CALLED, *OURS):
        if name not in ("compute_loss", "_load_from_checkpoint"):  # ours loads the best weights by the latter
            assert bool(ours[name]) == bool(stock[name]), (name, ours[name], stock[name])
        if name not in ELSEWHERE | {"_load_from_checkpoint"}:
            assert ours[name] == stock[name], name
    for name in ("_load_rng_state", "_load_callback_state", "_load_optimizer_and_scheduler", "_load_from_checkpoint"):
        assert bool(got["resumed"][name]) == bool(wanted["resumed"][name]), name
    for name in ("rows", "loss", "predictions", "rates", "parameters"):
        assert got[name] == pytest.approx(wanted[name], rel=1e-4), name
    check_card(got["card"], wanted["card"], sizes)


def check_card(ours: str, stock: str, sizes: dict[str, int]) -> None:
    """Stock's card of one process, and what is ours."""
    lines = ours.splitlines()
    own = ["pipeline_tag: text-generation", "- hf-nanotron 0.1.0"]
    own += [f"- {name}: {size}" for name, size in sizes.items()] + (["- num_devices: 4"] if sizes else [])
    assert set(own) <= set(lines)
    figures = ("- Loss", "- Rows", "- Model Preparation", "| ")
    kept = [line for line in lines if line not in own]
    left = [line for line in kept if not line.lstrip().startswith(figures)]
    assert left == [line for line in stock.splitlines() if not line.lstrip().startswith(figures)]


# ---- what is refused -----------------------------------------------------------------------------------------------


def refusals() -> None:
    from hf_nanotron import NanotronTrainer, NanotronTrainingArguments

    def make(*bases: type, **methods: Any) -> Any:
        cls = type("Mine", bases or (NanotronTrainer,), methods)
        return cls(
            model=AutoModelForCausalLM.from_config(tiny_config(num_hidden_layers=1)),
            args=NanotronTrainingArguments(**training_arguments(max_steps=1)),
            train_dataset=random_dataset(2, length=4),
            data_collator=pad_batch,
        )

    def other(self: Any, *args: Any, **kwargs: Any) -> Any:
        return None

    for name in (*IRRELEVANT, *OURS):
        with pytest.raises(ValueError, match=f"{name}, overridden in Mine, is refused: .*Use "):
            make(**{name: other})

    class Mixin(StockTrainer):
        def _clip_grad_norm(self, model: Any) -> Any:
            return super()._clip_grad_norm(model)

        def num_examples(self, dataloader: Any) -> int:
            return 7

    assert make(NanotronTrainer).num_examples([]) != 7
    with pytest.raises(ValueError, match="_clip_grad_norm, overridden in .*Mixin, is refused: .*before Nano"):
        make(NanotronTrainer, Mixin)
    assert make(Mixin, NanotronTrainer).num_examples([]) == 7

    trainer = make()
    trainer._wrap_model = types.MethodType(other, trainer)
    with pytest.raises(ValueError, match="_wrap_model, overridden in the trainer itself"):
        trainer.train()
    trainer = make()
    with pytest.raises(ValueError, match="training_step was called outside of train"):
        trainer.training_step(trainer.model, pad_batch(random_dataset(1)))
    original = trainer.training_step
    trainer.training_step = lambda *args: original(*args)
    trainer.train()

    class Twice(NanotronTrainer):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            super().training_step(model, inputs, num_items_in_batch)
            return super().training_step(model, inputs, num_items_in_batch)

    with pytest.raises(ValueError, match="called again after the last micro-batch"):
        make(Twice).train()

    class Skips(NanotronTrainer):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            return torch.zeros(()) if inputs else super().training_step(model, inputs, num_items_in_batch)

    with pytest.raises(ValueError, match=r"did not call super\(\) for the last micro-batch"):
        make(Skips).train()


def test_refused_overrides(pool: WorkerPool) -> None:
    pool.run(1, refusals)


def test_calls_next() -> None:
    def plain(self: Any) -> None:
        pass

    def wraps(self: Any) -> Any:
        return StockTrainer.log(self, {})

    assert not calls_next(plain, "log") and calls_next(wraps, "log")


# ---- what is honoured without super() ------------------------------------------------------------------------------


def freely(trainer_class: type, args: Any) -> dict[str, Any]:
    """Overrides that call nothing of Trainer's."""

    class Free(trainer_class):  # type: ignore[misc]
        def prediction_step(
            self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
        ) -> tuple[Any, Any, Any]:
            inputs = self._prepare_inputs(inputs)
            with torch.no_grad():
                output = model(**inputs)
            return output.loss, None if prediction_loss_only else output.logits[..., :3], inputs["labels"]

        def create_optimizer(self, model: Any = None) -> Any:
            named = dict(self.model.named_parameters())
            slow = [p for name, p in named.items() if "norm" in name]
            fast = [p for name, p in named.items() if "norm" not in name]
            if self.optimizer is None:
                self.optimizer = torch.optim.AdamW(
                    [{"params": fast}, {"params": slow, "lr": args.learning_rate / 2}], lr=args.learning_rate
                )
            return self.optimizer

        def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
            return DataLoader(self.eval_dataset, batch_size=2, collate_fn=pad_batch)

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return None

        def save_model(self, output_dir: Any = None, _internal_call: bool = False) -> None:
            super().save_model(output_dir, _internal_call)
            if self.is_world_process_zero():
                Path(output_dir or self.args.output_dir, "mine.txt").write_text("mine")

    set_seed(0)
    trainer = Free(
        model=AutoModelForCausalLM.from_config(tiny_config(num_hidden_layers=2)),
        args=args,
        train_dataset=random_dataset(8, length=8),
        eval_dataset=random_dataset(6, length=8),
        data_collator=pad_batch,
        compute_metrics=lambda prediction: {"sum": float(prediction.predictions.sum())},
        preprocess_logits_for_metrics=lambda logits, labels: logits * 2,
    )
    trainer.train()
    metrics = trainer.evaluate()
    held = hasattr(trainer, "mesh") and "model.norm.weight" in dict(trainer.model.named_parameters())
    group = trainer.get_optimizer_group("model.norm.weight") if held else None
    mine = Path(args.output_dir, "checkpoint-4", "mine.txt").is_file()
    batches = list(type(trainer).__mro__[1].get_eval_dataloader(trainer))
    return {
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
        "eval_loss": metrics["eval_loss"],
        "eval_sum": metrics["eval_sum"],
        "group": None if group is None else group["initial_lr"],
        "mine": mine,
        "batches": [{name: value.tolist() for name, value in dict(batch).items()} for batch in batches],
    }


FREE = {
    "max_steps": 4,
    "gradient_accumulation_steps": 2,
    "save_strategy": "steps",
    "save_steps": 4,
    "per_device_eval_batch_size": 2,
}


def our_free(directory: str, sizes: dict[str, int]) -> Any:
    from hf_nanotron import NanotronTrainer, NanotronTrainingArguments

    return freely(
        NanotronTrainer, NanotronTrainingArguments(**training_arguments(**FREE, output_dir=directory), **sizes)
    )


def test_overrides_without_super(pool: WorkerPool, tmp_path: Path) -> None:
    wanted = freely(StockTrainer, TrainingArguments(**training_arguments(**FREE, output_dir=str(tmp_path / "stock"))))
    for got in pool.run(4, our_free, str(tmp_path / "ours"), {"tp_size": 2, "pp_size": 2}):
        assert got["group"] in (5e-3 / 2, None)
        assert got["losses"] == pytest.approx(wanted["losses"], abs=2e-4)
        for name in ("eval_loss", "eval_sum"):
            assert got[name] == pytest.approx(wanted[name], rel=1e-3), name
        assert got["mine"] and wanted["mine"]
        assert got["batches"] == wanted["batches"]
