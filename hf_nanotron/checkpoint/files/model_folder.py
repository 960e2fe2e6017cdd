"""Whether a folder holds a model as the Hub has them, and what it holds instead."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

CONFIG, ADAPTER = "config.json", "adapter_config.json"  # transformers' and PEFT's
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def why_no_model(path: str | os.PathLike[str]) -> str | None:
    """Why no model can be read from what exists at `path`, and what would work, as a sentence; None where there is one.

    Of the weights nothing is said: only whether there is a `config.json`.
    """
    folder = Path(path)
    if not folder.is_dir():
        return f"{folder} is a file; give the folder of a model, with {CONFIG} and safetensors."
    if (folder / CONFIG).is_file():
        return None
    names = sorted(os.listdir(folder))
    if not names:
        return f"{folder} is empty."
    if ADAPTER in names:
        return (
            f"{folder} is an adapter ({ADAPTER}{_base_of(folder)}) and no whole model: merge it into its base first "
            "(PEFT's merge_and_unload, then save_pretrained)."
        )
    steps = [int(found[1]) for name in names if (found := _CHECKPOINT.fullmatch(name)) and (folder / name).is_dir()]
    if steps:
        return f"{folder} is the folder of a run; give one of its checkpoints, such as checkpoint-{max(steps)}."
    if weights := [name for name in names if name.endswith((".safetensors", ".safetensors.index.json"))]:
        return f"{folder} holds {weights[0]} and no {CONFIG}, which says what model it is of; put that of it there."
    return f"{folder} holds no {CONFIG}: no model was saved there, or not completely."


def _base_of(folder: Path) -> str:
    try:
        base = json.loads((folder / ADAPTER).read_bytes()).get("base_model_name_or_path")
    except (OSError, ValueError, RecursionError, AttributeError):
        return ""
    return f" of {base}" if isinstance(base, str) and base.isprintable() else ""
