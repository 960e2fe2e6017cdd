"""LoRA on linears that are cut: the losses of stock PEFT under stock `trl.SFTTrainer`, and PEFT's files."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pool import JobError, WorkerPool
from safetensors.torch import load_file
from sft_runs import MODES, Log, chat_checkpoint, chats, lora, sft_arguments
from test_chat_dataset import MARKED, tokenizer
from test_snapshots import await_snapshots
from tiny import message
from transformers import AutoModelForCausalLM, TrainerCallback

pytest.importorskip("peft", reason="peft is not installed (pip install hf-nanotron[peft])")
pytest.importorskip("trl", reason="trl is not installed (pip install hf-nanotron[trl])")
from peft import LoraConfig, PeftModel, PromptTuningConfig
from trl import SFTConfig, SFTTrainer

from hf_nanotron.trl import NanotronSFTConfig, NanotronSFTTrainer

TOLERANCE = {"first loss": 1e-6, "loss": 2e-5, "norm": 1e-4}
COMMON: dict[str, Any] = {**MODES["packing"][1], "learning_rate": 2e-2, "gradient_accumulation_steps": 2}

TOPOLOGIES: dict[str, tuple[int, dict[str, Any]]] = {  # data-parallel ranks, sizes
    "one process": (1, {}),
    "tp 2": (1, {"tp_size": 2}),
    "tp 4": (1, {"tp_size": 4}),  # more ranks than key-value heads
    "tp 2 whole sequences": (1, {"tp_size": 2, "sequence_parallel": False}),
    "pp 2": (1, {"pp_size": 2}),
    "pp 2 zb": (1, {"pp_size": 2, "pp_schedule": "zb"}),
    "dp 2 zero 1": (2, {}),
    "dp 2 zero 2": (2, {"zero_stage": 2}),
    "dp 2 zero 3": (2, {"zero_stage": 3}),
    "cp 2": (1, {"cp_size": 2}),
    "tp 2 pp 2": (1, {"tp_size": 2, "pp_size": 2}),
}
BY_DEFAULT = {"tp 2 pp 2"}  # the resume below has dp 2


MLA = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
# The same of adapters in other places: the model, sizes, fields of LoraConfig.
PLACES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "first layer, pp 2": ("llama", {"pp_size": 2}, {"layers_to_transform": [0]}),
    "last layer, pp 2 zb": ("llama", {"pp_size": 2, "pp_schedule": "zb"}, {"layers_to_transform": [1]}),
    "last layer, pp 2 zero 3": ("llama", {"pp_size": 2, "dp_size": 2, "zero_stage": 3}, {"layers_to_transform": [1]}),
    "rank above the sizes": ("llama", {"tp_size": 2}, {"rank_pattern": {"v_proj": 100}, "alpha_pattern": {"v": 3}}),
    "tied head, all linears": ("qwen3", {"tp_size": 2, "pp_size": 2}, {"target_modules": "all-linear"}),
    "biases": ("qwen2", {"tp_size": 4}, {"target_modules": "all-linear", "use_rslora": True}),
    "fused": ("phi3", {"tp_size": 2}, {"target_modules": "all-linear", "init_lora_weights": "gaussian"}),
    "fused by heads": ("gpt_neox", {"tp_size": 2}, {"target_modules": "all-linear", "init_lora_weights": False}),
    "latent attention": (
        "deepseek_v3",
        {"tp_size": 2},
        {"target_modules": MLA},
    ),
    "experts": ("mixtral", {"ep_size": 2}, {"target_modules": ["q_proj", "o_proj"]}),
}


@functools.cache
def reference(dp: int, family: str = "llama", fields: str = "{}") -> tuple[Log, str]:
    """The log of stock PEFT and TRL, and the folder of their adapters."""
    log, folder = Log(), tempfile.mkdtemp()
    args = SFTConfig(**sft_arguments(**COMMON, per_device_train_batch_size=dp, output_dir=folder))
    adapters = lora(**json.loads(fields))
    trainer = SFTTrainer(model_of(family), args, train_dataset=chats(), callbacks=[log], peft_config=adapters)
    trainer.train()
    trainer.save_model()
    return log, folder


def model_of(family: str) -> str:
    more = {
        "qwen3": {"tie_word_embeddings": True},
        "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
        "deepseek_v3": {
            "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
            "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
            "moe_intermediate_size": 16, "num_key_value_heads": 4,
        },
    }  # fmt: skip
    return chat_checkpoint() if family == "llama" else chat_checkpoint(family, **more.get(family, {}))


class Stop(TrainerCallback):
    def __init__(self, at: int) -> None:
        self.at = at

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.at


def run(directory: str, sizes: dict[str, Any], until: int = 4, resume: Any = None, **fields: Any) -> Log:
    log = Log()
    trainer = NanotronSFTTrainer(
        directory,
        NanotronSFTConfig(**sft_arguments(**{**COMMON, **sizes})),
        train_dataset=chats(),
        callbacks=[log, Stop(until)],
        peft_config=lora(**fields),
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    assert trainer.get_num_trainable_parameters() < trainer.model.num_parameters() / 2
    trainer.mesh.close()
    return log


def logits(folder: Path | str, family: str = "llama") -> torch.Tensor:
    """Of the stock model, with the adapters of a folder that plain PEFT reads and merges into it."""
    base = AutoModelForCausalLM.from_pretrained(model_of(family))
    with torch.no_grad():
        merged: torch.Tensor = PeftModel.from_pretrained(base, folder).merge_and_unload().eval()(IDS).logits
    return merged


IDS = torch.arange(3, 35)[None]


def column(log: Log, name: str) -> list[float]:
    return [line[name] for line in log.lines]


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_losses_and_files_are_those_of_peft(
    pool: WorkerPool, pytestconfig: pytest.Config, tmp_path: Path, name: str
) -> None:
    if name not in BY_DEFAULT and not pytestconfig.getoption("full_matrix"):
        pytest.skip("runs with --full-matrix")
    dp, sizes = TOPOLOGIES[name]
    world = dp * sizes.get("tp_size", 1) * sizes.get("pp_size", 1) * sizes.get("cp_size", 1)
    results = pool.run(world, run, chat_checkpoint(), {**sizes, "output_dir": str(tmp_path)})
    got, (expected, folder) = results[0], reference(dp)
    assert all(log.lines == got.lines for log in results)
    assert column(got, "loss")[:1] == pytest.approx(column(expected, "loss")[:1], rel=TOLERANCE["first loss"])
    assert column(got, "loss") == pytest.approx(column(expected, "loss"), rel=TOLERANCE["loss"])
    assert column(got, "grad_norm") == pytest.approx(column(expected, "grad_norm"), rel=TOLERANCE["norm"])
    assert not list(tmp_path.glob("model*.safetensors"))

    ours, theirs = load_file(tmp_path / "adapter_model.safetensors"), load_file(f"{folder}/adapter_model.safetensors")
    assert {name: tensor.shape for name, tensor in ours.items()} == {name: t.shape for name, t in theirs.items()}
    base = AutoModelForCausalLM.from_pretrained(chat_checkpoint())
    with torch.no_grad():
        plain = base(torch.arange(3, 35)[None]).logits
    assert (logits(tmp_path) - logits(folder)).abs().max() < 1e-3 * (logits(folder) - plain).abs().max()
    configs = [json.loads(Path(each, "adapter_config.json").read_text()) for each in (tmp_path, folder)]
    for config in configs:
        config["target_modules"] = sorted(config["target_modules"])
    assert configs[0] == configs[1]


@pytest.mark.parametrize("name", PLACES)
def test_adapters_elsewhere(pool: WorkerPool, pytestconfig: pytest.Config, tmp_path: Path, name: str) -> None:
    """A stage without adapters, a tied head, fused projections: as stock PEFT."""
    if name != "first layer, pp 2" and not pytestconfig.getoption("full_matrix"):
        pytest.skip("runs with --full-matrix")
    family, sizes, fields = PLACES[name]
    sizes, dp = dict(sizes), sizes.get("dp_size", sizes.get("ep_size", 1))
    sizes.pop("dp_size", None)
    world = dp * sizes.get("tp_size", 1) * sizes.get("pp_size", 1)
    before = digests(model_of(family))
    got = pool.run(world, partial(run, **fields), model_of(family), {**sizes, "output_dir": str(tmp_path)})[0]
    expected, folder = reference(dp, family, json.dumps(fields))
    for figure in ("loss", "grad_norm"):
        assert column(got, figure) == pytest.approx(column(expected, figure), rel=TOLERANCE["norm"]), figure
    assert torch.allclose(logits(tmp_path, family), logits(folder, family), atol=1e-3)
    assert digests(model_of(family)) == before


def digests(directory: str) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(directory).iterdir()}


def test_a_run_goes_on_at_other_sizes(pool: WorkerPool, tmp_path: Path) -> None:
    """From the adapters' training state alone: the checkpoint has no weights of the base."""
    save = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    first = pool.run(2, run, chat_checkpoint(), {**save, "tp_size": 2}, 2)[0]
    other = {**save, "zero_stage": 2, "gradient_accumulation_steps": 1}
    text = message(lambda: run(chat_checkpoint(), save, 4, True, alpha_pattern={"q_proj": 16}))
    assert "self_attn.q_proj has the scale 2.0 there and 4.0 here" in text
    text = message(lambda: run(chat_checkpoint(), save, 4, True, target_modules=["q_proj"]))
    assert "is of another peft_config: the adapter of" in text and "and None here" in text
    rest = pool.run(2, run, chat_checkpoint(), other, 4, True)[0]
    expected, folder = reference(1)
    for name in ("loss", "grad_norm"):
        got = column(first, name) + column(rest, name)
        assert got == pytest.approx(column(expected, name), rel=TOLERANCE["norm"])
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-4"]
    assert torch.allclose(logits(tmp_path / "checkpoint-4"), logits(folder), atol=1e-3)


