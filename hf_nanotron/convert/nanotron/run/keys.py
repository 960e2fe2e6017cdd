"""The keys of a configuration that is converted: each is carried over or named, and none is lost."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from ....redaction import shown
from .secrets import without_secrets


class Keys:
    """The values of a nested mapping by dotted key, and which of them have been used.

    A list is one value, except where it holds mappings, whose keys get the place in brackets (`data_stages[0].name`).

    Attributes:
        notes: by key, what is told of it: that it is not carried over, or means something else here.
    """

    def __init__(self, source: Path, settings: Mapping[Any, Any]) -> None:
        self.source = source
        self.values: dict[str, Any] = {}
        self.notes: dict[str, str] = {}
        self._used: set[str] = set()
        self._add("", settings)

    def _add(self, prefix: str, value: Any) -> None:
        if isinstance(value, Mapping) and value:
            for key, part in value.items():
                self._add(f"{prefix}.{key}" if prefix else str(key), part)
        elif isinstance(value, list) and value and all(isinstance(part, Mapping) for part in value):
            for place, part in enumerate(value):
                self._add(f"{prefix}[{place}]", part)
        else:
            self.values[prefix] = value

    def take(self, key: str, default: Any = None) -> Any:
        """The value of a key, which counts as carried over; `default` if it is null or not there."""
        self._used.add(key)
        value = self.values.get(key)
        return default if value is None else value

    def one_of(self, key: str, default: str, known: Collection[str]) -> str:
        """`take`, of one of these texts, in capitals or not.

        Raises:
            ValueError: if it is another one.
        """
        value = str(self.take(key, default))
        found = next((each for each in known if each.lower() == value.lower()), None)
        if found is None:
            raise ValueError(f"{self.source}: {key} is {shown(key, value)}; it must be one of {', '.join(known)}.")
        return found

    def number(self, key: str, default: Any = None, whole: bool = True, least: float | None = None) -> Any:
        """`take`, of an integer (or a number), `least` or more.

        Raises:
            ValueError: if it is none; without a default also if it is not there.
        """
        value = self.take(key, default)
        kind, what = (int, "an integer") if whole else (float, "a number")
        try:
            if isinstance(value, bool) or (whole and float(value) != int(value)):
                raise ValueError
            found = value if isinstance(value, int) and whole else kind(float(value))
            if not math.isfinite(found):
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            said = "is missing" if value is None else f"is {shown(key, value)}"
            raise ValueError(f"{self.source}: {key} {said}; it must be {what}.") from None
        if least is not None and found < least:
            raise ValueError(f"{self.source}: {key} is {value}; it must be at least {least}.")
        return found

    def below(self, prefix: str) -> dict[str, Any]:
        """The keys of a section, without its name; they count as carried over."""
        found = {key: value for key, value in self.values.items() if key.startswith(f"{prefix}.")}
        self._used |= set(found)
        return {key[len(prefix) + 1 :]: value for key, value in found.items()}

    def note(self, key: str, text: str) -> None:
        """Tell something of a key; with the value that it has."""
        self._used.add(key)
        self.notes[key] = text

    def note_rest(self, reasons: Mapping[str, str], neutral: Mapping[str, Any], unknown: str) -> None:
        """Name all keys that have not been used, with the reason of the longest prefix of them.

        Values that ask for nothing, as null or `neutral` ones, are left out.
        """
        for key, value in self.values.items():
            if key not in self._used and value not in (None, [], {}) and neutral.get(key, ...) != value:
                known = [prefix for prefix in reasons if key == prefix or key.startswith((f"{prefix}.", f"{prefix}["))]
                self.note(key, reasons[max(known, key=len)] if known else unknown)

    def told(self) -> list[str]:
        """Notes, a line each; keys with the same one share it."""
        by_text: dict[str, list[str]] = {}
        for key, text in self.notes.items():
            value = without_secrets(key, self.values.get(key))
            by_text.setdefault(text, []).append(f"{key}={value}" if key in self.values else key)
        return [f"{', '.join(shown)}: {text}" for text, shown in by_text.items()]


def read(source: Path) -> Keys:
    """The keys of a YAML file.

    Raises:
        FileNotFoundError: without a file.
        ValueError: if it holds no mapping.
    """
    if not source.is_file():
        raise FileNotFoundError(f"{source}: file not found; give a configuration of huggingface/nanotron (YAML).")
    try:
        settings = yaml.safe_load(source.read_bytes())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark is not None else ""
        raise ValueError(
            f"{source} is not valid YAML{where}: {getattr(error, 'problem', None) or 'unreadable'}."
        ) from None
    if not isinstance(settings, dict) or not settings:
        raise ValueError(f"{source} holds no sections: it is no configuration of huggingface/nanotron.")
    return Keys(source, settings)
