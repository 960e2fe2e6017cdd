"""What each field of `transformers.TrainingArguments` means here: honoured, or refused with a reason.

Two tables, `HONOURED` and `REFUSED`, hold every field exactly once. A field that a newer transformers adds is in
neither: the tests fail on it, and setting it raises. `ENVIRONMENT` does the same for what `accelerate launch` sets.
"""

from __future__ import annotations

import inspect
import os
from dataclasses import MISSING, Field, fields
from typing import Any

from torch.utils.checkpoint import checkpoint
from transformers import TrainingArguments

from ..redaction import shown
from .rules import Refused, RefusedKeys, plain

# ---- Rules -----------------------------------------------------------------------------------------------------


# ---- Optimizers ------------------------------------------------------------------------------------------------

# The keys of `optim_args` that transformers hands to each optimizer we take. It also reads `weight_decay`, but the
# parameter groups override that.
OPTIMIZERS: dict[str, tuple[str, ...]] = {
    "adamw_torch": (),
    "adamw_torch_fused": (),
    "sgd": ("momentum", "dampening", "nesterov"),
    "adagrad": ("lr_decay", "eps"),
    "rmsprop": ("momentum", "alpha", "eps", "centered"),
    "lion_32bit": (),
    "muon": (),  # ours; transformers has no such name
}


def _group(names: str, reason: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), reason)


REFUSED_OPTIMIZERS: dict[str, str] = {
    **_group(
        "adafactor galore_adafactor galore_adafactor_layerwise",
        "it factors whole weight matrices by rows and columns, and a rank holds only its shard of each",
    ),
    **_group(
        "galore_adamw galore_adamw_8bit galore_adamw_layerwise galore_adamw_8bit_layerwise "
        "apollo_adamw apollo_adamw_layerwise",
        "it projects whole gradient matrices to a low rank, and a rank holds only its shard of each",
    ),
    **_group(
        "lomo adalomo",
        "it updates weights inside the backward, before gradients are accumulated over micro-batches and reduced",
    ),
    **_group(
        "adamw_bnb_8bit adamw_8bit ademamix ademamix_8bit lion_8bit rmsprop_bnb rmsprop_bnb_8bit "
        "rmsprop_bnb_32bit paged_adamw_32bit paged_adamw_8bit paged_ademamix_32bit paged_ademamix_8bit "
        "paged_lion_32bit paged_lion_8bit",
        "it needs bitsandbytes, which does not support sharded parameters and their checkpoints",
    ),
    **_group(
        "adamw_torch_4bit adamw_torch_8bit", "it needs torchao, whose quantized state cannot be sharded or resumed"
    ),
    **_group(
        "schedule_free_radam schedule_free_adamw schedule_free_sgd",
        "it needs schedulefree, which keeps a second set of weights that evaluating and saving would have to swap in",
    ),
    **_group("adamw_torch_xla", "it needs torch_xla, and runs on TPUs only"),
    **_group("adamw_torch_npu_fused", "it needs torch_npu, and runs on Ascend NPUs only"),
    **_group("adamw_anyprecision", "it needs torchdistx, and fp32 master weights make it redundant"),
    **_group("grokadamw", "it needs grokadamw, which does not support sharded parameters"),
    **_group("stable_adamw", "it needs torch-optimi, and scales each update by a norm over the whole parameter"),
}


def _optim_args_apply(value: Any, args: TrainingArguments) -> bool:
    if not isinstance(value, str | None):
        return False
    items = [item.partition("=") for item in (value or "").replace(" ", "").split(",") if item]
    known = OPTIMIZERS.get(plain(args.optim), ())
    return all(equals and text and key in known for key, equals, text in items)


# ---- Keys of the fields that hold mappings ---------------------------------------------------------------------

# torch's own keyword arguments differ between the versions supported; `preserve_rng_state` hides in its **kwargs.
_CHECKPOINT_KEYS = [
    parameter.name
    for parameter in inspect.signature(checkpoint).parameters.values()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
]