class BreakOff(TrainerCallback):
    """Says the step after which a run began, and breaks it off at the beginning of step `at`, from 1."""

    def __init__(self, at: int | None) -> None:
        self.at, self.began = at, -1

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = state.global_step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.at:
            await_snapshots()
            raise RuntimeError("the cable was pulled")


def run_with_snapshots(base: str, folder: str, at: int | None) -> tuple[dict[int, float], int]:
    """Losses by step, also those before the snapshot that the run went on from."""
    save = {"output_dir": f"{folder}/out", "save_strategy": "steps", "save_steps": 100, "memory_snapshot_steps": 2}
    sizes = {**COMMON, **save, "memory_snapshot_dir": f"{folder}/memory", "max_steps": 6}
    ends = BreakOff(at)
    trainer = NanotronSFTTrainer(
        base,
        NanotronSFTConfig(**sft_arguments(**sizes)),
        train_dataset=chats(),
        callbacks=[ends],
        peft_config=lora(),
    )
    trainer.train(resume_from_checkpoint="auto")
    trainer.mesh.close()
    return {line["step"]: line["loss"] for line in trainer.state.log_history if "loss" in line}, ends.began


def test_a_run_goes_on_from_memory(pool: WorkerPool, tmp_path: Path) -> None:
    for name in ("whole", "broken"):
        (tmp_path / name / "memory").mkdir(parents=True)
    expected, _ = pool.run(2, run_with_snapshots, chat_checkpoint(), str(tmp_path / "whole"), None)[0]
    with pytest.raises(JobError, match="the cable was pulled"):
        pool.run(2, run_with_snapshots, chat_checkpoint(), str(tmp_path / "broken"), 6)
    assert pool.run(2, run_with_snapshots, chat_checkpoint(), str(tmp_path / "broken"), None)[0] == (expected, 4)


