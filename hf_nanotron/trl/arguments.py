"""What each argument of `trl.SFTConfig` and `trl.SFTTrainer` means here: the same as in TRL, or refused with a reason.

Two tables hold every field of `SFTConfig` that `transformers.TrainingArguments` has not; two hold every argument of
`SFTTrainer` that `transformers.Trainer` has not. The docs show them. Fields of
`TrainingArguments` are in `hf_nanotron.arguments.policy`.
"""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import torch
from transformers import TrainingArguments
from trl import SFTConfig

from ..arguments.policy import REFUSED as STOCK_REFUSED, at_least_one
from ..arguments.rules import Refused, RefusedKeys
from ..models.auto import DOWNLOAD_ARGUMENTS
from ..redaction import shown

_DATA = "while the data is prepared, by TRL"
_LOAD = "by AutoModelForCausalLM.from_pretrained, which reads the parts of each rank"

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float64)}

HONOURED: dict[str, str] = {
    "chat_template_path": "as in TRL; a tokenizer's template may resize the embeddings, so the whole model is loaded "
    "first and then sharded, unless the path is a Jinja file",
    "router_aux_loss_coef": "as in TRL: the load-balancing loss is on unless it is 0, as a mean over micro-batches",
    "dataset_text_field": _DATA,
    "dataset_num_proc": _DATA,
    "eos_token": _DATA,
    "max_length": _DATA,
    "truncation_mode": _DATA,
    "shuffle_dataset": _DATA,
    "packing": f"{_DATA}; documents of a row are kept apart by position_ids, with any attention",
    "packing_strategy": f"{_DATA}: bfd, bfd_split or wrapped",
    "padding_free": "by TRL's collator; documents are kept apart by position_ids, with any attention",
    "pad_to_multiple_of": "by TRL's collator",
    "eval_packing": _DATA,
    "completion_only_loss": _DATA,
    "assistant_only_loss": _DATA,
    "pad_token": "as in TRL, where it is deprecated",
}

REFUSED: dict[str, Refused | RefusedKeys] = {
    "model_init_kwargs": RefusedKeys(
        {
            **dict.fromkeys((*DOWNLOAD_ARGUMENTS, "attn_implementation"), _LOAD),
            "dtype": Refused(
                lambda value, args: (
                    value in (None, "auto") or value in DTYPES or str(value) in map(str, DTYPES.values())
                ),
                "the weights are those of a causal LM",
                "'auto', 'float32' (TRL's default) or 'bfloat16'",
            ),
            "device_map": Refused((None,), "each rank has one device", "none"),
            "quantization_config": Refused((None,), "quantised weights cannot be sharded", "bf16=True"),
            "trust_remote_code": Refused(
                (False,), "stock classes are sharded as they are read", "a model that you have loaded with transformers"
            ),
        }
    ),
    "trust_remote_code": Refused(
        lambda value, args: not value,
        "stock classes are sharded as they are read",
        "a model and a processing_class that you have loaded with transformers",
    ),
    "dataset_kwargs": RefusedKeys({"skip_prepare_dataset": _DATA}),
    "loss_type": Refused(("nll", "dft"), "TRL has two losses", "'nll' or 'dft'"),
    "activation_offloading": Refused(
        (False,),
        "it copies what the whole forward saves, and stages run micro-batch by micro-batch",
        "activation_offload=1 with activation_checkpointing=True",
    ),
}


def _none_or_one(value: Any, args: Any) -> bool:
    return value is None or at_least_one(value, args)


def _is_padding(value: Any, args: Any) -> bool:
    """TRL turns text into numbers, after it was checked."""
    if isinstance(value, str):
        return value == "auto" or value.lower() in ("none", "null") or (value.isdecimal() and int(value) > 0)
    return _none_or_one(value, args)


# Values of honoured fields that TRL takes without a word, or whose error names neither the field nor the value.
VALUES: dict[str, Refused] = {
    "max_length": Refused(
        lambda value, args: value is None or value >= 2,
        "it is the tokens that a sample or a packed row may have, and one alone predicts nothing",
        "an integer of at least 2, or None",
    ),
    "pad_to_multiple_of": Refused(
        _is_padding, "it is a number of tokens", "an integer of at least 1, 'auto' (TRL's default), or None"
    ),
    "dataset_num_proc": Refused(_none_or_one, "it is a number of processes", "an integer of at least 1, or None"),
    "router_aux_loss_coef": Refused(
        lambda value, args: value is None or 0 <= value < math.inf,
        "it is what the load-balancing loss is multiplied by",
        "a number of at least 0, or None for the model's own",
    ),
}