ACTIVATION_CHECKPOINTING = RefusedKeys(
    {
        **dict.fromkeys([*_CHECKPOINT_KEYS, "preserve_rng_state"], "forwarded to torch.utils.checkpoint"),
        "use_reentrant": Refused(
            (None, False),
            "the pipeline's backward starts from a stage's outputs, which needs the non-reentrant implementation",
            "use_reentrant=False, the default here",
        ),
        "every_n_layers": Refused(
            lambda value, _: isinstance(value, int) and not isinstance(value, bool) and value >= 1,
            "it counts decoder layers",
            "an integer of at least 1",
        ),
        "offload": Refused(
            (None, False),
            "it copies on the stream that computes, which stands still meanwhile",
            "activation_offload=1, whose copies run beside the computation",
        ),
    }
)

_OWN_LOADER = "each rank reads its own part of the global batch, in an order that does not depend on the topology"

ACCELERATOR_CONFIG = RefusedKeys(
    {
        "non_blocking": "batches are copied to the device without blocking",
        "split_batches": Refused((False,), _OWN_LOADER, "a smaller per_device_train_batch_size"),
        "dispatch_batches": Refused((None, False), _OWN_LOADER, "dispatch_batches=None"),
        "even_batches": Refused(
            (True,), "every data-parallel rank must run the same number of steps", "even_batches=True"
        ),
        "use_seedable_sampler": Refused(
            (True,), "the data order is a function of the seed alone, the same on all ranks", "data_seed to change it"
        ),
        "gradient_accumulation_kwargs": Refused(
            lambda value, _: not value,
            "gradients are accumulated by the pipeline and reduced in its last backward",
            "gradient_accumulation_steps",
        ),
        "use_configured_state": Refused(
            (False,), "the process group must be started with the sizes checked here", "torchrun's variables"
        ),
    }
)

# ---- The two classes -------------------------------------------------------------------------------------------

_TRAINER = "by transformers.Trainer, as documented"
_LOADER = "by our data loader, as documented"
_SAVING = "as documented; what is saved is the whole model, written by all the ranks that hold it"

HONOURED: dict[str, str] = {
    **_group(
        "output_dir num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps "
        "logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter log_level "
        "log_level_replica disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id "
        "trackio_static_space_id eval_strategy eval_steps eval_delay eval_on_start eval_do_concat_batches "
        "eval_accumulation_steps prediction_loss_only include_for_metrics batch_eval_metrics metric_for_best_model "
        "greater_is_better restore_callback_states_from_checkpoint seed full_determinism use_cpu tf32 ddp_backend "
        "skip_memory_metrics do_train do_eval do_predict",
        _TRAINER,
    ),
    **_group(
        "per_device_eval_batch_size dataloader_drop_last dataloader_num_workers dataloader_pin_memory "
        "dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context "
        "remove_unused_columns length_column_name data_seed ignore_data_skip",
        _LOADER,
    ),
    **_group(
        "save_strategy save_steps save_total_limit save_only_model load_best_model_at_end push_to_hub hub_token "
        "hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision",
        _SAVING,
    ),
    "per_device_train_batch_size": "the samples of one micro-batch of one data-parallel replica",
    "weight_decay": "by the optimizer, with the parameters that transformers excludes excluded on every rank",
    "adam_beta1": "by the Adam optimizers",
    "adam_beta2": "by the Adam optimizers",
    "adam_epsilon": "by the Adam optimizers",
    "average_tokens_across_devices": "tokens are counted over micro-batches, and over data-parallel replicas if True",
    "max_grad_norm": "clips by the norm over the whole model, whatever the topology; 0 disables",
    "bf16": "bfloat16 compute, with fp32 master weights, accumulation and optimizer state",
    "activation_checkpointing": "as documented, on the layers that a rank holds",
    "gradient_checkpointing": "the deprecated alias of activation_checkpointing",
    "torch_compile": "decoder layers one by one (or their blocks, where ranks communicate between them), for training",
    "torch_compile_backend": "as documented",
    "use_cache": "sets config.use_cache, as in Trainer; training steps build no cache either way",
    "torch_empty_cache_steps": "as documented, counted in optimizer steps",
    "include_num_input_tokens_seen": "as documented; ranks that read the same samples count once",
    "ddp_timeout": "of every process group, on CPU too (transformers passes it on to accelerators only)",
    "resume_from_checkpoint": "for the script to read, as documented",
    "local_rank": "deprecated: accepted and unused, as in transformers; the launcher's LOCAL_RANK counts",
}

