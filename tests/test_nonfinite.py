"""Steps, losses and weights that are not finite: skipped within a limit, logged as what they are, never saved."""

from __future__ import annotations

import math
import os
import signal
import threading
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pool import WorkerPool
from tiny import pad_batch, random_dataset, tiny_config, training_arguments
from transformers import TrainerCallback

from hf_nanotron import AutoModelForCausalLM, NanotronTrainer, NanotronTrainingArguments
from hf_nanotron.checkpoint.directory.save import Save
from hf_nanotron.optim.norm import NonFiniteGradientError
from hf_nanotron.prepare.shard_weights import shard_weights
from hf_nanotron.training.nonfinite import FiniteLosses, NonFiniteGuard

# Every layout divides the weights in another way.
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2 zero1": {}, "dp2 zero3": {"zero_stage": 3}, "tp2": {"tp_size": 2}, "pp2": {"pp_size": 2, "bf16": True},
}  # fmt: skip
COMMON = {
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "gradient_accumulation_steps": 2,
    "save_total_limit": None,
}


def make(output_dir: str, callbacks: Any = (), train_dataset: Any = None, **arguments: Any) -> NanotronTrainer:
    args = NanotronTrainingArguments(**training_arguments(output_dir=output_dir, **{**COMMON, **arguments}))
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(tiny_config(num_hidden_layers=2), parallel=args.parallel)
    return NanotronTrainer(
        model=model, args=args, train_dataset=train_dataset or random_dataset(64), eval_dataset=random_dataset(4),
        data_collator=pad_batch, callbacks=list(callbacks),
    )  # fmt: skip


class Breaks(TrainerCallback):
    """Makes the weights of one layer NaN after some step, on the ranks that hold them; mends them after another."""

    def __init__(self, breaks: int, mends: int | None = None, name: str = "layers.1.mlp.up") -> None:
        self.breaks, self.mends, self.name = breaks, mends, name
        self.kept: dict[int, torch.Tensor] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for index, segment in enumerate(self.trainer.weights.segments):
            if self.name in segment.name and state.global_step == self.breaks:
                self.kept[index] = segment.master.detach().clone()
                segment.master.data.fill_(float("nan"))
            if index in self.kept and state.global_step == self.mends:
                segment.master.data.copy_(self.kept[index])
        if state.global_step in (self.breaks, self.mends):
            self.trainer.weights.publish()
            self.trainer.weights.wait()


def breaking(output_dir: str, breaks: int, mends: int | None = None, **arguments: Any) -> NanotronTrainer:
    callback = Breaks(breaks, mends)
    callback.trainer = trainer = make(output_dir, [callback], skip_nonfinite_steps=True, **arguments)
    return trainer


