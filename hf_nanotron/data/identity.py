"""What a set was made of when a checkpoint was saved, and in which words it differs now."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import xxhash

LISTED = 16_384  # entries at most: of more files, several share one, so that a checkpoint stays small
ACCEPT = "accept_changed_data"  # the training argument


class FileFacts(NamedTuple):
    """Of a file: its name without folders, which may move; its length and kind; when it was written."""

    name: str
    length: str
    time: str


def file_prints(files: Sequence[FileFacts]) -> dict[str, Any]:
    """Their number, and hashes of names, lengths and times in order, of 4 bytes for each file (see `LISTED`)."""
    size = group_size(len(files))
    groups = [files[first : first + size] for first in range(0, len(files), size)]
    columns = {
        what: np.array([xxhash.xxh32_intdigest("\n".join(column).encode()) for column in columns], "<u4")
        for what, columns in (
            ("names", [[file.name for file in group] for group in groups]),
            ("lengths", [[file.length for file in group] for group in groups]),
            ("times", [[file.time for file in group] for group in groups]),
        )
    }
    return {"count": len(files), **{name: base64.b64encode(c.tobytes()).decode() for name, c in columns.items()}}


def group_size(count: int) -> int:
    """Files that share an entry."""
    return max(-(-count // LISTED), 1)


def without_times(identity: Mapping[str, Any]) -> dict[str, Any]:
    """What must be equal on all ranks, which may read copies of the same files."""
    files = identity.get("files")
    if not isinstance(files, Mapping):
        return dict(identity)
    return {**identity, "files": {name: value for name, value in files.items() if name != "times"}}


def order_facts(identity: Mapping[str, Any]) -> dict[str, Any]:
    """What the order of a set depends on besides the length of its rows."""
    facts = {name: _order_of(name, value) for name, value in identity.items()}
    cut = ("sequence_length", "rows") if "sequence_length" in facts else ()
    return {name: value for name, value in facts.items() if name not in cut}


class Difference(NamedTuple):
    """Why a set is another one, as a sentence without its full stop; `in_files`: only files and their rows differ."""

    sentence: str
    in_files: bool


def difference(before: Mapping[str, Any], now: Mapping[str, Any], shown: Sequence[str]) -> Difference | None:
    """Between two identities of a set; None if there is none.

    Args:
        shown: the files of now, in order.
    """
    for name in [name for name in before if name in now and name not in ("files", "tokens", "rows")]:
        if _order_of(name, before[name]) != _order_of(name, now[name]):
            return Difference(f"{name} was {before[name]!r} when it was saved, and is {now[name]!r} now", False)
    if "files" in before and "files" in now and (sentence := _files(before["files"], now["files"], shown)):
        return Difference(sentence, True)
    for name in ("tokens", "rows"):
        if before.get(name) != now.get(name) and name in before:
            return Difference(f"it had {before[name]} {name} when it was saved, and has {now.get(name)} now", True)
    return None


def _order_of(name: str, value: Any) -> Any:
    """What the order depends on: `"mask"` cuts the same rows as `"cross"`."""
    return "cross" if (name, value) == ("documents", "mask") else value


def _files(before: Any, now: Any, shown: Sequence[str]) -> str | None:
    if before == now:
        return None
    if not (isinstance(before, Mapping) and isinstance(now, Mapping)):  # a set that tells it in its own way
        return "it was made of other files"
    size = group_size(len(shown))
    if group_size(before["count"]) != size:
        return f"it had {before['count']} files when it was saved, and has {now['count']} now"
    columns = [what for what in ("names", "lengths", "times") if what in before and what in now]
    old, new = ({what: _numbers(prints[what]) for what in columns} for prints in (before, now))
    if old["names"].shape == new["names"].shape and (old["names"] == new["names"]).all():
        for what, says in (("lengths", "has another length than"), ("times", "was written again, or copied, since")):
            places = np.flatnonzero(old[what] != new[what]) if what in columns else np.array([])
            if len(places):
                since = " when the checkpoint was saved" if what == "lengths" else " the checkpoint was saved"
                return f"{_shown(int(places[0]), size, shown)} {says}{since}{_others(len(places))}"
        return None
    added = np.flatnonzero(~np.isin(new["names"], old["names"]))
    gone = int((~np.isin(old["names"], new["names"])).sum())
    if len(added):
        was = f", and {gone} that it had are gone" if gone else ""
        return f"{_shown(int(added[0]), size, shown)} was not there when it was saved{_others(len(added))}{was}"
    if gone:
        return f"{gone} of the {before['count']} files that it had are gone"
    place = int(np.flatnonzero(old["names"][: len(new["names"])] != new["names"][: len(old["names"])])[0])
    return f"its files are in another order, from {_shown(place, size, shown)} on"


def _numbers(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<u4")


def _shown(place: int, size: int, shown: Sequence[str]) -> str:
    first = shown[place * size]
    return first if size == 1 else f"{first} (or one of the {size - 1} files after it)"


def _others(count: int) -> str:
    return "" if count < 2 else f" (and {count - 1} others)"