def refuse(options: dict[str, Any] | None = None, **fields: Any) -> str:
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **fields})
    args = NanotronSFTConfig(**sft_arguments(**(options or {})))
    return message(lambda: NanotronSFTTrainer(chat_checkpoint(), args, train_dataset=chats(), peft_config=config))


def test_adapters_that_would_train_otherwise_are_refused() -> None:
    said = {
        "lora_dropout=0.1": refuse(lora_dropout=0.1),
        "use_dora=True": refuse(use_dora=True),
        "bias='all'": refuse(bias="all"),
        "modules_to_save=['lm_head']": refuse(modules_to_save=["lm_head"]),
        "trainable_token_indices=[1]": refuse(trainable_token_indices=[1]),
        "init_lora_weights='pissa'": refuse(init_lora_weights="pissa"),
        "fp8='tensorwise'": refuse({"fp8": "tensorwise", "bf16": True}),
        "ema_decay=0.9": refuse({"ema_decay": 0.9}),
        "optim='muon'": refuse({"optim": "muon"}),
        "inference_mode=True": refuse(inference_mode=True),  # PEFT would train nothing
        "task_type='SEQ_CLS'": refuse(task_type="SEQ_CLS"),
    }
    assert {what: text for what, text in said.items() if what not in text or "refused" not in text} == {}
    assert "the head and the loss are one" in refuse(target_modules=["lm_head"])
    assert "is no linear" in refuse(target_modules=["embed_tokens"])
    args = NanotronSFTConfig(**sft_arguments())
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    text = message(lambda: NanotronSFTTrainer(chat_checkpoint(), args, train_dataset=chats(), peft_config=prompts))
    assert text.startswith("peft_config=PromptTuningConfig is refused")


