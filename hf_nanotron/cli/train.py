"""`hf-nanotron train`: a YAML file, checked, becomes a `NanotronTrainer` run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, set_seed

from ..models.auto import AutoModelForCausalLM
from ..trainer import NanotronTrainer
from ..training.doremi import DoReMi
from ..training.loaders import data_seed
from ..training.reporting import check_reports
from ..training_args import NanotronTrainingArguments
from .data import collate, load_data
from .errors import existing_model, existing_path, explained
from .model_config import changed_config, make_config
from .settings import check_complete, read_settings

DOMAIN_WEIGHTS = "domain_weights.json"  # of a run with doremi, in its output_dir


def train(path: Path, overrides: Sequence[str]) -> None:
    """Train as the YAML file at `path` says (see `hf-nanotron train --help`), evaluate if it has a split, and save."""
    settings, tokenizer_name = read_settings(path, overrides)
    plan = check_complete(settings)
    with explained("training"):
        args = NanotronTrainingArguments(**settings["training"])
        check_reports(args)
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
    if trainer.stopped_by_signal:  # what is left of its time limit is not for an evaluation
        if trainer.is_world_process_zero():
            step, steps = trainer.state.global_step, trainer.state.max_steps
            print(f"stopped after step {step} of {steps}; go on with --resume_from_checkpoint auto", flush=True)
        return
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


def check_model_section(section: dict[str, Any], args: NanotronTrainingArguments) -> None:
    """Refuse keys of the section `model` that do not go together, or not with the arguments.

    Raises:
        ValueError: with what to change.
    """
    if section.get("name_or_path") is not None:
        if args.spectral is not None:
            raise ValueError(
                "training.parametrization='spectral' with model.name_or_path: fresh weights follow from it; give "
                "model.config instead."
            )
        return
    if "revision" in section:
        raise ValueError("model.revision needs model.name_or_path; a config has no revision.")
    if section.get("config_overrides"):
        raise ValueError("model.config_overrides needs model.name_or_path; set the fields in model.config.")


def make_model(section: dict[str, Any], tokenizer: Any, args: NanotronTrainingArguments) -> Any:
    """The model that the section `model` describes, sharded over the ranks of `args`."""
    chosen = ("name_or_path", "config", "config_overrides")
    options = {name: value for name, value in section.items() if name not in chosen}
    check_model_section(section, args)
    if (name := section.get("name_or_path")) is not None:
        name = existing_model("model.name_or_path", name)
        source = {"revision": options["revision"]} if "revision" in options else {}
        with explained(f"model.name_or_path={name!r} cannot be loaded"):
            if overrides := section.get("config_overrides"):
                options["config"] = changed_config(name, overrides, **source)
            return AutoModelForCausalLM.from_pretrained(name, parallel=args.parallel, **options)
    config = make_config(section["config"], tokenizer)
    with explained("model"):
        return AutoModelForCausalLM.from_config(
            config, parallel=args.parallel, parametrization=args.spectral, **options
        )


def make_doremi(section: dict[str, Any], model: Any) -> DoReMi | None:
    """What weighs the domains, by the reference model that the section `doremi` names; None without one."""
    if not section:
        return None
    name = existing_model("doremi.reference", section["reference"])
    with explained(f"doremi.reference={name!r} cannot be loaded"):
        reference = AutoModelForCausalLM.from_pretrained(name, mesh=model.mesh)
    return DoReMi(reference, **{key: section[key] for key in ("rate", "smoothing") if section.get(key) is not None})
