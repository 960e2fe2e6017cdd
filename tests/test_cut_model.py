"""A parallel model that is changed or measured after it was cut: as the stock model, or refused on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_methods import FINE, OURS, methods_of
from pool import WorkerPool
from test_bad_input import agree, message_of
from test_gradients import stock_model
from test_parity import checkpoint, relative
from tiny import VOCABULARY, History, pad_batch, random_dataset, tiny_config, training_arguments
from torch import nn
from transformers import AutoModelForCausalLM as StockAuto, PreTrainedModel, TrainerCallback

from hf_nanotron import AutoModelForCausalLM, NanotronTrainer, NanotronTrainingArguments
from hf_nanotron.models.base import ParallelModel
from hf_nanotron.models.methods import REFUSED

ROWS = random_dataset(32, seed=5)
HEAD, EMBEDDING, GATE = "lm_head.weight", "model.embed_tokens.weight", "model.layers.1.mlp.gate_proj.weight"
LAYOUTS: list[dict[str, Any]] = [
    {},
    {"tp_size": 2},
    {"pp_size": 2},
    {"zero_stage": 1},
    {"zero_stage": 3},
    {"tp_size": 2, "pp_size": 2},
]


def label(sizes: dict[str, Any]) -> str:
    return " ".join(f"{name} {value}" for name, value in sizes.items()) or "one process"


def world_of(sizes: dict[str, Any]) -> tuple[int, int]:
    dp = 2 if "zero_stage" in sizes else 1
    return dp * sizes.get("tp_size", 1) * sizes.get("pp_size", 1), dp


# ---- the table of methods ----


def test_every_method_of_a_model_is_in_the_table() -> None:
    """A release of transformers or torch that adds one fails here: is it right for a cut model?"""
    fine = [name for names in FINE.values() for name in names]
    known = [*REFUSED, *OURS, *fine]
    assert len(known) == len(set(known)), "a method is in two tables"
    unknown = sorted(methods_of() - set(known))
    assert not unknown, f"no table has {unknown}"
    gone = {name for name in known if not hasattr(PreTrainedModel, name) and not name.startswith("_")}
    assert gone <= {"prune_heads", "save_distributed_checkpoint", "generate"}, gone
    replaced = {name for base in ParallelModel.__mro__ if "hf_nanotron" in base.__module__ for name in vars(base)}
    assert set(OURS) - {"forward"} <= replaced
    assert not set(fine) & replaced - {"dtype"}


# ---- measured and changed before a trainer takes it ----


def calls(model: Any) -> dict[str, Any]:
    """What each call answers: its ValueError, or a result."""
    other = nn.Linear(32, 8)

    def result(call: Any) -> Any:
        found: list[Any] = []
        return message_of(lambda: found.append(call())) or found[0]

    def config(name: str, value: Any) -> Any:
        before = getattr(model.config, name)
        setattr(model.config, name, value)
        try:
            return result(model.check_cut), result(model.tie_weights)
        finally:
            setattr(model.config, name, before)

    def replaced() -> Any:
        head = model.lm_head
        model.lm_head = other
        try:
            return result(model.check_cut)
        finally:
            model.lm_head = head

    embedding = model.get_input_embeddings()
    return {
        "parameters": model.num_parameters(),
        "without embeddings": model.num_parameters(exclude_embeddings=True),
        "trainable": model.num_parameters(only_trainable=True),
        "trainable without": model.num_parameters(only_trainable=True, exclude_embeddings=True),
        "run_clm": len(embedding.weight) < VOCABULARY and model.resize_token_embeddings(VOCABULARY) is not embedding,
        "same size": model.resize_token_embeddings(VOCABULARY, pad_to_multiple_of=8) is embedding,
        "pad": model.resize_token_embeddings(pad_to_multiple_of=8) is embedding,
        "nothing": model.resize_token_embeddings() is embedding,
        "resize": result(lambda: model.resize_token_embeddings(VOCABULARY + 8)),
        "resize to a part": result(lambda: model.resize_token_embeddings(VOCABULARY // 2)),
        "pad to more": result(lambda: model.resize_token_embeddings(pad_to_multiple_of=64)),
        "same embedding": result(lambda: model.set_input_embeddings(model.get_input_embeddings())),
        "same head": result(lambda: model.set_output_embeddings(model.get_output_embeddings())),
        "embedding": result(lambda: model.set_input_embeddings(nn.Embedding(8, 32))),
        "head": result(lambda: model.set_output_embeddings(other)),
        "tie": result(model.tie_weights),
        "tie others": config("tie_word_embeddings", True),
        "vocab_size": config("vocab_size", 64)[0],
        "replaced": replaced(),
        "init": result(model.init_weights),
        "apply": result(lambda: model.apply(model._init_weights)),
        "adapter": result(lambda: model.add_adapter(None)),
        "push": result(lambda: model.push_to_hub("somebody/something")),
        "state": result(lambda: model.save_pretrained("nowhere", state_dict={})),
        "load a part": result(lambda: model.load_state_dict({HEAD: torch.zeros(7, 32)}, strict=False)),
        "load too little": result(lambda: model.load_state_dict({HEAD: torch.zeros(VOCABULARY, 32)})),
        "load unknown": result(lambda: model.load_state_dict({"nothing": torch.zeros(1)})),
        "assign": result(lambda: model.load_state_dict({}, assign=True)),
    }  # fmt: skip


RIGHT: dict[str, Any] = {
    "run_clm": False, "same size": True, "pad": True, "nothing": True, "same embedding": None, "same head": None,
    "tie": None,
}  # fmt: skip
WRONG: dict[str, list[str]] = {
    "resize": ["to 128 tokens", "vocabulary of 120", "Resize the stock model before it is sharded"],
    "resize to a part": ["to 60 tokens", "vocabulary of 120"],
    "pad to more": ["to 128 tokens"],
    "embedding": ["set_input_embeddings", "stock model"],
    "head": ["set_output_embeddings", "stock model"],
    "vocab_size": ["config.vocab_size is 64", "vocab_size=120", "stock model"],
    "replaced": ["lm_head", "was replaced or removed", "stock model"],
    "init": ["init_weights", "from_config"],
    "apply": ["_init_weights", "from_config"],
    "adapter": ["add_adapter", "Merge", "requires_grad_(True)"],
    "push": ["push_to_hub", "NanotronTrainer.push_to_hub()"],
    "state": ["state_dict", "load_state_dict"],
    "load a part": [HEAD, "(7, 32)", "(120, 32)"],
    "load too little": ["missing", EMBEDDING],
    "load unknown": ["unknown ['nothing']"],
    "assign": ["assign=True"],
}


def measure(sizes: dict[str, Any]) -> list[dict[str, Any]]:
    """Before and while a trainer owns the model, whose embedding and second layer are frozen."""
    args = NanotronTrainingArguments(**training_arguments(gradient_accumulation_steps=2, **sizes))
    model = AutoModelForCausalLM.from_config(tiny_config(num_hidden_layers=2), args.parallel)
    for name, weight in model.named_parameters():
        weight.requires_grad_(not name.startswith(("model.embed", "model.layers.1.")))
    before = {name: value for name, value in calls(model).items() if not name.startswith("trainable")}
    NanotronTrainer(model=model, args=args, train_dataset=ROWS, data_collator=pad_batch)
    after = calls(model)
    after["half"] = message_of(model.half)
    assert model.float() is model
    own = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in model.parameters())
    after["footprint"] = model.get_memory_footprint(return_buffers=False) == 4 * own
    return [before, after]


@pytest.mark.parametrize("sizes", LAYOUTS, ids=label)
def test_methods_answer_for_the_whole_model(pool: WorkerPool, sizes: dict[str, Any]) -> None:
    stock = stock_model("llama", num_hidden_layers=2)
    for name, weight in stock.named_parameters():
        weight.requires_grad_(not name.startswith(("model.embed", "model.layers.1.")))
    counts = {
        "parameters": stock.num_parameters(),
        "without embeddings": stock.num_parameters(exclude_embeddings=True),
        "trainable": stock.num_parameters(only_trainable=True),
        "trainable without": stock.num_parameters(only_trainable=True, exclude_embeddings=True),
    }
    ranks = pool.run(world_of(sizes)[0], measure, sizes)
    for found in zip(*ranks, strict=True):
        for answers in found:
            for name, value in {**counts, **RIGHT}.items():
                assert answers.get(name, value) == value, f"{name}: {answers[name]}"
        messages = agree([{name: answers[name] for name in WRONG} for answers in found])
        for name, parts in WRONG.items():
            assert all(part in messages[name] for part in parts), f"{name}: {messages[name]}"
        assert "sharded with False" in found[0]["tie others"][1]
    assert all("torch.float16" in after["half"] and after["footprint"] for _, after in ranks)


# ---- weights that are set while a trainer owns them ----


class Writes(TrainerCallback):
    """Sets weights at events: what stock training goes on with."""

    def __init__(self, how: str) -> None:
        self.how = how

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        change(model, HEAD, 0.5, self.how)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 2:
            change(model, GATE, 0.25, self.how)


def change(model: Any, name: str, factor: float, how: str) -> None:
    """Multiply a weight where it is, if the model has it."""
    weight = dict(model.named_parameters()).get(name)
    if weight is None:
        return
    if how == "in place":
        with torch.no_grad():
            weight.mul_(factor)
    elif how == "data":
        weight.data.mul_(factor)
    else:
        weight.data = weight.data * factor


def train_on(directory: str, saved: str, sizes: dict[str, Any], how: str, new: dict[str, torch.Tensor]) -> History:
    """Two runs of one trainer, with weights set before each and by callbacks."""
    args = NanotronTrainingArguments(**training_arguments(max_steps=3, **sizes))
    model, history = AutoModelForCausalLM.from_pretrained(directory, args.parallel), History()
    trainer = NanotronTrainer(
        model=model, args=args, train_dataset=ROWS, data_collator=pad_batch, callbacks=[history, Writes(how)]
    )
    model.load_state_dict(new)
    change(model, EMBEDDING, 0.5, how)
    trainer.train()
    change(model, GATE, 2.0, how)
    args.max_steps = 2
    trainer.train()
    trainer.save_model(saved)
    own = model.state_dict()
    assert not any(model.load_state_dict({name: value.clone() for name, value in own.items()}))
    model.mesh.close()
    return history


def stock_train_on(directory: str, how: str, new: dict[str, torch.Tensor]) -> History:
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(**training_arguments(max_steps=3, gradient_accumulation_steps=2))
    model, history = StockAuto.from_pretrained(directory), History()
    trainer = Trainer(
        model=model, args=args, train_dataset=ROWS, data_collator=pad_batch, callbacks=[history, Writes(how)]
    )
    model.load_state_dict(new)
    change(model, EMBEDDING, 0.5, how)
    trainer.train()
    change(model, GATE, 2.0, how)
    args.max_steps = 2
    trainer.train()
    history.model = model  # type: ignore[attr-defined]
    return history


def new_weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(9)
    return {name: value.clone() for name, value in stock_model("llama", num_hidden_layers=2).state_dict().items()}


@pytest.mark.parametrize("sizes", LAYOUTS, ids=label)
@pytest.mark.parametrize("how", ["in place", "replaced"])
def test_weights_set_in_a_trainer_are_trained_on(
    pool: WorkerPool, tmp_path: Path, sizes: dict[str, Any], how: str
) -> None:
    """`load_state_dict` of whole tensors, and weights changed in place, between runs and by callbacks."""
    if how == "replaced" and sizes.get("zero_stage") == 3:
        pytest.skip("torch gives a DTensor no other data")
    world, dp = world_of(sizes)
    values = {**sizes, "gradient_accumulation_steps": 2 // dp}
    new = new_weights()
    got = pool.run(world, train_on, checkpoint("llama", num_hidden_layers=2), str(tmp_path), values, how, new)[0]
    expected = stock_train_on(checkpoint("llama", num_hidden_layers=2), how, new)
    assert len(got.losses) == len(expected.losses) == 5
    assert relative(got.losses, expected.losses) <= 2e-5
    assert relative(got.norms, expected.norms) <= 1e-4
    for name, weight in StockAuto.from_pretrained(tmp_path).named_parameters():
        other = expected.model.get_parameter(name)  # type: ignore[attr-defined]
        torch.testing.assert_close(weight, other, rtol=1e-3, atol=2e-4)


def bf16_runs(directory: str, sizes: dict[str, Any]) -> list[list[float]]:
    """bf16, whose masters are other memory: weights set after the trainer was made, and before."""
    losses = []
    for when in ("before", "in place", "data", "replaced"):
        args = NanotronTrainingArguments(**training_arguments(max_steps=3, bf16=True, **sizes))
        model, history = AutoModelForCausalLM.from_pretrained(directory, args.parallel), History()
        if when == "before":
            change(model, HEAD, 0.5, "data")
        trainer = NanotronTrainer(
            model=model, args=args, train_dataset=ROWS, data_collator=pad_batch, callbacks=[history]
        )
        if when != "before":
            change(model, HEAD, 0.5, when)
        trainer.train()
        losses.append(history.losses)
    return losses


@pytest.mark.parametrize("sizes", [{}, {"zero_stage": 2}], ids=label)
def test_masters_follow_weights_that_are_set(pool: WorkerPool, sizes: dict[str, Any]) -> None:
    directory = bf16_checkpoint()
    for rank in pool.run(world_of(sizes)[0], bf16_runs, directory, sizes):
        assert all(losses == rank[0] for losses in rank)


def bf16_checkpoint() -> str:
    """One whose weights are bf16 numbers, so that rounding them comes to the same before and after."""
    import tempfile

    directory, model = tempfile.mkdtemp(), stock_model("llama", num_hidden_layers=2)
    model.to(torch.bfloat16).float().save_pretrained(directory)
    return directory


def replacing(sizes: dict[str, Any]) -> dict[str, str | None]:
    def run(action: Any) -> str | None:
        args = NanotronTrainingArguments(**training_arguments(max_steps=2, **sizes))
        model = AutoModelForCausalLM.from_config(tiny_config(num_hidden_layers=2), args.parallel)
        trainer = NanotronTrainer(model=model, args=args, train_dataset=ROWS, data_collator=pad_batch)
        action(model)
        return message_of(trainer.train)

    def parameter(model: Any) -> None:
        model.model.norm.weight = nn.Parameter(torch.ones(32))

    def module(model: Any) -> None:
        model.model.norm = type(model.model.norm)(32)

    def added(model: Any) -> None:
        model.model.extra = nn.Linear(2, 2)

    def data(model: Any) -> None:
        model.model.norm.weight.data = torch.ones(5)

    def frozen(model: Any) -> None:
        model.model.norm.weight.requires_grad_(False)

    def alone(model: Any) -> None:
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight.mul_(1.0 if model.mesh.rank == 0 else 2.0)

    actions = (parameter, module, added, data, frozen, *((alone,) if "zero_stage" in sizes else ()))
    return {action.__name__: run(action) for action in actions}


@pytest.mark.parametrize(
    "sizes", [{}, pytest.param({"tp_size": 2}, marks=pytest.mark.full_matrix), {"zero_stage": 1}], ids=label
)
def test_replaced_weights_are_refused(pool: WorkerPool, sizes: dict[str, Any]) -> None:
    messages = agree(pool.run(world_of(sizes)[0], replacing, sizes))
    assert "model.norm.weight was replaced by another parameter" in messages["parameter"]
    assert "the module model.norm was replaced" in messages["module"]
    assert "model.extra.bias was added" in messages["added"]
    assert "model.norm.weight" in messages["data"] and "(5,)" in messages["data"]
    assert "requires_grad of model.norm.weight (1 parameters) was changed" in messages["frozen"]
    if "zero_stage" in sizes:
        assert "model.layers.1.mlp.up_proj.weight" in messages["alone"] and "every rank alike" in messages["alone"]
