"""Every `TrainingArguments` field is honoured or refused at construction; sizes map to a `ParallelConfig`."""

from __future__ import annotations

import dataclasses
import json
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.utils import DynamoBackend
from transformers import HfArgumentParser, TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from hf_nanotron import NanotronTrainer
from hf_nanotron.arguments.policy import (
    ACCELERATOR_CONFIG,
    ENVIRONMENT,
    HONOURED,
    OPTIMIZERS,
    REFUSED,
    REFUSED_OPTIMIZERS,
)
from hf_nanotron.arguments.rules import Refused
from hf_nanotron.parallel.config import ParallelConfig
from hf_nanotron.training_args import NanotronTrainingArguments

ARGUMENTS: Any = NanotronTrainingArguments  # HfArgumentParser's annotations admit no class
STOCK_FIELDS = {entry.name: entry for entry in dataclasses.fields(TrainingArguments)}

# A value other than the default for every honoured field, and what it needs beside it.
HONOURED_VALUES: dict[str, tuple[Any, dict[str, Any]]] = {
    "output_dir": ("elsewhere", {}),
    "per_device_train_batch_size": (2, {}),
    "num_train_epochs": (1.5, {}),
    "max_steps": (7, {}),
    "learning_rate": (1e-3, {}),
    "lr_scheduler_type": ("cosine", {}),
    "lr_scheduler_kwargs": ({"num_cycles": 1}, {"lr_scheduler_type": "cosine"}),
    "warmup_steps": (0.1, {}),
    "weight_decay": (0.1, {}),
    "adam_beta1": (0.8, {}),
    "adam_beta2": (0.95, {}),
    "adam_epsilon": (1e-6, {}),
    "average_tokens_across_devices": (False, {}),
    "max_grad_norm": (0.0, {}),
    "bf16": (True, {}),
    "tf32": (False, {}),
    "activation_checkpointing": (True, {}),
    "gradient_checkpointing": (True, {}),
    "use_cache": (True, {}),
    "torch_empty_cache_steps": (3, {}),
    "logging_strategy": ("epoch", {}),
    "logging_steps": (5, {}),
    "logging_first_step": (True, {}),
    "log_on_each_node": (False, {}),
    "logging_nan_inf_filter": (False, {}),
    "include_num_input_tokens_seen": ("non_padding", {}),
    "log_level": ("info", {}),
    "log_level_replica": ("error", {}),
    "disable_tqdm": (True, {}),
    "report_to": (["tensorboard"], {}),
    "run_name": ("run", {}),
    "project": ("project", {}),
    "trackio_space_id": ("user/space", {}),
    "trackio_bucket_id": ("user/bucket", {}),
    "trackio_static_space_id": (False, {}),
    "eval_strategy": ("epoch", {}),
    "eval_steps": (4, {"eval_strategy": "steps"}),
    "eval_delay": (2, {}),
    "per_device_eval_batch_size": (3, {}),
    "prediction_loss_only": (True, {}),
    "eval_on_start": (True, {}),
    "eval_do_concat_batches": (False, {}),
    "eval_accumulation_steps": (2, {}),
    "include_for_metrics": (["inputs", "loss"], {}),
    "batch_eval_metrics": (True, {}),
    "save_only_model": (True, {}),
    "save_strategy": ("epoch", {}),
    "save_steps": (10, {}),
    "save_total_limit": (2, {}),
    "push_to_hub": (True, {}),
    "hub_token": ("hf_secret", {}),
    "hub_private_repo": (True, {}),
    "hub_model_id": ("user/model", {}),
    "hub_strategy": ("checkpoint", {}),
    "hub_always_push": (True, {}),
    "hub_revision": ("branch", {}),
    "load_best_model_at_end": (True, {"eval_strategy": "epoch", "save_strategy": "epoch"}),
    "metric_for_best_model": ("accuracy", {}),
    "greater_is_better": (True, {}),
    "ignore_data_skip": (True, {}),
    "restore_callback_states_from_checkpoint": (True, {}),
    "full_determinism": (True, {}),
    "seed": (1, {}),
    "data_seed": (2, {}),
    "use_cpu": (True, {}),
    "dataloader_drop_last": (True, {}),
    "dataloader_num_workers": (1, {}),
    "dataloader_pin_memory": (False, {}),
    "dataloader_persistent_workers": (True, {"dataloader_num_workers": 1}),
    "dataloader_prefetch_factor": (4, {"dataloader_num_workers": 1}),
    "dataloader_multiprocessing_context": ("spawn", {"dataloader_num_workers": 1}),
    "remove_unused_columns": (False, {}),
    "length_column_name": ("n", {}),
    "ddp_backend": ("gloo", {}),
    "ddp_timeout": (60, {}),
    "skip_memory_metrics": (False, {}),
    "do_train": (True, {}),
    "do_eval": (True, {}),
    "do_predict": (True, {}),
    "resume_from_checkpoint": ("checkpoint-7", {}),
    "local_rank": (0, {}),
    "torch_compile": (True, {}),
    "torch_compile_backend": ("aot_eager", {"torch_compile": True}),
}

