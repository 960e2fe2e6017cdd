"""`hf-nanotron convert nanotron-config`: configurations shaped as nanotron's examples, each key accounted for."""

from __future__ import annotations

import copy
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pool import WorkerPool
from test_cli import DATA, checkpoint, command, figures, history, one_line, tokenizer
from tiny import VOCABULARY
from token_files import documents, write_ds
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from hf_nanotron import NanotronTrainingArguments
from hf_nanotron.cli.data import load_data
from hf_nanotron.cli.model_config import make_config
from hf_nanotron.cli.settings import check_complete, read_settings
from hf_nanotron.convert.nanotron.run.config import NEUTRAL, converted, nanotron_config
from hf_nanotron.convert.nanotron.run.keys import Keys
from hf_nanotron.data import TokenDataset

# The sections of a whole configuration, with the keys of nanotron's examples.
LLAMA: dict[str, Any] = yaml.safe_load("""
checkpoints: {checkpoint_interval: 10, checkpoints_path: checkpoints, checkpoints_path_is_shared_file_system: false,
  load_lr_scheduler: true, load_optimizer: true, resume_checkpoint_path: null, save_final_state: true,
  save_initial_state: false}
data_stages:
- name: Stable Training Stage
  start_training_step: 1
  data:
    num_loading_workers: 1
    seed: 42
    dataset: {dataset_overwrite_cache: false, dataset_processing_num_proc_per_process: 2, hf_dataset_config_name: null,
      hf_dataset_or_datasets: org/text-10k, hf_dataset_splits: train, text_column_name: text}
general: {benchmark_csv_path: null, consumed_train_samples: null, ignore_sanity_checks: true, project: debug,
  run: tiny_llama_%date_%jobid, seed: 42, step: null}
lighteval: null
logging: {iteration_step_info_interval: 1, log_level: info, log_level_replica: info}
model:
  ddp_bucket_cap_mb: 25
  dtype: bfloat16
  init_method: {std: 0.025}
  make_vocab_size_divisible_by: 1
  model_config: {bos_token_id: 1, eos_token_id: 2, hidden_act: silu, hidden_size: 16, initializer_range: 0.02,
    intermediate_size: 64, is_llama_config: true, max_position_embeddings: 256, num_attention_heads: 4,
    num_hidden_layers: 2, num_key_value_heads: 4, pad_token_id: null, pretraining_tp: 1, rms_norm_eps: 1.0e-05,
    rope_scaling: null, tie_word_embeddings: true, use_cache: true, vocab_size: 256}
optimizer:
  accumulate_grad_in_fp32: true
  clip_grad: 1.0
  learning_rate_scheduler: {learning_rate: 0.0003, lr_decay_starting_step: null, lr_decay_steps: 13,
    lr_decay_style: cosine, lr_warmup_steps: 2, lr_warmup_style: linear, min_decay_lr: 1.0e-05}
  optimizer_factory: {adam_beta1: 0.9, adam_beta2: 0.95, adam_eps: 1.0e-08, name: adamW, torch_adam_is_fused: true}
  weight_decay: 0.01
  weight_decay_exclude_named_params: []
  zero_stage: 0
parallelism: {context_parallel_size: 1, dp: 2, expert_parallel_size: 1, pp: 2, pp_engine: 1f1b, recompute_layer: false,
  tp: 2, tp_linear_async_communication: true, tp_mode: REDUCE_SCATTER, tp_recompute_allgather: true}
profiler: null
s3_upload: null
tokenizer: {tokenizer_max_length: null, tokenizer_name_or_path: org/tokenizer, tokenizer_revision: null}
tokens: {batch_accumulation_per_replica: 4, limit_test_batches: 0, limit_val_batches: 0, micro_batch_size: 2,
  sequence_length: 256, train_steps: 15, val_check_interval: -1}
""")


