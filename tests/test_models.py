"""Models as users have them: subclasses, older code, wrapped, compiled, changed by hand. Against stock Trainer."""

from __future__ import annotations

import json
import logging
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import custom_models as custom
import pytest
import torch
from custom_models import make
from pool import WorkerPool
from test_bad_input import message_of
from tiny import VOCABULARY, History, StockTrainer, pad_batch, random_dataset, tiny_config, training_arguments
from torch import nn
from transformers import (
    AutoModelForCausalLM as StockAuto,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
)

from hf_nanotron import AutoModelForCausalLM, NanotronTrainer, NanotronTrainingArguments, ParallelConfig
from hf_nanotron.checkpoint.hub.nonfinite_tensors import warn_nonfinite
from hf_nanotron.convert.nanotron.convert import hub_to_nanotron, nanotron_to_hub
from hf_nanotron.convert.sharded import hub_to_sharded, sharded_to_hub
from hf_nanotron.models.sharding import selfcheck
from hf_nanotron.models.sharding.parallelize import parallelize
from hf_nanotron.models.sharding.unwrap import unwrap
from hf_nanotron.models.stock.foreign import why_not_causal
from hf_nanotron.parallel.mesh import ParallelMesh

Figures = tuple[list[float], list[float], float]

TP, PP, DP = {"tp_size": 2}, {"pp_size": 2}, {"gradient_accumulation_steps": 1}
TOPOLOGIES = {"tp": TP, "pp": PP, "dp": DP}

# What is handed over -> on which topologies it is trained.
CASES: dict[str, tuple[Callable[[], Any], str]] = {
    "old": (lambda: make(custom.OldForCausalLM), "tp pp dp"),
    "tuple": (lambda: make(custom.TupleForCausalLM), "tp pp"),
    "heedless": (lambda: make(custom.HeedlessForCausalLM), "tp dp"),
    "denying": (lambda: make(custom.DenyingForCausalLM), "pp dp"),
    "embeddings of its own": (lambda: make(custom.LouderForCausalLM), "tp pp"),
    "second head": (lambda: make(custom.ValuesForCausalLM), "tp pp dp"),
    "scratch": (lambda: make(custom.Scratch), "tp pp"),
    "norm": (lambda: make(change=custom.with_layers(custom.NormedLayer)), "tp"),
    "mixes tokens": (lambda: make(change=custom.with_layers(custom.LookingLayer)), "tp"),
    "norm of embeddings": (lambda: make(change=custom.with_backbone(custom.NormedEmbeddings)), "tp pp"),
    "tuples of layers": (lambda: make(change=custom.with_tuples), "pp"),
    "compiled": (lambda: make(change=custom.compile_everywhere), "tp pp"),
    "DDP": (lambda: make(change=custom.wrap), "dp"),
    "patched": (lambda: make(change=custom.patch_forward), "tp pp"),
    "trains the last stage": (lambda: make(change=custom.train_only("layers.3")), "pp"),
    "trains the first stage": (lambda: make(change=custom.train_only("layers.0")), "pp"),
}


def figures(cls: type[Any], args: Any, model: Any, data: Any, collate: Any) -> Figures:
    history = History()
    trainer = cls(
        model=model, args=args, train_dataset=data, eval_dataset=data, data_collator=collate, callbacks=[history]
    )
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    if isinstance(trainer, NanotronTrainer):
        trainer.model.mesh.close()
    return history.losses, history.norms, loss


def options(**overrides: Any) -> dict[str, Any]:
    """Three steps of up to two micro-batches over five samples: the last window is short, and dp 2 has a filler."""
    return training_arguments(**{"max_steps": 3, "gradient_accumulation_steps": 2, **overrides})


def stock(model: Any, data: Any = None, collate: Any = pad_batch) -> Figures:
    args = TrainingArguments(**options(average_tokens_across_devices=False))
    return figures(StockTrainer, args, unwrap(model), data or random_dataset(5), collate)


