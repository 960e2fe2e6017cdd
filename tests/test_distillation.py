"""A frozen teacher on the mesh of its student: losses are those of both models in one process, on every layout."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pool import WorkerPool
from test_examples import EXAMPLES, load
from test_token_stream import words
from tiny import History, message, pad_batch, random_dataset, tiny_config, training_arguments
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_nanotron.prepare.frozen import check_tokenizer

STEPS, SAMPLES, EVALUATED = 3, 40, 6
TEMPERATURE, HARD = 1.7, 0.3


@functools.cache
def checkpoint(family: str = "llama", seed: int = 1, **fields: Any) -> str:
    directory = tempfile.mkdtemp()
    torch.manual_seed(seed)
    config = tiny_config(family, **{"initializer_range": 0.3, "num_hidden_layers": 4, **fields})
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def student_and_teacher(family: str) -> tuple[str, str]:
    """With `ep_size`, both are mixtures of experts."""
    if family == "qwen3_moe":
        return checkpoint(family, **EXPERTS), checkpoint(family, 2, hidden_size=48, **EXPERTS)
    return checkpoint(), checkpoint(family, 2, hidden_size=48, num_hidden_layers=6)


def arguments(**overrides: Any) -> dict[str, Any]:
    sizes = {"max_steps": STEPS, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2}
    return training_arguments(**sizes, **overrides)


def datasets(ragged: bool) -> dict[str, Any]:
    return {
        "train_dataset": random_dataset(SAMPLES, ragged=ragged, length=15),
        "eval_dataset": random_dataset(EVALUATED, ragged=ragged, length=13, seed=4),
    }


@functools.cache
def reference(directory: str, teacher: str, ragged: bool = True) -> tuple[list[float], list[float], float]:
    """Losses, norms and the evaluation of stock Trainer in one process, whose loss calls both models."""
    taught = AutoModelForCausalLM.from_pretrained(teacher).eval()

    class Distils(Trainer):
        model_accepts_loss_kwargs = True

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            with torch.no_grad():
                target = taught(**inputs).logits[:, :-1].flatten(0, 1)
            logits, labels = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            soft = (target / TEMPERATURE).softmax(-1)
            kl = (soft * (soft.log() - (logits / TEMPERATURE).log_softmax(-1))).sum(-1)
            nll = F.cross_entropy(logits, labels, reduction="none")  # zero where nothing is predicted
            losses = (1 - HARD) * TEMPERATURE**2 * kl * (labels != -100) + HARD * nll
            items = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
            loss = losses.sum() / items
            return (loss, outputs) if return_outputs else loss

    history = History()
    trainer = Distils(
        model=AutoModelForCausalLM.from_pretrained(directory),
        args=TrainingArguments(**arguments(gradient_accumulation_steps=4)),
        data_collator=pad_batch,
        callbacks=[history],
        **datasets(ragged),
    )
    trainer.train()
    return history.losses, history.norms, trainer.evaluate()["eval_loss"]


def distil(directory: str, teacher: str, ragged: bool, overrides: dict[str, Any]) -> Any:
    from hf_nanotron import AutoModelForCausalLM as ParallelAuto, NanotronTrainer, NanotronTrainingArguments

    loss = load("distillation_train", EXAMPLES / "distillation" / "train.py").Distillation(TEMPERATURE, HARD)
    args = NanotronTrainingArguments(**arguments(**overrides))
    model, history = ParallelAuto.from_pretrained(directory, parallel=args.parallel), History()
    taught: Any = ParallelAuto.from_pretrained(teacher, mesh=model.mesh)
    if args.pp_size == 1 and args.tp_size == 2:
        taught = AutoModelForCausalLM.from_pretrained(teacher)  # a stock one is sharded in place
    trainer = NanotronTrainer(
        model=model,
        args=args,
        data_collator=pad_batch,
        callbacks=[history],
        compute_loss_func=loss,
        teacher=taught,
        **datasets(ragged),
    )
    trainer.train()
    held = trainer.weights.bytes_held()["parameters"] + sum(p.nbytes for p in trainer._teacher_model.parameters())
    assert trainer.memory_report.parameters == held
    found = history.losses, history.norms, trainer.evaluate()["eval_loss"]
    trainer.mesh.close()
    return found


LAYOUTS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "tp 2 pp 2": (4, "llama", {"tp_size": 2, "pp_size": 2}),
    "cp 2": (2, "llama", {"cp_size": 2}),
    "tp 2 dp 2": (4, "llama", {"tp_size": 2}),
}
WIDE: dict[str, tuple[int, str, dict[str, Any]]] = {
    "one": (1, "llama", {}),
    "dp 2 zero 3": (2, "llama", {"zero_stage": 3}),
    "pp 2 interleaved": (2, "llama", {"pp_size": 2, "pp_virtual_stages": 2, "pp_schedule": "interleaved_1f1b"}),
    "pp 2 zb dp 2": (4, "llama", {"pp_size": 2, "pp_schedule": "zb"}),
    "cp 2 tp 2": (4, "llama", {"cp_size": 2, "tp_size": 2}),
    "cp 2 pp 2": (4, "llama", {"cp_size": 2, "pp_size": 2}),
    "tp 2, no sp": (2, "llama", {"tp_size": 2, "sequence_parallel": False}),
    "capped logits, tp 2 pp 2": (4, "gemma2", {"tp_size": 2, "pp_size": 2}),
    "ep 2": (2, "qwen3_moe", {"ep_size": 2}),
    "ep 2 tp 2 pp 2": (4, "qwen3_moe", {"ep_size": 2, "tp_size": 2, "pp_size": 2}),
}


@pytest.mark.parametrize("name", [*LAYOUTS, *WIDE])
def test_a_student_learns_as_in_one_process(pool: WorkerPool, request: pytest.FixtureRequest, name: str) -> None:
    """Forward KL at a temperature, mixed with cross-entropy; the loss, the gradient norm, the evaluation."""
    if name in WIDE and not request.config.getoption("--full-matrix"):
        pytest.skip("runs with --full-matrix")
    world, family, sizes = (LAYOUTS | WIDE)[name]
    dp = world // (sizes.get("tp_size", 1) * sizes.get("pp_size", 1) * sizes.get("cp_size", 1))
    student, teacher = student_and_teacher(family)
    overrides = {**sizes, "gradient_accumulation_steps": 4 // dp}
    losses, norms, evaluated = reference(student, teacher)
    for got, its_norms, its_eval in pool.run(world, distil, student, teacher, True, overrides):
        assert got[0] == pytest.approx(losses[0], rel=1e-6)
        assert got == pytest.approx(losses, rel=2e-5)
        assert its_norms == pytest.approx(norms, rel=1e-4)
        assert its_eval == pytest.approx(evaluated, rel=2e-5)


def refusals(directory: str, larger: str) -> list[str]:
    from hf_nanotron import NanotronTrainer, NanotronTrainingArguments

    args = NanotronTrainingArguments(**arguments())
    loss = load("distillation_train", EXAMPLES / "distillation" / "train.py").Distillation()

    def trainer(teacher: Any, **kwargs: Any) -> Any:
        model = AutoModelForCausalLM.from_pretrained(directory)
        return NanotronTrainer(model=model, args=args, teacher=teacher, **datasets(True), **kwargs)

    same = AutoModelForCausalLM.from_pretrained(directory)
    return [
        message(lambda: trainer(AutoModelForCausalLM.from_pretrained(larger), compute_loss_func=loss)),
        message(lambda: trainer(AutoModelForCausalLM.from_pretrained(directory))),
        message(lambda: NanotronTrainer(model=same, args=args, teacher=same, compute_loss_func=loss)),
        message(lambda: trainer("a/teacher", compute_loss_func=loss)),
        message(lambda: NanotronTrainer(model="a/model", args=args)),
    ]


def test_teachers_that_cannot_teach(pool: WorkerPool) -> None:
    ((vocabulary, unread, same, *names),) = pool.run(1, refusals, checkpoint(), checkpoint(seed=3, vocab_size=128))
    assert "the teacher has a vocabulary of 128 ids, and the model that is trained one of 120" in vocabulary
    assert "teacher without compute_loss_func" in unread
    assert "the teacher is the model that is trained itself" in same
    for name, said in zip(("a/teacher", "a/model"), names, strict=True):
        assert said.startswith(f"'{name}' (str) is given as a model: load it with AutoModelForCausalLM.from_pretrained")


def refuse_windows(student: str, teacher: str) -> str:
    return message(lambda: distil(student, teacher, True, {"cp_size": 2, "gradient_accumulation_steps": 4}))


def test_rows_are_shared_by_the_windows_of_the_student(pool: WorkerPool) -> None:
    for said in pool.run(2, refuse_windows, checkpoint(), checkpoint("mistral", 4)):
        assert "a layer of the teacher sees 6 tokens, as none of the model that is trained does" in said


def test_tokenizers_are_compared(tmp_path: Path) -> None:
    """With the one beside the teacher's weights, if there is one."""
    tokenizer = words()
    model: Any = SimpleNamespace(config=SimpleNamespace(name_or_path=str(tmp_path)))
    check_tokenizer(model, tokenizer, "teacher")
    tokenizer.save_pretrained(tmp_path)
    check_tokenizer(model, tokenizer, "teacher")
    check_tokenizer(model, None, "teacher")
    tokenizer.add_tokens(["more"])
    said = message(lambda: check_tokenizer(model, tokenizer, "teacher"))
    assert "has another tokenizer than processing_class: 'more' is the id None there" in said
