"""The moving average of the weights: torch's `AveragedModel` to the last bit, on any layout, saved and resumed."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from family_runs import tiny_model
from pool import WorkerPool
from tiny import History, message, pad_batch, random_dataset, training_arguments
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import AutoModelForCausalLM as StockAuto, TrainerCallback

from hf_nanotron import AutoModelForCausalLM as ParallelAuto, NanotronTrainer, NanotronTrainingArguments
from hf_nanotron.checkpoint.files.repository import copy_average, drop_average

DECAY, STEPS, SAVED, GLOBAL_BATCH = 0.7, 4, 2, 8
# world size, family, sizes
LAYOUTS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "one process": (1, "qwen3", {"async_save": True}),
    "pp2": (2, "qwen3", {"pp_size": 2, "async_save": True}),
}
WIDE: dict[str, tuple[int, str, dict[str, Any]]] = {
    "dp2 zero3": (2, "qwen3", {"zero_stage": 3}),
    "tp2 pp2": (4, "qwen3", {"tp_size": 2, "pp_size": 2, "async_save": True}),
    "dp2 zero0": (2, "qwen3", {"zero_stage": 0}),
    "pp2 dp2 zero3": (4, "qwen3", {"pp_size": 2, "zero_stage": 3}),
    "cp2 dp2 zero2": (4, "qwen3", {"cp_size": 2, "zero_stage": 2}),
    "tp2 dp2": (4, "qwen3", {"tp_size": 2}),
    "tp2 dp2 bf16": (4, "qwen3", {"tp_size": 2, "bf16": True}),
    "pp2 interleaved": (2, "qwen3", {"pp_size": 2, "pp_schedule": "interleaved_1f1b", "pp_virtual_stages": 2}),
    "ep2 dp2": (2, "qwen3_moe", {"ep_size": 2}),
    "ep4 tp2": (4, "qwen3_moe", {"ep_size": 4, "tp_size": 2, "zero_stage": 0}),
}
OVERRIDES: dict[str, dict[str, Any]] = {"qwen3": {"tie_word_embeddings": True, "num_hidden_layers": 4}, "qwen3_moe": {}}


class Reference(TrainerCallback):
    """torch's own average over the masters of this rank, updated after each step of which the gradient is finite."""

    def __init__(self, skipped: tuple[int, ...] = (), start: int = 0) -> None:
        self.skipped, self.start, self.average = skipped, start, None
        self.trainer: Any = None

    def masters(self) -> torch.nn.Module:
        values = [torch.nn.Parameter(s.master.detach().clone()) for s in self.trainer.weights.segments]
        return torch.nn.ParameterList(values)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.average = AveragedModel(self.masters(), multi_avg_fn=get_ema_multi_avg_fn(DECAY))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step not in self.skipped and state.global_step > self.start:
            self.average.update_parameters(self.masters())

    def is_equal(self) -> bool:
        pairs = zip(self.average.module, self.trainer._average.shadows, strict=True)
        return all(torch.equal(reference.detach(), shadow) for reference, shadow in pairs)


def train(
    layout: str, weights: str, output: str, resume_from: str | None, **overrides: Any
) -> tuple[bool, list[float], int, float]:
    """Whether the shadows of this rank are torch's, the losses, and the updates and bytes of the average."""
    world, _, sizes = {**LAYOUTS, **WIDE}[layout]
    parallel = {name: sizes.get(name, 1) for name in ("tp_size", "pp_size", "cp_size")}
    dp = world // (parallel["tp_size"] * parallel["pp_size"] * parallel["cp_size"])
    values = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": SAVED, "ema_decay": DECAY}
    values |= {"gradient_accumulation_steps": GLOBAL_BATCH // dp, **sizes, **overrides}
    skipped, start = values.pop("skipped", ()), values.get("ema_start_step", 0)
    args = NanotronTrainingArguments(**training_arguments(output_dir=output, **values))
    model = ParallelAuto.from_pretrained(weights, parallel=args.parallel)
    reference, history = Reference(skipped, start), History()
    trainer = NanotronTrainer(
        model=model,
        args=args,
        train_dataset=random_dataset(40),
        eval_dataset=random_dataset(8, seed=1),
        data_collator=pad_batch,
        callbacks=[reference, history],
    )
    reference.trainer = trainer
    if skipped:
        spoil = lambda gradient, part: gradient * float("inf") if trainer.state.global_step + 1 in skipped else gradient  # noqa: E731
        trainer.add_gradient_hook("*norm.weight", spoil)
    trainer.train(resume_from_checkpoint=resume_from)
    is_equal = resume_from is not None or reference.is_equal()
    loss = trainer.evaluate()["eval_loss"]
    assert trainer._average is not None and trainer.memory_report.average == trainer._average.nbytes
    updates = int(trainer._average.updates)
    model.mesh.close()
    return is_equal, history.losses, updates, loss


def start(family: str, directory: Path) -> str:
    tiny_model(family, **OVERRIDES[family]).save_pretrained(directory / family)
    return str(directory / family)


def averaged(output: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    return StockAuto.from_pretrained(output / f"checkpoint-{step}", subfolder="ema").state_dict()


def farthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name].float() - other[name].float()).abs().max().item() for name in one)


