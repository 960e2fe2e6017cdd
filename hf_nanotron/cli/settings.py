"""The settings of `hf-nanotron train`: a YAML file and overrides become sections whose keys and types are known."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..arguments.values import plain_value, wrong_type
from ..parallel.config import refuse_removed
from ..redaction import MASK, is_secret, printable, shown
from ..training_args import NanotronTrainingArguments
from .hints import refuse_nanotron, refuse_unknown

Settings = dict[str, dict[str, Any]]

TEXT, MAPPING, NUMBER = str | None, dict | None, int | None

# What the keys of a section take; `training` is checked as training arguments are.
TYPES: dict[str, dict[str, Any]] = {
    "model": {"name_or_path": TEXT, "config": MAPPING, "revision": TEXT, "dtype": TEXT, "attn_implementation": TEXT},
    "dataset": {
        "path": TEXT,
        "name": TEXT,
        "data_files": str | list | dict | None,
        "train_split": TEXT,
        "eval_split": TEXT,
        "text_column": TEXT,
        "block_size": NUMBER,
        "num_proc": NUMBER,
    },
}
SECTIONS: dict[str, Collection[str]] = {
    **TYPES,
    "training": [field.name for field in dataclasses.fields(NanotronTrainingArguments) if field.init],
}
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
        raise ValueError(
            f"{path} is empty; it needs the sections {', '.join(SECTIONS)} (see hf-nanotron train --help)."
        )
    for key, value in _pairs(overrides):
        *parents, leaf = key.split(".") if "." in key or key == "tokenizer" else ("training", key)
        section = settings
        for parent in parents:
            section[parent] = section = section.get(parent) or {}
            if not isinstance(section, dict):
                raise ValueError(f"--{key}: {parent!r} is {shown(parent, section)} in {path}, not a section.")
        section[leaf] = value
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


def check_complete(settings: Settings) -> None:
    """Refuse settings without a model or data."""
    model, dataset = settings["model"], settings["dataset"]
    if (model.get("name_or_path") is None) == (model.get("config") is None):
        raise ValueError("model needs either name_or_path (existing weights) or config (random weights).")
    if dataset.get("path") is None:
        raise ValueError("dataset needs path: a file, a folder of save_to_disk, or a name for datasets.load_dataset.")


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
        raise ValueError(f"{path} holds a {type(settings).__name__}, not the sections {', '.join(SECTIONS)}.")
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
        if not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        yield key.replace("-", "_"), _parse(value, option)


def _check_types(sections: Settings, tokenizer: Any) -> None:
    problems = [wrong_type("tokenizer", tokenizer, TEXT)]
    for name, types in TYPES.items():
        section = sections[name]
        for key, value in section.items():
            section[key] = plain_value(value, [int] if types[key] == NUMBER else [])
            problems.append(wrong_type(f"{name}.{key}", section[key], types[key]))
    if sections["model"].get("dtype") not in (None, *DTYPES):
        problems.append(f"model.dtype={sections['model']['dtype']!r} is not one of {', '.join(map(repr, DTYPES))}.")
    num_proc = sections["dataset"].get("num_proc")
    if isinstance(num_proc, int) and num_proc < 1:
        problems.append(f"dataset.num_proc={num_proc} must be at least 1.")
    if found := [problem for problem in problems if problem is not None]:
        raise ValueError("\n".join(found))