def losses(trainer: NanotronTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def skips(output_dir: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """Runs that skip: some steps in a row, and again; in log lines of one step and of three; with no end."""
    out: dict[str, Any] = {}
    trainer = breaking(output_dir, 2, 4, max_steps=7, max_skipped_steps=2, **sizes)
    out["train_loss"], out["each"] = trainer.train().training_loss, losses(trainer)
    trainer = breaking(output_dir, 2, 4, max_steps=6, max_skipped_steps=2, logging_steps=3, **sizes)
    out["train_loss_by_3"], out["by_3"] = trainer.train().training_loss, losses(trainer)
    trainer = breaking(output_dir, 0, None, max_steps=3, logging_nan_inf_filter=False, **sizes)
    out["unfiltered"] = (trainer.train().training_loss, losses(trainer))
    trainer = breaking(output_dir, 1, None, max_steps=50, max_skipped_steps=3, **sizes)
    try:
        trainer.train()
    except ArithmeticError as error:
        out["error"] = (type(error).__name__, str(error), trainer.state.global_step)
    return out


def skips_in_layouts(output_dir: str, names: list[str]) -> dict[str, Any]:
    return {name: skips(f"{output_dir}/{name}", LAYOUTS[name]) for name in names}


def test_skipped_steps(pool: WorkerPool, tmp_path: Path) -> None:
    results = pool.run(2, skips_in_layouts, str(tmp_path), ["dp2 zero1", "tp2", "pp2"])
    for got in (result[name] for result in results for name in result):
        each = got["each"]
        assert [math.isnan(loss) for loss in each] == [False, False, True, True, False, False, False]
        finite = [loss for loss in each if not math.isnan(loss)]
        assert got["train_loss"] == pytest.approx(sum(finite) / 5, rel=1e-6)
        # Two finite losses and one that is not; then one that is not and two finite ones.
        wanted = [(each[0] + each[1]) / 2, (each[4] + each[5]) / 2]
        assert got["by_3"] == pytest.approx(wanted, rel=1e-5)
        assert got["train_loss_by_3"] == pytest.approx(sum(wanted) / 2, rel=1e-5)
        assert all(math.isnan(loss) for loss in (got["unfiltered"][0], *got["unfiltered"][1]))
        kind, message, step = got["error"]
        assert kind == "NonFiniteGradientError" and step in (4, 5)
        for part in (
            "step 5:", "4 steps in a row", "max_skipped_steps=3", "those of step 1", "not finite themselves",
            "'model.layers.1.mlp.up_proj.weight'", "no checkpoint before it",
        ):  # fmt: skip
            assert part in message, message
    assert len({result[name]["error"][1] for result in results for name in ["tp2"]}) == 1


def unlabelled(output_dir: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """The second step has no label, nor have the fourth and the fifth; the weights are noted behind each."""
    out: dict[str, Any] = {"weights": []}

    class Notes(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trainer.weights.wait()
            out["weights"].append([segment.master.detach().clone() for segment in trainer.weights.segments])

    options: dict[str, Any] = {"train_sampling_strategy": "sequential", "max_steps": 5, "max_skipped_steps": 1, **sizes}
    trainer = make(output_dir, [Notes()], random_dataset(1), **options)
    samples = trainer.get_total_train_batch_size(trainer.args)
    rows = random_dataset(5 * samples)
    labels = [[-100] * 16 if i // samples in (1, 3, 4) else row for i, row in enumerate(rows["labels"])]
    trainer.train_dataset = rows.remove_columns("labels").add_column("labels", labels)
    with pytest.raises(ValueError, match="have no label") as error:
        trainer.train()
    same = [all(map(torch.equal, one, two)) for one, two in pairwise(out.pop("weights"))]
    return {"same": same, "error": str(error.value), "losses": losses(trainer)}


def unlabelled_in_layouts(output_dir: str) -> dict[str, Any]:
    return {name: unlabelled(f"{output_dir}/{name}", LAYOUTS[name]) for name in ("dp2 zero1", "tp2", "pp2")}


def test_steps_without_a_label_change_nothing(pool: WorkerPool, tmp_path: Path) -> None:
    """Momentum and weight decay would: no gradient is one of zero for them."""
    for result in pool.run(2, unlabelled_in_layouts, str(tmp_path)):
        for got in result.values():
            assert got["same"] == [True, False, True]  # from a step to the next
            assert [math.isnan(loss) for loss in got["losses"]] == [False, True, False, True]
            assert got["error"].startswith("step 5: its batches have no label, all are -100, and 2 steps in a row")


def saves(output_dir: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """Saves a checkpoint, then has the weights broken, and tries to save in every way."""
    trainer = breaking(output_dir, 3, None, max_steps=4, save_strategy="steps", save_steps=2, **sizes)
    out: dict[str, Any] = {}
    for name, act in {
        "checkpoint": trainer.train,
        "save_model": trainer.save_model,
        "elsewhere": lambda: trainer.save_model(f"{output_dir}/elsewhere"),
    }.items():
        with pytest.raises(ArithmeticError) as error:
            act()
        out[name] = (type(error.value).__name__, str(error.value))
    trainer.model.save_pretrained(f"{output_dir}/as-it-is")
    return out


@pytest.mark.parametrize("async_save", [False, True])
def test_weights_that_are_not_finite_are_not_saved(pool: WorkerPool, tmp_path: Path, async_save: bool) -> None:
    names = ["dp2 zero1", "dp2 zero3"] if async_save else ["tp2", "pp2"]
    messages = pool.run(2, saves_in_layouts, str(tmp_path), names, async_save)
    for name in names:
        assert messages[0][name] == messages[1][name]
        out = tmp_path / name
        for kind, message in messages[0][name].values():
            assert kind == "NonFiniteWeightsError" and "'model.layers.1.mlp.up_proj.weight'" in message
            assert f"Resume from {out / 'checkpoint-2'}" in message and "after step" in message
        assert "checkpoint-4 is not saved" in messages[0][name]["checkpoint"][1]
        assert (out / "checkpoint-2" / "committed.json").is_file() and not (out / "checkpoint-4").exists()
        assert not (out / "model.safetensors").exists() and not (out / "elsewhere").exists()
        assert list((out / "as-it-is").glob("*.safetensors"))


def saves_in_layouts(output_dir: str, names: list[str], async_save: bool) -> dict[str, Any]:
    return {name: saves(f"{output_dir}/{name}", {**LAYOUTS[name], "async_save": async_save}) for name in names}


def other_ways(output_dir: str) -> dict[str, str]:
    """Weights that no gradient has broken: an absurd learning rate, masters beyond bfloat16, a frozen weight."""
    out: dict[str, str] = {}

    def note(name: str, trainer: NanotronTrainer) -> None:
        with pytest.raises(ArithmeticError) as error:
            trainer.train()
        out[name] = f"{type(error.value).__name__}: {error.value}"

    each_step = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    rows = random_dataset(8).map(lambda row: {name: [max(v, 6) if v > 0 else v for v in row[name]] for name in row})
    note("rate", make(f"{output_dir}/rate", learning_rate=3e38, weight_decay=100.0, optim="sgd", **each_step))
    # Of a token that does not occur. The weight is what its master is rounded to; any other was set, and is taken.
    trainer = make(f"{output_dir}/bf16", bf16=True, learning_rate=0.0, train_dataset=rows, **each_step)
    width, embedding = trainer.model.config.hidden_size, "model.embed_tokens.weight"
    (segment,) = [segment for segment in trainer.weights.segments if segment.name == embedding]
    segment.master.data[5 * width : 6 * width] = torch.finfo(torch.float32).max
    trainer.model.get_parameter(embedding).data[5] = float("inf")
    note("bf16", trainer)
    args = NanotronTrainingArguments(**training_arguments(output_dir=f"{output_dir}/frozen", **COMMON, **each_step))
    model = AutoModelForCausalLM.from_config(tiny_config(num_hidden_layers=2), parallel=args.parallel)
    model.model.embed_tokens.weight.data[5] = float("nan")  # a token that does not occur
    model.model.embed_tokens.weight.requires_grad = False
    note("frozen", NanotronTrainer(model=model, args=args, train_dataset=rows, data_collator=pad_batch))
    return out


def test_other_ways_to_lose_weights(pool: WorkerPool, tmp_path: Path) -> None:
    (got,) = pool.run(1, other_ways, str(tmp_path))
    for name in ("rate", "bf16", "frozen"):
        assert got[name].startswith("NonFiniteWeightsError: checkpoint-1 is not saved"), got
        assert "There is no checkpoint before it" in got[name]
        assert not (tmp_path / name / "checkpoint-1").exists()
        assert name == "rate" or "'model.embed_tokens.weight'" in got[name]


class Acts(TrainerCallback):
    """Does something after a step, right before what is saved then."""

    def __init__(self, step: int, act: Any) -> None:
        self.step, self.act = step, act

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.act(self.trainer)


def write_nan(trainer: NanotronTrainer) -> None:
    """As a script does, and not into the masters."""
    trainer.model.get_parameter("model.layers.1.mlp.up_proj.weight").data[3, 2] = float("nan")


def write_moment(trainer: NanotronTrainer) -> None:
    (segment,) = [each for each in trainer.weights.segments if each.name == "model.layers.1.mlp.up_proj.weight"]
    trainer.optimizer.state[segment.master]["exp_avg_sq"][7] = float("inf")


def tell_to_stop(_: NanotronTrainer) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


class SlowSave:
    """Holds a background save until the next save looks for it."""

    def __init__(self, trainer: NanotronTrainer) -> None:
        self.begin, self.go_on = trainer._checkpointer.finish, threading.Event()
        write = Save._write
        trainer._checkpointer.finish = self.finish  # type: ignore[method-assign]
        Save._write = lambda save, rank: (self.go_on.wait(600), write(save, rank))  # type: ignore[method-assign]
        self.restore = lambda: setattr(Save, "_write", write)

    def finish(self, wait: bool = True) -> None:
        if wait:
            self.go_on.set()
        self.begin(wait)


def each_way(output_dir: str) -> dict[str, Any]:
    """What is not finite, and when: what is said, and the files that are there afterwards."""
    out: dict[str, Any] = {}
    every = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    at_end = {"save_strategy": "steps", "save_steps": 2, "max_steps": 3}  # and once more, at the end
    ways: dict[str, tuple[Any, dict[str, Any]]] = {
        "written": (write_nan, {**every, "bf16": True}),
        "written, async": (write_nan, {**every, "bf16": True, "async_save": True}),
        "written, fp32": (write_nan, every),
        "written, model alone": (write_nan, {**every, "save_only_model": True}),
        "moment": (write_moment, every),
        "moment, async": (write_moment, {**every, "async_save": True}),
        "signal": (write_nan, {**every, "save_steps": 2, "save_on_signal": 300.0}),
        "the end": (write_nan, at_end),
        "a moment without state": (write_moment, {**every, "max_steps": 3, "save_only_model": True}),
    }
    for name, (act, arguments) in ways.items():
        callback, before = Acts(3, act), Acts(2 if name == "signal" else 0, tell_to_stop)  # the next step saves
        trainer = make(f"{output_dir}/{name}", [callback, before], **arguments)
        callback.trainer = before.trainer = trainer
        slow = SlowSave(trainer) if arguments.get("async_save") else None
        try:
            trainer.train()
            out[name] = "nothing was raised"
        except ArithmeticError as error:
            out[name] = f"{type(error).__name__}: {error}"
        if slow is not None:
            slow.restore()
        out[f"{name}: committed"] = sorted(path.parent.name for path in Path(output_dir, name).glob("*/committed.json"))
    # a checkpoint of an earlier version: resumed, the run says what it holds
    every["max_steps"] = 3
    refuse, trainer = NonFiniteGuard.refuse_to_save, make(f"{output_dir}/old", [callback], **every)
    callback.act, callback.trainer = write_moment, trainer
    NonFiniteGuard.refuse_to_save = lambda *_, **__: None  # type: ignore[method-assign]
    trainer.train()
    NonFiniteGuard.refuse_to_save = refuse  # type: ignore[method-assign]
    for name, source in {"resume": f"{output_dir}/old/checkpoint-3", "resume the newest": True}.items():
        with pytest.raises(ArithmeticError) as error:
            make(f"{output_dir}/old", **{**every, "max_steps": 5}).train(resume_from_checkpoint=source)
        out[name] = str(error.value)
    resumed = make(f"{output_dir}/written", **{**every, "bf16": True, "max_steps": 4})
    out["goes on"] = resumed.train(resume_from_checkpoint=True).global_step
    return out


def test_nothing_of_a_checkpoint_that_is_not_finite_is_written(pool: WorkerPool, tmp_path: Path) -> None:
    (got,) = pool.run(1, each_way, str(tmp_path))
    name = "model.layers.1.mlp.up_proj.weight"
    for way in (
        "written", "written, async", "written, fp32", "written, model alone", "moment", "moment, async", "signal",
        "the end",
    ):  # fmt: skip
        what = ("the optimizer's state of " if "moment" in way else "the weight ") + repr(name)
        assert got[way].startswith(f"NonFiniteWeightsError: checkpoint-3 is not saved: {what} is not finite"), got
        assert f"after step 3. Resume from {tmp_path / way / 'checkpoint-2'} and" in got[way], got
        committed = got[f"{way}: committed"]
        assert committed == ["checkpoint-1", "checkpoint-2"][-len(committed) :] != [], got
    assert got["a moment without state"] == "nothing was raised"  # the weights are finite
    assert (tmp_path / "a moment without state/checkpoint-3/committed.json").is_file()
    for way in ("resume", "resume the newest"):
        assert f"checkpoint-3: the optimizer's state of {name!r} is not finite there" in got[way], got
        assert got[way].endswith(f"Resume from {tmp_path / 'old' / 'checkpoint-2'}."), got
    assert got["goes on"] == 4


def test_sums_of_finite_losses() -> None:
    losses, logged = FiniteLosses(torch.device("cpu")), torch.tensor(0.0)
    nan = torch.tensor(float("nan"))
    for loss, wanted in ((nan, 0.0), (torch.tensor(4.0), 8.0), (nan, 12.0), (torch.tensor(2.0), 12.0)):
        logged += losses.add(loss, logged)
        assert logged.item() == wanted  # the mean of the finite ones times the steps
    assert losses.close() and losses.missing(12.0, 4) == 0.0
    losses.add(nan, torch.tensor(0.0))
    assert not losses.close() and losses.missing(12.0, 4) == 4.0 and math.isnan(losses.missing(0.0, 1))


def make_guard(output_dir: str, **arguments: Any) -> NonFiniteGuard:
    """Without a trainer."""
    args = NanotronTrainingArguments(**training_arguments(output_dir=output_dir, **arguments))
    model = AutoModelForCausalLM.from_config(tiny_config(num_hidden_layers=1), parallel=args.parallel)
    weights = shard_weights(model, torch.float32, args.gradient_bucket_bytes)
    return NonFiniteGuard(args, model, weights, lambda besides=None: "Resume from checkpoint-2")


def test_steps_in_a_row(tmp_path: Path) -> None:
    """One that is not finite is skipped, and one after a finite one; two in a row end the run."""
    guard = make_guard(str(tmp_path), skip_nonfinite_steps=True, max_skipped_steps=1)
    link: Any = SimpleNamespace(skips_on_device=False, skips_next=None)
    loss = torch.tensor(1.0)
    for step, norm in enumerate((math.nan, 1.0, math.inf), 1):
        judged = guard.judge(step, torch.tensor(norm), loss, link)
        assert judged == math.isfinite(norm) and link.skips_next is not judged
    with pytest.raises(NonFiniteGradientError, match="^step 4: .* 2 steps in a row .* those of step 2, .* Resume from"):
        guard.judge(4, torch.tensor(math.nan), loss, link)
    guard.begin_run()
    link.skips_on_device, link.skip_unless_finite = True, lambda norm: None
    assert guard.judge(5, torch.tensor(math.nan), loss, link) and guard.arriving is not None  # nobody has waited
    assert not guard.check() and guard.arriving is None and guard.check()


def test_a_mean_over_no_finite_loss(tmp_path: Path) -> None:
    guard, logged = make_guard(str(tmp_path), logging_nan_inf_filter=True), torch.tensor(0.0)
    with guard.filtering():
        assert not guard.args.logging_nan_inf_filter and guard.asked_to_filter
        with guard.evaluating():
            assert guard.args.logging_nan_inf_filter
        logs = {"loss": guard.filtered(torch.tensor(math.nan), logged).item()}
        assert logs["loss"] == 0.0
        guard.filter_logs(logs)
        assert math.isnan(logs["loss"])
        assert guard.filtered(torch.tensor(3.0), logged) == 3.0
    assert guard.args.logging_nan_inf_filter and guard.missing(3.0, 2) == 3.0
    assert math.isnan(guard.filtered(torch.tensor(math.nan), logged))


@pytest.mark.parametrize("value", [0, -1, "many", True, None, 2.5])
def test_the_limit_is_a_number_of_steps(tmp_path: Path, value: Any) -> None:
    with pytest.raises(ValueError, match="max_skipped_steps="):
        NanotronTrainingArguments(output_dir=str(tmp_path), use_cpu=True, max_skipped_steps=value)


def evaluates_unlabelled(output_dir: str) -> tuple[float, float]:
    """A batch without labels has a loss of NaN, which Trainer leaves out of the mean; also while it trains."""
    trainer = make(output_dir, max_steps=1, eval_strategy="steps", eval_steps=1, learning_rate=0.0)
    trainer.args.per_device_eval_batch_size = 2
    rows = [dict(row) for row in random_dataset(4)]
    for row in rows[:2]:
        row["labels"] = [-100] * len(row["labels"])
    trainer.eval_dataset = rows
    trainer.train()
    (during,) = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return during, trainer.evaluate()["eval_loss"]


def test_evaluation_filters_the_same_while_training(pool: WorkerPool, tmp_path: Path) -> None:
    ((during, after),) = pool.run(1, evaluates_unlabelled, str(tmp_path))
    assert during == after and not math.isnan(after)
