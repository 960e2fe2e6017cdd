"""`hf-nanotron train`: a YAML file, checked, becomes a `NanotronTrainer` run."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, PreTrainedConfig, set_seed

from ..data.padding import PADDING
from ..models.auto import AutoModelForCausalLM
from ..trainer import NanotronTrainer
from ..training_args import NanotronTrainingArguments
from .errors import SettingsError, explained, refuse_missing_path
from .hints import refuse_unknown
from .settings import SECTIONS, check_complete, read_settings

FILE_TYPES = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


def train(path: Path, overrides: Sequence[str]) -> None:
    """Train as the YAML file at `path` says (see `hf-nanotron train --help`), evaluate if it has a split, and save."""
    settings, tokenizer_name = read_settings(path, overrides)
    check_complete(settings)
    with explained("training"):
        args = NanotronTrainingArguments(**settings["training"])
    tokenizer = load_tokenizer(tokenizer_name)
    with args.main_process_first(desc="preparing the data"):  # the others find what it cached
        train_dataset, eval_dataset = load_data(settings["dataset"], tokenizer)
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
        )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if eval_dataset is not None:
        trainer.log_metrics("eval", trainer.evaluate())
    trainer.save_model()
    trainer.save_state()
    if args.push_to_hub:
        trainer.push_to_hub()


# ---- model ----


def load_tokenizer(name: str | None) -> Any:
    """The tokenizer of a folder or a Hub id; None for none."""
    if name is None:
        return None
    refuse_missing_path("tokenizer", name, "folder")
    with explained(f"tokenizer={name!r} cannot be loaded"):
        return AutoTokenizer.from_pretrained(name)


def make_model(section: dict[str, Any], tokenizer: Any, args: NanotronTrainingArguments) -> Any:
    """The model that the section `model` describes, sharded over the ranks of `args`."""
    options = {name: value for name, value in section.items() if name not in ("name_or_path", "config")}
    if (name := section.get("name_or_path")) is not None:
        refuse_missing_path("model.name_or_path", name, "folder")
        with explained(f"model.name_or_path={name!r} cannot be loaded"):
            return AutoModelForCausalLM.from_pretrained(name, parallel=args.parallel, **options)
    if "revision" in options:
        raise ValueError("model.revision needs model.name_or_path; a config has no revision.")
    config = make_config(section["config"], tokenizer)
    with explained("model"):
        return AutoModelForCausalLM.from_config(config, parallel=args.parallel, **options)


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


# ---- data ----


def load_data(section: dict[str, Any], tokenizer: Any) -> tuple[Any, Any]:
    """The training set and, if `eval_split` is given, the evaluation set, tokenized."""
    train_dataset = _tokenised(_load_split(section, section.get("train_split") or "train"), section, tokenizer)
    eval_split = section.get("eval_split")
    return train_dataset, None if eval_split is None else _tokenised(
        _load_split(section, eval_split), section, tokenizer
    )


def _load_split(section: dict[str, Any], split: str) -> Any:
    refuse_missing_path("dataset.path", section["path"], "file or folder")
    with explained(f"dataset.path={section['path']!r} cannot be read"):
        dataset = _read_split(section, split)
    if not len(dataset):
        raise ValueError(f"dataset.path={section['path']!r} has no samples in its split {split!r}.")
    return dataset


def _read_split(section: dict[str, Any], split: str) -> Any:
    from datasets import DatasetDict, load_dataset, load_from_disk

    path = Path(section["path"])
    is_saved = any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))
    for name in ("name", "data_files"):
        if section.get(name) is not None and (is_saved or path.suffix in FILE_TYPES):
            raise ValueError(
                f"dataset.{name}={section[name]!r} needs a dataset.path that is a name for datasets.load_dataset, but "
                f"{section['path']!r} is a {'folder of save_to_disk' if is_saved else 'file'}; remove dataset.{name}."
            )
    if not is_saved:
        files, builder = section.get("data_files"), section["path"]
        if path.suffix in FILE_TYPES:
            if not path.is_file():
                raise ValueError(f"dataset.path={section['path']!r}: file not found.")
            if not path.stat().st_size:
                raise ValueError(f"dataset.path={section['path']!r} is an empty file.")
            files, builder = str(path), FILE_TYPES[path.suffix]
        return load_dataset(builder, section.get("name"), data_files=files, split=split)
    if not any(path.rglob("*.arrow")):
        raise ValueError(f"dataset.path={section['path']!r} has no samples.")
    saved = load_from_disk(str(path))
    splits = saved if isinstance(saved, DatasetDict) else {"train": saved}
    if split not in splits:
        raise ValueError(f"{path} has no split {split!r}; it has {', '.join(splits)}.")
    return splits[split]


def _tokenised(dataset: Any, section: dict[str, Any], tokenizer: Any) -> Any:
    """`dataset` with `input_ids`: its own, or its texts, each ended by the end-of-text token, cut into blocks."""
    column, size = section.get("text_column"), section.get("block_size")
    if column is None:
        if "input_ids" not in dataset.column_names:
            raise ValueError(
                f"the dataset has the columns {', '.join(dataset.column_names)}: without input_ids it needs "
                "dataset.text_column, dataset.block_size and tokenizer."
            )
        _check_ids(dataset)
        return dataset
    if column not in dataset.column_names:
        raise ValueError(f"dataset.text_column={column!r} is not one of {', '.join(dataset.column_names)}.")
    if not isinstance(size, int) or size < 2:
        raise ValueError(f"dataset.block_size={size!r} must be an integer of at least 2 (tokens per sample).")
    if tokenizer is None or tokenizer.eos_token_id is None:
        raise ValueError("dataset.text_column needs a tokenizer with an end-of-text token.")

    def tokenise(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        # verbose=False: texts longer than the model are expected, they are cut.
        rows = tokenizer(batch[column], return_attention_mask=False, verbose=False)["input_ids"]
        end = tokenizer.eos_token_id
        tokens = list(chain.from_iterable(row if row[-1:] == [end] else [*row, end] for row in rows))
        return {"input_ids": [tokens[start : start + size] for start in range(0, len(tokens) - size + 1, size)]}

    with explained(f"dataset.text_column={column!r} cannot be tokenized"):
        packed = dataset.map(
            tokenise,
            batched=True,
            remove_columns=dataset.column_names,
            num_proc=section.get("num_proc"),
            desc="Packing",
        )
    if not len(packed):
        raise ValueError(f"the texts are too short for one block of dataset.block_size={size} tokens.")
    return packed


def _check_ids(dataset: Any) -> None:
    """Refuse a column of tokens or labels that does not hold a list of integers in every row."""
    for name in ("input_ids", "labels"):
        if name not in dataset.column_names:
            continue
        kind, values = dataset.features[name], dataset.data.column(name)
        if not str(getattr(getattr(kind, "feature", None), "dtype", "")).startswith(("int", "uint")):
            raise ValueError(f"the column {name} of the dataset must hold a list of integers in each row, not {kind}.")
        if values.null_count:
            raise ValueError(f"the column {name} of the dataset is empty (null) in {values.null_count} rows.")


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Stack samples, padded on the right where they differ in length. Samples without labels predict themselves."""
    length = max(len(row["input_ids"]) for row in rows)
    rows = [{"labels": row["input_ids"], **row} for row in rows]
    for row in rows:
        if len(row["labels"]) != len(row["input_ids"]):
            raise ValueError(f"a sample has {len(row['input_ids'])} input_ids and {len(row['labels'])} labels.")
    return {
        name: torch.tensor([[*row[name], *[fill] * (length - len(row[name]))] for row in rows])
        for name, fill in PADDING.items()
        if name in rows[0]
    }
