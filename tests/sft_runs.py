"""Fine-tuning runs of TRL and of ours on the same tiny model, tokenizer and conversations."""

from __future__ import annotations

import functools
import tempfile
from typing import Any

import torch
from datasets import Dataset, IterableDataset, disable_progress_bars
from test_chat_dataset import CHATS, MARKED, messages, tokenizer
from tiny import tiny_config, training_arguments
from transformers import AutoModelForCausalLM, TrainerCallback

FIGURES = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens", "aux_loss")


class Log(TrainerCallback):
    """What each line of the log says, training and evaluation."""

    def __init__(self) -> None:
        self.lines: list[dict[str, float]] = []
        self.evaluations: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.lines.append({name: logs[name] for name in FIGURES if name in logs})
        elif logs and "eval_loss" in logs:
            evaluated = [f"eval_{name}" for name in FIGURES]
            self.evaluations.append({name: logs[name] for name in evaluated if name in logs})


@functools.cache
def chat_checkpoint(family: str = "llama", **overrides: Any) -> str:
    """A Hub checkpoint of random weights, with a tokenizer that marks what the assistant says."""
    directory = tempfile.mkdtemp()
    torch.manual_seed(1)
    chosen = tokenizer(MARKED)
    config = tiny_config(
        family,
        **{
            "vocab_size": len(chosen) + 1,
            "num_hidden_layers": 2,
            "max_position_embeddings": 512,
            "pad_token_id": chosen.eos_token_id,
            "eos_token_id": chosen.eos_token_id,
            **overrides,
        },
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    chosen.save_pretrained(directory)
    return directory


SHORT = [chat for chat in CHATS if sum(len(text) for _, text in chat) < 60]


def chats() -> Dataset:
    return Dataset.from_dict({"messages": [messages(chat) for chat in SHORT]})


def prompts(conversational: bool = False) -> Dataset:
    found: dict[str, list[Any]] = {"prompt": [], "completion": []}
    for chat in SHORT:
        found["prompt"].append(messages(chat[:-1]) if conversational else f"{chat[-2][1]} = ")
        found["completion"].append(messages(chat[-1:]) if conversational else chat[-1][1])
    return Dataset.from_dict(found)


def texts() -> Dataset:
    return Dataset.from_dict({"text": [f"{chat[-2][1]} and {chat[-1][1]}" for chat in SHORT]})


def streamed() -> IterableDataset:
    return texts().to_iterable_dataset(num_shards=3)


# What TRL can do with data and loss -> the data, and the arguments.
MODES: dict[str, tuple[Any, dict[str, Any]]] = {
    "packing": (chats, {"packing": True, "max_length": 96}),
    "packing wrapped": (texts, {"packing": True, "packing_strategy": "wrapped", "max_length": 48}),
    "padding-free": (texts, {"padding_free": True, "max_length": None}),
    "assistant-only": (chats, {"assistant_only_loss": True, "max_length": 128}),
    "completion-only": (prompts, {"max_length": 40}),
    "completion-only chat": (functools.partial(prompts, True), {"max_length": 128, "packing": True}),
    "dft": (chats, {"loss_type": "dft", "assistant_only_loss": True}),
    "dft packed": (chats, {"loss_type": "dft", "packing": True, "max_length": 96}),
    "plain": (texts, {"gradient_checkpointing": False}),
    "streamed": (streamed, {}),
    "label smoothing": (texts, {"label_smoothing_factor": 0.1}),
}


def lora(**options: Any) -> Any:
    """Adapters on linears whose outputs are cut, and on those whose inputs are; of several ranks."""
    from peft import LoraConfig

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    own = {"target_modules": targets, "rank_pattern": {"down_proj": 6}, **options}
    return LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **own)


def sft_arguments(**overrides: Any) -> dict[str, Any]:
    return training_arguments(**{"bf16": False, "per_device_eval_batch_size": 2, **overrides})


def train_stock_sft(checkpoint: str, mode: str, evaluates: bool = False, **overrides: Any) -> Log:
    """The reference: `trl.SFTTrainer` in one process."""
    from trl import SFTConfig, SFTTrainer

    data, options = MODES[mode]
    log = Log()
    disable_progress_bars()
    SFTTrainer(
        model=checkpoint,
        args=SFTConfig(**sft_arguments(**options, **overrides)),
        train_dataset=data(),
        eval_dataset=data().take(4 if mode == "streamed" else 5) if evaluates else None,
        callbacks=[log],
    ).train()
    return log


def train_our_sft(checkpoint: str, mode: str, evaluates: bool = False, **overrides: Any) -> Log:
    """The same through `NanotronSFTTrainer`; call it on every rank."""
    from hf_nanotron.trl import NanotronSFTConfig, NanotronSFTTrainer

    data, options = MODES[mode]
    log = Log()
    disable_progress_bars()
    trainer = NanotronSFTTrainer(
        model=checkpoint,
        args=NanotronSFTConfig(**sft_arguments(**options, **overrides)),
        train_dataset=data(),
        eval_dataset=data().take(4 if mode == "streamed" else 5) if evaluates else None,
        callbacks=[log],
    )
    trainer.train()
    trainer.mesh.close()
    return log