def changed(**sections: Any) -> dict[str, Any]:
    """`LLAMA` with other keys; a section that is no mapping is replaced, and `...` takes a key away."""
    config = copy.deepcopy(LLAMA)

    def put(into: dict[str, Any], values: dict[str, Any]) -> None:
        for key, value in values.items():
            if isinstance(value, dict) and isinstance(into.get(key), dict):
                put(into[key], value)
            elif value is ...:
                into.pop(key, None)
            else:
                into[key] = value

    put(config, sections)
    return config


def stage(dataset: Any, name: str = "one", start: int = 1, **more: Any) -> dict[str, Any]:
    data = {"dataset": dataset, "num_loading_workers": 1, "seed": 7}
    return {"name": name, "start_training_step": start, "data": data, **more}


MODEL = dict.fromkeys(LLAMA["model"]["model_config"], ...)
EXPERTS = {
    "is_llama_config": ...,
    "is_qwen2_config": True,
    "_use_doc_masking": True,
    "moe_config": {"num_experts": 8, "top_k": 1, "enable_shared_expert": True, "token_dispatcher_type": "alltoall"},
}
NANOSET = {"dataset_folder": ["data/web", "data/code"], "dataset_weights": [0.8, 0.2]}
LATER_NANOSET = {
    "dataset_folder": ["web", "code"],
    "token_size_in_bytes": 4,
    "tokenizer_name": "org/t",
    "vocab_size": 256,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "tiny llama": LLAMA,
    "stages of nanosets": changed(
        data_stages=[
            stage({"dataset_folder": "data/web"}, "general"),
            stage(NANOSET, "more", 5, sequence_length=512),
            stage({"dataset_folder": {"data/web": 0.7, "data/code": 0.3}}, "blended", 9),
        ]
    ),
    "later nanosets": changed(data_stages=[stage(LATER_NANOSET)]),
    "stages of text": changed(
        data_stages=[stage(LLAMA["data_stages"][0]["data"]["dataset"]), stage({"hf_dataset_or_datasets": "b"}, "b", 9)]
    ),
    "shares of sets": changed(data_stages=[stage({"hf_dataset_or_datasets": {"a": 0.5, "b": 1.0}})]),
    "one share": changed(data_stages=[stage({"hf_dataset_or_datasets": {"a/b": 0.25}})]),
    "chat": changed(data_stages=[stage({"hf_dataset_or_datasets": "org/chat", "sft_dataloader": True})]),
    "a dataloader of its own": changed(data_stages=[stage(None), stage({"hf_dataset_or_datasets": "b"}, "b", 9)]),
    "no data": changed(data_stages=[stage(None)]),
    "experts": changed(model={"model_config": EXPERTS}),
    "experts without a shared one": changed(
        model={"model_config": {**EXPERTS, "moe_config": {"num_experts": 4, "top_k": 2}}}
    ),
    "window": changed(
        model={"model_config": {"is_llama_config": ..., "is_qwen2_config": True, "sliding_window_size": 20}}
    ),
    "qwen2 with biases and a window": changed(
        model={"model_config": {"is_llama_config": ..., "is_qwen2_config": True, "attention_bias": True,
                                "sliding_window_size": 64}}
    ),
    "layers without positions": changed(
        model={"model_config": {"is_llama_config": ..., "is_qwen2_config": True, "no_rope_layer": 2}}
    ),
    "llamoe": changed(
        model={"model_config": {"is_llama_config": ..., "is_llamoe_config": True, "moe_capacity_factor": 1,
                                "moe_num_experts": 4, "num_experts_per_tok": 1}},
        parallelism={"expert_parallel_size": 2, "tp_mode": "ALL_REDUCE"},
        optimizer={"accumulate_grad_in_fp32": False},
    ),
    "mamba": changed(
        model={"model_config": {**MODEL, "d_model": 64, "dtype": "bfloat16", "fused_add_norm": True,
                                "is_mamba_config": True, "num_hidden_layers": 2,
                                "pad_vocab_size_multiple": 8, "residual_in_fp32": True,
                                "rms_norm": True, "rms_norm_eps": 1e-5, "vocab_size": 256,
                                "ssm_cfg": {"bias": False, "conv_bias": True, "d_conv": 4, "d_state": 16,
                                            "dt_init": "random", "dt_init_floor": 1e-4, "dt_max": 0.1, "dt_min": 1e-3,
                                            "dt_rank": "auto", "dt_scale": 1.0, "expand": 2, "use_fast_path": True}},
               "init_method": {"std": ..., "initializer_range": 0.02, "n_residuals_per_layer": 1,
                               "rescale_prenorm_residual": True}},
    ),
    "starcoder2": changed(
        model={"model_config": {**MODEL, "is_starcoder2_config": True, "hidden_size": 32, "intermediate_size": 64,
                                "num_attention_heads": 4, "num_hidden_layers": 2, "num_kv_heads": 2,
                                "grouped_query": True, "sliding_window_size": None, "vocab_size": 256}},
    ),
    "spectral muP": changed(model={"init_method": {"std": ..., "use_mup": True}}, lighteval={"tasks": {"tasks": "x"}}),
    "an older optimizer section": changed(
        optimizer={"optimizer_factory": ..., "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_eps": 1e-7,
                   "torch_adam_is_fused": False},
        data_stages=...,
        data=stage({"hf_dataset_or_datasets": "x"})["data"],
        doremi={"domain_names": "a, b"},
    ),
    "uploads": changed(
        s3_upload={"remove_after_upload": False, "s5cmd_concurrency": 5, "s5cmd_numworkers": 16,
                   "s5cmd_path": "/bin/s5cmd", "upload_s3_path": "s3://bucket/run"},
        checkpoints={"resume_checkpoint_path": "s3://bucket/run"},
        profiler={"profiler_export_path": "logs"},
    ),
    "sgd, z-loss, recomputation": changed(
        optimizer={"optimizer_factory": {"name": "sgd"}, "clip_grad": None, "weight_decay": 0.0},
        model={"model_config": {"z_loss_enabled": True, "z_loss_coefficient": 2e-4}, "dtype": "float32"},
        parallelism={"recompute_layer": True, "tp": 1, "pp": 1, "dp": 1},
    ),
}  # fmt: skip