_SIZES = "tp_size, pp_size, cp_size, dp_replicate_size and zero_stage"
_NO_DDP = "there is no DistributedDataParallel wrapper: gradients are reduced in buckets of our own"


def at_least_one(value: Any, _: TrainingArguments) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


REFUSED: dict[str, Refused | RefusedKeys] = {
    "optim": Refused(
        tuple(OPTIMIZERS),
        "it is not known to be element-wise, which sharded parameters require",
        f"one of {', '.join(OPTIMIZERS)}",
        REFUSED_OPTIMIZERS,
    ),
    "optim_args": Refused(
        _optim_args_apply,
        "a key of it would not reach the optimizer (weight_decay has its own field)",
        "; ".join(f"{name}: {', '.join(keys)}" for name, keys in OPTIMIZERS.items() if keys)
        + ", as 'key=value,key=value'",
    ),
    "optim_target_modules": Refused((None,), "only the refused GaLore and APOLLO read it", "optim_target_modules=None"),
    "gradient_accumulation_steps": Refused(
        at_least_one, "it is the number of micro-batches in a step", "an integer of at least 1"
    ),
    "label_smoothing_factor": Refused(
        lambda value, _: isinstance(value, int | float) and 0 <= value < 1,
        "it is the probability mass that is spread over the vocabulary",
        "a number from 0 to below 1",
    ),
    "fp16": Refused((False,), "it needs loss scaling, which is not implemented", "bf16=True"),
    "bf16_full_eval": Refused(
        lambda value, args: not value or args.bf16,
        "evaluation runs on the weights that are trained, which are fp32 without bf16",
        "bf16=True, under which evaluation is in bfloat16",
    ),
    "fp16_full_eval": Refused(
        (False,), "evaluation runs on the weights that are trained, which are never fp16", "bf16=True"
    ),
    "torch_compile_mode": Refused(
        (None, "default", "max-autotune-no-cudagraphs"),
        "weight gradients are accumulated in buffers that a CUDA graph does not track",
        "'default' or 'max-autotune-no-cudagraphs'",
    ),
    "activation_checkpointing_kwargs": ACTIVATION_CHECKPOINTING,
    "gradient_checkpointing_kwargs": ACTIVATION_CHECKPOINTING,
    "use_liger_kernel": Refused((False,), "it replaces layers that are sharded", "use_liger_kernel=False"),
    "liger_kernel_config": Refused((None,), "it configures use_liger_kernel, which is refused", "None"),
    "neftune_noise_alpha": Refused(
        lambda value, _: value is None or (isinstance(value, int | float) and value > 0),
        "it is the size of the noise on embeddings",
        "a number above 0, or None",
    ),
    "auto_find_batch_size": Refused(
        (False,),
        "a rank that runs out of memory cannot restart a step while the others wait for it",
        "a smaller per_device_train_batch_size; the memory report in the log estimates what a step needs",
    ),
    "eval_use_gather_object": Refused((False,), "evaluation gathers tensors", "labels that are tensors"),
    "save_on_each_node": Refused(
        (False,),
        "a checkpoint is written once, each part by a rank that holds it",
        "an output_dir that all nodes share",
    ),
    "enable_jit_checkpoint": Refused(
        (False,),
        "accelerate implements it with a separate checkpoint on each rank",
        "save_on_signal, which stops all ranks at the same step",
    ),
    "accelerator_config": ACCELERATOR_CONFIG,
    "parallelism_config": Refused((None,), "accelerate's parallelism is not used", _SIZES),
    "dataloader_in_order": Refused(
        (True,),
        "ranks that share a model replica must read the same batch, which out-of-order loading does not ensure",
        "dataloader_in_order=True with more dataloader_num_workers",
    ),
    "label_names": Refused(
        lambda value, _: value is None or value in (["labels"], ("labels",)),
        "the loss is the causal language model's, on labels",
        "label_names=None, and a column named labels",
    ),
    "train_sampling_strategy": Refused(
        ("random", "sequential", "group_by_length"),
        "the strategies are random, sequential and group_by_length",
        "one of them",
        {"batch_rebalance": "its sampler assumes that every rank is data-parallel"},
    ),
    # False is what happens anyway, and scripts set it often.
    "ddp_find_unused_parameters": Refused((None, False), _NO_DDP, "None"),
    "ddp_broadcast_buffers": Refused((None, False), _NO_DDP, "None: buffers are built alike on all ranks"),
    "ddp_static_graph": Refused((None, False), _NO_DDP, "None"),
    "ddp_bucket_cap_mb": Refused(
        lambda value, args: value is None or at_least_one(value, args),
        "it is the size of a gradient bucket in MiB",
        "an integer of at least 1, or None for 25",
    ),
    "fsdp": Refused(lambda value, _: not value, "parameters are sharded by this package", _SIZES),
    "fsdp_config": Refused(lambda value, _: not value, "parameters are sharded by this package", _SIZES),
    "deepspeed": Refused(lambda value, _: not value, "DeepSpeed's engine is not used", _SIZES),
    "debug": Refused(
        lambda value, _: not value,
        "it hooks the forward of the whole model, and stages run layers; TPUs are not supported",
        "torch.autograd.set_detect_anomaly(True), or grad_norm in the log",
    ),
}

