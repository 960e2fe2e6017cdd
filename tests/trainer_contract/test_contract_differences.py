"""Where a run with our classes is meant to differ from one with stock classes: the list of the docs, row by row."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import Kit, both, lines, run, said
from pool import WorkerPool
from tiny import random_dataset
from transformers import AutoModelForCausalLM, LlamaForCausalLM, TrainerCallback, TrainingArguments, set_seed

from hf_nanotron import NanotronTrainingArguments

TESTS = Path(__file__).parent.parent
PAGE = TESTS.parent / "docs" / "moving" / "from_trainer.md"

# Each row of the page, by its first cell, and the test that holds it.
HELD_BY = {
    # losses and gradients
    "divisor of the loss of GPT-2 and other classes not named `...ForCausalLM`, a subclass `M` of your own too":
        "test_models.py::test_the_divisor_of_stock_follows_from_the_name_of_a_class",
    "a gradient that is not finite": "test_nonfinite.py::test_steps_in_a_row",
    "a step without a single label (all -100)": "test_nonfinite.py::test_steps_without_a_label_change_nothing",
    "logged loss with `logging_nan_inf_filter` where a loss is not finite":
        "test_nonfinite.py::test_a_mean_over_no_finite_loss",
    "`train_loss` with losses that are not finite": "test_nonfinite.py::test_skipped_steps",
    "`train_loss` of a run that a callback stops within a step":
        "trainer_contract/test_contract_loop.py::test_a_stop_within_a_step",
    "weights that are not finite": "test_nonfinite.py::test_weights_that_are_not_finite_are_not_saved",
    "`bf16=True`": "test_precision_and_dropout.py::test_bf16_keeps_fp32_masters",
    "a model that was loaded in bfloat16 (transformers loads a checkpoint in its own dtype), without `bf16=True`":
        "trainer_contract/test_contract_differences.py::test_models_loaded_in_half_precision",
    "a model that was loaded in float16, without `bf16=True`":
        "trainer_contract/test_contract_differences.py::test_models_loaded_in_half_precision",
    "packed documents of a text model inside another, such as gemma3n, and of any model with `use_cache=True`":
        "test_packed_caches.py::test_packed_documents_stay_apart_in_training_and_evaluation",
    "label smoothing": "trainer_contract/test_contract_differences.py::test_labels_of_a_subclass_are_shifted",
    "`neftune_noise_alpha`": "trainer_contract/test_contract_data.py::test_noise_on_embeddings",
    "hooks on the gradient of a weight (`register_hook`)":
        "test_user_gradients.py::test_hooks_that_would_be_lost_are_refused",
    "`grad` of parameters in `on_pre_optimizer_step`":
        "trainer_contract/test_contract_differences.py::test_gradients_of_parameters",
    "a trainable weight that no batch uses (an embedding under `inputs_embeds`)":
        "trainer_contract/test_contract_differences.py::test_a_weight_that_no_batch_uses",
    "`requires_grad` changed by a callback, or between two calls of `train`":
        "trainer_contract/test_contract_optimizers.py::test_weights_that_callbacks_freeze",
    "two calls of a model with dropout for one micro-batch":
        "trainer_contract/test_contract_differences.py::test_two_calls_with_dropout",
    "dropout masks": "test_precision_and_dropout.py::test_masks_follow_sample_and_layer",
    "fresh weights (`AutoModelForCausalLM.from_config`)": "test_initialize.py::test_every_topology_has_the_same_values",
    "the loss that `training_step` returns":
        "trainer_contract/test_contract_differences.py::test_what_training_step_returns",
    "`torch_compile`": "trainer_contract/test_contract_differences.py::test_what_is_compiled_unless_told",
    "attention kernels": "test_attention.py::test_choice",
    "TF32 under `torch_compile`": "test_training_args.py::test_compiling_does_not_change_precision",
    "an optimizer over the parameters of a stock model, with `tp_size` or `pp_size` above 1":
        "trainer_contract/test_contract_optimizers.py::test_an_optimizer_over_a_stock_model_that_is_cut",
    # the log and callbacks
    "log lines": "trainer_contract/test_contract_loop.py::test_what_callbacks_are_given",
    "callbacks of a trainer": "trainer_contract/test_contract_loop.py::test_callbacks_of_a_trainer",
    # data and evaluation
    "shuffle with `data_seed=None`": "trainer_contract/test_contract_data.py::test_runs_of_a_seed_are_the_same",
    "seed of `group_by_length`": "trainer_contract/test_contract_data.py::test_batches_by_length",
    "a sampler of your own that draws random numbers":
        "trainer_contract/test_contract_data.py::test_samplers_of_users",
    "several data-parallel ranks, at the end of an epoch": "test_data_order.py::test_order_equals_stock",
    "`dataloader_drop_last` on several data-parallel ranks":
        "trainer_contract/test_contract_loop.py::test_what_drop_last_leaves_out_on_data_parallel_ranks",
    "evaluation on several data-parallel ranks": "test_evaluation.py::test_evaluation_equals_stock",
    "`eval_do_concat_batches=False` on several data-parallel ranks": "test_evaluation.py::test_evaluation_equals_stock",
    "an `IterableDataset`": "test_data_order.py::test_several_workers_would_change_the_order_of_a_stream",
    "predictions of a mixture of experts with `output_router_logits=True`":
        "test_custom_loss.py::test_predictions_of_a_mixture",
    "ranks that hold other data, or read it in another order":
        "test_data_agreement.py::test_ranks_that_read_different_samples_are_told",
    "a stream of samples drawn from the entropy of the system, on several data-parallel ranks":
        "test_data_agreement.py::test_ranks_that_read_different_samples_are_told",
    "a resume with other data": "test_data_agreement.py::test_a_resume_over_other_samples_is_refused",
    "ids outside the vocabulary": "test_vocabulary_check.py::test_ids_outside_the_vocabulary",
    "`max_steps=0`": "trainer_contract/test_contract_arguments.py::test_ours_refuses_with_what_to_use",
    # checkpoints
    "optimizer and scheduler": "trainer_contract/test_contract_checkpoints.py::test_what_a_checkpoint_holds",
    "`output_dir`": "trainer_contract/test_contract_checkpoints.py::test_what_a_checkpoint_holds",
    "a checkpoint that is complete": "test_checkpoint_manager.py::test_without_its_marker_it_does_not_count",
    "`resume_from_checkpoint=True`": "test_runs.py::test_resume_takes_the_newest_of_the_run_that_started_last",
    "learning rate of the first step of a resume with more `max_steps`":
        "trainer_contract/test_contract_checkpoints.py::test_rates_of_a_resume_with_more_steps",
    "a checkpoint of the stock Trainer": "trainer_contract/test_contract_checkpoints.py::test_a_checkpoint_of_stock",
    "what `save_total_limit` counts": "test_runs.py::test_each_run_keeps_its_own_number",
    "`save_total_limit=1` with `load_best_model_at_end`":
        "trainer_contract/test_contract_loop.py::test_a_limit_of_one_keeps_the_best_and_the_last",
    "deleting or overwriting a `checkpoint-N`": "test_own_files.py::test_a_users_files_stay",
    "a fresh run in a folder with checkpoints": "test_runs.py::test_start_of_a_run",
    "two runs in one `output_dir`": "test_runs.py::test_a_second_run_is_refused_on_every_rank",
    "order of the data after a resume": "test_data_cursor.py::test_a_resumed_run_goes_on_with_the_next_sample",
    "`save_model`, `push_to_hub`": "test_ranks_differ.py::test_only_rank_0_comes",
    "`training_args.bin`": "test_secrets.py::test_arguments_are_written_without_secrets",
    "weights that modules share, without `_tied_weights_keys` and `config.tie_word_embeddings` that say so":
        "test_models.py::test_what_cannot_be_cut_is_refused_on_every_rank",
    "weights or optimizer states that are not finite":
        "test_nonfinite.py::test_nothing_of_a_checkpoint_that_is_not_finite_is_written",
    # processes
    "several GPUs seen by one process": "test_training_args.py::test_one_gpu_per_process",
    "no accelerator":
        "trainer_contract/test_contract_differences.py::test_processes_without_an_accelerator_are_one_job",
    "`ddp_timeout`": "test_training_args.py::test_process_group_has_the_timeout",
    "`hyperparameter_search`": "trainer_contract/test_contract_differences.py::test_no_search_of_hyperparameters",
}  # fmt: skip


def rows() -> list[str]:
    """First cells of the tables under "What is different"."""
    text = PAGE.read_text(encoding="utf-8").partition("## What is different")[2]
    cells = re.findall(r"^\| (\S.*?) \|", text, re.MULTILINE)
    return [cell for cell in cells if not cell.startswith("| stock")]


def test_each_difference_of_the_docs_is_held_by_a_test() -> None:
    found = rows()
    assert len(found) == len(set(found)) > 40, sorted(found)
    assert set(found) == set(HELD_BY)


@pytest.mark.parametrize("held_by", sorted(set(HELD_BY.values())))
def test_the_tests_exist(held_by: str) -> None:
    file, _, name = held_by.partition("::")
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


# ---- those that no other test holds ----


class Mine(LlamaForCausalLM):
    """A causal LM whose name Trainer does not know."""


def smoothed(kit: Kit) -> float:
    set_seed(0)
    model = Mine(kit.model().config)
    return kit.trainer(model=model, label_smoothing_factor=0.1, data_collator=None).evaluate()["eval_loss"]


def as_llama(kit: Kit) -> float:
    set_seed(0)
    model = LlamaForCausalLM(kit.model().config)
    return kit.trainer(model=model, label_smoothing_factor=0.1, data_collator=None).evaluate()["eval_loss"]


def test_labels_of_a_subclass_are_shifted(pool: WorkerPool) -> None:
    """Stock smooths the labels of such a class without shifting them; ours has the loss of the class that it knows."""
    stock, found = both(pool, smoothed)
    known, _ = both(pool, as_llama)
    assert found == pytest.approx(known, rel=1e-5) and abs(stock - known) > 1e-3


@pytest.mark.parametrize(
    ("device", "bf16", "asked", "compiles"),
    [
        ("cuda", True, None, True),
        ("cuda", False, None, False),
        ("cpu", True, None, False),
        ("cuda", True, False, False),
    ],
)
def test_what_is_compiled_unless_told(
    device: str, bf16: bool, asked: bool | None, compiles: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stock compiles nothing unless it is told to."""
    known = TrainingArguments.device.fget  # type: ignore[attr-defined]
    monkeypatch.setattr(TrainingArguments, "device", property(lambda self: known(self) and torch.device(device)))
    values = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": bf16}
    assert not TrainingArguments(**values).torch_compile
    told = {} if asked is None else {"torch_compile": asked}
    assert NanotronTrainingArguments(**values, **told).torch_compile is compiles