def convert(folder: Path, config: dict[str, Any]) -> tuple[dict[str, Any], str, str]:
    """What is written, read as YAML; its comments; the file."""
    source, destination = folder / "theirs.yaml", folder / "ours.yaml"
    source.write_text(yaml.safe_dump(config, sort_keys=False))
    nanotron_config(source, destination, overwrite=True)
    text = destination.read_text()
    return yaml.safe_load(text), "\n".join(line for line in text.splitlines() if line[:1] == "#"), str(destination)


@pytest.mark.parametrize("name", CONFIGS)
def test_each_loads_and_accounts_for_every_key(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The parser takes it, transformers makes its model's config, and no key with a value is neither used nor named."""
    found, comments, path = convert(tmp_path, CONFIGS[name])
    shown = capsys.readouterr().out
    for line in comments.splitlines()[5:]:
        assert line[1:].strip() in shown
    sections, _ = read_settings(Path(path), [])
    check_complete(sections)
    make_config(sections["model"]["config"], None)
    sizes = ("tp_size", "pp_size", "cp_size", "ep_size", "tp_overlap")  # which need processes
    training = {key: value for key, value in sections["training"].items() if key not in sizes}
    NanotronTrainingArguments(**{**training, "output_dir": str(tmp_path), "use_cpu": True})
    keys = Keys(tmp_path / "theirs.yaml", CONFIGS[name])
    converted(keys)
    lost = [key for key, value in keys.values.items() if key not in keys._used and value not in (None, [], {})]
    assert not [key for key in lost if NEUTRAL.get(key, ...) != keys.values[key]]
    assert found["training"]["max_steps"] == 15 and "dataset" in found


def test_a_key_that_is_not_known_is_named(tmp_path: Path) -> None:
    config = changed(general={"mood": "good"}, tokens={"colour": 3}, model={"model_config": {"softness": 0.5}}, extra=5)
    config["data_stages"][0]["data"]["dataset"]["sieve"] = 1
    config["data_stages"].append(stage({**NANOSET, "comb": 2}, "two", 9))
    config["data_stages"][0]["mark"] = True
    _, comments, _ = convert(tmp_path, config)
    for part in ("general.mood=good", "tokens.colour=3", "extra=5", "not known here",
                 "model.model_config.softness=0.5: llama has nothing like it", "data_stages[0].mark=True",
                 "data_stages[0].data.dataset.sieve=1",
                 "data_stages[1].data.dataset.comb=2"):  # fmt: skip
        assert part in comments


def test_what_a_llama_becomes(tmp_path: Path) -> None:
    found, comments, _ = convert(tmp_path, LLAMA)
    assert found == {
        "model": {"config": {
            "model_type": "llama", "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 16,
            "initializer_range": 0.025, "intermediate_size": 64, "max_position_embeddings": 256,
            "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 4, "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0, "tie_word_embeddings": True, "use_cache": True, "vocab_size": 256,
        }},
        "tokenizer": "org/tokenizer",
        "dataset": {"path": "org/text-10k", "train_split": "train", "text_column": "text", "num_proc": 2,
                    "sequence_length": 256},
        "training": {
            "output_dir": "checkpoints", "project": "debug", "run_name": "tiny_llama", "seed": 42,
            "tp_size": 2, "pp_size": 2, "pp_schedule": "1f1b", "sequence_parallel": True, "tp_overlap": True,
            "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 15, "zero_stage": 0,
            "weight_decay": 0.01, "max_grad_norm": 1.0, "optim": "adamw_torch_fused", "adam_beta1": 0.9,
            "adam_beta2": 0.95, "adam_epsilon": 1e-8, "learning_rate": 3e-4, "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr": 1e-5}, "warmup_steps": 2, "bf16": True, "ddp_bucket_cap_mb": 25,
            "save_steps": 10, "logging_steps": 1, "log_level": "info", "log_level_replica": "info",
            "dataloader_num_workers": 1,
        },
    }  # fmt: skip
    assert "torchrun --nproc-per-node 8 -m hf_nanotron.cli train ours.yaml" in comments
    assert "optimizer.weight_decay=0.01: norms and biases do not decay here" in comments


