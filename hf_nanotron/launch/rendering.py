"""Templates become files. A cluster may have its own: a whole one, or one that replaces blocks of ours."""

from __future__ import annotations

import importlib.resources
import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import (
    BaseLoader,
    ChoiceLoader,
    Environment,
    FileSystemLoader,
    PackageLoader,
    StrictUndefined,
    TemplateError,
    TemplateNotFound,
    TemplateSyntaxError,
)

FOLDER = "templates"


def template_text(name: str) -> str:
    """The template `name` as the package ships it."""
    return importlib.resources.files(__package__).joinpath(FOLDER, name).read_text(encoding="utf-8")


def render(name: str, values: Mapping[str, Any], own: Path | None = None) -> str:
    """The text of a template.

    Args:
        name: of ours.
        values: its variables.
        own: file of a template that takes its place. It may begin with `{% extends "NAME" %}`, to replace blocks alone.

    Raises:
        ValueError: for a template that cannot be read, or asks for a variable that does not exist, with its line.
    """
    loader: BaseLoader = PackageLoader(__package__, FOLDER)
    if own is not None:
        if not own.is_file():
            raise ValueError(f"--template {own}: file not found.")
        # Ours first: a file of the user's with the name of ours can still extend it, not itself.
        loader = ChoiceLoader([loader, FileSystemLoader(own.parent)])
    environment = Environment(
        loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters.update(sh=quoted, path=quoted_path, line=one_line, percent=percent, yaml=as_yaml)
    try:
        template = environment.get_template(name) if own is None else environment.from_string(_text(own))
        return template.render(values)
    except TemplateNotFound as error:
        raise ValueError(f"--template {own}: there is no template {error.name!r} to extend or include.") from error
    except TemplateSyntaxError as error:
        raise ValueError(f"--template {error.filename or own}: {error.message} (line {error.lineno}).") from error
    except TemplateError as error:
        raise ValueError(f"--template {own or name}: {error.message}.") from error


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--template {path} is not UTF-8 text: {error.reason} at byte {error.start}.") from error


def quoted(value: Any) -> str:
    """As one word of bash, in one line."""
    text = str(value)
    if re.search(r"[\n\r]", text):
        for plain, escaped in (("\\", "\\\\"), ("'", "\\'"), ("\n", "\\n"), ("\r", "\\r")):
            text = text.replace(plain, escaped)
        return f"$'{text}'"
    return shlex.quote(text)


def quoted_path(value: Any) -> str:
    """As one word of a shell that is a path: `~/` is the home there."""
    home, rest = ("~/", str(value)[2:]) if str(value).startswith("~/") else ("", str(value))
    return home + quoted(rest)


def as_yaml(value: Any) -> str:
    """As a value of YAML, in one line. Letters stay as they are: YAML reads no pair of surrogates."""
    return json.dumps(value, ensure_ascii=False)


def one_line(value: Any) -> str:
    """For a line of comments that a program reads, such as `#SBATCH`: quoted if it has a space.

    Raises:
        ValueError: for what such a line cannot hold.
    """
    text = str(value)
    if re.search(r"[\n\r\"\\]", text):
        raise ValueError(f"{text!r} cannot stand in a line of options: it has a line break, a quote or a backslash.")
    return f'"{text}"' if re.search(r"[\s'#]", text) else text


def percent(value: Any) -> str:
    """A path for a pattern of Slurm's, in which % begins what is filled in."""
    return str(value).replace("%", "%%")
