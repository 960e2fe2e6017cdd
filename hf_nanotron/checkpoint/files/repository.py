"""The files of a Hub repository, and how a save makes way for them in a folder that is in use."""

from __future__ import annotations

import re
from pathlib import Path

WEIGHTS = r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
TEXTS = (
    r"config\.json|generation_config\.json|tokenizer(_config)?\.json|special_tokens_map\.json|added_tokens\.json"
    r"|vocab\.(json|txt|model)|merges\.txt|(tokenizer|spiece|sentencepiece\.bpe)\.model|chat_template\.(jinja|json)"
    r"|(pre)?processor_config\.json|additional_chat_templates/[^/]+\.jinja"
)
AVERAGE_FOLDER = "ema"  # in a repository: one with the moving average of its weights
_REPOSITORY = rf"{WEIGHTS}|{TEXTS}|training_args\.bin|additional_chat_templates"


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
