"""Whether a picture can be drawn, asked before anything else is done."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def check_picture(option: str, path: Path) -> None:
    """Refuse the file of an option that draws a picture."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError(f"{option} needs matplotlib: pip install hf-nanotron[plot].")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{option} {path}: its folder does not exist.")
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ValueError(f"{option} {path} must end with .png, .svg or .pdf.")