def parallel(name: str) -> dict[str, Figures]:
    found: dict[str, Figures] = {}
    for case, (build, where) in CASES.items():
        if name in where.split():
            args = NanotronTrainingArguments(**options(**TOPOLOGIES[name]))
            found[case] = figures(NanotronTrainer, args, build(), random_dataset(5), pad_batch)
    args = NanotronTrainingArguments(**options(**TOPOLOGIES[name]))
    found["embeddings"] = figures(NanotronTrainer, args, make(), custom.embedded_dataset(), custom.stack)
    return found


def assert_equal(got: Figures, want: Figures, what: str) -> None:
    for one, other, tolerance in zip(got, want, (2e-5, 2e-4, 2e-5), strict=True):
        assert one == pytest.approx(other, rel=tolerance), f"{what}: {got} instead of {want}"


@pytest.fixture(scope="module")
def references() -> dict[str, Figures]:
    found = {name: stock(build()) for name, (build, _) in CASES.items()}
    return found | {"embeddings": stock(make(), custom.embedded_dataset(), custom.stack)}


@pytest.mark.parametrize("name", list(TOPOLOGIES))
def test_models_of_users(pool: WorkerPool, references: dict[str, Figures], name: str) -> None:
    for rank in pool.run(2, parallel, name):
        for case, got in rank.items():
            assert_equal(got, references[case], f"{case} on {name}")


# ---- what cannot be cut ----

REFUSED: dict[str, tuple[dict[str, Any], Callable[[], Any], list[str]]] = {
    "residual": (
        TP,
        lambda: make(change=custom.with_mlp(custom.ResidualMLP)),
        ["tp_size=2", "ResidualMLP", "when it is not", "register_plan"],
    ),
    "embeddings in all layers": (
        PP,
        lambda: make(change=custom.with_backbone(custom.EmbeddingsEverywhere)),
        ["pp_size=2", "EmbeddingsEverywhere", "neither the embedding"],
    ),
    "embeddings in all layers, tp": (
        TP,
        lambda: make(change=custom.with_backbone(custom.EmbeddingsEverywhere)),
        ["fails when the model is sharded", "sequence_parallel=False"],
    ),
    "shared": (
        PP,
        lambda: make(change=custom.share(0, 3)),
        ["are the same parameter", "stages 0 and 1", "use pp_size=1"],
    ),
    "shared on a stage": (TP, lambda: make(change=custom.share(0, 1)), ["does not declare", "`_tied_weights_keys`"]),
    "different": (DP, lambda: different(), ["different models", "same on every rank"]),
    "frozen": (TP, lambda: make(change=lambda m: m.requires_grad_(False) and None), ["no parameter", "requires_grad_"]),
    "frozen stages": (PP, lambda: make(change=lambda m: m.requires_grad_(False) and None), ["nothing to train"]),
}


def different() -> Any:
    rank = torch.distributed.get_rank()
    return make(change=lambda model: model.requires_grad_(rank == 0) and None)


def refusals(names: list[str]) -> dict[str, str | None]:
    found = {}
    for name in names:
        sizes, build, _ = REFUSED[name]
        args = NanotronTrainingArguments(**options(**sizes))
        found[name] = message_of(
            lambda a=args, b=build: NanotronTrainer(  # type: ignore[misc]
                model=b(), args=a, train_dataset=random_dataset(4), data_collator=pad_batch
            )
        )
    return found


def test_what_cannot_be_cut_is_refused_on_every_rank(pool: WorkerPool) -> None:
    for messages in pool.run(2, refusals, list(REFUSED)):
        for name, (_, _, parts) in REFUSED.items():
            assert all(part in str(messages[name]) for part in parts), f"{name}: {messages[name]}"


@pytest.fixture
def mesh() -> ParallelMesh:
    return ParallelMesh(ParallelConfig())


def with_attribute(name: str, value: Any) -> Any:
    model = make()
    setattr(model, name, value)
    return model


