"""What bad input gets: one clear ValueError that names the values and says which would work.

Where ranks take part, every one of them raises the same error. A check that only the rank made which holds a layer
would leave the others waiting, so those cases run with several stages.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from family_runs import FAMILIES
from pool import JobError, WorkerPool
from safetensors.torch import load_file, save_file
from test_gradients import stock_model
from tiny import pad_batch, random_dataset, tiny_config, training_arguments
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM as StockAuto,
    AutoModelForMaskedLM,
    LlamaForSequenceClassification,
    TrainingArguments,
)

from hf_nanotron import AutoModelForCausalLM, NanotronTrainer, NanotronTrainingArguments, ParallelConfig
from hf_nanotron.data.padding import pad_sequence
from hf_nanotron.models.sharding.parallelize import parallelize
from hf_nanotron.parallel.mesh import ParallelMesh
from hf_nanotron.training.same_model import differences

# ---- sizes that do not fit the model ----

SMOLLM2_135M = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 2,
    "num_attention_heads": 9, "num_key_value_heads": 3,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 4, "n_head": 4, "vocab_size": 120}
HRM = {"model_type": "hrm_text", **FAMILIES["hrm_text"]["config"]}
MOE = {"model_type": "qwen3_moe", **FAMILIES["qwen3_moe"]["config"]}

# sizes, config, what the message says
MISFITS: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "world": ({"tp_size": 3}, {}, ["tp_size=3", "world size", "start 3 processes"]),
    "heads": ({"tp_size": 2}, SMOLLM2_135M, ["tp_size=2", "9 attention heads", "3 key-value heads", "[1, 3]"]),
    "kv heads": (
        {"tp_size": 2},
        {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48},
        ["tp_size=2", "6 attention heads", "3 key-value heads", "[1, 3, 6]"],
    ),
    "vocabulary": (
        {"tp_size": 2},
        {"vocab_size": 1},
        ["tp_size=2", "larger than the vocabulary of 1", "must be one of [1]."],
    ),
    "intermediate": (
        {"tp_size": 2},
        {"intermediate_size": 49},
        ["tp_size=2", "49 features", "mlp", "must be one of [1]."],
    ),
    "stages": ({"pp_size": 2}, {"num_hidden_layers": 1}, ["2 pipeline stages", "1 decoder layers", "at most 1"]),
    "split": (
        {"pp_size": 2, "pp_layers_per_stage": (1, 2)},
        {},
        ["pp_layers_per_stage=[1, 2]", "adds up to 3", "has 4"],
    ),
    "virtual stages": (
        {"pp_size": 2, "pp_schedule": "interleaved_1f1b", "pp_virtual_stages": 3},
        {},
        ["6 pipeline stages", "4 decoder layers", "at most 4"],
    ),
    "tp plan": ({"tp_size": 2}, GPT2, ["gpt2", "no tensor-parallel plan", "tp_size=1"]),
    "pp plan": ({"pp_size": 2}, HRM, ["pp_size=2", "hrm_text", "split into stages", "use pp_size=1"]),
    "experts": ({"ep_size": 2}, {**MOE, "num_experts": 7}, ["ep_size=2", "the 7 experts", "must be one of [1, 7]."]),
    "no experts": ({"ep_size": 2}, {}, ["ep_size=2", "llama", "no experts", "use ep_size=1"]),
    "expert ranks": ({"ep_size": 4, "tp_size": 2}, MOE, ["ep_size=4", "size 1 x tp_size=2 = 2", "one of [1, 2]."]),
    "quantised": ({"tp_size": 2}, {"quantization_config": {"quant_method": "fp8"}}, ["quantization_config", "plain"]),
}


def config_of(values: dict[str, Any]) -> Any:
    if "model_type" in values:
        return AutoConfig.for_model(**values)
    return tiny_config(**values)


def message_of(function: Callable[[], Any]) -> str | None:
    """The message of the ValueError that `function` raises, None if it raises nothing."""
    try:
        function()
    except ValueError as error:
        return str(error)
    return None


def misfits() -> dict[str, str | None]:
    return {
        name: message_of(lambda s=sizes, c=config: AutoModelForCausalLM.from_config(config_of(c), ParallelConfig(**s)))
        for name, (sizes, config, _) in MISFITS.items()
    }


def agree(results: list[dict[str, str | None]]) -> dict[str, str]:
    """The messages, after a check that every rank has the same ones."""
    for name in results[0]:
        assert None not in {messages[name] for messages in results}, f"{name}: a rank raises nothing"
        assert len({messages[name] for messages in results}) == 1, f"{name}: ranks disagree"
    return {name: message or "" for name, message in results[0].items()}


def test_sizes_that_do_not_fit(pool: WorkerPool) -> None:
    messages = agree(pool.run(2, misfits))
    for name, (_, _, parts) in MISFITS.items():
        assert all(part in messages[name] for part in parts), f"{name}: {messages[name]}"


def test_the_error_reaches_the_caller_on_every_rank(pool: WorkerPool) -> None:
    with pytest.raises(JobError, match="9 attention heads") as caught:
        pool.run(2, AutoModelForCausalLM.from_config, config_of(SMOLLM2_135M), ParallelConfig(tp_size=2))
    assert caught.value.kinds == {0: "ValueError", 1: "ValueError"}


def train_gpt2() -> float:
    """A model without plans still trains data-parallel, as the errors above say."""
    args = NanotronTrainingArguments(**training_arguments(max_steps=1))
    model = AutoModelForCausalLM.from_config(config_of(GPT2), args.parallel)
    trainer = NanotronTrainer(model=model, args=args, train_dataset=random_dataset(4), data_collator=pad_batch)
    return trainer.train().training_loss


def test_without_a_plan_data_parallel_works(pool: WorkerPool) -> None:
    assert all(loss > 1 for loss in pool.run(2, train_gpt2))


@pytest.mark.parametrize(
    ("sizes", "parts"),
    [
        ({"cp_size": 2, "cp_kv_heads_per_gather": 0}, ["cp_kv_heads_per_gather=0", "at least 1"]),
        ({"cp_kv_heads_per_gather": 2}, ["cp_kv_heads_per_gather=2", "cp_size=1", "cp_size of at least 2"]),
        ({"cp_size": 2, "cp_mode": "ring"}, ["cp_mode='ring'", "'gather'"]),
        ({"ep_size": 0}, ["ep_size=0", "at least 1"]),
        ({"zero_stage": 4}, ["zero_stage=4", "0 (shard nothing)"]),
        ({"zero_stage": 0, "dp_replicate_size": 2}, ["dp_replicate_size=2", "zero_stage=0", "dp_replicate_size=1"]),
        ({"tp_size": 0}, ["tp_size=0", "at least 1"]),
        ({"pp_size": 2, "pp_layers_per_stage": (1, 2, 1)}, ["[1, 2, 1]", "2 stages"]),
        ({"pp_virtual_stages": 2}, ["pp_virtual_stages=2", "interleaved_1f1b", "'1f1b'"]),
        ({"pp_schedule": "gpipe"}, ["gpipe", "afab"]),
        ({"pp_schedule": "zb"}, ["pp_schedule='zb'", "pp_size=1", "'1f1b'"]),
        ({"pp_schedule": "zb", "pp_size": 2, "zero_stage": 3}, ["pp_schedule='zb'", "zero_stage=3", "0, 1 or 2"]),
    ],
)
def test_sizes_that_no_run_could_use(sizes: dict[str, Any], parts: list[str]) -> None:
    message = message_of(lambda: ParallelConfig(**sizes))
    assert message is not None and all(part in message for part in parts), message


def test_too_few_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a process group exists: the size of the job is announced by its environment."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match=r"gradient_accumulation_steps=2 .* pp_size=4 .* 4 or more .*'afab'"):
        NanotronTrainingArguments(**training_arguments(pp_size=4, gradient_accumulation_steps=2))
    with pytest.raises(ValueError, match=r"tp_size=3 .* does not divide the world size 4: .* \[1, 2, 4\]"):
        NanotronTrainingArguments(**training_arguments(tp_size=3))
    assert not torch.distributed.is_initialized()


# ---- checkpoints ----


def damage(directory: Path, how: str) -> None:
    weights = directory / "model.safetensors"
    index = directory / "model.safetensors.index.json"
    tensors = load_file(weights)
    last_layer = "model.layers.3.self_attn.q_proj.weight"  # which the first stage does not hold
    if how == "missing tensor":
        del tensors[last_layer]
    elif how == "other shape":
        tensors[last_layer] = tensors[last_layer][:-1].clone()
    elif how == "integers":
        tensors[last_layer] = tensors[last_layer].to(torch.int8)
    save_file(tensors, weights, {"format": "pt"})
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "empty":
        weights.write_bytes(b"")
    elif how == "other format":
        weights.rename(directory / "pytorch_model.bin")
    elif how.startswith("index"):
        named = dict.fromkeys(tensors, "model.safetensors")
        if how == "index names an absent file":
            named[last_layer] = "model-00002-of-00002.safetensors"
        elif how == "index names an absent tensor":
            del tensors[last_layer]
            save_file(tensors, weights, {"format": "pt"})
        text = json.dumps({"metadata": {}, "weight_map": named})
        index.write_text(text[: len(text) // 2] if how == "index truncated" else text)


DAMAGES = {
    "missing tensor": ["lacks 1 tensors of LlamaForCausalLM", "model.layers.3.self_attn.q_proj.weight"],
    "other shape": ["model.layers.3.self_attn.q_proj.weight", "(31, 32)", "(32, 32)"],
    "integers": ["model.layers.3.self_attn.q_proj.weight", "I8", "quantized"],
    "truncated": ["model.safetensors is truncated or damaged", "fetch it again"],
    "empty": ["model.safetensors is truncated or damaged", "fetch it again"],
    "other format": ["contains neither model.safetensors nor model.safetensors.index.json", "save_pretrained"],
    "index names an absent file": ["model-00002-of-00002.safetensors is missing", "index.json names it"],
    "index names an absent tensor": ["model.safetensors has no tensor", "q_proj", "index.json"],
    "index truncated": ["model.safetensors.index.json is truncated or damaged", "fetch it again"],
    "argument": ["unknown arguments ['no_such_argument']", "revision", "dtype"],
}


def load_damaged(directory: str, sizes: dict[str, Any]) -> dict[str, str | None]:
    mesh = ParallelMesh(ParallelConfig(**sizes))
    messages = {}
    for name in DAMAGES:
        path = os.path.join(directory, "whole" if name == "argument" else name)
        more = {"no_such_argument": 1} if name == "argument" else {}
        messages[name] = message_of(lambda p=path, m=more: AutoModelForCausalLM.from_pretrained(p, mesh=mesh, **m))
    return messages


@pytest.mark.parametrize("sizes", [{"pp_size": 2}, {"tp_size": 2}], ids=["pp2", "tp2"])
def test_damaged_checkpoints(pool: WorkerPool, tmp_path: Path, sizes: dict[str, Any]) -> None:
    model = stock_model("llama")
    for name in ("whole", *DAMAGES):
        model.save_pretrained(tmp_path / name)
        if name in DAMAGES and name != "argument":
            damage(tmp_path / name, name)
    messages = agree(pool.run(2, load_damaged, str(tmp_path), sizes))
    for name, parts in DAMAGES.items():
        assert all(part in messages[name] for part in parts), f"{name}: {messages[name]}"


# ---- models and arguments that the trainer refuses ----


@pytest.fixture
def mesh() -> ParallelMesh:
    return ParallelMesh(ParallelConfig())


def with_adapter() -> Any:
    model = stock_model("llama")
    model.peft_config = {"default": object()}
    return model


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda: LlamaForSequenceClassification(tiny_config()), "not a causal language model"),
        (lambda: AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", num_hidden_layers=1)), "not a causal"),
        (lambda: nn.Linear(2, 2), "Linear is not a causal language model"),
        (with_adapter, "peft_config"),
    ],
    ids=["classifier", "masked", "module", "adapter"],
)
def test_models_that_are_refused(mesh: ParallelMesh, make: Callable[[], Any], part: str) -> None:
    with pytest.raises(ValueError, match=part):
        parallelize(make(), mesh)


def test_a_parallel_model_is_not_cut_again(mesh: ParallelMesh) -> None:
    model = parallelize(stock_model("llama"), mesh)
    with pytest.raises(ValueError, match="already sharded"):
        parallelize(model, mesh)
    with pytest.raises(ValueError, match="`mesh` and `parallel` have different sizes"):
        AutoModelForCausalLM.from_config(tiny_config(), ParallelConfig(sequence_parallel=False), mesh=mesh)


def build_trainer(model: Any = None, args: Any = None, **kwargs: Any) -> NanotronTrainer:
    args = args or NanotronTrainingArguments(**training_arguments(max_steps=1))
    kwargs = {"train_dataset": random_dataset(4), "data_collator": pad_batch, **kwargs}
    return NanotronTrainer(model=model if model is not None else stock_model("llama"), args=args, **kwargs)


def without_labels(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {"input_ids": pad_batch(rows)["input_ids"]}


def changed(**columns: Any) -> Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]:
    """A collator whose columns are made of the ids."""
    return lambda rows: (batch := pad_batch(rows)) | {name: make(batch["input_ids"]) for name, make in columns.items()}


# what is done, and what the message says
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "stock arguments": (
        lambda: build_trainer(args=TrainingArguments(**training_arguments())),
        "NanotronTrainingArguments.* not TrainingArguments",
    ),
    "other sizes": (
        lambda: build_trainer(AutoModelForCausalLM.from_config(tiny_config(), ParallelConfig(sequence_parallel=False))),
        r"the model was made for .*`parallel=args.parallel`",
    ),
    "optimizers": (
        lambda: build_trainer(optimizers=(torch.optim.SGD([nn.Parameter(torch.ones(1))]), None)),
        "optimizers: 1 of its 1 parameters are not parameters of the model.*named_parameters",
    ),
    "matrix optimizer": (
        lambda: build_trainer(optimizers=(torch.optim.Muon([nn.Parameter(torch.ones(1, 1))]), None)),
        "optimizers: Muon is not known to be element-wise.*elementwise = True",
    ),
    "optimizer with state": (
        lambda: build_trainer(optimizers=(torch.optim.Adagrad([nn.Parameter(torch.ones(1))]), None)),
        "optimizers: Adagrad already has state.*optimizer_cls_and_kwargs",
    ),
    "scheduler alone": (lambda: build_trainer(optimizers=(None, object())), r"\(None, scheduler\).*lr_scheduler_type"),
    "optimizer class": (
        lambda: build_trainer(optimizer_cls_and_kwargs=(torch.optim.Muon, {})).train(),
        "Muon is not known to be element-wise.*AdamW",
    ),
    "search": (lambda: build_trainer().hyperparameter_search(), "hyperparameter_search.*one job per trial"),
    "a mask of other tokens": (
        lambda: build_trainer(data_collator=changed(attention_mask=lambda ids: ids[:, 2:] * 0 + 1)).train(),
        r"attention_mask of a batch has the shape \[\d, 14\], and input_ids \[\d, 16\]: each token needs one",
    ),
    "positions of other rows": (
        lambda: build_trainer(data_collator=changed(position_ids=lambda ids: ids.repeat(3, 1))).train(),
        "position_ids of a batch has the shape",
    ),
    "ids that are no integers": (
        lambda: build_trainer(data_collator=changed(input_ids=lambda ids: ids.float())).train(),
        "input_ids of a batch are torch.float32: ids are integers",
    ),
    "labels": (
        lambda: build_trainer(data_collator=without_labels).train(),
        r"no `labels` \(they have \['input_ids'\]\).*DataCollatorForLanguageModeling",
    ),
}


@pytest.mark.parametrize(("act", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_the_trainer_refuses(act: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        act()
    assert re.search(message, str(caught.value), re.DOTALL), str(caught.value)


@pytest.mark.parametrize(
    ("changes", "lost"),
    [
        ({"num_hidden_layers": 2}, r"model.layers.2.input_layernorm.weight, .*\(18 tensors"),
        ({"tie_word_embeddings": True}, r"lm_head.weight \(1 tensors"),
    ],
    ids=["fewer layers", "tied"],
)
def test_a_checkpoint_of_more_than_the_model(changes: dict[str, Any], lost: str, tmp_path: Path) -> None:
    """Half of a model would go on, in silence."""
    values = training_arguments(output_dir=str(tmp_path), save_strategy="steps", save_steps=1, max_steps=1)
    build_trainer(args=NanotronTrainingArguments(**values)).train()
    smaller = stock_model("llama", **changes)
    trainer = build_trainer(smaller, NanotronTrainingArguments(**{**values, "max_steps": 2}))
    with pytest.raises(ValueError, match=f"checkpoint-1 holds {lost}.* which the model does not have"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}, "hidden_act": "gelu"},
            r'hidden_act="silu" \(here "gelu"\), rope_parameters.rope_theta=[0-9.]+ \(here 5000.0\)',
        ),
        ({"attention_dropout": 0.1, "initializer_range": 0.1, "max_position_embeddings": 256, "pad_token_id": 3}, None),
    ],
    ids=["computes something else", "computes the same"],
)
def test_a_checkpoint_of_another_config(changes: dict[str, Any], said: str | None, tmp_path: Path) -> None:
    """Its weights have the same shapes: nothing else would notice."""
    values = training_arguments(output_dir=str(tmp_path), save_strategy="steps", save_steps=1, max_steps=1)
    build_trainer(args=NanotronTrainingArguments(**values)).train()
    other = stock_model("llama", **changes)
    trainer = build_trainer(other, NanotronTrainingArguments(**{**values, "max_steps": 2}))
    with pytest.raises(ValueError, match=f"is of a model with {said}: it") if said else contextlib.nullcontext():
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert trainer.state.global_step == (0 if said else 2)


def test_configs_that_are_saved_and_loaded_are_the_same(tmp_path: Path) -> None:
    """Of all families: a refusal of one's own checkpoint would be worse than what it is for."""
    for family, entry in FAMILIES.items():
        config = AutoConfig.for_model(family, **entry["config"])
        config.save_pretrained(tmp_path / family)
        saved = json.loads(config.to_json_string(use_diff=False))
        loaded = AutoConfig.from_pretrained(tmp_path / family, dtype="bfloat16", attn_implementation="sdpa")
        assert not differences(saved, json.loads(loaded.to_json_string(use_diff=False))), family


