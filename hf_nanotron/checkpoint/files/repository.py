"""The files of a Hub repository, and how a save makes way for them in a folder that is in use."""

from __future__ import annotations

import contextlib
import re
import shutil
from pathlib import Path

WEIGHTS = r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
TEXTS = (
    r"config\.json|generation_config\.json|tokenizer(_config)?\.json|special_tokens_map\.json|added_tokens\.json"
    r"|vocab\.(json|txt|model)|merges\.txt|(tokenizer|spiece|sentencepiece\.bpe)\.model|chat_template\.(jinja|json)"
    r"|(pre)?processor_config\.json|additional_chat_templates/[^/]+\.jinja"
)
AVERAGE_FOLDER = "ema"  # in a repository: one with the moving average of its weights
_ARGUMENTS = "training_args.bin"  # of a run, beside its weights and not beside their average
_ADAPTERS = r"adapter_(config\.json|model\.safetensors)"
_REPOSITORY = rf"{WEIGHTS}|{_ADAPTERS}|{TEXTS}|{re.escape(_ARGUMENTS)}|additional_chat_templates|{AVERAGE_FOLDER}"


def unlink_links(directory: Path) -> None:
    """Before a model is saved into a folder that is in use: nothing of it is to be written through a link."""
    for path in directory.iterdir() if directory.is_dir() else ():
        if re.fullmatch(_REPOSITORY, path.name):
            unlink_link(path)


def unlink_link(path: Path) -> None:
    """Make way for a file of its own: a symbolic link, or one of several names of a file (a hard link), goes.

    What it stands for belongs to another folder.
    """
    if path.is_symlink() or (path.is_file() and path.stat().st_nlink > 1):
        path.unlink()


def drop_average(directory: Path) -> None:
    """Before weights without an average come into `directory`: one that is left there is that of other weights.

    A folder of the same name that belongs to a run stays.
    """
    folder = directory / AVERAGE_FOLDER
    unlink_link(folder)
    if not folder.is_dir() or (folder / _ARGUMENTS).exists():
        return
    for path in folder.iterdir():
        if re.fullmatch(rf"{WEIGHTS}|{TEXTS}", path.name):
            path.unlink()
    with contextlib.suppress(OSError):  # something else is in it
        folder.rmdir()


def prepare_push(checkpoint: Path, folder: Path, is_pushed: bool) -> None:
    """A folder that Trainer is about to push, into which it copies the weights of a checkpoint if `is_pushed`."""
    unlink_links(folder)
    if is_pushed:
        copy_average(checkpoint, folder)


def copy_average(source: Path, target: Path) -> None:
    """The average of one repository, if it has one, in the place of that of another."""
    drop_average(target)
    if (source / AVERAGE_FOLDER).is_dir():
        shutil.copytree(source / AVERAGE_FOLDER, target / AVERAGE_FOLDER, dirs_exist_ok=True)
