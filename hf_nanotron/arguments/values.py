"""The type and the range of each training argument, from its annotation and a table.

transformers checks few of its fields, and a wrong one fails far from its cause, or not at all: `max_steps=0` trains
three epochs. What spells a value of the right type without loss becomes it: 1000.0 for 1000, "1e-4" (which YAML takes
for text), 0 and 1 for bools.
"""

from __future__ import annotations

import math
import os
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any, Literal, NamedTuple

import numpy as np
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from ..redaction import redacted, shown

Conditions = Callable[[Any], bool]

PLURALS = {int: "integers", str: "texts"}
NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null"}


class Limit(NamedTuple):
    """A range of numbers from `least` (itself `excluded` or not) to `below`, which is outside.

    `unless` says of the arguments whether the number is not used at all.
    """

    least: float
    excluded: bool = False
    below: float = math.inf
    unless: Conditions = lambda args: False

    def says(self) -> str:
        least = f"{'above' if self.excluded else 'at least'} {self.least:g}"
        return least if self.below == math.inf else f"{least} and below {self.below:g}"

    def takes(self, value: float) -> bool:
        above = value > self.least if self.excluded else value >= self.least
        return above and value < self.below and math.isfinite(value)


def _interval(strategy: str) -> Limit:
    # With another strategy the number is not read.
    return Limit(0, excluded=True, unless=lambda args: str(_plain(getattr(args, strategy))) != "steps")


# What is documented, or passed on to `Trainer.train`, beyond the annotation.
WIDER: dict[str, Any] = {"resume_from_checkpoint": str | bool | None}

SIZE, COUNT, SHARE = Limit(1), Limit(0), Limit(0, below=1)
RATE = Limit(0, below=3.4e38)  # more is no float32
SEED = Limit(0, below=2**32)

LIMITS: dict[str, Limit] = {
    **dict.fromkeys(
        (
            "per_device_train_batch_size", "per_device_eval_batch_size", "eval_accumulation_steps",
            "torch_empty_cache_steps", "dataloader_prefetch_factor", "ddp_timeout", "max_skipped_steps",
            "remote_keep_local", "remote_pending_limit", "mlp_chunk_tokens", "metrics_detail_steps",
        ),
        SIZE,
    ),
    **dict.fromkeys(("dataloader_num_workers", "eval_delay", "warmup_steps", "remote_min_free_gb"), COUNT),
    **dict.fromkeys(("remote_start_timeout", "remote_wait_timeout"), COUNT),
    **dict.fromkeys(("remote_retry_seconds", "remote_retry_max_seconds"), Limit(0, excluded=True)),
    **dict.fromkeys(("learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm", "muon_learning_rate"), RATE),
    **dict.fromkeys(("moe_bias_update_rate", "z_loss_coefficient"), RATE),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "muon_momentum"), SHARE),
    "muon_ns_steps": Limit(1, below=100),
    "stall_warning": COUNT,
    "stall_timeout": Limit(10),  # ranks take seconds to say where they are, and healthy ones stand still longer
    **dict.fromkeys(("seed", "data_seed"), SEED),
    "num_train_epochs": Limit(0, excluded=True, unless=lambda args: args.max_steps > 0),
    "logging_steps": _interval("logging_strategy"),
    "eval_steps": _interval("eval_strategy"),
    "save_steps": _interval("save_strategy"),
}  # fmt: skip


def set_plain_values(args: TrainingArguments, known: type[TrainingArguments]) -> None:
    """Convert each field to its annotated type where that loses nothing.

    Only the fields of the class `known` are converted; one derived from it may have others.
    """
    for name, annotation in _annotations(args, known):
        value = getattr(args, name)
        plain = plain_value(value, _kinds(annotation))
        if plain is not value:
            setattr(args, name, plain)


def check_values(args: TrainingArguments, known: type[TrainingArguments], ruled: Collection[str] = ()) -> None:
    """Refuse values of a wrong type, outside their range, or not among the choices, one line each.

    `known` is as for `set_plain_values`; fields in `ruled` are checked elsewhere.
    """
    judged = [(name, annotation) for name, annotation in _annotations(args, known) if name not in ruled]
    problems = [wrong_type(name, _plain(getattr(args, name)), annotation) for name, annotation in judged]
    if not any(problems):  # ranges may depend on other fields
        problems = [_out_of_range(args, name, annotation) for name, annotation in judged]
    if found := [problem for problem in problems if problem is not None]:
        raise ValueError("\n".join(found))


def wrong_type(name: str, value: Any, annotation: Any) -> str | None:
    """A sentence if `annotation` does not accept `value`."""
    kinds = _kinds(annotation)
    if any(_is(value, kind) for kind in kinds):
        return None
    hint = ""
    if str in kinds and isinstance(value, int | float) and not isinstance(value, bool):
        hint = f" (in YAML: '{redacted(name, value)}', in quotes)"
    return f"{name}={shown(name, value)} must be {_describe(kinds)}{hint}."