# For every field with a rule: values refused, and values other than the default that are taken.
RULED_VALUES: dict[str, tuple[list[Any], list[Any]]] = {
    "optim": ([*REFUSED_OPTIMIZERS, "adamw_hf"], [*OPTIMIZERS]),
    "optim_args": (["betas=0.9", "weight_decay=0.1", "momentum"], [""]),
    "optim_target_modules": (["all-linear", ["attn"]], []),
    "gradient_accumulation_steps": ([0, 1.5], [4]),
    "label_smoothing_factor": ([-0.1, 1], [0.1]),
    "fp16": ([True], []),
    "bf16_full_eval": ([True], []),
    "fp16_full_eval": ([True], []),
    "torch_compile_mode": (["reduce-overhead", "max-autotune"], ["default", "max-autotune-no-cudagraphs"]),
    "activation_checkpointing_kwargs": (
        [{"use_reentrant": True}, {"every_n_layers": 0}, {"offload": True}, {"unheard_of": 1}, '{"offload": "true"}'],
        [{"use_reentrant": False, "every_n_layers": 2}, '{"every_n_layers": "2"}', {"preserve_rng_state": False}],
    ),
    "gradient_checkpointing_kwargs": ([{"use_reentrant": True}], [{"use_reentrant": False}]),
    "use_liger_kernel": ([True], []),
    "liger_kernel_config": ([{"rope": True}], []),
    "neftune_noise_alpha": ([0, -5.0], [5.0]),
    "auto_find_batch_size": ([True], []),
    "eval_use_gather_object": ([True], []),
    "save_on_each_node": ([True], []),
    "enable_jit_checkpoint": ([True], []),
    "accelerator_config": (
        [
            {"split_batches": True},
            {"dispatch_batches": True},
            {"even_batches": False},
            {"use_seedable_sampler": False},
            {"gradient_accumulation_kwargs": {"num_steps": 2}},
            {"use_configured_state": True},
            {"unheard_of": 1},
            '{"split_batches": "true"}',
            "no-such-file.json",
            AcceleratorConfig(split_batches=True),
        ],
        [{"non_blocking": True}, {"dispatch_batches": False}, '{"non_blocking": true}', AcceleratorConfig()],
    ),
    "parallelism_config": (["anything"], []),
    "dataloader_in_order": ([False], []),
    "label_names": ([["start_positions"], []], [["labels"]]),
    "train_sampling_strategy": (["batch_rebalance", "unheard_of"], ["sequential", "group_by_length"]),
    "ddp_find_unused_parameters": ([True], [False]),
    "ddp_broadcast_buffers": ([True], [False]),
    "ddp_static_graph": ([True], [False]),
    "ddp_bucket_cap_mb": ([0], [100]),
    "fsdp": ([True, "full_shard"], [False, ""]),
    "fsdp_config": ([{"version": 2}], []),
    "deepspeed": (["ds_config.json", {"zero_optimization": {"stage": 1}}], []),
    "debug": (["underflow_overflow", "tpu_metrics_debug"], []),
}


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher's variables, whatever started pytest."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", *ENVIRONMENT):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def build(tmp_path: Path) -> Any:
    """A constructor of arguments for a quiet CPU run."""

    def build(**fields: Any) -> NanotronTrainingArguments:
        return NanotronTrainingArguments(
            **{"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", **fields}
        )

    return build


