"""Trainer's own file of a checkpoint, `trainer_state.json`: checked before Trainer makes its state of it."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from ..files.schema import (
    EARLIER,
    Rule,
    anything,
    boolean,
    each,
    interval,
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


def _callbacks(value: Any) -> str | None:
    fault = mapping(_callback)(value)
    if fault is None and "TrainerControl" in value:  # of which `attributes` could hide methods
        return None if (fault := _CONTROL(value["TrainerControl"])) is None else f"['TrainerControl']{fault}"
    return fault


_CONTROL = record(
    {}, {"args": mapping(boolean, text("should_[a-z_]+")), "attributes": mapping(boolean, text("should_[a-z_]+"))}
)

_KNOWN: dict[str, Rule] = {
    "epoch": optional(number),
    "global_step": whole(),
    "max_steps": whole(),
    "logging_steps": optional(interval),
    "eval_steps": optional(interval),
    "save_steps": optional(interval),
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
    "stateful_callbacks": optional(_callbacks),
}
LARGEST = 1 << 30  # bytes


def check_progress(checkpoint: str | os.PathLike[str], step: int) -> None:
    """Refuse a `trainer_state.json` that Trainer could not go on from, or that is of another step."""
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
    if (found_step := found.get("global_step", 0)) != step:
        raise ValueError(f"{path} is of step {found_step}, but the checkpoint of step {step}; {EARLIER}.")
