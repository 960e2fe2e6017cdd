"""What the JSON files of a checkpoint hold: a table of keys, types and ranges for each, asked where a file is read.

A checksum says that a file is as it was written, not that this program has written it. So nothing that comes out of
JSON is used before its table has accepted it; keys that a table does not know are left to later versions.

A rule takes a value and says what is wrong with it, in words that go on after the name of the value, or None.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

from .inside import find_clash, find_fault
from .safetensors_file import DTYPES

Rule = Callable[[Any], str | None]

MOST = 1 << 62  # elements, bytes or steps: sums of two fit 64 bits
LARGEST_FLOAT = 10**308
LONGEST_NAME = 4096  # characters of a tensor's name
MOST_DIMENSIONS = 64  # of a tensor in torch
MOST_BLOCK_BYTES = 64 << 20  # a reader holds a whole block
EARLIER = "use an earlier checkpoint"


def load_json(data: bytes | str, where: object, advice: str = EARLIER) -> Any:
    try:
        return json.loads(data, object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is truncated or damaged: it is not valid JSON ({error}); {advice}.") from error


def require(rule: Rule, value: Any, where: object, advice: str = EARLIER) -> Any:
    """`value` itself, if `rule` accepts it; else a ValueError that names `where`, the key and what is wrong."""
    if (fault := rule(value)) is not None:
        raise ValueError(f"{where} is damaged or forged: {fault.lstrip('. ')}; {advice}.")
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} comes twice")
    return found


# ---- rules ----


def show(value: Any) -> str:
    """A value for a message, cut short."""
    return reprlib.repr(value)


def anything(value: Any) -> str | None:
    return None


def whole(low: int = 0, high: int = MOST, multiple: int = 1) -> Rule:
    kind = "a whole number" if multiple == 1 else f"a multiple of {multiple}"

    def rule(value: Any) -> str | None:
        if type(value) is int and low <= value <= high and value % multiple == 0:
            return None
        return f" is {show(value)}, not {kind} from {low} to {high}"

    return rule


def number(value: Any) -> str | None:
    """Also nan and inf. A whole number is one that a float can be made of."""
    is_known = type(value) is float or (type(value) is int and abs(value) < LARGEST_FLOAT)
    return None if is_known else f" is {show(value)}, not a number"


def finite(most: int) -> Rule:
    def rule(value: Any) -> str | None:
        is_known = type(value) in (int, float) and -most <= value <= most  # nan compares as False
        return None if is_known else f" is {show(value)}, not a number from {-most} to {most}"

    return rule


def interval(value: Any) -> str | None:
    """A number of steps or a share of them, 0 for none."""
    if type(value) in (int, float) and 0 <= value <= MOST:
        return None
    return f" is {show(value)}, not a number of steps"


def boolean(value: Any) -> str | None:
    return None if type(value) is bool else f" is {show(value)}, not true or false"


def text(pattern: str = r"[\s\S]*", longest: int = MOST, what: str = "a text") -> Rule:
    compiled = re.compile(pattern)

    def rule(value: Any) -> str | None:
        if type(value) is str and len(value) <= longest and compiled.fullmatch(value):
            return None
        return f" is {show(value)}, not {what}"

    return rule


def one_of(values: Collection[str]) -> Rule:
    def rule(value: Any) -> str | None:
        is_known = isinstance(value, str) and value in values
        return None if is_known else f" is {show(value)}, not one of {', '.join(values)}"

    return rule


def optional(rule: Rule) -> Rule:
    """None, or what `rule` accepts."""
    return lambda value: None if value is None else rule(value)


def each(item: Rule, longest: int = MOST) -> Rule:
    """A list of such items."""

    def rule(value: Any) -> str | None:
        if type(value) is not list or len(value) > longest:
            return f" is {show(value)}, not a list" + (f" of at most {longest} items" if longest < MOST else "")
        faults = ((index, item(content)) for index, content in enumerate(value))
        return next((f"[{index}]{fault}" for index, fault in faults if fault is not None), None)

    return rule


def row(*items: Rule) -> Rule:
    """A list of exactly these items."""

    def rule(value: Any) -> str | None:
        if type(value) is not list or len(value) != len(items):
            return f" is {show(value)}, not a list of {len(items)} items"
        faults = ((index, item(content)) for index, (item, content) in enumerate(zip(items, value, strict=True)))
        return next((f"[{index}]{fault}" for index, fault in faults if fault is not None), None)

    return rule


def mapping(item: Rule, key: Rule = anything, least: int = 0) -> Rule:
    """An object with any keys of one kind."""

    def rule(value: Any) -> str | None:
        if type(value) is not dict or len(value) < least:
            return f" is {show(value)}, not an object" + (" with keys" if least else "")
        for name, content in value.items():
            if (fault := key(name)) is not None:
                return f": a key{fault}"
            if (fault := item(content)) is not None:
                return f"[{show(name)}]{fault}"
        return None

    return rule


def record(required: Mapping[str, Rule], others: Mapping[str, Rule] | None = None) -> Rule:
    """An object with these keys, and perhaps the `others`."""
    rules = [(key, item, True) for key, item in required.items()]
    rules += [(key, item, False) for key, item in (others or {}).items()]

    def rule(value: Any) -> str | None:
        if type(value) is not dict:
            return f" is {show(value)}, not an object"
        for key, item, is_required in rules:
            if key in value:
                if (fault := item(value[key])) is not None:
                    return f".{key}{fault}"
            elif is_required:
                return f" lacks the key {key!r}"
        return None

    return rule


def _file_name(value: Any) -> str | None:
    if (fault := find_fault(value)) is None and any(part.startswith(".") for part in value.split("/")):
        fault = "is hidden"
    return None if fault is None else f" is {show(value)}, which {fault}"


def _files(value: Any) -> str | None:
    """Files of a checkpoint: names, lengths, and checksums where the training state has none of its own."""
    fault = _EACH_FILE(value)
    if fault is None and (clash := find_clash(value)) is not None:
        fault = f" has {show(clash)} as a file and as a folder"
    return fault


# ---- tables ----

_CHECKSUM = text("[0-9a-f]{8}", what="eight hexadecimal digits")
_NAME = text(r"[\s\S]+", LONGEST_NAME, "a name")
_STATE_FILE = text(r"rank-[0-9]{5,9}\.safetensors", what="rank-N.safetensors with N of five digits")
_EACH_FILE = mapping(record({"bytes": whole(), "crc32": optional(_CHECKSUM)}), _file_name)

# `.written/rank-N.json`, what a rank says of the files that it has written.
DESCRIPTION = record({"files": _files})

# Of every file that is there for later versions as well.
VERSIONED = record({"format": text(), "version": whole(1)})

# `committed.json`.
MARKER = record({"step": whole(), "hub_weights": boolean, "files": _files})

_PIECE = record(
    {
        "name": _NAME,
        "shape": each(whole(), MOST_DIMENSIONS),
        "dim": optional(whole(0, MOST_DIMENSIONS - 1)),
        "ranges": each(row(whole(), whole())),
        "start": whole(),
        "stop": whole(),
        "file": _STATE_FILE,
        "tensors": mapping(
            row(one_of(DTYPES), whole(), text("([0-9a-f]{8})+", what="checksums of eight hexadecimal digits each")),
            _NAME,
            least=1,
        ),
    }
)

# `training_state/rank-N.json`, what one rank has written of the training state.
RANK = record(
    {
        "block_bytes": whole(8, MOST_BLOCK_BYTES, 8),
        "files": mapping(
            record({"bytes": whole(), "header": row(whole(8, multiple=8), whole(0, 0xFFFFFFFF))}), _STATE_FILE
        ),
        "pieces": each(_PIECE),
        "scalars": mapping(anything, _NAME),
    }
)

# `training_state/index.json`, besides the keys of `RANK`.
INDEX = record({"values": mapping(anything)})

# `model.safetensors.index.json`.
HUB_INDEX = record({"weight_map": mapping(text(), _NAME)})

# Where a run is in its data: `data.cursor.Cursor`, of which older checkpoints lack the last two.
_CURSOR = record(
    {
        "step": whole(),
        "epoch": whole(),
        "samples": whole(),
        "order": record(
            {"kind": text()},
            {
                "samples": whole(),
                "data_seed": optional(whole(-MOST, MOST)),
                "group": optional(whole(1)),
                "fingerprint": optional(whole(-2 * MOST, 4 * MOST)),
            },
        ),
    },
    {"state": anything, "refused": optional(text())},
)

# By which learning rates a run was trained: `training.lr_schedule`.
_STEPS = optional(row(whole(), whole(-MOST)))
_SCHEDULE = record({"type": text(), "max_steps": whole(), "learning_rate": anything, "stable": _STEPS, "decay": _STEPS})

# `values` of a training state, once decoded, for a resume.
VALUES = record(
    {
        "optimizer": optional(record({"class": text(longest=200), "groups": each(mapping(anything, text()))})),
        "scheduler": optional(mapping(anything, text())),
        "extra": record(
            {},
            {
                "data_cursor": optional(_CURSOR),
                "ema": optional(record({"updates": whole()})),
                "lr_schedule": optional(_SCHEDULE),
            },
        ),
    }
)
