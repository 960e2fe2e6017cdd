"""Rules for a field of the training arguments: which values are refused, and in which words."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from ..redaction import printable, shown


@dataclass(frozen=True)
class Refused:
    """A field, or a key of one, of which only some values are accepted: these, or those that satisfy a predicate.

    `instead` is the object of "Use ..."; `reasons` are those of particular values, where one does not fit all.
    """

    allowed: tuple[Any, ...] | Callable[[Any, TrainingArguments], bool]
    reason: str
    instead: str
    reasons: Mapping[Any, str] = field(default_factory=dict)

    def problems(self, name: str, value: Any, args: TrainingArguments) -> Iterator[str]:
        """One sentence if `value` is refused, else nothing."""
        value = plain(value)
        if self.allowed(value, args) if callable(self.allowed) else value in self.allowed:
            return
        reason = self.reasons.get(value, self.reason) if isinstance(value, str) else self.reason
        yield f"{name}={shown(name, plain(value))} is refused: {reason}. Use {self.instead}."


@dataclass(frozen=True)
class RefusedKeys:
    """A field that holds a mapping, with a rule for each key: a `Refused`, or a text saying how it is honoured."""

    keys: Mapping[str, Refused | str]

    def problems(self, name: str, value: Any, args: TrainingArguments) -> Iterator[str]:
        """One sentence for each key whose value is refused."""
        try:
            items = as_mapping(value).items()
        except (OSError, ValueError, TypeError) as error:
            text = shown(name, plain(value))
            yield f"{name}={text} is neither a mapping, nor JSON text, nor a JSON file: {printable(str(error))}."
            return
        for key, item in items:
            rule = self.keys.get(key)
            if rule is None:
                yield f"{name}: {key}={shown(key, plain(item))} is refused: the keys are {', '.join(self.keys)}."
            elif isinstance(rule, Refused):
                yield from rule.problems(f"{name}: {key}", item, args)


def as_mapping(value: Any) -> dict[str, Any]:
    """The keys that `value` sets: `None`, a dict, a dataclass, JSON text or the path of a JSON file.

    Text that spells a JSON value ("true", "2") becomes that value, as transformers does for the command line.
    """
    if isinstance(value, str):
        value = json.loads(value if value.lstrip().startswith("{") else Path(value).read_text(encoding="utf-8"))
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    return {key: _parsed(item) for key, item in dict(value or {}).items()}


def _parsed(item: Any) -> Any:
    try:
        return json.loads(item.lower()) if isinstance(item, str) else item
    except ValueError:
        return item


def plain(value: Any) -> Any:
    """`value` with enumeration members as their values: their hashes are not those of the strings they equal."""
    if isinstance(value, Enum):
        return value.value
    return [plain(item) for item in value] if isinstance(value, list) else value