# ---- Honoured or refused ---------------------------------------------------------------------------------------


def test_every_field_is_in_one_class() -> None:
    """A transformers release that adds a field fails here until somebody decides what it means."""
    assert not HONOURED.keys() & REFUSED.keys()
    assert HONOURED.keys() | REFUSED.keys() == STOCK_FIELDS.keys()
    assert HONOURED.keys() == HONOURED_VALUES.keys()
    assert REFUSED.keys() == RULED_VALUES.keys()


def test_every_choice_is_in_one_class() -> None:
    assert not OPTIMIZERS.keys() & REFUSED_OPTIMIZERS.keys()
    own = {"muon"}  # which transformers does not have
    assert (OPTIMIZERS.keys() | REFUSED_OPTIMIZERS.keys()) - own == {optimizer.value for optimizer in OptimizerNames}
    assert ACCELERATOR_CONFIG.keys.keys() == {entry.name for entry in dataclasses.fields(AcceleratorConfig)}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("name", HONOURED_VALUES)
def test_honoured(name: str, build: Any) -> None:
    value, beside = HONOURED_VALUES[name]
    args = build(**{**beside, name: value})
    assert getattr(args, name) == value
    assert value != STOCK_FIELDS[name].default


@pytest.mark.parametrize("name", RULED_VALUES)
def test_refused(name: str, build: Any) -> None:
    for value in RULED_VALUES[name][0]:
        with pytest.raises(ValueError) as caught:
            build(**{name: value})
        message = str(caught.value)
        assert message.startswith(name), message
        if isinstance(value, dict) and name != "deepspeed" and not isinstance(REFUSED[name], Refused):
            (key, shown), *_ = value.items()
            assert f"{key}={shown!r}" in message
        elif not isinstance(value, AcceleratorConfig) and not str(value).startswith("{"):
            assert f"{name}={value!r}" in message
        assert "Use " in message or "the keys are" in message or "JSON file" in message


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("name", [name for name, (_, taken) in RULED_VALUES.items() if taken])
def test_taken(name: str, build: Any) -> None:
    for value in RULED_VALUES[name][1]:
        build(**{name: value})


def test_defaults_are_taken(build: Any) -> None:
    build()
    NanotronTrainingArguments(use_cpu=True)


def test_all_problems_are_named_at_once(build: Any) -> None:
    with pytest.raises(ValueError, match=r"(?s)optim='adafactor'.*\n.*fp16=True.*\n.*deepspeed="):
        build(optim="adafactor", fp16=True, deepspeed="ds.json")


def test_unknown_field_is_refused(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a newer transformers' would be: here, a field taken out of the table."""
    monkeypatch.delitem(HONOURED, "seed")
    build()
    with pytest.raises(ValueError, match=r"seed=1 is refused: .* does not support"):
        build(seed=1)


@pytest.mark.parametrize("name", ENVIRONMENT)
def test_launcher_variables_are_refused(name: str, build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "no")
    build()
    monkeypatch.setenv(name, "bf16")
    with pytest.raises(ValueError, match=f"{name}='bf16'"):
        build()
    if name == "ACCELERATE_MIXED_PRECISION":
        build(bf16=True)  # the field decides, as in transformers


def test_optimizer_arguments(build: Any) -> None:
    assert build(optim="sgd", optim_args="momentum=0.9, nesterov=true").optim_args
    for optim, optim_args in (("sgd", "alpha=1"), ("rmsprop", "weight_decay=0.1"), ("adamw_torch", "beta1=0.5")):
        with pytest.raises(ValueError, match="optim_args="):
            build(optim=optim, optim_args=optim_args)


@pytest.mark.parametrize("schedule", [schedule.value for schedule in SchedulerType])
def test_schedules(schedule: str, build: Any) -> None:
    assert build(lr_scheduler_type=schedule, eval_strategy="steps").lr_scheduler_type == schedule


def test_checkpointing_is_never_reentrant(build: Any) -> None:
    args = build(activation_checkpointing=True, activation_checkpointing_kwargs='{"every_n_layers": "2"}')
    assert args.activation_checkpointing_kwargs == {"every_n_layers": 2, "use_reentrant": False}
    assert args.gradient_checkpointing_kwargs == args.activation_checkpointing_kwargs
    assert build().activation_checkpointing_kwargs is None


def test_check_sees_later_assignments(build: Any) -> None:
    args = build()
    args.set_optimizer("adafactor")
    with pytest.raises(ValueError, match="optim='adafactor'"):
        args.check()


# ---- Precision and devices -------------------------------------------------------------------------------------


def test_accelerate_does_not_cast(build: Any) -> None:
    assert build(bf16=True).mixed_precision == build().mixed_precision == "no"


def test_one_gpu_per_process(build: Any) -> None:
    args = build(per_device_train_batch_size=3)
    args._n_gpu = 4  # what transformers finds without torchrun on a machine with four GPUs
    assert (args.n_gpu, args.train_batch_size) == (1, 3)
    assert args.parallel_mode.value == "not_parallel"


def test_attention_is_chosen_or_stock(build: Any) -> None:
    assert build().attention == "auto"
    with pytest.raises(ValueError, match="attention='flash' is not one of 'auto', 'stock'"):
        build(attention="flash")


def test_bucket_size(build: Any) -> None:
    assert build().gradient_bucket_bytes == 25 * 2**20
    assert build(ddp_bucket_cap_mb=1).gradient_bucket_bytes == 2**20


# ---- Remote checkpoints ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["remote_retry_seconds", "remote_retry_max_seconds"])
def test_pauses(name: str, build: Any) -> None:
    for value in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"{name}={value} must be above 0"):
            build(**{name: value})


