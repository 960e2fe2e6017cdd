"""LoRA on linears that are cut: the losses of stock PEFT under stock `trl.SFTTrainer`, and PEFT's files."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig
from pool import WorkerPool
from safetensors.torch import load_file
from sft_runs import MODES, Log, chat_checkpoint, chats, lora, sft_arguments
from tiny import message
from transformers import AutoModelForCausalLM, TrainerCallback
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


@functools.cache
def reference(dp: int) -> tuple[Log, str]:
    """The log of stock PEFT and TRL, and the folder of their adapters."""
    log, folder = Log(), tempfile.mkdtemp()
    args = SFTConfig(**sft_arguments(**COMMON, per_device_train_batch_size=dp, output_dir=folder))
    trainer = SFTTrainer(chat_checkpoint(), args, train_dataset=chats(), callbacks=[log], peft_config=lora())
    trainer.train()
    trainer.save_model()
    return log, folder


class Stop(TrainerCallback):
    def __init__(self, at: int) -> None:
        self.at = at

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.at


def run(directory: str, sizes: dict[str, Any], until: int = 4, resume: Any = None) -> Log:
    log = Log()
    trainer = NanotronSFTTrainer(
        directory,
        NanotronSFTConfig(**sft_arguments(**{**COMMON, **sizes})),
        train_dataset=chats(),
        callbacks=[log, Stop(until)],
        peft_config=lora(),
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    assert trainer.get_num_trainable_parameters() < trainer.model.num_parameters() / 2
    trainer.mesh.close()
    return log


def logits(folder: Path | str) -> torch.Tensor:
    """Of the stock model, with the adapters of a folder that plain PEFT reads."""
    base = AutoModelForCausalLM.from_pretrained(chat_checkpoint())
    with torch.no_grad():
        adapted: torch.Tensor = PeftModel.from_pretrained(base, folder).eval()(torch.arange(3, 35)[None]).logits
    return adapted


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


def test_a_run_goes_on_at_other_sizes(pool: WorkerPool, tmp_path: Path) -> None:
    """From the adapters' training state alone: the checkpoint has no weights of the base."""
    save = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    first = pool.run(2, run, chat_checkpoint(), {**save, "tp_size": 2}, 2)[0]
    other = {**save, "zero_stage": 2, "gradient_accumulation_steps": 1}
    rest = pool.run(2, run, chat_checkpoint(), other, 4, True)[0]
    expected, folder = reference(1)
    for name in ("loss", "grad_norm"):
        got = column(first, name) + column(rest, name)
        assert got == pytest.approx(column(expected, name), rel=TOLERANCE["norm"])
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-4"]
    assert torch.allclose(logits(tmp_path / "checkpoint-4"), logits(folder), atol=1e-3)


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
    }
    assert {what: text for what, text in said.items() if what not in text or "refused" not in text} == {}
    assert "the head and the loss are one" in refuse(target_modules=["lm_head"])
    assert "is no linear" in refuse(target_modules=["embed_tokens"])
    args = NanotronSFTConfig(**sft_arguments())
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    text = message(lambda: NanotronSFTTrainer(chat_checkpoint(), args, train_dataset=chats(), peft_config=prompts))
    assert text.startswith("peft_config=PromptTuningConfig is refused")
