"""Errors of a command: one sentence, printed once per job. Does not import torch.

Errors that this package raises itself are written for the user. Those of other libraries become a sentence where a
command says what it was about to do (`explained`); anywhere else they keep their traceback, as faults of ours do.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NoReturn

from ..checkpoint.files.model_folder import why_no_model
from ..redaction import printable, printable_url, secrets_of

# Modules whose errors are written for the user: they say what to change, and a traceback would bury it.
SPEAKING = ("hf_nanotron", "transformers.trainer", "transformers.training_args", "__main__")
KINDS = (ValueError, RuntimeError, ArithmeticError, ImportError)

STATUS = 2  # of a command that the user can repair
INTERRUPTED = 130  # of one that Ctrl-C has ended, as a shell reports it
KEY = "hf_nanotron/error"
PATIENCE = timedelta(seconds=5)  # until rank 0 has said what is wrong with it


class SettingsError(ValueError):
    """What cannot be done with what the user gave, in one sentence."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints come once a job."""

    def error(self, message: str) -> NoReturn:
        message = printable(message, secrets_of(os.environ))
        if _speaks(message):
            super().error(message)
        sys.exit(STATUS)


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn any error of another library into a `SettingsError` about `what`."""
    try:
        yield
    except Exception as error:
        if is_for_the_user(error) and not isinstance(error, OSError):
            raise
        raise SettingsError(printable(f"{what}: {_first_line(error)}", secrets_of(os.environ))) from error


def is_for_the_user(error: BaseException) -> bool:
    """Whether the message of `error` says all. What the system refuses always does."""
    if isinstance(error, OSError | SettingsError):
        return True
    frames = list(traceback.walk_tb(error.__traceback__))
    module = frames[-1][0].f_globals.get("__name__", "") if frames else ""
    return isinstance(error, KINDS) and any(module == name or module.startswith(name + ".") for name in SPEAKING)


def report(program: str, error: BaseException) -> None:
    """Print `error` as one line, unless another rank of this job does."""
    message = printable(" ".join(str(error).split()), secrets_of(os.environ)) or type(error).__name__
    speaks = _speaks(message)
    if speaks:
        print(f"{program}: error: {message}", file=sys.stderr, flush=True)
    _hear(speaks)


def report_interrupt(program: str) -> None:
    """Say in one line that Ctrl-C has ended the command. Every rank of a job gets it; rank 0 says so."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{program}: stopped by Ctrl-C", file=sys.stderr, flush=True)


def existing_path(name: str, value: str, what: str) -> str:
    """`value`, with the home folder for `~`. Before a Hub is asked for it: what can only be a local path must exist.

    Raises:
        SettingsError: if it does not; for a URL.
    """
    if "://" in value:
        raise SettingsError(f"{name}={printable_url(value)!r} is a URL; give a {what}, or a name on the Hub.")
    is_path = os.path.isabs(value) or value.startswith(("./", "../", "~")) or value.count("/") > 1
    value = os.path.expanduser(value)
    if is_path and not os.path.exists(value):
        raise SettingsError(f"{name}={value!r}: {what} not found.")
    return value


def existing_model(name: str, value: str) -> str:
    """As `existing_path`, of a model: what is there must be the folder of one, not that of an adapter or a run.

    Raises:
        SettingsError: if it is not, saying what it is.
    """
    value = existing_path(name, value, "folder")
    if os.path.exists(value) and (why := why_no_model(value)) is not None:
        raise SettingsError(f"{name}: {why}")
    return value


def process_group() -> Any:
    """`torch.distributed`, if a process group is open (without importing it to see)."""
    distributed = sys.modules.get("torch.distributed")
    return distributed if distributed is not None and distributed.is_initialized() else None


def _speaks(message: str) -> bool:
    """Whether this rank is to print `message`: rank 0 is, and those that have another one.

    torchrun mixes the output of its ranks, and ends all of them when one is gone. So a rank that may be silent waits
    for what rank 0 says, and rank 0 until the others have heard it.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return True
    rank, group = int(os.environ.get("RANK", "0")), process_group()
    if group is None:
        if rank != 0:
            time.sleep(PATIENCE.total_seconds())  # torchrun ends it, unless rank 0 is content
        return True
    store = group.distributed_c10d._get_default_store()
    try:
        if rank != 0:
            store.wait([KEY], PATIENCE)
            return bool(store.get(KEY).decode() != message)
        store.set(KEY, message)
    except RuntimeError:  # rank 0 has not failed, or is gone already
        pass
    return True


def _hear(spoken: bool) -> None:
    """Of ranks in a process group, after `_speaks`: let all say what they have to say before one of them ends."""
    group = process_group()
    if "TORCHELASTIC_RUN_ID" not in os.environ or group is None:
        return
    store, rank = group.distributed_c10d._get_default_store(), group.get_rank()
    with contextlib.suppress(RuntimeError):
        if rank == 0:
            store.wait([f"{KEY}/{other}" for other in range(1, group.get_world_size())], PATIENCE)
        else:
            store.set(f"{KEY}/{rank}", str(spoken))


def _first_line(error: BaseException) -> str:
    """What `error` says, and its cause, if that is another: libraries wrap the sentence that matters."""
    lines = []
    cause: BaseException | None = error
    while cause is not None:
        text = next((line.strip() for line in str(cause).splitlines() if line.strip()), "")
        name = "" if isinstance(cause, OSError | ValueError) and text else type(cause).__name__
        lines.append(": ".join(part for part in (name, text[:300]) if part))
        cause = cause.__cause__
    last = lines[-1].rstrip(".")
    return f"{last}." if last in lines[0] else f"{lines[0].rstrip('.')} ({last})."
