"""`hf-nanotron train`: a YAML file, checked, becomes a `NanotronTrainer` run."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Collection, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, PreTrainedConfig, set_seed

from .models.auto import AutoModelForCausalLM
from .train_step import PADDING
from .trainer import NanotronTrainer
from .training_args import NanotronTrainingArguments

Settings = dict[str, dict[str, Any]]

SECTIONS: dict[str, Collection[str]] = {
    "model": ("name_or_path", "config", "revision", "dtype", "attn_implementation"),
    "dataset": ("path", "name", "data_files", "train_split", "eval_split", "text_column", "block_size", "num_proc"),
    "training": [field.name for field in dataclasses.fields(NanotronTrainingArguments) if field.init],
}
FILE_TYPES = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


class _Loader(yaml.SafeLoader):
    """YAML as most people read it: `no` is a word (`save_strategy: no`), `1e-3` a number, and dates are text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regex) for tag, regex in resolvers if tag.rpartition(":")[2] not in ("bool", "float", "timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"([-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"),
    list("-+.0123456789"),
)


def train(path: Path, overrides: Sequence[str]) -> None:
    """Run what the YAML file at `path` says: train, save, and evaluate if there is an evaluation split.

    Args:
        path: see `hf-nanotron train --help`.
        overrides: `--key value` pairs: a field of `training`, or a dotted key of any section.

    Raises:
        ValueError: for keys that are not known, and for what the library refuses.
    """
    settings, tokenizer_name = read_settings(path, overrides)
    args = NanotronTrainingArguments(**settings["training"])
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_name) if tokenizer_name is not None else None
    with args.main_process_first(desc="preparing the data"):  # the others find what it cached
        train_dataset, eval_dataset = load_data(settings["dataset"], tokenizer)
    set_seed(args.seed)  # fresh weights follow from it
    trainer = NanotronTrainer(
        model=make_model(settings["model"], tokenizer, args),
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


# ---- settings ----


def read_settings(path: Path, overrides: Sequence[str]) -> tuple[Settings, str | None]:
    """The sections of a configuration with its overrides, and the name of the tokenizer.

    Raises:
        ValueError: for text that is no YAML, or a key that is not known, naming the nearest one that is.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}.")
    settings = _parse(path.read_text(encoding="utf-8"), str(path)) or {}
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds a {type(settings).__name__}, not the sections {', '.join(SECTIONS)}.")
    for key, value in _pairs(overrides):
        *parents, leaf = key.split(".") if "." in key or key == "tokenizer" else ("training", key)
        section = settings
        for parent in parents:
            section[parent] = section = section.get(parent) or {}
            if not isinstance(section, dict):
                raise ValueError(f"--{key}: {parent!r} is {section!r} in {path}, which holds no keys.")
        section[leaf] = value
    refuse_unknown("", settings, (*SECTIONS, "tokenizer"))
    sections = {name: settings.get(name) or {} for name in SECTIONS}
    for name, known in SECTIONS.items():
        if not isinstance(sections[name], dict):
            raise ValueError(f"{name}: {sections[name]!r} must be a mapping with keys such as {', '.join(known)[:80]}.")
        refuse_unknown(f"{name}.", sections[name], known)
    return sections, settings.get("tokenizer")


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - derived from the safe loader
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not YAML: {error}") from error


def _pairs(arguments: Sequence[str]) -> Iterable[tuple[str, Any]]:
    """`--key value`, `--key=value`, and `--key` alone for true."""
    rest = list(arguments)
    while rest:
        option = rest.pop(0)
        if not option.startswith("--"):
            raise ValueError(f"{option!r} follows no --key; write overrides as --key value.")
        key, equals, value = option[2:].partition("=")
        if not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        yield key.replace("-", "_"), _parse(value, option)


def refuse_unknown(prefix: str, keys: Iterable[Any], known: Collection[str]) -> None:
    """Raise a ValueError for the first of `keys` that is not `known`, with the nearest name that is."""
    for key in keys:
        if key not in known:
            (nearest,) = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)
            raise ValueError(f"unknown key {prefix}{key}; the nearest known one is {prefix}{nearest}.")


# ---- model ----


def make_model(section: dict[str, Any], tokenizer: Any, args: NanotronTrainingArguments) -> Any:
    """The model that the section `model` describes, spread over the ranks of `args`.

    Raises:
        ValueError: unless it says either `name_or_path` or `config`.
    """
    options = {name: value for name, value in section.items() if name not in ("name_or_path", "config")}
    if (section.get("name_or_path") is None) == (section.get("config") is None):
        raise ValueError("model needs either name_or_path, for weights to start from, or config, for fresh ones.")
    if section.get("name_or_path") is not None:
        return AutoModelForCausalLM.from_pretrained(section["name_or_path"], parallel=args.parallel, **options)
    if "revision" in options:
        raise ValueError("model.revision goes with name_or_path; a config has no revisions.")
    config = make_config(section["config"], tokenizer)
    return AutoModelForCausalLM.from_config(config, parallel=args.parallel, **options)


def make_config(fields: dict[str, Any], tokenizer: Any) -> PreTrainedConfig:
    """A config of `model_type` with these fields; the size of the vocabulary and special tokens are the tokenizer's.

    Raises:
        ValueError: for an unknown type or field (transformers takes any field and ignores those it does not know).
    """
    fields = dict(fields)
    model_type = fields.pop("model_type", None)
    if model_type is None:
        raise ValueError("model.config needs model_type, such as llama.")
    refuse_unknown("model.config.model_type=", [model_type], list(CONFIG_MAPPING.keys()))
    default = AutoConfig.for_model(model_type)
    known = {*default.to_dict(), *default.attribute_map}
    if "rope_parameters" in known:
        known |= {"rope_theta", "rope_scaling"}  # how configs before transformers 5 spell them
    refuse_unknown("model.config.", fields, sorted(known))
    if tokenizer is not None:
        special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        fields = {"vocab_size": len(tokenizer), **special, **fields}
        if fields["vocab_size"] < len(tokenizer):
            raise ValueError(
                f"model.config.vocab_size={fields['vocab_size']} is smaller than the tokenizer's {len(tokenizer)}."
            )
    try:
        return AutoConfig.for_model(model_type, **fields)
    except StrictDataclassError as error:
        raise ValueError(f"model.config: {error}") from error


# ---- data ----


def load_data(section: dict[str, Any], tokenizer: Any) -> tuple[Any, Any]:
    """The training set and, if `eval_split` is given, the evaluation set, tokenised.

    Raises:
        ValueError: for a split that is not there, or data that cannot be tokenised.
    """
    if section.get("path") is None:
        raise ValueError("dataset needs path: a folder of save_to_disk, a file, or a name for datasets.load_dataset.")
    train_dataset = _tokenised(_load_split(section, section.get("train_split") or "train"), section, tokenizer)
    eval_split = section.get("eval_split")
    return train_dataset, None if eval_split is None else _tokenised(
        _load_split(section, eval_split), section, tokenizer
    )


def _load_split(section: dict[str, Any], split: str) -> Any:
    from datasets import DatasetDict, load_dataset, load_from_disk

    path = Path(section["path"])
    if not any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        files, builder = section.get("data_files"), section["path"]
        if path.is_file() and path.suffix in FILE_TYPES:
            files, builder = str(path), FILE_TYPES[path.suffix]
        return load_dataset(builder, section.get("name"), data_files=files, split=split)
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
        return dataset
    if column not in dataset.column_names:
        raise ValueError(f"dataset.text_column={column!r} is not one of {', '.join(dataset.column_names)}.")
    if not isinstance(size, int) or size < 2:
        raise ValueError(f"dataset.block_size={size!r} must be an integer of at least 2: tokens in a sample.")
    if tokenizer is None or tokenizer.eos_token_id is None:
        raise ValueError("dataset.text_column needs tokenizer, one that has an end-of-text token.")

    def tokenise(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        # verbose=False: texts longer than the model are expected, they are cut.
        rows = tokenizer(batch[column], return_attention_mask=False, verbose=False)["input_ids"]
        end = tokenizer.eos_token_id
        tokens = list(chain.from_iterable(row if row[-1:] == [end] else [*row, end] for row in rows))
        return {"input_ids": [tokens[start : start + size] for start in range(0, len(tokens) - size + 1, size)]}

    packed = dataset.map(
        tokenise, batched=True, remove_columns=dataset.column_names, num_proc=section.get("num_proc"), desc="Packing"
    )
    if not len(packed):
        raise ValueError(f"the texts are too short for one block of dataset.block_size={size} tokens.")
    return packed


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Join samples, filled up on the right where they differ in length. Samples without labels predict themselves."""
    length = max(len(row["input_ids"]) for row in rows)
    rows = [{"labels": row["input_ids"], **row} for row in rows]
    return {
        name: torch.tensor([[*row[name], *[fill] * (length - len(row[name]))] for row in rows])
        for name, fill in PADDING.items()
        if name in rows[0]
    }
