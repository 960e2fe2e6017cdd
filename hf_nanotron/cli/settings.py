"""The settings of `hf-nanotron train`: a YAML file and overrides become sections whose keys and types are known."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Collection, Hashable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from ..arguments.values import WIDER, takes_text, wrong_type
from ..parallel.config import refuse_removed
from ..redaction import MASK, is_secret, printable, shown
from ..training_args import NanotronTrainingArguments
from .data_keys import KEYS, MAPPING, TEXT, check_types
from .data_plan import DataPlan, MixturePlan, SetPlan, plan_data
from .hints import refuse_nanotron, refuse_unknown

Settings = dict[str, dict[str, Any]]

# What the keys of a section take; `training` is checked as training arguments are.
TYPES: dict[str, dict[str, Any]] = {
    "model": {
        "name_or_path": TEXT,
        "config": MAPPING,
        "config_overrides": MAPPING,
        "revision": TEXT,
        "dtype": TEXT,
        "attn_implementation": TEXT,
    },
    "dataset": KEYS,
    "doremi": {"reference": TEXT, "rate": float | None, "smoothing": float | None},
}
SECTIONS: dict[str, Collection[str]] = {
    **TYPES,
    "training": [field.name for field in dataclasses.fields(NanotronTrainingArguments) if field.init],
}
NEEDED = "model, dataset, training"  # sections that a file has
DTYPES = ("auto", "float32", "bfloat16", "float16")


class _Loader(yaml.SafeLoader):
    """YAML as most people read it.

    `no` is a word (`save_strategy: no`), `1e-3` a number, and dates, `010` and `1:30` are text. A key comes once.
    """

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[Any, Any] = {}
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name is not None and name != "<<" and name in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"duplicate key {name!r}, first in line {seen[name].line + 1}", key.start_mark
                )
            seen[name] = key.start_mark
        return super().construct_mapping(node, deep)


_OURS = ("bool", "int", "float", "timestamp")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regex) for tag, regex in resolvers if tag.rpartition(":")[2] not in _OURS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"([-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"),
    list("-+.0123456789"),
)


def read_settings(path: Path, overrides: Sequence[str]) -> tuple[Settings, str | None]:
    """The sections of a configuration with its overrides, and the name of the tokenizer."""
    settings = _read(path)
    if not settings and not overrides:
        raise ValueError(f"{path} is empty; it needs the sections {NEEDED} (see hf-nanotron train --help).")
    return sections_of(settings, str(path), overrides)


def sections_of(settings: dict[Any, Any], where: str, overrides: Sequence[str]) -> tuple[Settings, str | None]:
    """As `read_settings`, of `settings` that are from `where`."""
    for key, value in _pairs(overrides):
        *parents, leaf = key.split(".") if "." in key or key == "tokenizer" else ("training", key)
        section: Any = settings
        for parent in parents:
            place = _place(section, parent, key)
            if isinstance(section, dict) and section.get(place) is None:
                section[place] = {}
            section = section[place]
            if not isinstance(section, dict | list):
                raise ValueError(f"--{key}: {parent!r} is {shown(parent, section)} in {where}, not a section.")
        section[_place(section, leaf, key)] = value
    refuse_unknown("", settings, (*SECTIONS, "tokenizer"), SECTIONS)
    sections = {name: {} if settings.get(name) is None else settings[name] for name in SECTIONS}
    refuse_removed(sections["training"])
    for name, known in SECTIONS.items():
        if not isinstance(sections[name], dict):
            text = shown(name, sections[name])
            raise ValueError(f"{name}: {text} must be a mapping with keys such as {', '.join(known)[:80]}.")
        refuse_unknown(f"{name}.", sections[name], known, SECTIONS)
    _check_types(sections, settings.get("tokenizer"))
    return sections, settings.get("tokenizer")


def _place(section: dict[str, Any] | list[Any], name: str, key: str) -> Any:
    """A name in a section, or a number in a list such as `dataset.stages`."""
    if isinstance(section, dict):
        return name
    if not name.isdecimal() or int(name) >= len(section):
        raise ValueError(f"--{key}: {name!r} is no place in a list of {len(section)} (0 to {len(section) - 1}).")
    return int(name)


def check_complete(settings: Settings) -> DataPlan:
    """Refuse settings without a model or data, and data that do not go together; the plan of the data."""
    model = settings["model"]
    if (model.get("name_or_path") is None) == (model.get("config") is None):
        raise ValueError("model needs either name_or_path (existing weights) or config (random weights).")
    if settings["doremi"] and settings["doremi"].get("reference") is None:
        raise ValueError(
            "doremi needs reference, the folder or Hub id of a model that was trained on the same domains; without "
            "the section, domains are not weighed."
        )
    plan = plan_data(settings["dataset"])
    data_seed = settings["training"].get("data_seed")
    if None not in (plan.seed, data_seed) and plan.seed != data_seed:
        raise ValueError(f"dataset.seed={plan.seed} and training.data_seed={data_seed} differ; give one of them.")
    if plan.brings_order and settings["training"].get("train_sampling_strategy") not in (None, "sequential"):
        raise ValueError(
            f"training.train_sampling_strategy={settings['training']['train_sampling_strategy']!r}: files of tokens "
            "and mixtures come in their own order, by dataset.seed; leave it out (dataset.shuffle is their switch)."
        )
    if plan.has_no_end and settings["training"].get("max_steps") in (None, -1):
        endless = {list: "stages have", MixturePlan: "the mixture has", SetPlan: "a stream has"}
        what = endless[type(plan.train)]
        raise ValueError(f"training.max_steps is needed: {what} no end.")
    return plan


def _read(path: Path) -> dict[Any, Any]:
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the path of a YAML file.")
    if not path.is_file():
        raise ValueError(f"file not found: {path}.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}.") from error
    settings = _parse(text, str(path))
    if settings is None:
        settings = {}
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds a {type(settings).__name__}, not the sections {NEEDED}.")
    refuse_nanotron(str(path), settings)
    return settings


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - derived from the safe loader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        hint = " Indent with spaces: YAML does not allow tabs." if "'\\t'" in str(error) else ""
        # The error quotes lines that it has not understood, and one may hold a token: it is not chained, either.
        raise ValueError(f"{printable(where)} is not valid YAML: {_without_lines(error, text, where)}.{hint}") from None


def _without_lines(error: Exception, text: str, where: str) -> str:
    """What an error of YAML says, and where, without the lines that it quotes."""
    mark = getattr(error, "problem_mark", None)
    if not isinstance(mark, yaml.Mark):
        return printable(str(error))
    said = ", ".join(part for part in (getattr(error, "context", None), getattr(error, "problem", None)) if part)
    line = next(iter(text.splitlines()[mark.line :]), "")
    if any(map(is_secret, [where, *re.findall(r"[\w.\-]+(?=['\"]?\s*:)", line)])):
        said = re.sub("'.*'", repr(MASK), said)
    return f"{printable(said)} in line {mark.line + 1}, column {mark.column + 1}"


def _pairs(arguments: Sequence[str]) -> Iterable[tuple[str, Any]]:
    """`--key value`, `--key=value`, and `--key` alone for true."""
    rest = list(arguments)
    while rest:
        option = rest.pop(0)
        if not option.startswith("--"):
            raise ValueError(f"{printable(repr(option))} is not preceded by a --key; write overrides as --key value.")
        key, equals, value = option[2:].partition("=")
        if not all(key.split(".")):
            raise ValueError(
                f"{printable(repr(option))} is not a key; write overrides as --key value, or --section.key value."
            )
        key = key.replace("-", "_")
        is_text, is_list = takes_text(_type_of(key))
        if not equals:
            is_alone = not rest or rest[0].startswith("--")
            if is_alone and is_text:
                raise ValueError(f"{printable(option)} needs a value, which is text; write --{key}=TEXT.")
            value = "true" if is_alone else rest.pop(0)
        is_text &= not (is_list and value.startswith("[") and value.endswith("]"))
        yield key, given_text(value) if is_text else given_value(value, option)


def _type_of(key: str) -> Any:
    """What the key of an override takes; Any of keys inside of mappings that a user names."""
    section, _, name = key.rpartition(".")
    if section in ("", "training"):
        return TEXT if name == "tokenizer" and not section else _training_types().get(name, Any)
    first, *inner = section.split(".")
    if first == "dataset" and not {"weights", "storage_options"} & set(inner):
        return KEYS.get(name, Any)
    return TYPES.get(section, {}).get(name, Any)


@lru_cache(maxsize=1)
def _training_types() -> dict[str, Any]:
    return {**typing.get_type_hints(NanotronTrainingArguments), **WIDER}


def given_text(text: str) -> str | None:
    """What an override of a key means that takes text alone: itself, without quotes around it; nothing for `null`."""
    if re.fullmatch(r"'[^']*'|\"[^\"\\]*\"", text):
        return text[1:-1]
    return None if text.strip() in ("", "~", "null", "Null", "NULL") else text


def given_value(text: str, option: str) -> Any:
    """What an override means: YAML in brackets, in quotes or with `key: value`, otherwise one word of YAML as it is.

    A file's rest of a line behind ` #` is a comment, and `&a` at the start a name; of a path they are a part.
    """
    if text.startswith(("[", "{", '"', "'")) or re.search(r":(\s|$)|\n", text):
        return _parse(text, option)
    loader, word = _Loader(""), text.strip()
    try:
        tag = loader.resolve(yaml.ScalarNode, word, (True, False))
        return loader.construct_object(yaml.ScalarNode(tag, word)) if tag in loader.yaml_constructors else word
    finally:
        loader.dispose()


def _check_types(sections: Settings, tokenizer: Any) -> None:
    problems = [wrong_type("tokenizer", tokenizer, TEXT)]
    for name, types in TYPES.items():
        problems += check_types(name, sections[name], types)
    if sections["model"].get("dtype") not in (None, *DTYPES):
        problems.append(f"model.dtype={sections['model']['dtype']!r} is not one of {', '.join(map(repr, DTYPES))}.")
    if found := [problem for problem in problems if problem is not None]:
        raise ValueError("\n".join(found))
