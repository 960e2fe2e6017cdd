"""`copy.deepcopy` of a model that a trainer owns: an independent model with the same weights, which can be trained."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from types import FunctionType, MethodType, ModuleType
from typing import Any

import pytest
import torch
from pool import JobError, WorkerPool
from test_gradients import plain, stock_model
from tiny import History, pad_batch, random_dataset, train_stock, training_arguments
from transformers import AutoModelForCausalLM as StockAuto, TrainerCallback

from hf_nanotron import AutoModelForCausalLM, NanotronTrainer, NanotronTrainingArguments, ParallelConfig
from hf_nanotron.ops.fp8_linear import Fp8Weight
from hf_nanotron.parallel.mesh import ParallelMesh
from hf_nanotron.parallel.zero.bucketed import BucketWeights
from hf_nanotron.parallel.zero.gradients import BucketGradients, MemberGradient
from hf_nanotron.prepare.compile import CompiledForward

STEPS = 2
FULL = {"activation_checkpointing": True}
SELECTIVE = {**FULL, "activation_checkpointing_policy": "selective"}
COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
ALONE: list[dict[str, Any]] = [{}, SELECTIVE | COMPILED]
TWO: list[dict[str, Any]] = [
    {"tp_size": 2, **FULL},
    {"zero_stage": 2},  # `PARTS` has stage 1
    {"pp_size": 2, "gradient_accumulation_steps": 2},
    {"tp_size": 2, "tp_overlap": True},
]


class Copies(TrainerCallback):
    """Copies the model after each step, as a callback that averages weights does."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.latest = copy.deepcopy(model)


def make_trainer(model: Any, rows: int, *callbacks: TrainerCallback, **values: Any) -> NanotronTrainer:
    args = NanotronTrainingArguments(**training_arguments(max_steps=STEPS, **values))
    data = random_dataset(4 * STEPS, seed=rows)
    return NanotronTrainer(model=model, args=args, train_dataset=data, data_collator=pad_batch, callbacks=[*callbacks])


@pytest.mark.parametrize(("ranks", "cases"), [(1, ALONE), (2, TWO)])
def test_a_copy_is_a_model_of_its_own(
    pool: WorkerPool, tmp_path: Path, ranks: int, cases: list[dict[str, Any]]
) -> None:
    stock_model("llama", num_hidden_layers=2).save_pretrained(tmp_path / "begin")
    for rank in pool.run(ranks, copy_and_train, str(tmp_path), cases):
        for index, (case, (broken, history, logits)) in enumerate(zip(cases, rank, strict=True)):
            assert not broken, case
            saved = str(tmp_path / str(index))
            expected = StockAuto.from_pretrained(saved)(**plain(0)).logits
            torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
            window = max(case.get("gradient_accumulation_steps", 1), 2 if "zero_stage" in case else 1)
            data = random_dataset(4 * STEPS, seed=2)
            wanted = train_stock(saved, data, max_steps=STEPS, gradient_accumulation_steps=window)
            assert history.losses == pytest.approx(wanted.losses, rel=1e-6), case
            assert history.norms == pytest.approx(wanted.norms, rel=1e-5), case


def copy_and_train(folder: str, cases: list[dict[str, Any]]) -> list[tuple[list[str], History, torch.Tensor]]:
    """Of each case: what is wrong with the copy, how training it went, and its logits before."""
    return [copy_once(Path(folder), index, case) for index, case in enumerate(cases)]