def takes_text(annotation: Any) -> tuple[bool, bool]:
    """Whether `annotation` is of text, none and lists alone, and whether it is of lists, too."""
    kinds = {typing.get_origin(kind) or kind for kind in _kinds(annotation)} - {type(None)}
    return str in kinds and kinds <= {str, list}, list in kinds


def plain_value(value: Any, kinds: list[Any]) -> Any:
    """`value`, or the number or bool of one of `kinds` that it spells."""
    if isinstance(value, np.generic):
        value = value.item()
    if any(_is(value, kind) for kind in kinds):
        return value
    if isinstance(value, str) and (int in kinds or float in kinds) and str not in kinds:
        try:
            value = float(value) if float in kinds or not value.strip().lstrip("+-").isdecimal() else int(value)
        except ValueError:
            return value
    if isinstance(value, float) and value.is_integer() and int in kinds and float not in kinds:
        return int(value)
    if bool in kinds and type(value) is int and value in (0, 1):
        return bool(value)
    return value


def _annotations(args: TrainingArguments, known: type[TrainingArguments]) -> Iterator[tuple[str, Any]]:
    """Fields and what they take. What a class derived from `known` has for a default is right."""
    hints = {**typing.get_type_hints(known), **WIDER}
    for entry in fields(args):
        value = getattr(args, entry.name)
        if entry.init and entry.name in hints and not (value is None and entry.default is None):
            yield entry.name, hints[entry.name]


def _out_of_range(args: TrainingArguments, name: str, annotation: Any) -> str | None:
    value = _plain(getattr(args, name))
    if value is None:
        return None
    if (choices := _choices(args, name, _kinds(annotation))) is not None:
        unknown = [each for each in (value if isinstance(value, list | tuple) else [value]) if each not in choices]
        if unknown:
            listed = ", ".join(map(repr, choices))
            return f"{name}={shown(name, value)}: {shown(name, unknown[0])} is not one of {listed}."
    elif name in LIMITS and not LIMITS[name].unless(args) and not LIMITS[name].takes(value):
        return f"{name}={shown(name, value)} must be {LIMITS[name].says()}."
    elif name == "max_steps" and value != -1 and value < 1:
        return f"max_steps={value!r} must be at least 1, or -1 to train for num_train_epochs={args.num_train_epochs!r}."
    return None


def _choices(args: TrainingArguments, name: str, kinds: list[Any]) -> list[Any] | None:
    if name == "report_to":
        return ["none", "all", *INTEGRATION_TO_CALLBACK]
    if name == "include_for_metrics":
        return ["inputs", "loss"]
    if name == "include_num_input_tokens_seen":
        return [True, False, "all", "non_padding", "no"]
    enumerated = [member.value for kind in kinds if _is_enum(kind) for member in kind]
    if enumerated:
        return enumerated
    (entry,) = [entry for entry in fields(args) if entry.name == name]
    choices = entry.metadata.get("choices")
    return None if choices is None else list(choices)


def _kinds(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [kind for part in typing.get_args(annotation) for kind in _kinds(part)]
    return [annotation]


def _is(value: Any, kind: Any) -> bool:
    origin = typing.get_origin(kind) or kind
    if kind is Any:
        return True
    if origin is Literal:
        return any(value is choice for choice in typing.get_args(kind))
    if origin is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if origin is str:
        return isinstance(value, str | os.PathLike)
    if origin is dict:
        return isinstance(value, Mapping) or (is_dataclass(value) and not isinstance(value, type))
    if origin is list:
        (inner,) = typing.get_args(kind) or (Any,)
        return isinstance(value, list | tuple) and all(_is(item, inner) for item in value)
    if _is_enum(kind):
        return isinstance(value, kind) or value in [member.value for member in kind]
    return isinstance(value, origin)


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Enum)


def _describe(kinds: list[Any]) -> str:
    names = []
    for kind in kinds:
        origin = typing.get_origin(kind) or kind
        if origin is Literal:
            names += [str(choice).lower() for choice in typing.get_args(kind)]
        elif origin is list:
            items = PLURALS.get((typing.get_args(kind) or (None,))[0])
            names.append(f"a list of {items}" if items else "a list")
        elif origin is dict:
            names.append("a mapping")
        elif _is_enum(kind):
            names += [repr(member.value) for member in kind]
        else:
            names.append(NAMES.get(origin, getattr(origin, "__name__", str(origin))))
    unique = [name for name in dict.fromkeys(names) if name != "text" or not any(map(_is_enum, kinds))]
    return unique[0] if len(unique) == 1 else f"{', '.join(unique[:-1])} or {unique[-1]}"


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value