@pytest.mark.parametrize(
    "name",
    ["use_mamba_kernels", "router_jitter_noise", "z_loss_coefficient", "aux_loss_alpha", "mamba_ssm_cache_dtype",
     "attn_implementation", "embd_pdrop", "embedding_initializer_range", "tokenizer_class"],
)  # fmt: skip
def test_what_a_resume_may_change(name: str) -> None:
    assert not differences({"text_config": {name: 1}}, {"text_config": {name: 2}})


@pytest.mark.parametrize("name", ["conv_kernel", "rms_norm_eps", "hidden_act", "sliding_window", "swiglu_alpha"])
def test_what_a_resume_may_not_change(name: str) -> None:
    assert differences({"text_config": {name: 1}}, {"text_config": {name: 2}}) == [f"text_config.{name}=1 (here 2)"]


def test_sequences_are_filled_up_or_refused() -> None:
    ids = torch.ones(2, 5, dtype=torch.long)
    batch = {"input_ids": ids, "labels": ids, "attention_mask": ids, "position_ids": ids, "epoch": 3}
    filled = pad_sequence(batch, 4)
    assert {name: tuple(filled[name].shape) for name in filled if name != "epoch"} == dict.fromkeys(
        ("input_ids", "labels", "attention_mask", "position_ids"), (2, 8)
    )
    assert (filled["labels"][:, 5:] == -100).all() and (filled["attention_mask"][:, 5:] == 0).all()
    assert pad_sequence({**batch, "segments": ids}, 5)["segments"] is ids
    with pytest.raises(ValueError, match=r"multiple of 4 .* has 5, .*'segments' .*\(2, 5\).*pad_to_multiple_of=4"):
        pad_sequence({**batch, "segments": ids}, 4)


