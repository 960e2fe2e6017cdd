"""The loss that is fused with the head: value and gradients are those of logits that exist, on every path."""

from __future__ import annotations

import copy
from typing import Any
from unittest.mock import patch

import pytest
import test_gradients
import torch
from family_runs import FAMILIES
from pool import WorkerPool
from test_gradients import SMALL_BUCKETS, TOLERANCE, Case, gradient_errors, plain, stock_model
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hf_nanotron import ParallelConfig
from hf_nanotron.models.head import linear_head
from hf_nanotron.models.sharding.parallelize import parallelize
from hf_nanotron.models.stock_forward import stock_forward
from hf_nanotron.ops.linear import Linear
from hf_nanotron.parallel.mesh import Group, ParallelMesh
from hf_nanotron.parallel.tp import loss as loss_module
from hf_nanotron.parallel.tp.loss import causal_lm_loss, chunk_size, linear_causal_lm_loss
from hf_nanotron.parallel.tp.vocabulary import vocabulary_parts
from hf_nanotron.prepare.shard_weights import shard_weights
from hf_nanotron.prepare.training_state import TrainingState
from hf_nanotron.training.step.train_step import TrainStep

ALONE = Group((0,), 0, None)
BATCH, LENGTH, HIDDEN, VOCABULARY = 2, 13, 16, 120
COLUMNS = 123  # of the loss alone: no multiple of 16 bytes, and not of two ranks
TOKENS = BATCH * LENGTH
EXACT = {torch.float64: 1e-12, torch.float32: 1e-6}  # relative to the largest value

Tensors = dict[str, torch.Tensor]