def test_fewer_micro_batches_than_stages(tmp_path: Path) -> None:
    """1f1b is refused by training then, and the file is one that trains."""
    tokens = {**LLAMA["tokens"], "batch_accumulation_per_replica": 1}
    found, comments, _ = convert(tmp_path, {**LLAMA, "tokens": tokens})
    assert found["training"]["pp_schedule"] == "afab" and found["training"]["gradient_accumulation_steps"] == 1
    assert "parallelism.pp_engine=1f1b: afab: with fewer micro-batches than stages" in comments


def test_what_data_become(tmp_path: Path) -> None:
    found = {name: convert(tmp_path, CONFIGS[name])[0]["dataset"] for name in CONFIGS}
    order = {"order": "nanoset", "seed": 7, "samples": 15 * 2 * 4 * 2}
    both, again = {"tokens": ["data/web", "data/code"]}, {"max_epochs": None}
    assert found["stages of nanosets"] == {"sequence_length": 256, "stages": [
        {"start_step": 0, **again, "mixture": {"general": {"tokens": ["data/web"], **order, "weight": 1.0}}},
        {"start_step": 4, **again, "sequence_length": 512,
         "mixture": {"more": {**both, **order, "folder_weights": [0.8, 0.2], "weight": 1.0}}},
        {"start_step": 8, **again,
         "mixture": {"blended": {**both, **order, "folder_weights": [0.7, 0.3], "weight": 1.0}}},
    ]}  # fmt: skip
    assert found["later nanosets"] == {
        "sequence_length": 256, "token_size": 4, "vocab_size": 256, "shuffle": False, "seed": 7, "max_epochs": None,
        "mixture": {"web": {"tokens": ["web"], "weight": 1.0}, "code": {"tokens": ["code"], "weight": 1.0}},
    }  # fmt: skip
    twice = {**LATER_NANOSET, "dataset_folder": ["web", "code", "web"], "dataset_weights": [0.25, 0.5, 0.25]}
    sets = convert(tmp_path, changed(data_stages=[stage(twice)]))[0]["dataset"]["mixture"]
    assert {name: part["weight"] for name, part in sets.items()} == {"web": 0.5, "code": 0.5}
    assert found["shares of sets"]["mixture"]["a"] == {
        "path": "a",
        "split": "train",
        "text_column": "text",
        "weight": 0.5,
    }
    assert found["one share"]["train_split"] == "train[:25%]"
    assert found["stages of text"]["stages"][1] == {
        "start_step": 8, "path": "b", "split": "train", "text_column": "text",
    }  # fmt: skip
    assert found["chat"] == {"sequence_length": 256, "chat": "org/chat", "split": "train"}
    assert found["a dataloader of its own"]["path"] == "b"