def loaded_in_half(kit: Kit) -> dict[str, Any]:
    folder, found = str(kit.folder / "bfloat16"), {}
    kit.model().to(torch.bfloat16).save_pretrained(folder)
    for name, bf16 in (("without", False), ("with", True)):
        trainer = kit.trainer(model=AutoModelForCausalLM.from_pretrained(folder), max_steps=3, bf16=bf16)
        trainer.train()
        found[name] = lines(trainer)
        dtypes = {segment.master.dtype for segment in trainer.weights.segments}
        found[f"{name}: dtypes"] = [str(trainer.model.model.norm.weight.dtype), *map(str, dtypes)]
    found["float16"] = said(lambda: kit.trainer(model=kit.model().half(), max_steps=1).train())
    found["float16 with bf16"] = said(lambda: kit.trainer(model=kit.model().half(), max_steps=1, bf16=True).train())
    return found


def test_models_loaded_in_half_precision(pool: WorkerPool, tmp_path: Path) -> None:
    """Masters are fp32 whatever the model was loaded in."""
    (found,) = pool.run(1, run, loaded_in_half, True, str(tmp_path), {})
    assert found["without"] == found["with"]
    assert found["without: dtypes"] == found["with: dtypes"] == ["torch.bfloat16", "torch.float32"]
    assert "Use bf16=True, or load the model with dtype=torch.float32" in found["float16"]
    assert found["float16 with bf16"] == "nothing was raised"