# Fields of NanotronTrainingArguments that do not go with what TRL does.
TOGETHER: dict[str, Refused] = {
    "batch_size_warmup_tokens": Refused(
        (None,), "TRL prepares the data, whose batch is to grow, when the trainer is made", "None"
    ),
    "z_loss_coefficient": Refused(
        lambda value, args: not value or getattr(args, "loss_type", "nll") != "dft",
        "loss_type='dft' multiplies the loss of each token by its probability, and a z-loss is no part of that",
        "0, or loss_type='nll'",
    ),
    "label_smoothing_factor": Refused(
        lambda value, args: not value or getattr(args, "loss_type", "nll") != "dft",
        "loss_type='dft' has no smoothed labels (TRL would ignore it)",
        "0, or loss_type='nll'",
    ),
}

TRAINER_HONOURED: dict[str, str] = {
    "model": "a Hub id or folder, read by parts; a stock causal LM, which is sharded in place; or one of "
    "hf_nanotron.AutoModelForCausalLM",
    "args": "a NanotronSFTConfig",
    "formatting_func": _DATA,
    "peft_config": "a `peft.LoraConfig`: adapters of linears, each cut as its linear is; saved in PEFT's format",
}

TRAINER_REFUSED: dict[str, Refused] = {
    "quantization_config": Refused((None,), "quantised weights cannot be sharded", "bf16=True"),
    "doremi": Refused((None,), "TRL drops the column of domains when it prepares the data", "NanotronTrainer"),
}


# Fields whose values are judged by rules, not by their annotations.
RULED = frozenset({*STOCK_REFUSED, *REFUSED, "pad_to_multiple_of"})


def own_fields() -> list[str]:
    """Fields of `SFTConfig` that `TrainingArguments` has not."""
    stock = {entry.name for entry in fields(TrainingArguments)}
    return [entry.name for entry in fields(SFTConfig) if entry.name not in stock]


def check_sft_arguments(args: Any) -> None:
    """Refuse values that would be ignored.

    Raises:
        ValueError: one line for each, naming the field, its value, the reason, and what to use instead.
    """
    defaults = {entry.name: entry.default for entry in fields(SFTConfig)}
    problems: list[str] = []
    for name in own_fields():
        value = getattr(args, name)
        if rule := REFUSED.get(name):
            problems.extend(rule.problems(name, value, args))
        elif name not in HONOURED and value != defaults[name]:
            problems.append(
                f"{name}={shown(name, value)} is refused: this version of TRL has a field that this version of "
                f"hf_nanotron does not support. Use its default, {defaults[name]!r}, or a newer hf_nanotron."
            )
    rules = {**VALUES, **TOGETHER}
    problems += [line for name, rule in rules.items() for line in rule.problems(name, getattr(args, name), args)]
    if problems:
        raise ValueError("\n".join(problems))


def check_trainer_arguments(given: dict[str, Any], args: TrainingArguments) -> None:
    """The same of arguments of the trainer."""
    problems = [line for name, rule in TRAINER_REFUSED.items() for line in rule.problems(name, given.get(name), args)]
    if problems:
        raise ValueError("\n".join(problems))


def rows() -> list[tuple[str, str]]:
    """Each argument, and what it means here, as Markdown."""
    listed: list[tuple[str, str | Refused | RefusedKeys]] = [
        *((f"`{name}`", HONOURED.get(name) or REFUSED[name]) for name in own_fields()),
        *((f"`{name}` of the trainer", rule) for name, rule in TRAINER_HONOURED.items()),
        *((f"`{name}` of the trainer", rule) for name, rule in TRAINER_REFUSED.items()),
        *((f"`{name}`, with TRL", rule) for name, rule in TOGETHER.items()),
    ]
    return [(name, _in_words(rule)) for name, rule in listed]


def _in_words(rule: str | Refused | RefusedKeys) -> str:
    if isinstance(rule, str):
        return rule
    if isinstance(rule, Refused):
        taken = "" if callable(rule.allowed) else f" but for {', '.join(f'`{value!r}`' for value in rule.allowed)}"
        return f"refused{taken}: {rule.reason}; use {rule.instead}"
    judged = {key: of_key for key, of_key in rule.keys.items() if isinstance(of_key, Refused)}
    taken = ", ".join(f"`{key}`" for key in rule.keys if key not in judged or callable(judged[key].allowed))
    refused = "; ".join(f"`{key}`: {of.reason}" for key, of in judged.items() if not callable(of.allowed))
    return f"keys {taken}" + (f"; refused: {refused}" if refused else "; other keys are refused")