def test_remote_limits(build: Any) -> None:
    for name, value, least in (
        ("remote_pending_limit", 0, 1),
        ("remote_keep_local", 0, 1),
        ("remote_min_free_gb", -0.5, 0),
        ("remote_start_timeout", -1, 0),
        ("remote_wait_timeout", float("nan"), 0),
        ("remote_wait_timeout", float("inf"), 0),
    ):
        with pytest.raises(ValueError, match=f"{name}={value} must be at least {least}"):
            build(**{name: value})
    with pytest.raises(ValueError, match="remote_retry_max_seconds=60 is below remote_retry_seconds=90"):
        build(remote_retry_seconds=90)
    build(remote_start_timeout=0, remote_wait_timeout=0, remote_pending_limit=1, remote_min_free_gb=0.5)


def test_stall_limits(build: Any) -> None:
    for name, value, least in (("stall_warning", -1.0, 0), ("stall_timeout", 9.0, 10), ("stall_timeout", 0.0, 10)):
        with pytest.raises(ValueError, match=f"{name}={value} must be at least {least}"):
            build(**{name: value})
    with pytest.raises(ValueError, match="stall_timeout=90 is above ddp_timeout=60, after which a collective ends"):
        build(stall_timeout=90, ddp_timeout=60)
    build(stall_warning=0, stall_timeout=10)


# ---- Sizes -----------------------------------------------------------------------------------------------------


BEYOND_SIZES = {"optim_state_dtype", "skip_nonfinite_steps", "save_hub_weights", "async_save", "save_on_signal"}
BEYOND_SIZES |= {"max_dp_size"}
BEYOND_SIZES |= {"optim_offload", "ema_decay", "ema_start_step", "ema_evaluate"}
BEYOND_SIZES |= {"remote_checkpoints", "remote_keep_local", "remote_pending_limit", "remote_min_free_gb"}
BEYOND_SIZES |= {"remote_retry_seconds", "remote_retry_max_seconds", "remote_start_timeout", "remote_wait_timeout"}
BEYOND_SIZES |= {"activation_checkpointing_policy", "activation_checkpointing_layers"}
BEYOND_SIZES |= {"activation_offload", "mlp_chunk_tokens", "accept_changed_data"}
BEYOND_SIZES |= {"moe_capacity_factor", "moe_bias_update_rate", "moe_log_loads", "z_loss_coefficient"}
BEYOND_SIZES |= {"muon_scale", "muon_learning_rate", "muon_momentum", "muon_nesterov", "muon_ns_steps", "muon_dtype"}
BEYOND_SIZES |= {"parametrization", "base_hidden_size", "base_sizes"}
BEYOND_SIZES |= {"attention", "max_skipped_steps", "no_weight_decay"}
BEYOND_SIZES |= {"fp8", "fp8_skip_layers", "overwrite_output_dir"}
BEYOND_SIZES |= {"ema_decay", "ema_start_step", "ema_evaluate", "wsd_decay_steps"}
BEYOND_SIZES |= {"batch_size_warmup_tokens", "batch_size_warmup_start", "batch_size_warmup_increment"}
BEYOND_SIZES |= {"memory_snapshot_steps", "memory_snapshot_dir"}
BEYOND_SIZES |= {"metrics_detail", "metrics_detail_steps", "profile_steps", "profile_ranks", "run_log"}
BEYOND_SIZES |= {"health_check", "stall_warning", "stall_timeout"}