class Gradients(TrainerCallback):
    """Whether parameters have gradients when the optimizer is about to step."""

    def __init__(self) -> None:
        self.found: list[bool] = []
        self.trainer: Any = None
        self.sums: dict[str, float] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.found += [parameter.grad is not None for parameter in model.parameters()]
        if hasattr(self.trainer, "gradients"):
            self.sums = {name: gradient.abs().sum().item() for name, _, gradient in self.trainer.gradients()}
        else:
            self.sums = {name: parameter.grad.abs().sum().item() for name, parameter in model.named_parameters()}


def gradients(kit: Kit) -> dict[str, Any]:
    callback = Gradients()
    trainer = kit.trainer(callbacks=[callback], max_steps=1)
    callback.trainer = trainer
    trainer.train()
    return {"found": sorted(set(callback.found)), "sums": dict(sorted(callback.sums.items()))}


def test_gradients_of_parameters(pool: WorkerPool) -> None:
    stock, found = both(pool, gradients)
    assert stock["found"] == [True] and found["found"] == [False]
    assert found["sums"] == pytest.approx(stock["sums"], rel=1e-4)


def unused(kit: Kit) -> float:
    """How far an embedding moves under weight decay that no batch uses."""
    model = kit.model()
    generator = torch.Generator().manual_seed(0)
    embeds = [torch.randn(8, 16, generator=generator).tolist() for _ in range(4)]
    data = random_dataset(4, length=8).remove_columns("input_ids").add_column("inputs_embeds", embeds)

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {name: torch.tensor([row[name] for row in rows]) for name in ("inputs_embeds", "labels")}

    trainer = kit.trainer(
        model=model, train=data, data_collator=collate, max_steps=1, weight_decay=0.1, lr_scheduler_type="constant"
    )
    before = trainer.model.get_input_embeddings().weight.detach().clone()
    trainer.train()
    return (trainer.model.get_input_embeddings().weight.detach().norm() / before.norm()).item()