def test_what_models_become(tmp_path: Path) -> None:
    found = {name: convert(tmp_path, CONFIGS[name])[0] for name in CONFIGS}
    types = {name: config["model"]["config"]["model_type"] for name, config in found.items()}
    assert {name: kind for name, kind in types.items() if kind != "llama"} == {
        "experts": "qwen2_moe", "experts without a shared one": "mixtral", "window": "mistral", "llamoe": "mixtral",
        "qwen2 with biases and a window": "qwen2", "layers without positions": "smollm3", "mamba": "mamba",
        "starcoder2": "starcoder2",
    }  # fmt: skip
    assert found["llamoe"]["training"]["moe_capacity_factor"] == 1 and found["llamoe"]["training"]["ep_size"] == 2
    assert found["mamba"]["model"]["config"]["time_step_rank"] == "auto"
    other = found["sgd, z-loss, recomputation"]["training"]
    assert (other["optim"], other["max_grad_norm"], other["z_loss_coefficient"]) == ("sgd", 0.0, 2e-4)
    assert other["activation_checkpointing"] is True and "bf16" not in other
    assert found["uploads"]["training"]["remote_checkpoints"] == "s3://bucket/run"
    assert found["an older optimizer section"]["training"]["adam_beta1"] == 0.8


# ---- learning rates ----


def theirs(step: int, rate: float, low: float, warmup: int, start: int, decay: int, style: str, linear: bool) -> float:
    """nanotron's rate, by the description in its `LRSchedulerArgs`: warmup, constant, decay, constant."""
    if step <= warmup and warmup:
        return rate * step / warmup if linear else rate
    if step < start:
        return rate
    if step >= start + decay:
        return low
    progress = (step - start) / decay
    shape = {
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
        "linear": 1 - progress,
        "1-sqrt": 1 - math.sqrt(progress),
    }
    return low + (rate - low) * shape[style]


SCHEDULES = [  # style, warmup, its style, start of the decay, its steps, lowest; exact or not
    ("cosine", 4, "linear", None, 16, 1e-5, True),
    ("cosine", 4, "linear", None, None, 0.0, True),
    ("linear", 4, "linear", None, 16, 1e-5, True),
    ("linear", 4, "linear", None, None, 0.0, True),
    ("linear", 4, "linear", 12, 8, 0.0, True),
    ("1-sqrt", 4, "linear", 12, 8, 0.0, True),
    ("1-sqrt", 0, "linear", 12, 5, 1e-4, True),
    ("cosine", 0, "linear", 2, 10, 1e-4, True),
    ("cosine", 5, "constant", None, 10, 1e-4, True),
    ("linear", 5, "linear", 5, 30, 0.0, True),
    ("cosine", 4, "linear", None, None, None, True),
    ("1-sqrt", 4, "linear", 12, 8, 1e-4, False),
]


