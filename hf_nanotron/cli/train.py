"""`hf-nanotron train`: a YAML file, checked, becomes a `NanotronTrainer` run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, PreTrainedConfig, set_seed

from ..models.auto import AutoModelForCausalLM
from ..trainer import NanotronTrainer
from ..training.data_order import data_seed
from ..training.doremi import DoReMi
from ..training_args import NanotronTrainingArguments
from .data import collate, load_data
from .errors import SettingsError, existing_path, explained
from .hints import refuse_unknown
from .settings import SECTIONS, check_complete, read_settings

DOMAIN_WEIGHTS = "domain_weights.json"  # of a run with doremi, in its output_dir


def train(path: Path, overrides: Sequence[str]) -> None:
    """Train as the YAML file at `path` says (see `hf-nanotron train --help`), evaluate if it has a split, and save."""
    settings, tokenizer_name = read_settings(path, overrides)
    plan = check_complete(settings)
    with explained("training"):
        args = NanotronTrainingArguments(**settings["training"])
    tokenizer = load_tokenizer(tokenizer_name)
    with args.main_process_first(desc="preparing the data"):  # the others find what it cached
        train_dataset, eval_dataset = load_data(plan, tokenizer, data_seed(args))
    set_seed(args.seed)  # fresh weights follow from it
    model = make_model(settings["model"], tokenizer, args)
    with explained("training"):
        trainer = NanotronTrainer(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            data_collator=collate,
            doremi=make_doremi(settings["doremi"], model),
        )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if eval_dataset is not None:
        trainer.log_metrics("eval", trainer.evaluate())
    trainer.save_model()
    trainer.save_state()
    if trainer.doremi is not None and trainer.is_world_process_zero():
        text = json.dumps(trainer.doremi.weights, indent=2)
        (Path(args.output_dir or ".") / DOMAIN_WEIGHTS).write_text(f"{text}\n", encoding="utf-8")
    if args.push_to_hub:
        trainer.push_to_hub()


# ---- model ----


def load_tokenizer(name: str | None) -> Any:
    """The tokenizer of a folder or a Hub id; None for none."""
    if name is None:
        return None
    name = existing_path("tokenizer", name, "folder")
    with explained(f"tokenizer={name!r} cannot be loaded"):
        return AutoTokenizer.from_pretrained(name)


def make_model(section: dict[str, Any], tokenizer: Any, args: NanotronTrainingArguments) -> Any:
    """The model that the section `model` describes, sharded over the ranks of `args`."""
    options = {name: value for name, value in section.items() if name not in ("name_or_path", "config")}
    if (name := section.get("name_or_path")) is not None:
        if args.spectral is not None:
            raise ValueError(
                "training.parametrization='spectral' with model.name_or_path: fresh weights follow from it; give "
                "model.config instead."
            )
        name = existing_path("model.name_or_path", name, "folder")
        with explained(f"model.name_or_path={name!r} cannot be loaded"):
            return AutoModelForCausalLM.from_pretrained(name, parallel=args.parallel, **options)
    if "revision" in options:
        raise ValueError("model.revision needs model.name_or_path; a config has no revision.")
    config = make_config(section["config"], tokenizer)
    with explained("model"):
        return AutoModelForCausalLM.from_config(
            config, parallel=args.parallel, parametrization=args.spectral, **options
        )


def make_doremi(section: dict[str, Any], model: Any) -> DoReMi | None:
    """What weighs the domains, by the reference model that the section `doremi` names; None without one."""
    if not section:
        return None
    name = existing_path("doremi.reference", section["reference"], "folder")
    with explained(f"doremi.reference={name!r} cannot be loaded"):
        reference = AutoModelForCausalLM.from_pretrained(name, mesh=model.mesh)
    return DoReMi(reference, **{key: section[key] for key in ("rate", "smoothing") if section.get(key) is not None})


def make_config(fields: dict[str, Any], tokenizer: Any) -> PreTrainedConfig:
    """A config of `model_type` with these fields; the size of the vocabulary and special tokens are the tokenizer's.

    Unknown types and fields are refused: transformers accepts any field and ignores those it does not know.
    """
    fields = dict(fields)
    model_type = fields.pop("model_type", None)
    if model_type is None:
        raise ValueError("model.config needs model_type, such as llama.")
    if not isinstance(model_type, str):
        raise ValueError(f"model.config.model_type={model_type!r} must be text, such as llama.")
    refuse_unknown("model.config.model_type=", [model_type], list(CONFIG_MAPPING.keys()))
    default = AutoConfig.for_model(model_type)
    known = {*default.to_dict(), *default.attribute_map}
    if "rope_parameters" in known:
        known |= {"rope_theta", "rope_scaling"}  # how configs before transformers 5 spell them
    refuse_unknown("model.config.", fields, sorted(known), SECTIONS)
    if tokenizer is not None:
        special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        fields = {"vocab_size": len(tokenizer), **special, **fields}
        if isinstance(fields["vocab_size"], int) and fields["vocab_size"] < len(tokenizer):
            raise ValueError(
                f"model.config.vocab_size={fields['vocab_size']} is smaller than the tokenizer's {len(tokenizer)}."
            )
    try:
        with explained("model.config"):
            config = AutoConfig.for_model(model_type, **fields)
    except SettingsError as error:
        if isinstance(error.__cause__, StrictDataclassError):
            raise ValueError(f"model.config: {error.__cause__}") from error
        raise
    heads, shared = getattr(config, "num_attention_heads", None), getattr(config, "num_key_value_heads", None)
    if isinstance(heads, int) and isinstance(shared, int) and (shared < 1 or heads % shared):
        raise ValueError(
            f"model.config.num_key_value_heads={shared} does not divide model.config.num_attention_heads={heads}."
        )
    return config