def test_sizes_are_the_fields_of_parallel_config() -> None:
    own = {entry.name: entry for entry in dataclasses.fields(NanotronTrainingArguments)}
    sizes = dataclasses.fields(ParallelConfig)
    assert own.keys() - STOCK_FIELDS.keys() == {entry.name for entry in sizes} | BEYOND_SIZES
    for name in BEYOND_SIZES:
        assert own[name].metadata["help"]
    for entry in sizes:
        assert own[entry.name].default == entry.default
        assert own[entry.name].metadata["help"]


def test_parallel(build: Any) -> None:
    assert build().parallel == ParallelConfig()
    assert build().dp_size == 1
    sizes: dict[str, Any] = {"sequence_parallel": False, "pp_schedule": "afab", "pp_layers_per_stage": (4,)}
    assert build(**sizes).parallel == ParallelConfig(**sizes)
    with pytest.raises(ValueError, match=r"tp_size=0"):
        build(tp_size=0)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"tp_size": 2}, "tp_size=2 .* does not divide the world size 3"),
        ({"pp_size": 3, "gradient_accumulation_steps": 2}, "gradient_accumulation_steps=2 .* at least 3"),
        ({"pp_schedule": "zigzag"}, "pp_schedule='zigzag'"),
        ({"pp_size": 3, "pp_layers_per_stage": "1,2"}, r"pp_layers_per_stage=\[1, 2\]"),
        ({"pp_layers_per_stage": "1,x"}, "pp_layers_per_stage='1,x'"),
    ],
)
def test_bad_sizes_raise_before_a_process_group(
    sizes: dict[str, Any], expected: str, build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=expected):
        build(**sizes)
    assert not dist.is_initialized()


def test_sizes_need_processes(build: Any) -> None:
    with pytest.raises(ValueError, match="start 2 processes"):
        build(tp_size=2)