def copy_once(folder: Path, index: int, case: dict[str, Any]) -> tuple[list[str], History, torch.Tensor]:
    sizes = NanotronTrainingArguments(**training_arguments(**case)).parallel
    model = AutoModelForCausalLM.from_pretrained(str(folder / "begin"), parallel=sizes)
    copies, history = Copies(), History()
    trainer = make_trainer(model, 1, copies, **case)
    trainer.train()
    twin = copies.latest
    wrong = []

    def logits(of: Any) -> torch.Tensor:
        with torch.no_grad():
            return of.eval()(**plain(0)).logits

    def check(what: str, is_right: bool) -> None:
        if not is_right:
            wrong.append(what)

    before = logits(model)
    twin.save_pretrained(folder / str(index))
    check("weights", torch.equal(logits(twin), before))
    prompt = torch.tensor([[5, 6, 7]])
    out = [each.generate(prompt, max_new_tokens=5, do_sample=False) for each in (model, twin)]
    check("generation", torch.equal(*out))
    check("eager", not any("forward" in vars(module) for module in twin.modules()))
    check("switches", not twin.is_activation_checkpointing)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    check("memory", not own & {x.untyped_storage().data_ptr() for x in (*twin.parameters(), *twin.buffers())})

    trainer.train()  # once more, from new weights: into the model's memory, through the model's hooks
    check("the copy follows the model", torch.equal(logits(twin), before))
    after = logits(model)
    check("the model trains on", not torch.equal(after, before))
    make_trainer(twin, 2, history, **case).train()
    check("the model follows the copy", torch.equal(logits(model), after))
    check("the copy trains", not torch.equal(logits(twin), before))
    model.mesh.close()
    return wrong, history, before


def test_the_gradients_of_a_copy(pool: WorkerPool) -> None:
    """By plain autograd, before any trainer takes it: nothing adds to the memory of the model's trainer."""
    stock = stock_model("llama", num_hidden_layers=2).train()
    stock(**plain(0)).loss.backward()
    (gradients,) = pool.run(1, copied_gradients)
    for name, parameter in stock.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-5, atol=1e-7)


def copied_gradients() -> dict[str, torch.Tensor]:
    trainer = make_trainer(stock_model("llama", num_hidden_layers=2), 1, **SELECTIVE, **COMPILED)
    twin = copy.deepcopy(trainer.model).train()
    twin(**plain(0)).loss.backward()
    assert not any(segment.gradient.any() for segment in trainer.weights.segments)
    return {name: parameter.grad for name, parameter in twin.named_parameters()}


PARTS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", {}, {"zero_stage": 1}),
    ("llama", {"hidden_size": 32}, {"zero_stage": 2, "bf16": True, "fp8": "tensorwise", **COMPILED, **SELECTIVE}),
    ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}, {"ep_size": 2}),
]


def test_a_copy_of_a_part_is_independent(pool: WorkerPool) -> None:
    for rank in pool.run(2, copy_parts, PARTS):
        for (family, _, case), broken in zip(PARTS, rank, strict=True):
            assert not broken, (family, case)


def copy_parts(cases: list[tuple[str, dict[str, Any], dict[str, Any]]]) -> list[list[str]]:
    """Of each case: what is wrong with copies of a layer, of the embedding and of the head after training."""
    results = []
    for family, shape, case in cases:
        sizes = NanotronTrainingArguments(**training_arguments(**case)).parallel
        model = AutoModelForCausalLM.from_config(stock_model(family, **shape).config, parallel=sizes)
        trainer = make_trainer(model, 1, **case)
        trainer.train()
        wrong = []
        parts = {"layer": model.model.layers[0], "embedding": model.model.embed_tokens, "head": model.lm_head}
        for name, part in parts.items():
            twin = copy.deepcopy(part).train()
            weights = dict(part.named_parameters())
            if any(not torch.equal(p, weights[n]) for n, p in twin.named_parameters()):
                wrong.append(f"{name}: weights")
            found = objects_in(twin)
            if any(isinstance(thing, BucketWeights | BucketGradients | MemberGradient | Fp8Weight) for thing in found):
                wrong.append(f"{name}: trainer state")
            if any(isinstance(thing, CompiledForward) for thing in found):
                wrong.append(f"{name}: compiled code")
            own = {tensor.untyped_storage().data_ptr() for tensor in weights.values()}
            if own & {p.untyped_storage().data_ptr() for p in twin.parameters()}:
                wrong.append(f"{name}: memory")
            with torch.no_grad():
                for parameter in twin.parameters():
                    parameter.zero_()  # what it computes from now on is nought, if it computes with its own
            width = model.config.hidden_size
            hidden = torch.randn(1, 4, width, dtype=model.dtype, requires_grad=True)
            rotary = model.model.rotary_emb(hidden, torch.arange(4)[None])
            before = [segment.gradient.clone() for segment in trainer.weights.segments]
            trainer.weights.begin()  # so that compiled code would add what it computes
            if name == "layer" and family == "llama":
                out = twin(hidden, position_embeddings=rotary)
                out = out[0] if isinstance(out, tuple) else out
                if not torch.equal(out, hidden):
                    wrong.append(f"{name}: output")
            elif name != "layer":
                out = twin(hidden if name == "head" else torch.tensor([[3, 4]]))
            if name != "layer" or family == "llama":
                out.sum().backward()
                if any(p.grad is None for p in twin.parameters()):
                    wrong.append(f"{name}: gradients")
            if any(not torch.equal(s.gradient, old) for s, old in zip(trainer.weights.segments, before, strict=True)):
                wrong.append(f"{name}: the model's gradients")
        results.append(wrong)
        model.mesh.close()
    return results