@pytest.mark.parametrize(("style", "warmup", "rise", "start", "decay", "low", "exact"), SCHEDULES)
def test_learning_rates(
    tmp_path: Path,
    style: str,
    warmup: int,
    rise: str,
    start: int | None,
    decay: int | None,
    low: float | None,
    exact: bool,
) -> None:
    """transformers' scheduler has nanotron's rate at each step, or a note says where not."""
    schedule = {"learning_rate": 1e-3, "lr_warmup_steps": warmup, "lr_warmup_style": rise, "lr_decay_style": style,
                "lr_decay_starting_step": start, "lr_decay_steps": decay, "min_decay_lr": low}  # fmt: skip
    config = changed(optimizer={"learning_rate_scheduler": schedule}, tokens={"train_steps": 20})
    found, comments, _ = convert(tmp_path, config)
    training = found["training"]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=training["learning_rate"])
    scheduler: LRScheduler = get_scheduler(
        training["lr_scheduler_type"],
        optimizer,
        training.get("warmup_steps", 0),
        20,
        training.get("lr_scheduler_kwargs"),
    )
    assert ("learning_rate_scheduler" in comments) is not exact
    for step in range(20):
        steps = 20 - warmup if decay is None else decay
        low_rate = 1e-3 if low is None else low
        expected = theirs(
            step, 1e-3, low_rate, warmup, warmup if start is None else start, steps, style, rise == "linear"
        )
        if exact or step >= warmup:
            assert scheduler.get_last_lr()[0] == pytest.approx(expected, rel=1e-6, abs=1e-12), step
        optimizer.step()
        scheduler.step()


# ---- refusals ----

FAULTS: list[tuple[Any, str]] = [
    (changed(tokens={"train_steps": "many"}), "tokens.train_steps is 'many'; it must be an integer"),
    (changed(tokens={"micro_batch_size": None}), "tokens.micro_batch_size is missing; it must be an integer"),
    (changed(tokens={"micro_batch_size": 0}), "tokens.micro_batch_size is 0; it must be at least 1"),
    (changed(parallelism={"tp": -1}), "parallelism.tp is -1; it must be at least 1"),
    (changed(parallelism={"pp_engine": "zigzag"}), "parallelism.pp_engine is 'zigzag'; it must be one of afab, 1f1b"),
    (changed(general={"seed": "abc"}), "general.seed is 'abc'; it must be an integer"),
    (changed(checkpoints={"checkpoint_interval": "often"}), "checkpoint_interval is 'often'; it must be an integer"),
    (changed(tokens=...), "it has no section tokens"),
    (changed(model={"model_config": {"is_llama_config": ..., "is_gpt_config": True}}), "is of is_gpt_config; known"),
    (changed(optimizer={"learning_rate_scheduler": {"lr_decay_style": "bumpy"}}), "lr_decay_style='bumpy' is not one"),
    (changed(data_stages=[stage({**NANOSET, "dataset_weights": [1.0]})]),
     "dataset_weights=[1.0] must be a number of 0 or more for each of the 2 folders"),
    (changed(data_stages=[stage({**LATER_NANOSET, "dataset_weights": [-1, 2]})]), "must be a number of 0 or more"),
    ({"model": {}, "training": {}}, "is no configuration of a nanotron run"),
    ([1], "holds no sections"),
    ("a: [", "is not valid YAML"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "says"), FAULTS, ids=lambda value: value if isinstance(value, str) else "")
def test_refused(tmp_path: Path, config: Any, says: str) -> None:
    source = tmp_path / "theirs.yaml"
    source.write_text(config if isinstance(config, str) else yaml.safe_dump(config))
    assert says in one_line(command("convert", "nanotron-config", str(source), str(tmp_path / "ours.yaml")))
    assert not (tmp_path / "ours.yaml").exists()