# Variables that `accelerate launch` sets from its own configuration, and what to use instead of them.
ENVIRONMENT: dict[str, str] = {
    "ACCELERATE_MIXED_PRECISION": "bf16=True",
    "ACCELERATE_DYNAMO_BACKEND": "torch_compile=True",
    "ACCELERATE_USE_DEEPSPEED": _SIZES,
    "ACCELERATE_USE_FSDP": _SIZES,
    "ACCELERATE_USE_MEGATRON_LM": _SIZES,
    "ACCELERATE_USE_PARALLELISM_CONFIG": _SIZES,
}


def check_policy(args: TrainingArguments) -> None:
    """Refuse what would otherwise be ignored, with one line per refused value: field, value, reason, alternative."""
    problems: list[str] = []
    for entry in fields(TrainingArguments):
        value = getattr(args, entry.name)
        if rule := REFUSED.get(entry.name):
            problems.extend(rule.problems(entry.name, value, args))
        elif entry.name not in HONOURED and value != _default(entry):
            problems.append(
                f"{entry.name}={shown(entry.name, plain(value))} is refused: this version of transformers has a field "
                f"that this version of hf_nanotron does not support. Use its default, {_default(entry)!r}, or a newer "
                "hf_nanotron."
            )
    for name, instead in ENVIRONMENT.items():
        setting = os.environ.get(name, "")
        # As in transformers, the field wins over the launcher's precision.
        decided = name == "ACCELERATE_MIXED_PRECISION" and args.bf16
        if setting.lower() not in ("", "no", "false", "0") and not decided:
            problems.append(
                f"The environment variable {name}={setting!r} is refused: accelerate neither wraps nor casts the "
                f"model here. Use {instead}, and torchrun (or `accelerate launch` without it)."
            )
    if problems:
        raise ValueError("\n".join(problems))


def _default(entry: Field[Any]) -> Any:
    return entry.default if entry.default_factory is MISSING else entry.default_factory()