def objects_in(module: torch.nn.Module) -> list[Any]:
    """What hangs on a module, as deep as attributes, containers and the cells of closures go."""
    found: dict[int, Any] = {}
    pending: list[Any] = [module]
    while pending:
        thing = pending.pop()
        if id(thing) in found or isinstance(thing, type | ModuleType | torch.Tensor | ParallelMesh | str | int | float):
            continue
        found[id(thing)] = thing
        if isinstance(thing, FunctionType):
            pending.extend(cell.cell_contents for cell in thing.__closure__ or ())
        elif isinstance(thing, MethodType):
            pending.extend((thing.__self__, thing.__func__))
        elif isinstance(thing, partial):
            pending.extend((thing.func, *thing.args, *thing.keywords.values()))
        elif isinstance(thing, dict):
            pending.extend(thing.values())
        elif isinstance(thing, list | tuple | set):
            pending.extend(thing)
        else:
            pending.extend(getattr(thing, "__dict__", {}).values())
    return list(found.values())


DROPOUT: list[dict[str, Any]] = [{}, {"bf16": True, "fp8": "tensorwise"}]


def test_dropout_of_a_copy(pool: WorkerPool) -> None:
    """A copy draws what the model draws, by a seed of its own."""
    for case, (copied, other, own) in zip(DROPOUT, pool.run(1, dropout_losses, DROPOUT)[0], strict=True):
        assert copied == own, case
        assert copied != other, case


def dropout_losses(cases: list[dict[str, Any]]) -> list[list[list[float]]]:
    """Losses of a copy, of another copy with another seed, and of the model itself with the first one's."""
    results = []
    for case in cases:
        model = make_trainer(stock_model("llama", num_hidden_layers=2, attention_dropout=0.3), 1, **case).model
        models, losses = [copy.deepcopy(model), copy.deepcopy(model), model], []
        for each, seed in zip(models, (7, 8, 7), strict=True):
            history = History()
            make_trainer(each, 1, history, seed=seed, data_seed=7, **case).train()
            losses.append(history.losses)
        results.append(losses)
    return results


def test_fully_sharded_weights_are_not_copied(pool: WorkerPool) -> None:
    with pytest.raises(JobError, match=r"zero_stage=3 .* over 2 ranks .* Save the model") as failed:
        pool.run(2, copy_fully_sharded)
    assert failed.value.kinds == {0: "ValueError", 1: "ValueError"}


def copy_fully_sharded() -> None:
    model = AutoModelForCausalLM.from_config(
        stock_model("llama", num_hidden_layers=2).config, parallel=ParallelConfig(zero_stage=3)
    )
    twin = copy.deepcopy(model)  # not yet
    trainer = make_trainer(twin, 1, zero_stage=3)
    copy.deepcopy(trainer.model)