def test_secrets_are_not_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither into the settings, nor into the comments, nor onto the terminal."""
    config = changed(
        s3_upload={
            "upload_s3_path": "s3://me:s3cr3t-a@bucket/run",
            "aws_secret_access_key": "s3cr3t-b",
            "key": "s3cr3t-c",
        },
        logging={"wandb": {"key": "s3cr3t-d"}, "hf_token": "s3cr3t-e"},
        wandb_key="s3cr3t-f",
    )
    dataset = {
        "dataset_folder": {"s3://me:s3cr3t-g@bucket/a": 0.5, "https://host/b?sig=s3cr3t-h": 0.5},
        "s3_keys": ["s3cr3t-i"],
        "token_size_in_bytes": 2,
    }
    config["data_stages"] = [{"name": "s", "start_training_step": 1, "data": {"seed": 1, "dataset": dataset}}]
    settings, comments, whole = convert(tmp_path, config)
    assert settings["training"]["remote_checkpoints"] == "s3://***@bucket/run"
    assert list(settings["dataset"]["mixture"]) == ["s3://***@bucket/a", "https://host/b?sig=***"]
    assert "training.remote_checkpoints: credentials are left out" in comments.replace("\n# ", " ")
    for text in (whole, (tmp_path / "ours.yaml").read_text(), capsys.readouterr().out):
        assert "s3cr3t" not in text


def test_data_without_stages(tmp_path: Path) -> None:
    settings, comments, _ = convert(tmp_path, changed(data_stages=...))
    assert settings["dataset"] == {"path": "name-the-data-here"}
    assert "no stage says what to train on: name it in dataset" in comments


def test_files_are_not_overwritten(tmp_path: Path) -> None:
    source, destination = tmp_path / "theirs.yaml", tmp_path / "ours.yaml"
    assert "file not found" in one_line(command("convert", "nanotron-config", str(source), str(destination)))
    source.write_text(yaml.safe_dump(LLAMA))
    destination.write_text("mine")
    argv = ["convert", "nanotron-config", str(source)]
    assert "exists" in one_line(command(*argv, str(destination))) and destination.read_text() == "mine"
    assert "its folder does not exist" in one_line(command(*argv, str(tmp_path / "no" / "ours.yaml")))
    assert "same file" in one_line(command(*argv, str(source), "--overwrite"))
    assert command(*argv, str(destination), "--overwrite")[0] == 0 and "model_type: llama" in destination.read_text()


# ---- runs ----


def test_a_run_goes_on_with_its_next_sample(pool: WorkerPool, tmp_path: Path) -> None:
    """nanotron's checkpoint of step 2 and its configuration: the weights, the schedule and the data from there."""
    (tmp_path / "web").mkdir()
    for place in range(2):
        docs = [[token % 90 + 3 for token in doc[:-1]] + [2] for doc in documents(200, place, vocabulary=96)]
        write_ds(tmp_path / "web" / f"{place:03d}_web.ds", docs)
    shutil.copytree(DATA / "tp1_pp1", tmp_path / "run")
    theirs = yaml.safe_load((tmp_path / "run" / "2" / "config.yaml").read_text())
    theirs["data_stages"][0]["data"]["dataset"] = {"dataset_folder": str(tmp_path / "web")}
    theirs["checkpoints"] |= {
        "resume_checkpoint_path": str(tmp_path / "run"),
        "checkpoints_path": str(tmp_path / "out"),
    }
    theirs["tokens"]["train_steps"] = 4
    theirs["optimizer"]["learning_rate_scheduler"] |= {
        "lr_warmup_steps": 0,
        "lr_decay_starting_step": 3,
        "lr_decay_steps": 1,
    }
    found, comments, path = convert(tmp_path, theirs)
    assert found["dataset"]["skip_samples"] == 4 and found["training"]["max_steps"] == 2
    assert found["training"]["lr_scheduler_kwargs"]["num_stable_steps"] == 1
    first = next(line[1:].strip() for line in comments.splitlines() if "nanotron-to-hub" in line)
    assert command(*first.split()[1:])[0] == 0
    sections, _ = read_settings(Path(path), ["--dataset.token_size=2"])
    train, _ = load_data(check_complete(sections), None, 0)
    folder = str(tmp_path / "web")
    whole = TokenDataset([folder], 32, order="nanoset", seed=42, samples=8, token_size=2)
    assert len(train) == 4 and torch.equal(train[0]["input_ids"], whole[4]["input_ids"])
    argv = ["train", path, "--use_cpu", "--dataset.token_size=2", "--report_to=none", "--disable_tqdm"]
    (result,) = pool.run(1, command, *argv, "--dataloader_num_workers=0")
    assert result[0] == 0, result[2]
    assert [entry["learning_rate"] for entry in history(tmp_path / "out") if "loss" in entry] == [3e-4, 3e-4]
    assert len(figures(tmp_path / "out")) == 4