def problem(dtype: torch.dtype, bias: bool = True) -> tuple[Tensors, torch.Tensor]:
    """Hidden states, weight and bias that want gradients, and labels of which some are ignored."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"hidden": (BATCH, LENGTH, HIDDEN), "weight": (COLUMNS, HIDDEN), "bias": (COLUMNS,)}
    tensors = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for name, shape in shapes.items()
        if bias or name != "bias"
    }
    labels = torch.randint(0, COLUMNS, (BATCH, LENGTH), generator=generator)
    labels[0, :4] = labels[1, -2:] = labels[1, 5] = -100
    labels[0, 6], labels[0, 7] = 0, COLUMNS - 1
    return tensors, labels


def reference(
    tensors: Tensors, labels: torch.Tensor, items: int | None = None, z_loss: float = 0.0, scale: float = 1.0
) -> torch.Tensor:
    """Plain torch over whole logits."""
    logits = scale * F.linear(tensors["hidden"], tensors["weight"], tensors.get("bias"))
    logits, target = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    total = F.cross_entropy(logits, target, reduction="sum")
    kept = target != -100
    total = total + z_loss * logits.logsumexp(-1)[kept].square().sum()
    return total / (kept.sum() if items is None else items)


def fused(tensors: Tensors, labels: torch.Tensor, items: Any = None, **arguments: Any) -> torch.Tensor:
    return linear_causal_lm_loss(
        tensors["hidden"], tensors["weight"], tensors.get("bias"), labels, 0, ALONE, items, **arguments
    )


def error(got: torch.Tensor | None, expected: torch.Tensor | None) -> float:
    """Of the largest value."""
    assert got is not None and expected is not None and got.dtype == expected.dtype
    return float(((got - expected).abs().max() / expected.abs().max()).detach())


def compare(dtype: torch.dtype, bias: bool = True, items: int | None = 17, chunk: int | None = 5, **both: Any) -> None:
    ours, labels = problem(dtype, bias)
    theirs, _ = problem(dtype, bias)
    value, expected = fused(ours, labels, items, chunk=chunk, **both), reference(theirs, labels, items, **both)
    # An upstream gradient that is not one.
    (3 * value).backward()
    (3 * expected).backward()
    assert error(value, expected) < EXACT[dtype]
    for name, tensor in ours.items():
        assert error(tensor.grad, theirs[name].grad) < EXACT[dtype], name


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("chunk", [None, 1, 5, TOKENS, 1000])
def test_equals_plain_torch(dtype: torch.dtype, chunk: int | None) -> None:
    compare(dtype, chunk=chunk)


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize(
    "variant",
    [{"bias": False}, {"items": None}, {"z_loss": 0.01}, {"scale": 0.25}, {"scale": -2.0, "z_loss": 0.01}],
    ids=str,
)
def test_variants(dtype: torch.dtype, variant: dict[str, Any]) -> None:
    compare(dtype, **variant)


@pytest.mark.parametrize("items", [None, 17, torch.tensor(17)], ids=str)
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_equals_the_unfused_loss(items: Any, z_loss: float) -> None:
    """Also with labels that the caller has shifted; the unfused z-loss is held against plain torch itself."""
    tensors, labels = problem(torch.float32)
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    ours = fused(tensors, labels, items, chunk=7, z_loss=z_loss, shift_labels=shifted)
    logits = F.linear(tensors["hidden"], tensors["weight"], tensors["bias"])
    unfused = causal_lm_loss(logits, labels, 0, ALONE, items, z_loss=z_loss)
    assert ours.dtype == unfused.dtype == torch.float32
    assert error(ours, unfused) < 1e-6
    got = torch.autograd.grad(unfused, list(tensors.values()))
    expected = torch.autograd.grad(reference(tensors, labels, items, z_loss), list(tensors.values()))
    assert max(error(one, other) for one, other in zip(got, expected, strict=True)) < 1e-6


@pytest.mark.parametrize("items", [17, None])
def test_nothing_is_predicted(items: int | None) -> None:
    """Zero, or as in plain torch no number, and gradients of zero in both cases."""
    tensors, labels = problem(torch.float32)
    value = fused(tensors, torch.full_like(labels, -100), items, chunk=5, z_loss=0.01)
    value.backward()
    assert value.item() == 0.0 if items else value.isnan()
    for tensor in tensors.values():
        assert tensor.grad is not None and not tensor.grad.any()


def test_bfloat16_accumulates_in_fp32() -> None:
    """Chunks of one token: a sum of roundings to bf16 would be off by more than one rounding is."""
    ours, labels = problem(torch.bfloat16)
    fused(ours, labels, 1, chunk=1).backward()
    theirs = {name: tensor.detach().double().requires_grad_() for name, tensor in ours.items()}
    reference(theirs, labels, 1).backward()
    gradient, expected = ours["weight"].grad, theirs["weight"].grad
    assert gradient is not None and expected is not None and gradient.dtype == torch.bfloat16
    # Gradients of logits are rounded to bf16 once, like the logits; each token adds its own, independent errors.
    assert float((gradient - expected).norm() / expected.norm()) < 6e-3


def test_what_is_frozen_gets_nothing() -> None:
    theirs, labels = problem(torch.float64)
    reference(theirs, labels, 17).backward()
    for frozen in theirs:
        ours, _ = problem(torch.float64)
        ours[frozen].requires_grad_(False)
        fused(ours, labels, 17, chunk=5).backward()
        for name, tensor in ours.items():
            assert tensor.grad is None if name == frozen else error(tensor.grad, theirs[name].grad) < 1e-12
    with torch.no_grad():
        assert error(fused(ours, labels, 17, chunk=5), reference(ours, labels, 17)) < 1e-12


class Sink:
    """A weight gradient that may be refused to a forward."""

    def __init__(self, early: bool) -> None:
        self.early, self.total = early, torch.zeros(COLUMNS, HIDDEN, dtype=torch.float64)

    def takes_product(self, dtype: torch.dtype) -> bool:
        return dtype == torch.float64

    def takes_early(self) -> bool:
        return self.early

    def add_product(self, grad_output: torch.Tensor, input: torch.Tensor) -> None:
        self.total += grad_output.t() @ input


@pytest.mark.parametrize("early", [True, False])
def test_a_sink_takes_the_weight_gradient(early: bool) -> None:
    """Two micro-batches; what the sink refuses, autograd gets. The weight's node runs in both cases."""
    ours, labels = problem(torch.float64)
    theirs, _ = problem(torch.float64)
    sink, calls = Sink(early), []
    node = torch.autograd.graph.get_gradient_edge(ours["weight"]).node
    node.register_hook(lambda *_: calls.append(1))
    for _ in range(2):
        fused(ours, labels, 17, chunk=5, weight_gradient=sink).backward()
        reference(theirs, labels, 17).backward()
    expected = theirs["weight"].grad
    if early:
        assert ours["weight"].grad is None and error(sink.total, expected) < 1e-12
    else:
        assert not sink.total.any() and error(ours["weight"].grad, expected) < 1e-12
    assert error(ours["hidden"].grad, theirs["hidden"].grad) < 1e-12
    assert len(calls) == 2


def test_what_a_sink_took_cannot_be_scaled() -> None:
    tensors, labels = problem(torch.float64)
    (2 * fused(tensors, labels, 17, weight_gradient=Sink(True))).backward()
    assert tensors["hidden"].grad is not None and tensors["hidden"].grad.isnan().all()