def test_process_group_has_the_timeout(build: Any, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers gives `ddp_timeout` to accelerators only; and a CPU machine need not be told `use_cpu`."""
    variables = {"WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "OMP_NUM_THREADS": 1}
    for name, value in {**variables, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    try:
        args = build(use_cpu=False, ddp_timeout=77)
        assert args.use_cpu and args.device.type == "cpu"
        group = dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
        assert group.options._timeout == timedelta(seconds=77)
    finally:
        dist.destroy_process_group()


# ---- What Trainer and scripts do with the arguments ------------------------------------------------------------


def test_copies(build: Any, tmp_path: Path) -> None:
    args = build(
        sequence_parallel=False, pp_layers_per_stage=(4,), activation_checkpointing=True, hub_token="hf_secret"
    )
    assert args.pp_layers_per_stage == [4]
    assert json.loads(args.to_json_string())["pp_layers_per_stage"] == [4]
    assert args.to_sanitized_dict()["sequence_parallel"] is False
    assert "hf_secret" not in f"{args!r}{args}{args.to_json_string()}"

    torch.save(args, tmp_path / "training_args.bin")
    loaded = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert loaded.to_dict() == args.to_dict()
    assert (loaded.parallel, loaded.dp_size, loaded.mixed_precision) == (args.parallel, 1, "no")

    assert dataclasses.replace(args, learning_rate=1.0).parallel == args.parallel
    assert NanotronTrainingArguments(**args.to_dict()).parallel == args.parallel


@pytest.mark.parametrize(
    ("layers", "expected"),
    [(["4"], (4,)), (["3,5"], (3, 5)), (["3", "5"], (3, 5)), (["[3, 5]"], (3, 5)), (["3", "5,"], (3, 5))],
)
def test_command_line(layers: list[str], expected: tuple[int, ...], build: Any, monkeypatch: Any) -> None:
    sizes = ["--pp_size", str(len(expected)), "--gradient_accumulation_steps=2", "--no_sequence_parallel"]
    monkeypatch.setattr(NanotronTrainingArguments, "__post_init__", lambda self: None)  # two stages need two processes
    argv = ["--output_dir", "o", "--use_cpu", *sizes, "--pp-layers-per-stage", *layers, "--max_grad_norm", "0.5"]
    (args,) = HfArgumentParser(ARGUMENTS).parse_args_into_dataclasses(argv, look_for_args_file=False)
    assert args.parallel == ParallelConfig(pp_size=len(expected), sequence_parallel=False, pp_layers_per_stage=expected)
    assert args.max_grad_norm == 0.5


@pytest.mark.parametrize("made", [NanotronTrainingArguments, ParallelConfig])
def test_a_removed_argument_is_refused(made: Any) -> None:
    with pytest.raises(ValueError, match="ep_parts was removed: .* Delete the setting"):
        made(ep_parts=2)


def test_pickles_with_a_removed_argument_load(build: Any, tmp_path: Path) -> None:
    """`training_args.bin`, and a config, of a version that had it."""
    args, parallel = build(ep_size=1), ParallelConfig(ep_size=2)
    args.ep_parts = 1
    object.__setattr__(parallel, "ep_parts", 2)
    torch.save((args, parallel), tmp_path / "training_args.bin")
    old, config = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert config == ParallelConfig(ep_size=2) and vars(config)["ep_parts"] == 2
    assert vars(old)["ep_parts"] == 1 and old.parallel == ParallelConfig()
    old.check()
    assert "ep_parts" not in f"{old}{old.to_dict()}"
    assert dataclasses.replace(old, learning_rate=1.0).parallel == old.parallel


def test_bare_switches(tmp_path: Path) -> None:
    """As stock TrainingArguments take them."""
    argv = [f"--output_dir={tmp_path}", "--use_cpu", "--torch_compile"]
    (args,) = HfArgumentParser(ARGUMENTS).parse_args_into_dataclasses(argv, look_for_args_file=False)
    assert args.torch_compile is True
    (args,) = HfArgumentParser(ARGUMENTS).parse_args_into_dataclasses(argv[:2], look_for_args_file=False)
    assert args.torch_compile is False  # no GPU, no default


@pytest.mark.parametrize("choice", [{"torch_compile": True}, {"torch_compile_backend": "aot_eager"}])
def test_compiling_does_not_change_precision(choice: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    """transformers switches TF32 on for whoever compiles, and accelerate does whatever `tf32` says, by this variable or
    for the backend that transformers' Trainer tells it."""
    monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND", raising=False)
    args = NanotronTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **choice)
    assert args.torch_compile is True and args.torch_compile_backend == choice.get("torch_compile_backend")
    assert "ACCELERATE_DYNAMO_BACKEND" not in os.environ
    trainer = NanotronTrainer.__new__(NanotronTrainer)
    trainer.args, trainer.model = args, None
    plugin = trainer._build_accelerator_args()["dynamo_plugin"]
    assert plugin.backend == DynamoBackend.NO  # or its state sets torch.backends.cuda.matmul.allow_tf32


def test_command_line_and_dict(tmp_path: Path) -> None:
    parser = HfArgumentParser(ARGUMENTS)
    argv = [f"--output_dir={tmp_path}", "--use_cpu", "--accelerator_config", '{"non_blocking": "true"}']
    (args,) = parser.parse_args_into_dataclasses([*argv, "--pp_layers_per_stage=4"], look_for_args_file=False)
    assert args.pp_layers_per_stage == [4] and args.accelerator_config.non_blocking is True
    (args,) = parser.parse_dict({"output_dir": str(tmp_path), "use_cpu": True, "pp_layers_per_stage": [4]})
    assert args.parallel == ParallelConfig(pp_layers_per_stage=(4,))
    assert "pp_layers_per_stage" in parser.format_help()
