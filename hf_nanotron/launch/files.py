"""The files of a job: where they are, without secrets, and never over others unasked."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from ..redaction import secrets_of


def write_files(folder: Path, files: Mapping[str, str], overwrite: bool, stale: tuple[str, ...] = ()) -> list[Path]:
    """Write `files` (texts by name) into `folder`; those whose names end in `.sh` can be run.

    Args:
        overwrite: whether files of these names may be replaced.
        stale: names of files of an earlier job, which are removed.

    Raises:
        ValueError: if one exists and `overwrite` is False, or would hold a secret of the environment; nothing is
            written then.
    """
    for name, text in files.items():
        for secret in secrets_of(os.environ):
            if secret in text:
                raise ValueError(
                    f"{name} would hold a secret of this environment, which is never written into a file; give the "
                    "name of its variable with --secret."
                )
    there = [name for name in (*files, *stale) if os.path.lexists(folder / name)]
    if there and not overwrite:
        raise ValueError(
            f"{folder / there[0]} exists. Pass --overwrite to replace the files of that job, or --folder DIR for "
            "another folder."
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name in there:
        (folder / name).unlink()  # a link is replaced, not what it leads to
    for name, text in files.items():
        path = folder / name
        path.write_text(text, encoding="utf-8")
        if name.endswith(".sh"):
            path.chmod(0o755)
    return [folder / name for name in files]