def test_chunk_size() -> None:
    """Whole tiles within the limits, or, where a tile is too large, what fits."""
    wide, narrow = 2 * 151936, 2 * 16032
    assert chunk_size(8192, narrow) == 4096
    assert chunk_size(8192, wide) == 2816  # three
    assert chunk_size(4200, narrow) == 2304  # two, instead of one of 4096 and a rest
    assert chunk_size(8192, 4 * 262144) == 1024
    assert chunk_size(100, wide) == 256
    assert chunk_size(100, 2**26) == 15 and chunk_size(100, 2**31) == 1 and chunk_size(0, 2) >= 1


def test_errors() -> None:
    tensors, labels = problem(torch.float64)
    with pytest.raises(ValueError, match="chunk=0"):
        fused(tensors, labels, chunk=0)
    with pytest.raises(ValueError, match="one label per position"):
        fused(tensors, labels[:, :5])
    value = fused(tensors, labels)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="already been used"):
        value.backward()


# ---- under tensor parallelism ----


def cut_errors(world: int) -> dict[str, float]:
    """On one rank: relative errors of the loss and of our part of each gradient, chunks of five tokens."""
    mesh = ParallelMesh(ParallelConfig(tp_size=world))
    ((start, stop),) = vocabulary_parts(COLUMNS, world)[mesh.tp_rank]
    length = stop - start
    whole, labels = problem(torch.float32)
    own = {
        name: (tensor if name == "hidden" else tensor[start : start + length]).detach().clone().requires_grad_()
        for name, tensor in whole.items()
    }
    value = linear_causal_lm_loss(
        own["hidden"], own["weight"], own["bias"], labels, start, mesh.tp, 17, z_loss=0.01, chunk=5, scale=0.5
    )
    value.backward()
    expected = reference(whole, labels, 17, z_loss=0.01, scale=0.5)
    expected.backward()
    assert own["hidden"].grad is not None and whole["hidden"].grad is not None
    torch.distributed.all_reduce(own["hidden"].grad)
    errors = {"loss": error(value, expected), "hidden": error(own["hidden"].grad, whole["hidden"].grad)}
    for name in ("weight", "bias"):
        gradient = whole[name].grad
        assert gradient is not None
        errors[name] = error(own[name].grad, gradient[start : start + length])
    mesh.close()
    return errors


def test_a_cut_vocabulary(pool: WorkerPool) -> None:
    for errors in pool.run(2, cut_errors, 2):
        assert max(errors.values()) < 2e-6, errors


# ---- in a model ----


def chunked_gradient_errors(case: Case, bucket_bytes: int) -> Any:
    """As in test_gradients.py, a few tokens at a time."""
    with (
        patch.object(loss_module, "CHUNK_BYTES", 4 * 60 * 7),
        patch.object(test_gradients, "SMALL_BUCKETS", bucket_bytes),
    ):
        return gradient_errors(case)