def test_a_weight_that_no_batch_uses(pool: WorkerPool) -> None:
    stock, found = both(pool, unused)
    assert stock == 1.0 and found == pytest.approx(1 - 1e-2 * 0.1, rel=1e-4)


def called_twice(kit: Kit) -> str:
    class Twice(kit.Trainer):  # type: ignore[misc, name-defined]
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            first, second = model(**inputs).logits, model(**inputs)
            return second.loss + (first - second.logits).pow(2).mean()

    trainer = kit.trainer(base=Twice, model=kit.model(attention_dropout=0.5), max_steps=1)
    return said(trainer.train)


def test_two_calls_with_dropout(pool: WorkerPool) -> None:
    stock, found = both(pool, called_twice)
    assert stock == "nothing was raised" and "the model was called twice for one micro-batch" in found


def returned(kit: Kit) -> dict[str, list[float]]:
    steps: list[float] = []

    class Watched(kit.Trainer):  # type: ignore[misc, name-defined]
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            steps.append(loss.item())
            return loss

    trainer = kit.trainer(base=Watched, max_steps=1, gradient_accumulation_steps=2)
    trainer.train()
    return {"steps": steps, "logged": [line["loss"] for line in lines(trainer) if "loss" in line]}


def test_what_training_step_returns(pool: WorkerPool) -> None:
    stock, found = both(pool, returned)
    assert found["steps"] == pytest.approx([0.0, stock["logged"][0]], rel=1e-4) and all(stock["steps"])
    assert sum(stock["steps"]) == pytest.approx(sum(found["steps"]), rel=1e-4)


def test_processes_without_an_accelerator_are_one_job(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """Started by torchrun, without `use_cpu`: stock's processes train alone, ours are two ranks."""
    if not pytestconfig.getoption("full_matrix"):
        pytest.skip("runs with --full-matrix")
    script = (
        "import sys\n"
        "from transformers import TrainingArguments\n"
        "from hf_nanotron import NanotronTrainingArguments\n"
        "cls = {'stock': TrainingArguments, 'ours': NanotronTrainingArguments}[sys.argv[1]]\n"
        "args = cls(output_dir=sys.argv[2])\n"
        "print('WORLD', args.world_size)\n"
    )
    path = tmp_path / "script.py"
    path.write_text(script)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    for which, worlds in (("stock", ["WORLD 1"] * 2), ("ours", ["WORLD 2"] * 2)):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(path)]
        done = subprocess.run(
            [*command, which, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=600
        )
        assert [line for line in done.stdout.splitlines() if line.startswith("WORLD")] == worlds, done.stderr[-2000:]


def searched(kit: Kit) -> str:
    trainer = kit.trainer(model_init=lambda: kit.model())
    return said(lambda: trainer.hyperparameter_search(n_trials=1))


def test_no_search_of_hyperparameters(pool: WorkerPool) -> None:
    assert both(pool, searched)[1].startswith("ValueError: hyperparameter_search is not supported: ")
