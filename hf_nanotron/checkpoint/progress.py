"""Trainer's own file of a checkpoint, `trainer_state.json`: checked before Trainer makes its state of it."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from .schema import (
    EARLIER,
    Rule,
    anything,
    boolean,
    each,
    load_json,
    mapping,
    number,
    optional,
    record,
    require,
    text,
    whole,
)

_OBJECT = mapping(anything)


def _callback(value: Any) -> str | None:
    """The state of a callback, or of several of one class."""
    one = record({}, {"args": _OBJECT, "attributes": _OBJECT})
    return each(one)(value) if isinstance(value, list) else one(value)


_KNOWN: dict[str, Rule] = {
    "epoch": optional(number),
    "global_step": whole(),
    "max_steps": whole(),
    "logging_steps": optional(number),
    "eval_steps": optional(number),
    "save_steps": optional(number),
    "train_batch_size": optional(whole()),
    "num_train_epochs": number,
    "num_input_tokens_seen": number,
    "total_flos": number,
    "log_history": each(mapping(anything, text())),
    "best_metric": optional(number),
    "best_global_step": optional(whole()),
    "best_model_checkpoint": optional(text()),
    "is_local_process_zero": boolean,
    "is_world_process_zero": boolean,
    "is_hyper_param_search": boolean,
    "trial_name": optional(text()),
    "trial_params": optional(mapping(anything, text())),
    "stateful_callbacks": optional(mapping(_callback)),
}
LARGEST = 1 << 30  # bytes


def check_progress(checkpoint: str | os.PathLike[str]) -> None:
    """Refuse a `trainer_state.json` that Trainer could not go on from.

    Raises:
        ValueError: naming the file, the key and what is wrong.
        OSError: if it cannot be read.
    """
    path = Path(checkpoint, TRAINER_STATE_NAME)
    if not path.is_file() or path.stat().st_size > LARGEST:
        raise ValueError(f"{path} is not a file of at most {LARGEST >> 20} MiB; {EARLIER}.")
    found = require(record({}, _KNOWN), load_json(path.read_bytes(), path), path)
    known = {field.name for field in dataclasses.fields(TrainerState)}
    if strangers := sorted(found.keys() - known):
        raise ValueError(
            f"{path} has {', '.join(strangers[:5])}, which this release of transformers does not know; resume with the "
            "release that wrote it."
        )