TIED = {"tie_word_embeddings": True}
CASES = {
    "one process": Case({}),
    "tied": Case({}, overrides=TIED),
    "tp": Case({"tp_size": 2}),
    "tp tied, all-reduce": Case({"tp_size": 2, "sequence_parallel": False}, overrides=TIED),
    "zero 1": Case({"zero_stage": 1}, dp=2),
    "zero 2": Case({"zero_stage": 2}, dp=2),
    "zero 2 tied": Case({"zero_stage": 2}, overrides=TIED, dp=2),
    "zero 2, forwards first": Case({"zero_stage": 2, "pp_size": 2, "pp_schedule": "afab"}, dp=2),
    "zero 3": Case({"zero_stage": 3}, dp=2),
    "zero 3 tied": Case({"zero_stage": 3}, overrides=TIED, dp=2),
    "scaled": Case({"tp_size": 2}, "granite", {"logits_scaling": 4.0}),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_a_model(pool: WorkerPool, name: str) -> None:
    """Three micro-batches through the whole training step against the stock model."""
    check_model(pool, CASES[name], SMALL_BUCKETS)


def test_a_bucket_is_still_being_reduced(pool: WorkerPool) -> None:
    """With one bucket, ZeRO-2 may still reduce one micro-batch when the forward of the next adds to the head's."""
    check_model(pool, CASES["zero 2"], 2**24)


def check_model(pool: WorkerPool, case: Case, bucket_bytes: int) -> None:
    for errors, _, loss in pool.run(case.world_size, chunked_gradient_errors, case, bucket_bytes):
        assert loss < 2e-6
        assert max(errors.values()) < TOLERANCE, errors


class Gatherings(TorchDispatchMode):
    """How often `fully_shard` gathers a unit."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "all_gather_copy_in" in str(function)
        return function(*args, **(kwargs or {}))


def gatherings(overrides: dict[str, Any]) -> list[int]:
    """On one rank: units gathered in a step of one micro-batch, fused, unfused and fused again."""
    mesh = ParallelMesh(ParallelConfig(zero_stage=3))
    model = parallelize(stock_model("llama", **overrides), mesh)
    step = TrainStep(TrainingState(model, shard_weights(model, torch.float32, 1000)))
    batch = {**plain(0), "num_items_in_batch": torch.tensor(20)}
    counts = []
    for index, fuses in enumerate((True, True, False, True)):
        model.fuses_loss = fuses
        with Gatherings() as mode:
            step.run([batch], index)
        counts.append(mode.count)
    mesh.close()
    return counts[1:]  # nothing is left over from the first


@pytest.mark.parametrize("overrides", [{}, TIED], ids=["untied", "tied"])
def test_a_fused_head_is_gathered_once(pool: WorkerPool, overrides: dict[str, Any]) -> None:
    """Its backward needs no weight."""
    for first, unfused, last in pool.run(2, gatherings, overrides):
        assert first == last == unfused - 1


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("fuses", [True, False])
def test_no_logits(fuses: bool) -> None:
    """A training step makes no tensor as large as the logits; with `fuses_loss=False` it does."""
    model = parallelize(stock_model("llama"), ParallelMesh(ParallelConfig()))
    model.fuses_loss = fuses
    step = TrainStep(TrainingState(model, shard_weights(model, torch.float32, 1000)))
    ids = torch.randint(0, VOCABULARY, (4, 32))
    batch = {"input_ids": ids, "labels": ids, "num_items_in_batch": torch.tensor(4 * 31)}
    step.run([batch], step=0)  # what is made once
    with patch.object(loss_module, "CHUNK_BYTES", 4 * VOCABULARY * 16), Largest() as largest:
        step.run([batch], step=1)
    assert (largest.elements < ids.numel() * VOCABULARY) == fuses


def test_a_forward_outside_a_step_adds_nothing() -> None:
    """Nobody promises its backward. The head returns no logits all the same, and autograd gets all gradients."""
    model = parallelize(stock_model("llama"), ParallelMesh(ParallelConfig()))
    weights = shard_weights(model, torch.float32, 1000)
    TrainStep(TrainingState(model, weights)).run([{**plain(0), "num_items_in_batch": torch.tensor(20)}], step=0)
    before = [segment.gradient.clone() for segment in weights.segments]
    output = model.train()(**plain(1))
    assert output.logits is None and output.loss.requires_grad
    assert all(torch.equal(one, s.gradient) for one, s in zip(before, weights.segments, strict=True))


def test_evaluation_and_forwards_without_labels_keep_logits() -> None:
    stock = stock_model("llama")
    model = parallelize(copy.deepcopy(stock), ParallelMesh(ParallelConfig()))
    batch = plain(0)
    expected = stock(**batch)
    for output in (model.eval()(**batch), model.train()(input_ids=batch["input_ids"])):
        torch.testing.assert_close(output.logits, expected.logits)
    assert model(**batch, return_dict=False)[0].dim() == 0
    torch.testing.assert_close(model(**batch).loss, expected.loss, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("fuses", [True, False])
def test_z_loss_of_a_model(fuses: bool) -> None:
    """While training alone, and also through the view of a pipeline stage that was made before it was set."""
    stock = stock_model("llama").train()
    model = parallelize(copy.deepcopy(stock), ParallelMesh(ParallelConfig())).train()
    view = copy.copy(model)
    view.__dict__ = {**model.__dict__}
    model.fuses_loss, model.training_loss.z_loss = fuses, 0.01
    batch = plain(0)
    expected = stock(**batch)
    kept = batch["labels"][:, 1:] != -100
    z_loss = expected.logits[:, :-1].logsumexp(-1)[kept].square().mean()
    for output in (model(**batch), stock_forward(model, view, **batch)):
        assert (output.logits is None) == fuses
        assert error(output.loss, expected.loss + 0.01 * z_loss) < 1e-6
    assert error(model.eval()(**batch).loss, expected.loss) < 1e-6


def test_a_config_that_changes_is_noticed() -> None:
    model = parallelize(stock_model("granite", logits_scaling=4.0), ParallelMesh(ParallelConfig())).train()
    model(**plain(0))
    model.config.logits_scaling = 8.0
    with pytest.raises(ValueError, match=r"multiplied by 0\.125, but by 0\.25"):
        model(**plain(0))


# ---- the trial ----


def family_config(name: str, **overrides: Any) -> Any:
    return AutoConfig.for_model(name, **{**FAMILIES[name]["config"], **overrides})


def build(config: Any) -> PreTrainedModel:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config)
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
    return model


# Soft-caps, cuts of the vocabulary, and one that multiplies with the head's weight itself.
UNFUSED = {
    "beam", "dory", "falcon_h1", "gemma2", "gemma3n_text", "gemma4", "gemma4_text", "gemma4_unified",
    "gemma4_unified_text", "hy_v4", "inkling2_loop_text", "inkling2_text", "inkling_text", "nanochat", "vaultgemma",
}  # fmt: skip
SCALED = {
    "cohere", "cohere2", "cohere2_moe", "cohere_compass_text", "granite", "granite_swa", "granitemoe",
    "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "hyperclovax",
}  # fmt: skip


def test_verdict_on_all_families() -> None:
    unfused, scaled = set(), set()
    for name in FAMILIES:
        try:
            with torch.device("meta"):
                model = build(family_config(name))
        except ImportError:  # a vision tower of another package
            continue
        head = linear_head(model, type(model))
        if head is None:
            unfused.add(name)
        elif head.scale != 1.0:
            scaled.add(name)
    assert unfused == UNFUSED & FAMILIES.keys()
    assert scaled == SCALED & FAMILIES.keys()


class Odd(nn.Module):
    """Something between head and loss."""


def odd_class(change: Any) -> type[PreTrainedModel]:
    """A stock class whose forward does something more."""
    stock = type(stock_model("llama"))

    def forward(self: Any, input_ids: Any = None, labels: Any = None, return_dict: Any = None, **kwargs: Any) -> Any:
        return change(self, stock, {"input_ids": input_ids, "labels": labels, **kwargs})

    return type("OddForCausalLM", (stock,), {"forward": forward})


def run_stock(self: Any, stock: Any, inputs: Any) -> Any:
    return stock.forward(self, **inputs, return_dict=True)


def other_labels(self: Any, stock: Any, inputs: Any) -> Any:
    return run_stock(self, stock, {**inputs, "labels": inputs["labels"].clone()})


def own_items(self: Any, stock: Any, inputs: Any) -> Any:
    return run_stock(self, stock, {**inputs, "num_items_in_batch": None})


def two_heads(self: Any, stock: Any, inputs: Any) -> Any:
    self.lm_head(self.model(inputs["input_ids"]).last_hidden_state)
    return run_stock(self, stock, inputs)


def reads_logits(self: Any, stock: Any, inputs: Any) -> Any:
    output = run_stock(self, stock, inputs)
    output.loss = output.loss + 1e-4 * output.logits.logsumexp(-1).mean()
    return output


def part_of_tokens(self: Any, stock: Any, inputs: Any) -> Any:
    return run_stock(self, stock, {**inputs, "logits_to_keep": 2})


@pytest.mark.parametrize("change", [other_labels, own_items, two_heads, reads_logits, part_of_tokens])
def test_the_trial_says_no(change: Any) -> None:
    model = parallelize(stock_model("llama"), ParallelMesh(ParallelConfig()))
    assert linear_head(model, odd_class(run_stock)) is not None
    assert linear_head(model, odd_class(change)) is None


REAL = ("granite", "cohere2", "gpt_oss", "mixtral", "phi", "minicpm3", "gemma2", "hyperclovax", "gpt_neox")


@pytest.mark.parametrize("name", REAL)
def test_families_train_as_stock(name: str) -> None:
    """Loss and every gradient, with the routers' own loss where there are routers."""
    config = family_config(name)
    if hasattr(config, "output_router_logits"):
        config.output_router_logits = True
    assert_trains_as_stock(config)


def assert_trains_as_stock(config: Any) -> None:
    torch.manual_seed(3)
    stock = AutoModelForCausalLM.from_config(config).train()
    model = parallelize(copy.deepcopy(stock), ParallelMesh(ParallelConfig())).train()
    batch = {**plain(0), "num_items_in_batch": torch.tensor(40)}
    with patch.object(loss_module, "CHUNK_BYTES", 4 * VOCABULARY * 7):
        ours, expected = model(**batch, use_cache=False), stock(**batch, use_cache=False)
        ours.loss.backward()
        expected.loss.backward()
    assert (ours.logits is None) == (model.linear_head is not None)
    assert error(ours.loss, expected.loss) < 2e-6
    theirs = dict(stock.named_parameters())
    for parameter, tensor in model.named_parameters():
        if theirs[parameter].grad is None:
            assert tensor.grad is None, parameter
        else:
            scale = theirs[parameter].grad.abs().max().clamp(min=1e-8)
            assert float((tensor.grad - theirs[parameter].grad).abs().max() / scale) < 1e-4, parameter