def test_layouts(pool: WorkerPool, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """On every layout the shadows are torch's, and what stock transformers loads is the average of one process."""
    layouts = {**LAYOUTS, **WIDE} if request.config.getoption("--full-matrix") else LAYOUTS
    first: dict[str, Any] = {}
    for layout, (world, family, _) in layouts.items():
        output = tmp_path / layout.replace(" ", "-")
        results = pool.run(world, train, layout, start(family, tmp_path), str(output), None)
        assert all(is_equal for is_equal, *_ in results), f"{layout}: other shadows than torch's"
        assert {updates for _, _, updates, _ in results} == {STEPS}
        own, weights = averaged(output), StockAuto.from_pretrained(output / f"checkpoint-{STEPS}").state_dict()
        distance = farthest(own, weights)
        assert distance > 1e-3, "the average is not the weights"
        other = first.setdefault(family, own)
        assert (gap := farthest(own, other)) < (distance if "bf16" in layout else 1e-5), (layout, gap, distance)
        if "pp2" not in layout:
            continue
        same, moved = output / "same", output / "moved"
        if request.config.getoption("--full-matrix"):
            again = pool.run(world, train, layout, str(tmp_path / family), str(same), str(output / "checkpoint-2"))
            assert again[0][1] == results[0][1][SAVED:]
            assert farthest(averaged(same), own) == 0
        pool.run(2, train, "dp2 zero3", str(tmp_path / family), str(moved), str(output / "checkpoint-2"))
        assert farthest(averaged(moved), own) < 1e-5


@pytest.mark.parametrize("changes", [{"skipped": (1,)}, {"skipped": (3,), "ema_start_step": 1}], ids=str)
def test_skipped_steps(tmp_path: Path, changes: dict[str, Any]) -> None:
    """A step that is skipped is no update, whether the host or the device finds out; nor is one before the start."""
    overrides = {"skip_nonfinite_steps": True, "save_strategy": "no", "async_save": False, **changes}
    is_equal, losses, updates, _ = train("one process", start("qwen3", tmp_path), str(tmp_path), None, **overrides)
    assert is_equal and updates == STEPS - len(changes["skipped"]) - changes.get("ema_start_step", 0)


def test_evaluation(tmp_path: Path) -> None:
    """With `ema_evaluate` the loss is that of the average, and the weights are back after."""
    weights = start("qwen3", tmp_path)
    results = [
        train("one process", weights, str(tmp_path / str(flag)), None, ema_evaluate=flag, async_save=False)
        for flag in (False, True)
    ]
    assert results[0][1] == results[1][1]
    loss = train(
        "one process", str(tmp_path / "True" / "checkpoint-4" / "ema"), str(tmp_path / "x"), None,
        max_steps=1, learning_rate=0.0, weight_decay=0.0, save_strategy="no", async_save=False,
    )[3]  # fmt: skip
    assert loss == pytest.approx(results[True][3], rel=1e-6)
    assert abs(results[0][3] - results[1][3]) > 1e-3


def test_refusals() -> None:
    make = lambda **values: NanotronTrainingArguments(**training_arguments(**values))  # noqa: E731
    assert "ema_decay=1.5 must be at least 0 and below 1" in message(lambda: make(ema_decay=1.5))
    assert "ema_start_step=3 needs ema_decay" in message(lambda: make(ema_start_step=3))
    best = {"load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "steps", "eval_steps": 1}
    assert "load the folder ema" in message(lambda: make(ema_decay=0.9, ema_evaluate=True, save_steps=1, **best))


@pytest.mark.parametrize("save_only_model", [False, True])
def test_the_best_weights_have_their_average(tmp_path: Path, save_only_model: bool) -> None:
    """What is saved after a run is the average of the checkpoint whose weights were loaded; other weights have none."""
    values = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 3}
    values |= {"load_best_model_at_end": True, "greater_is_better": True, "learning_rate": 0.3}
    averages = []
    for decay in (DECAY, None):
        args = NanotronTrainingArguments(
            **training_arguments(output_dir=str(tmp_path / f"run-{decay}"), ema_decay=decay, **values),
            save_only_model=save_only_model,
        )
        model = ParallelAuto.from_pretrained(start("qwen3", tmp_path), parallel=args.parallel)
        data = {"train_dataset": random_dataset(8), "eval_dataset": random_dataset(8, seed=1)}
        trainer = NanotronTrainer(model=model, args=args, data_collator=pad_batch, **data)
        trainer.train()
        best = Path(trainer.state.best_model_checkpoint)
        assert best.name == "checkpoint-2"  # neither the first, whose average is its weights, nor the last
        trainer.save_model(str(tmp_path / "saved"))
        model.mesh.close()
        averages.append((tmp_path / "saved" / "ema").exists())
        if decay is not None:
            own, expected = (
                StockAuto.from_pretrained(f, subfolder="ema").state_dict() for f in (tmp_path / "saved", best)
            )
            assert farthest(own, expected) == 0
    assert averages == [True, False]


def test_the_folder_of_a_run_is_no_average(tmp_path: Path) -> None:
    """A run may be called `ema`; its weights stay when those beside it are saved."""
    for name in ("ours", "runs"):
        (tmp_path / name / "ema").mkdir(parents=True)
        for file in ("model.safetensors", "config.json", *(["training_args.bin"] if name == "runs" else ())):
            (tmp_path / name / "ema" / file).touch()
        drop_average(tmp_path / name)
    assert not (tmp_path / "ours" / "ema").exists() and len(list((tmp_path / "runs" / "ema").iterdir())) == 3
    (tmp_path / "ours" / "ema").mkdir()
    (tmp_path / "ours" / "ema" / "model-00001-of-00002.safetensors").touch()
    (tmp_path / "checkpoint-1" / "ema").mkdir(parents=True)
    (tmp_path / "checkpoint-1" / "ema" / "model.safetensors").write_text("new")
    copy_average(tmp_path / "checkpoint-1", tmp_path / "ours")  # for a push
    assert {path.name: path.read_text() for path in (tmp_path / "ours" / "ema").iterdir()} == {
        "model.safetensors": "new"
    }


def test_a_run_that_begins_or_leaves_an_average(tmp_path: Path) -> None:
    """Says so, and begins with the weights of the checkpoint."""
    weights, told = start("qwen3", tmp_path), []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("hf_nanotron.checkpoint.state.training_state")
    logger.addHandler(handler)
    cases = (("without", None, None), ("with", DECAY, "without"), ("again", None, "with"))
    for step, (name, decay, source) in enumerate(cases, 1):
        values = {"max_steps": step, "save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}
        args = NanotronTrainingArguments(
            **training_arguments(output_dir=str(tmp_path / name), ema_decay=decay, **values)
        )
        model = ParallelAuto.from_pretrained(weights, parallel=args.parallel)
        trainer = NanotronTrainer(model=model, args=args, train_dataset=random_dataset(8), data_collator=pad_batch)
        trainer.train(resume_from_checkpoint=source and str(tmp_path / source / f"checkpoint-{step - 1}"))
        if name == "with":  # one update: the weights themselves
            own = StockAuto.from_pretrained(tmp_path / name / "checkpoint-2").state_dict()
            assert farthest(averaged(tmp_path / name, 2), own) == 0
        model.mesh.close()
    logger.removeHandler(handler)
    assert len(told) == 2
    assert "holds no moving average: that of this run begins with its weights" in told[0]
    assert f"has no ema_decay (there it was {DECAY})" in told[1]
    assert not (tmp_path / "again" / "checkpoint-3" / "ema").exists()