def test_adapters_are_no_part_of_the_base(tmp_path: Path) -> None:
    """They are not written into its folder, nor into a stock model's, nor forgotten by whoever loads or saves."""
    base, other = tmp_path / "base", tmp_path / "out"
    shutil.copytree(chat_checkpoint(), base)
    made = {"train_dataset": chats(), "peft_config": lora()}
    text = message(lambda: NanotronSFTTrainer(str(base), config(output_dir=str(base)), **made))
    assert text.startswith(f"{base} is the folder of the base model")
    trainer = NanotronSFTTrainer(str(base), config(output_dir=str(other)), **made)
    assert message(lambda: trainer.save_model(str(base))).startswith(f"{base} is the folder of the base model")
    assert "Use trainer.save_model()" in message(lambda: trainer.model.save_pretrained(tmp_path / "stock"))
    assert "counts the gradients and moments of all weights" in message(lambda: trainer.plan("h100", 1, run=False))
    for options in (made, {"train_dataset": chats()}):
        text = message(lambda options=options: NanotronSFTTrainer(trainer.model, config(), **options))
        assert text.startswith("the model has adapters of another trainer")
    trainer.save_model()
    assert digests(str(base)) == digests(chat_checkpoint())
    text = message(lambda: NanotronSFTTrainer(str(base), config(output_dir=str(other)), train_dataset=chats()))
    assert "which transformers would load in place of a model" in text
    for name in ("adapter_model.safetensors", "tokenizer.json", "training_args.bin"):  # links to files of others
        (tmp_path / name).write_text("another's")
        (other / name).unlink()
        (other / name).symlink_to(tmp_path / name)
    trainer.save_model()
    assert all((tmp_path / name).read_text() == "another's" for name in ("adapter_model.safetensors", "tokenizer.json"))
    assert (tmp_path / "training_args.bin").read_text() == "another's"
    text = message(lambda: NanotronSFTTrainer(str(other), config(), train_dataset=chats()))
    assert text.startswith(f"{other} has adapters (adapter_config.json)")


def test_new_tokens_that_nothing_would_train_are_refused(tmp_path: Path) -> None:
    chosen = tokenizer(MARKED)
    chosen.add_tokens(["<new>"])
    chosen.save_pretrained(tmp_path)
    assert "adds" in refuse({"chat_template_path": str(tmp_path)})


def config(**options: Any) -> NanotronSFTConfig:
    return NanotronSFTConfig(**sft_arguments(**options))
