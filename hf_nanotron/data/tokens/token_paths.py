"""Which files of token ids a path stands for, and what stands beside each."""

from __future__ import annotations

import os
from typing import Any

from ...redaction import printable_url
from .byte_ranges import Stat, expand, is_remote, list_folder, local_path, stat_files

KINDS = (".ds", ".bin", ".npy")

Group = dict[str, Stat]  # what belongs to one file, by the ends of their names


def find_groups(path: str, options: dict[str, Any]) -> list[Group]:
    """The files that a path stands for, each with what stands beside it.

    Raises:
        FileNotFoundError: if there is no such file, a folder holds none, or a `.bin` has no `.idx`.
        ValueError: for a file of another kind, or a folder with files of several.
    """
    if _is_pattern(path):
        matches = [match for match in expand(path, options) if match.endswith(KINDS)]
        groups = [group for match in matches if (group := _single(match, options))]  # none of a folder
        if not groups:
            raise FileNotFoundError(f"{printable_url(path)} matches no {_kinds()} file.")
        return groups
    if path.endswith(KINDS) and (group := _single(path, options)):
        return [group]
    listed = list_folder(path, options)
    if listed is None:
        if group := _single(path + ".bin", options):
            return [group]
        if stat_files([path], options):
            raise ValueError(
                f"{printable_url(path)} is no {_kinds()} file; hf-nanotron tokenize makes .ds files of texts."
            )
        raise FileNotFoundError(f"{printable_url(path)}: there is no such file or folder.")
    names = sorted(name for name in listed if name.endswith(KINDS))
    kinds = sorted({name[name.rindex(".") :] for name in names})
    if not names:
        raise FileNotFoundError(
            f"the folder {printable_url(path)} holds no {_kinds()} file; those of its subfolders are not looked for."
        )
    if len(kinds) > 1:
        raise ValueError(
            f"the folder {printable_url(path)} holds {' and '.join(kinds)} files; name those of one kind "
            f"({printable_url(path).rstrip('/')}/*{kinds[0]})."
        )
    return [_with_siblings(name, listed) for name in names]


def _is_pattern(path: str) -> bool:
    """A local name may have the marks of a pattern in it, too."""
    exists = not is_remote(path) and any(os.path.exists(local_path(path) + end) for end in ("", ".bin"))
    return any(mark in path for mark in "*?[") and not exists


def _kinds() -> str:
    return ", ".join(KINDS[:-1]) + f" or {KINDS[-1]}"


def _single(path: str, options: dict[str, Any]) -> Group | None:
    names = {path: path, **{name: name for name in _siblings(path).values()}}
    found = stat_files(list(names), options)
    return _with_siblings(path, found) if path in found else None


def _siblings(path: str) -> dict[str, str]:
    if path.endswith(".ds"):
        return {end: path + end for end in (".index", ".loss", ".metadata")}
    return {".idx": path[: -len(".bin")] + ".idx"} if path.endswith(".bin") else {}


def _with_siblings(name: str, listed: dict[str, Stat]) -> Group:
    kind = name[name.rindex(".") :]
    group = {kind: listed[name], **{end: listed[other] for end, other in _siblings(name).items() if other in listed}}
    if kind == ".bin" and ".idx" not in group:
        raise FileNotFoundError(
            f"{printable_url(listed[name].path)} has no .idx beside it, which would say where its sequences begin and "
            "how wide its ids are. Ids alone can be read as a .ds file."
        )
    return group