# ---- a rank that dies ----

DYING = """
import sys
sys.path.insert(0, {tests!r})
from tiny import pad_batch, random_dataset, tiny_config, training_arguments
from transformers import TrainerCallback
from hf_nanotron import AutoModelForCausalLM, NanotronTrainer, NanotronTrainingArguments

class Dies(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2 and args.process_index == 1:
            raise RuntimeError("rank 1 has had enough")

args = NanotronTrainingArguments(**training_arguments(tp_size=2, max_steps=50))
model = AutoModelForCausalLM.from_config(tiny_config(num_hidden_layers=2), args.parallel)
NanotronTrainer(
    model=model, args=args, train_dataset=random_dataset(64), data_collator=pad_batch, callbacks=[Dies()]
).train()
print("the job went on")
"""


def test_a_rank_that_dies_takes_the_job_down(pool: WorkerPool, tmp_path: Path) -> None:
    """At once, not after the timeout of the process group, half an hour, and its own traceback comes first."""
    script = tmp_path / "train.py"
    script.write_text(DYING.format(tests=str(Path(__file__).parent)))
    code, out, err = pool.run_alone(forked.torchrun_apart, 2, str(script), tmp_path)
    assert code != 0
    assert "the job went on" not in out
    own = err.find("rank 1 has had enough")
    assert own >= 0, err[-3000:]
    others = re.search(r"Connection (closed|reset)|DistBackendError|Socket", err)
    assert others is None or own < others.start()


def test_stock_models_without_the_package_still_load(tmp_path: Path) -> None:
    """The damage above is what makes loading fail: stock transformers takes the undamaged checkpoint."""
    stock_model("llama").save_pretrained(tmp_path)
    assert StockAuto.from_pretrained(tmp_path).num_parameters() > 0