@pytest.mark.parametrize(
    ("build", "part"),
    [
        (lambda: with_attribute("peft_config", {"default": object()}), "merge_and_unload.*requires_grad_.True"),
        (lambda: with_attribute("hf_quantizer", object()), "quantised.*32 or 16 bits"),
        (lambda: with_attribute("forward", lambda *_, **__: None), "model.forward was replaced"),
    ],
    ids=["adapters", "quantised", "closure"],
)
def test_models_that_are_refused(mesh: ParallelMesh, build: Callable[[], Any], part: str) -> None:
    with pytest.raises(ValueError, match=part):
        parallelize(build(), mesh)


def test_a_model_without_weights_is_refused() -> None:
    with torch.device("meta"):
        model = StockAuto.from_config(tiny_config())
    args = NanotronTrainingArguments(**options())
    with pytest.raises(ValueError, match="meta device.*from_pretrained"):
        NanotronTrainer(model=model, args=args, train_dataset=random_dataset(4))


# ---- names ----


class Masked(LlamaForSequenceClassification):
    pass


class MyLlamaForMaskedLM(custom.Scratch):
    pass


def test_the_name_is_no_test() -> None:
    assert why_not_causal(make(custom.M)) is None
    assert why_not_causal(make(custom.Scratch)) is None
    assert "a LlamaForSequenceClassification" in str(why_not_causal(Masked(tiny_config())))
    assert "not a causal" in str(why_not_causal(make(MyLlamaForMaskedLM)))
    tiny = T5Config(d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2, vocab_size=VOCABULARY)
    assert "not a causal" in str(why_not_causal(T5ForConditionalGeneration(tiny)))
    assert "PreTrainedModel" in str(why_not_causal(nn.Linear(2, 2)))


def test_the_saved_name_is_the_class_as_in_stock(mesh: ParallelMesh, tmp_path: Path) -> None:
    model = parallelize(make(custom.M), mesh)
    model.save_pretrained(tmp_path)
    assert type(model).__name__ == "ParallelM" and model.config.architectures == ["M"]
    assert type(StockAuto.from_pretrained(tmp_path)).__name__ == "LlamaForCausalLM"  # by its model_type
    assert type(custom.M.from_pretrained(tmp_path)) is custom.M


def test_remote_code_is_saved_with_its_weights(mesh: ParallelMesh, tmp_path: Path) -> None:
    fields = {"__module__": custom.__name__, "_auto_class": "AutoModelForCausalLM"}
    remote = type("OldForCausalLM", (custom.OldForCausalLM,), fields)
    for folder, model in (("stock", make(remote)), ("ours", parallelize(make(remote), mesh))):
        model.save_pretrained(tmp_path / folder)
        fields = json.loads((tmp_path / folder / "config.json").read_text())
        assert fields["auto_map"] == {"AutoModelForCausalLM": "custom_models.OldForCausalLM"}
        assert (tmp_path / folder / "custom_models.py").is_file()


def gpt2() -> Any:
    torch.manual_seed(3)
    return GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=VOCABULARY, initializer_range=0.1, **NO_DROPOUT)
    )


NO_DROPOUT = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)


@pytest.mark.parametrize("build", [gpt2, lambda: make(custom.M)], ids=["GPT-2", "M"])
def test_the_divisor_of_stock_follows_from_the_name_of_a_class(build: Callable[[], Any]) -> None:
    """Stock Trainer counts all labels unless the class is called …ForCausalLM; ours is the mean over what is predicted.

    Of rows of 16 tokens 15 are predicted, and the loss of stock is 15/16 of the mean.
    """
    data = random_dataset(8, length=16).map(lambda row: {"labels": row["input_ids"]})
    settings = training_arguments(max_steps=1, gradient_accumulation_steps=4, learning_rate=0.0)
    theirs = figures(StockTrainer, TrainingArguments(**settings), build(), data, pad_batch)
    ours = figures(NanotronTrainer, NanotronTrainingArguments(**settings), build(), data, pad_batch)
    assert theirs[0][0] == pytest.approx(ours[0][0] * 15 / 16, rel=1e-5)
    with torch.no_grad():
        batch = pad_batch(list(data))
        mean = float(build()(**batch).loss)
    evaluated = figures(NanotronTrainer, NanotronTrainingArguments(**settings), build(), data, pad_batch)[2]
    assert evaluated == pytest.approx(mean, rel=1e-5)


