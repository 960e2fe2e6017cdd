"""What a key of a configuration may have meant: keys of other sections, other programs' names, and near misses."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

CUT_OFF = 0.6  # of difflib's ratio: less alike is no hint

_PROCESSES = "the number of processes / (tp_size x pp_size x cp_size), which is the data-parallel size"
_SAMPLES = "training.per_device_train_batch_size x training.gradient_accumulation_steps x data-parallel ranks"

# Names of Megatron, nanotron, LLaMA-Factory, axolotl, TRL and older transformers -> what they are here.
SYNONYMS: dict[str, str] = {
    name: meaning
    for names, meaning in {
        "lr": "training.learning_rate",
        "dp dp_size data_parallel data_parallel_size dp_degree": _PROCESSES,
        "tp tensor_parallel_size tensor_model_parallel_size tp_degree": "training.tp_size",
        "pp pipeline_parallel_size pipeline_model_parallel_size pp_degree": "training.pp_size",
        "ep expert_parallel_size expert_model_parallel_size expert_parallel": "training.ep_size",
        "cp context_parallel_size": "training.cp_size",
        "pp_engine": "training.pp_schedule",
        "mbs micro_batch_size batch_size train_batch_size per_gpu_train_batch_size": (
            "training.per_device_train_batch_size"
        ),
        "eval_batch_size per_gpu_eval_batch_size": "training.per_device_eval_batch_size",
        "gbs global_batch_size": _SAMPLES,
        "gas grad_accum gradient_accumulation accumulation_steps batch_accumulation_per_replica grad_acc_steps": (
            "training.gradient_accumulation_steps"
        ),
        "block_size seq_length seq_len max_seq_length max_seq_len max_length sequence_len context_length "
        "cutoff_len": "dataset.sequence_length",
        "steps train_steps total_steps num_steps train_iters max_iters num_training_steps": "training.max_steps",
        "epochs num_epochs": "training.num_train_epochs",
        "scheduler lr_scheduler lr_decay_style": "training.lr_scheduler_type",
        "warmup warmup_ratio num_warmup_steps lr_warmup_steps": (
            "training.warmup_steps (a number below 1 is a fraction of all steps)"
        ),
        "clip_grad grad_clip gradient_clipping max_norm": "training.max_grad_norm",
        "optimizer": "training.optim",
        "muon_lr lr_muon": "training.muon_learning_rate",
        "muon_beta": "training.muon_momentum",
        "mup use_mup": "training.parametrization (spectral)",
        "mup_base_hidden_size base_width": "training.base_hidden_size",
        "ema use_ema ema_rate": "training.ema_decay",
        "z_loss z_loss_coef z_loss_weight lm_z_loss": "training.z_loss_coefficient",
        "rampup_batch_size batch_size_rampup": (
            "training.batch_size_warmup_tokens (with batch_size_warmup_start and batch_size_warmup_increment)"
        ),
        "weight_decay_exclude_named_params": "training.no_weight_decay",
        "optimizer_cpu_offload optimizer_offload_fraction offload_optimizer": "training.optim_offload",
        "zero": "training.zero_stage",
        "recompute recompute_layer recompute_granularity": "training.activation_checkpointing",
        "precision mixed_precision": "training.bf16",
        "no_cuda": "training.use_cpu",
        "save_interval checkpoint_interval": "training.save_steps",
        "eval_interval val_check_interval": "training.eval_steps",
        "log_interval iteration_step_info_interval": "training.logging_steps",
        "evaluation_strategy": "training.eval_strategy",
        "checkpoints_path save_dir": "training.output_dir",
        "resume resume_checkpoint_path": "training.resume_from_checkpoint",
        "wandb use_wandb wandb_project": "training.report_to",
        "num_workers num_loading_workers": "training.dataloader_num_workers",
        "model_name_or_path model_name model_path pretrained_model_name_or_path base_model hf_model": (
            "model.name_or_path"
        ),
        "model_config": "model.config",
        "torch_dtype": "model.dtype",
        "attention_implementation attn": "model.attn_implementation",
        "model_type hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "vocab_size max_position_embeddings rope_theta tie_word_embeddings": "model.config.{}",
        "tokenizer_name tokenizer_name_or_path tokenizer_path tokenizer_model": "tokenizer",
        "dataset_name dataset_path train_file data datasets": "dataset.path",
        "dataset_folder data_path data_prefix": "dataset.tokens",
        "weights dataset_weights data_weights blend sampling_weights": "a weight in each set of dataset.mixture",
        "data_stages curriculum": "dataset.stages",
        "dataset_config_name": "dataset.name",
        "validation_split val_split": "dataset.eval_split",
        "dataset_text_field text_field text_key text_column_name": "dataset.text_column",
        "preprocessing_num_workers dataset_processing_num_proc_per_process": "dataset.num_proc",
    }.items()
    for name in names.split()
}

# Sections of a configuration of huggingface/nanotron that no other program's has together.
NANOTRON = frozenset(
    (
        "general",
        "parallelism",
        "optimizer",
        "tokens",
        "data_stages",
        "checkpoints",
        "lighteval",
        "s3_upload",
        "profiler",
    )
)


def refuse_nanotron(where: str, settings: Mapping[Any, Any]) -> None:
    """Refuse a configuration of huggingface/nanotron, and name the command that converts it."""
    found = [str(key) for key in settings if key in NANOTRON]
    if len(found) >= 2:
        raise ValueError(
            f"{where} is a configuration of huggingface/nanotron (it has {', '.join(found)}). Convert it with "
            f"hf-nanotron convert nanotron-config {where} OUT.yaml, and its checkpoints with hf-nanotron convert "
            "nanotron-to-hub."
        )


def refuse_unknown(
    prefix: str, keys: Iterable[Any], known: Collection[str], sections: Mapping[str, Collection[str]] | None = None
) -> None:
    """Refuse the first of `keys` that is not `known`, and suggest what it may have meant, also in other `sections`.

    `prefix` is that of `known` in a dotted key, such as `training.`.
    """
    unknown = [key for key in keys if key not in known]
    if unknown:
        raise ValueError(f"unknown key {prefix}{unknown[0]}; {hint(prefix, str(unknown[0]), known, sections or {})}")


def hint(prefix: str, key: str, known: Collection[str], sections: Mapping[str, Collection[str]]) -> str:
    """What an unknown `key` may have meant, as a sentence."""
    if key in sections and prefix:
        return f"{key} is a section: write {key}.KEY, one of {_some(sections[key])}."
    if key == "tokenizer" and sections:
        return "tokenizer is a top-level key, next to the sections."
    meaning = SYNONYMS[key].format(key) if sections and key in SYNONYMS else None
    if meaning is not None and (not prefix or meaning.startswith(prefix)) and meaning != f"{prefix}{key}":
        return f"the equivalent is {meaning}."
    for section, names in sections.items():
        if key in names:
            return f"it belongs to the section {section}: {section}.{key}."
    if meaning not in (None, f"{prefix}{key}"):
        return f"the equivalent is {meaning}."
    here, elsewhere = (
        difflib.get_close_matches(key, names, n=1, cutoff=CUT_OFF)
        for names in (known, [name for names in sections.values() for name in names])
    )
    likeness = [difflib.SequenceMatcher(None, key, match).ratio() for match in (*here, *elsewhere)]
    if here and likeness[0] == max(likeness):
        return f"did you mean {prefix}{here[0]}?"
    if elsewhere:
        section = next(section for section, names in sections.items() if elsewhere[0] in names)
        return f"did you mean {section}.{elsewhere[0]}?"
    return f"known keys are {_some(known)}."


def _some(names: Collection[str], most: int = 12) -> str:
    """`names`, the first of them if they are many."""
    listed = ", ".join(list(names)[:most])
    return listed if len(names) <= most else f"{listed}, ... ({len(names)} in all)"
