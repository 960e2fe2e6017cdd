"""Nothing secret of a configuration gets into the file that is written, nor into what is printed."""

from __future__ import annotations

import re
from typing import Any

from ....redaction import MASK, is_secret, redacted

_SECRET_ENDS = ("key", "keys", "token", "tokens")  # of names that are not known here, such as `wandb_key`


def without_secrets(key: str, value: Any) -> Any:
    """The value of one of nanotron's dotted keys, as it may be printed."""
    last = key.rpartition(".")[2]
    ends = re.split(r"[\W_]+", last.lower())[-1] in _SECRET_ENDS and isinstance(value, str | list)
    return MASK if value is not None and (ends or is_secret(key) or is_secret(last)) else redacted(last, value)


def cleaned(value: Any, key: str = "") -> tuple[Any, list[str]]:
    """Settings of ours without secrets, also where they name a set, and the dotted keys that had one."""
    found: list[str] = []

    def clean(value: Any, key: str) -> Any:
        if isinstance(value, dict):
            names = {name: redacted("", name) for name in value}
            if any(name != new for name, new in names.items()):
                found.append(key)
            return {new: clean(value[name], f"{key}.{new}".lstrip(".")) for name, new in names.items()}
        if isinstance(value, list):
            return [clean(part, f"{key}[{place}]") for place, part in enumerate(value)]
        new = redacted("", value)
        if new != value:
            found.append(key)
        return new

    return clean(value, key), list(dict.fromkeys(found))