# ---- wrappers ----


def test_wrappers_are_taken_off() -> None:
    model = make()
    forward = model.forward
    model._original_forward = forward
    model.forward = types.MethodType(torch.autocast("cpu", torch.bfloat16)(forward.__func__), model)  # as accelerate
    wrapped = torch.compile(nn.DataParallel(model), backend="eager")
    assert unwrap(wrapped) is model
    assert "forward" not in vars(model)
    names = [name for name, _ in make().named_parameters()]
    assert [name for name, _ in unwrap(make(change=custom.compile_everywhere)).named_parameters()] == names


# ---- weights that are not numbers ----


class Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture
def warned() -> Any:
    handler, logger = Warnings(), logging.getLogger("hf_nanotron.checkpoint.hub.nonfinite_tensors")
    logger.addHandler(handler)
    yield handler.messages
    logger.removeHandler(handler)


def test_weights_that_are_not_finite_are_named(mesh: ParallelMesh, tmp_path: Path, warned: list[str]) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    model = make()
    with torch.no_grad():
        model.get_parameter(name)[3, 4] = float("nan")
        model.get_parameter(name)[5, 6] = float("inf")
    model.save_pretrained(tmp_path / "hub")

    def told(action: Callable[[], Any]) -> None:
        warned.clear()
        action()
        assert [name in message and "2 of 1536" in message for message in warned] == [True], warned

    told(lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "hub"))
    told(lambda: parallelize(model, mesh))
    told(lambda: hub_to_nanotron(tmp_path / "hub", tmp_path / "nanotron"))
    told(lambda: nanotron_to_hub(tmp_path / "nanotron", tmp_path / "back"))
    told(lambda: hub_to_sharded(tmp_path / "hub", tmp_path / "checkpoint-0"))
    told(lambda: sharded_to_hub(tmp_path / "checkpoint-0", tmp_path / "again"))


def test_what_is_no_warning(warned: list[str]) -> None:
    for tensor in (
        torch.ones(3, dtype=torch.int64),
        torch.empty(0),
        torch.full((3,), 3e38),
        torch.ones((), dtype=torch.bfloat16),
    ):
        assert warn_nonfinite("w", tensor, "a test") is tensor
    assert not warned


def test_a_trial_leaves_buffers_as_they_were() -> None:
    """A running mean, updated in place or replaced, has seen no batch when training begins."""
    model = StockAuto.from_config(tiny_config(num_hidden_layers=1))
    layer = model.model.layers[0]
    layer.register_buffer("mean", torch.zeros(2))
    layer.register_buffer("count", torch.zeros(1))
    with selfcheck._Mode(model):
        layer.mean.add_(1.0)
        layer.count = layer.count + 1
    assert layer.mean.tolist() == [0.0, 0.0] and layer.count.tolist() == [0.0]


def frozen_on_one_stage() -> str | None:
    """By the names of one process, of which the last stage has none."""
    args = NanotronTrainingArguments(**options(**PP))
    model = AutoModelForCausalLM.from_config(tiny_config(tie_word_embeddings=True), parallel=args.parallel)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("embed_tokens" not in name)
    data = {"train_dataset": random_dataset(4), "data_collator": pad_batch}
    return message_of(lambda: NanotronTrainer(model=model, args=args, **data))


def test_a_tied_weight_frozen_on_one_stage_is_refused(pool: WorkerPool) -> None:
    """Ranks that train it would wait for ever for those that do not."""
    said = set(pool.run(2, frozen_on_one_stage))
    assert len(said) == 1 and "model.embed_tokens.weight is frozen on some ranks and trained on others" in str(said)