def test_a_fresh_run_trains(pool: WorkerPool, tmp_path: Path) -> None:
    """Two pipeline ranks, a schedule with all parts, files of tokens: as nanotron's tiny example."""
    (tmp_path / "web").mkdir()
    docs = [[token + 3 for token in doc[:-1]] + [2] for doc in documents(200, 0, vocabulary=VOCABULARY - 3)]
    write_ds(tmp_path / "web" / "000_web.ds", docs)
    config = changed(
        data_stages=[stage({"dataset_folder": str(tmp_path / "web")})],
        tokenizer={"tokenizer_name_or_path": checkpoint()},
        tokens={"sequence_length": 16, "train_steps": 2},
        model={"dtype": "float32", "model_config": {"vocab_size": VOCABULARY, "hidden_size": 32}},
        parallelism={"dp": 1, "tp": 1, "tp_linear_async_communication": False},
        checkpoints={"checkpoints_path": str(tmp_path / "out")},
    )
    _, _, path = convert(tmp_path, config)
    argv = ["train", path, "--use_cpu", "--dataset.token_size=2", "--report_to=none", "--disable_tqdm"]
    results = pool.run(2, command, *argv, "--dataloader_num_workers=0")
    assert {code for code, *_ in results} == {0}, results[0][2]
    assert len(figures(tmp_path / "out")) == 4 and len(tokenizer()) == VOCABULARY


def test_stages_of_nanosets_begin_at_their_first_samples(tmp_path: Path) -> None:
    """As nanotron's do: each stage has a dataset of its own, in its order, with its seed."""
    folders = [tmp_path / name for name in ("web", "code")]
    for place, folder in enumerate(folders):
        folder.mkdir()
        write_ds(folder / "000.ds", documents(400, place, vocabulary=250))
    both = {"dataset_folder": [str(folder) for folder in folders], "dataset_weights": [0.8, 0.2]}
    stages = [stage({"dataset_folder": str(folders[0])}), stage(both, "two", 5), stage(both, "three", 9)]
    _, _, path = convert(tmp_path, changed(data_stages=stages, tokens={"sequence_length": 16}))
    sections, _ = read_settings(Path(path), ["--dataset.token_size=2"])
    train, _ = load_data(check_complete(sections), None, 0)
    legs = train.plan(16, 15)
    assert [(leg.step, leg.first) for leg in legs] == [(0, 0), (4, 64), (8, 128)]
    common = {"order": "nanoset", "seed": 7, "samples": 240, "token_size": 2}
    alone = TokenDataset(folders[:1], 16, **common)
    mixed = TokenDataset(folders, 16, folder_weights=[0.8, 0.2], **common)
    for data, leg in zip((alone, mixed, mixed), legs, strict=True):
        for place in (0, 1, 63):
            assert torch.equal(train[leg.first + place]["input_ids"], data[place]["input_ids"])


def test_weights_without_decay_keep_none(tmp_path: Path) -> None:
    """The embedding, which SmolLM3's configurations leave out; another pattern is named."""
    patterns = [".*token_embedding.*", ".*gate.*"]
    config = changed(optimizer={"weight_decay_exclude_named_params": patterns})
    found, comments, _ = convert(tmp_path, config)
    assert found["training"]["no_weight_decay"] == ["embed_tokens"]
    assert "optimizer.weight_decay_exclude_named_params" in comments and "all other weights do, but for" in comments
