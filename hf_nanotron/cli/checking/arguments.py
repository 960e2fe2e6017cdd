"""The training arguments of a run, as a few steps on CPU processes in fp32 take them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from ...arguments.muon import MUON

Arguments = dict[str, Any]

# What has no part in the loss, gradients and weights of a few steps, and would write or wait.
SILENT: Arguments = {
    "save_strategy": "no", "eval_strategy": "no", "eval_on_start": False, "report_to": "none", "disable_tqdm": True,
    "logging_strategy": "steps", "logging_steps": 1, "logging_first_step": False, "logging_nan_inf_filter": False,
    "log_level": "error", "log_level_replica": "error",
    "load_best_model_at_end": False, "push_to_hub": False, "resume_from_checkpoint": None,
    "async_save": False, "save_on_signal": 0.0, "save_only_model": False, "save_hub_weights": "always",
    "overwrite_output_dir": True, "dataloader_num_workers": 0, "dataloader_prefetch_factor": None,
    "dataloader_persistent_workers": False, "dataloader_pin_memory": False, "use_cpu": True,
    "skip_memory_metrics": True,
    "torch_empty_cache_steps": None, "full_determinism": False, "ignore_data_skip": False, "wsd_decay_steps": None,
    "skip_nonfinite_steps": False, "ddp_timeout": 120, "num_train_epochs": 1, "ema_evaluate": False,
}  # fmt: skip

LEFT_OUT = (
    "remote_",
    "hub_",
    "batch_size_warmup_",
    "profile_",
    "metrics_detail",
    "memory_snapshot_",
    "max_dp_size",
)  # beginnings of names

# What a CPU in fp32 does in another way: key -> (what is replaced, its replacement, why).
Replacement = tuple[Callable[[Any], bool], Any, str]
REPLACED: dict[str, Replacement] = {
    "bf16": (bool, False, "fp32 shows differences that bfloat16 would hide"),
    "bf16_full_eval": (bool, False, "fp32 shows differences that bfloat16 would hide"),
    "fp8": (lambda value: value is not None, None, "FP8 products need a GPU"),
    "fp8_skip_layers": (lambda value: value is not None, None, "FP8 products need a GPU"),
    "tf32": (lambda value: value is not None, None, "TF32 is of GPUs"),
    "torch_compile": (bool, False, "the CPU computes without a compiler"),
    "torch_compile_backend": (lambda value: value is not None, None, "the CPU computes without a compiler"),
    "torch_compile_mode": (lambda value: value is not None, None, "the CPU computes without a compiler"),
    "ddp_backend": (lambda value: value not in (None, "gloo"), "gloo", "CPU processes communicate by gloo"),
    "muon_dtype": (lambda value: value != "float32", "float32", "fp32 shows differences that bfloat16 would hide"),
    "optim_state_dtype": (
        lambda value: value != "float32", "float32", "stochastic rounding draws other numbers on other layouts",
    ),
    "batch_size_warmup_tokens": (lambda value: value is not None, None, "a few steps do not reach its end"),
    "tp_overlap": (bool, None, "products overlap with communication on GPUs"),
}  # fmt: skip
# The same, where the reference is the stock Trainer.
BESIDE_STOCK: dict[str, Replacement] = {
    "neftune_noise_alpha": (lambda value: value is not None, None, "the stock Trainer draws other noise"),
}
# Of a group of keys that are replaced for one reason, one sentence is enough.
TOLD_BY = {
    "fp8_skip_layers": "fp8", "bf16_full_eval": "bf16", "torch_compile_backend": "torch_compile",
    "torch_compile_mode": "torch_compile",
}  # fmt: skip
NEEDS_EVALUATION = ("reduce_lr_on_plateau", "greedy")


def on_cpu(training: Arguments, beside_stock: bool = False) -> tuple[Arguments, list[str]]:
    """The arguments with their own sizes and steps, for the CPU; and a sentence for each that is replaced.

    Args:
        beside_stock: they are compared with the stock Trainer.
    """
    changed, told = {key: value for key, value in training.items() if not key.startswith(LEFT_OUT)} | SILENT, []
    for key, (applies, instead, reason) in {**REPLACED, **(BESIDE_STOCK if beside_stock else {})}.items():
        if key in training and applies(training[key]):
            if key in changed:
                changed[key] = instead
            if TOLD_BY.get(key) not in training:
                told.append(f"{key}: {instead!r} instead of {training[key]!r}, because {reason}")
    if training.get("optim") == MUON:
        changed["muon_dtype"] = "float32"
    schedule = str(training.get("lr_scheduler_type"))
    if schedule in NEEDS_EVALUATION:
        changed["lr_scheduler_type"] = "constant"
        changed.pop("lr_scheduler_kwargs", None)
        told.append(f"lr_scheduler_type: 'constant' instead of {schedule!r}, which needs evaluation")
    return changed, told


def shortened(training: Arguments, steps: int, rows: int, accumulation: int, layers: list[int]) -> Arguments:
    """The arguments for `steps` steps of micro-batches of `rows` rows, of a model that has `layers` of the real one."""
    changed = {**training, "max_steps": steps, "per_device_train_batch_size": rows}
    changed["gradient_accumulation_steps"] = accumulation
    warmup = training.get("warmup_steps") or 0
    if isinstance(warmup, int | float):
        changed["warmup_steps"] = min(1, warmup) if warmup >= 1 else warmup
    options = training.get("lr_scheduler_kwargs")
    if isinstance(options, str):
        options = json.loads(options)
    if isinstance(options, dict):
        changed["lr_scheduler_kwargs"] = {
            key: min(value, 1) if key.endswith("_steps") and isinstance(value, int) else value
            for key, value in options.items()
        }
    if training.get("ema_start_step"):
        changed["ema_start_step"] = 1
    chosen = training.get("activation_checkpointing_layers")
    if chosen is not None:
        numbers = chosen.replace(",", " ").split() if isinstance(chosen, str) else chosen
        kept = [index for index, layer in enumerate(layers) if layer in {int(number) for number in numbers}]
        changed["activation_checkpointing_layers"] = kept or [0]
    if training.get("mlp_chunk_tokens"):
        changed["mlp_chunk_tokens"] = min(training["mlp_chunk_tokens"], 16)
    return changed
