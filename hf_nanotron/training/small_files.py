"""The small files of a checkpoint: random numbers, tokenizer, arguments, and the state of Trainer and its callbacks."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState, TrainerState

from ..parallel.mesh import ParallelMesh
from ..redaction import redacted
from ..training_args import NanotronTrainingArguments


def write_generators(write: Callable[[str], None], directory: Path, mesh: ParallelMesh) -> list[Path]:
    """The states of this rank's generators, as Trainer's method writes them: this rank describes them, and rank 0 need
    not.

    Raises:
        OSError: if there is no room for them, where `torch.save` raises a RuntimeError.
    """
    try:
        write(str(directory))
    except RuntimeError as error:
        raise OSError(f"the random numbers' states could not be written into {directory}: {error}") from error
    name = "rng_state.pth" if mesh.world_size == 1 else f"rng_state_{mesh.rank}.pth"
    return [path for path in [directory / name] if path.is_file()]


def write_companions(args: NanotronTrainingArguments, tokenizer: Any, directory: Path) -> None:
    """Tokenizer, if there is one, and arguments, which are pickled without secrets."""
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    torch.save(args, directory / "training_args.bin")


def copied_state(state: TrainerState) -> TrainerState:
    """For `write_trainer_state`, which adds to it, where the run's own is to stay as it is."""
    found = copy.copy(state)
    found.stateful_callbacks = copy.deepcopy(state.stateful_callbacks)
    return found


def write_trainer_state(state: TrainerState, holders: Iterable[Any], directory: Path) -> Path:
    """Step, log history and the states of `holders` (callbacks, control), as Trainer writes them: the file."""
    for holder in holders:
        if isinstance(holder, ExportableState):
            name, own = type(holder).__name__, redacted("", holder.state(), None)
            states = cast(dict[str, Any], state.stateful_callbacks)
            if isinstance(states.get(name), list):
                states[name].append(own)
            else:
                states[name] = own
    path = directory / TRAINER_STATE_NAME
    state.save_to_json(str(path))
    return path


@contextlib.contextmanager
def taking_states() -> Iterator[None]:
    """Around what hands the callbacks their states, with an error that says what to do."""
    try:
        yield
    except (TypeError, AttributeError) as error:
        raise ValueError(
            f"{TRAINER_STATE_NAME} holds a state that its callback does not take ({error}); set "
            "restore_callback_states_from_checkpoint=False, or use an earlier checkpoint."
        ) from error
