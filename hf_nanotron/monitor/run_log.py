"""The log of a run in its own folder: one JSON object a line, only ever appended, by rank 0.

`begin` (training begins or goes on): `step` (those done before), `max_steps`, `world_size`, `sizes`, `model`,
`parameters`, `device`, `marker`, and which process it is: `host`, `numbers`, `pid`, `start`.
`log` (a log line): `step`, `epoch`, `metrics`, and of a line with a loss `ranks` (see `monitor/ranks.py`).
`save` (a checkpoint): `step`, `checkpoint` (its folder).
`detail` (of `metrics_detail`, in a file of its own): `step`, `epoch`, `metrics`.
`end`: `step`, `status` (finished, stopped or failed), of a failure `error`.

Each line has `run` (an id of the process's run) and `time` (seconds since 1970, UTC) too. Numbers that JSON lacks are
the texts "nan", "inf" and "-inf". `monitor/read_log.py` reads it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.utils import logging

from ..parallel.mesh import ParallelMesh
from ..redaction import printable, secrets_of
from .read_log import DETAIL_LOG, RUN_LOG, process_numbers, process_start
from .throughput import Throughput

logger = logging.get_logger(__name__)

OF_TENSORS = ("weights/", "gradients/", "activations/")  # begin the names of metrics_detail
LONGEST_ERROR = 500  # characters


class LogFile:
    """Appends lines to a file. A line is written at once, so that a reader finds at most the last one incomplete.

    A line that cannot be written is lost, with one warning for all in a row: the run goes on, and so does its log once
    there is room again. Symbolic links are not followed.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._fails = path, False

    def write(self, line: Mapping[str, Any]) -> None:
        text = json.dumps(plain(line), allow_nan=False, separators=(",", ":")) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            handle = os.open(self.path, flags, 0o666)
            try:
                size = os.fstat(handle).st_size
                if size and os.pread(handle, 1, size - 1) != b"\n":  # what a killed run has left
                    text = "\n" + text
                data = text.encode()
                while data:
                    data = data[os.write(handle, data) :]
            finally:
                os.close(handle)
        except OSError as error:
            if not self._fails:
                logger.warning(f"{self.path} cannot be written ({error.strerror}): lines are lost until it can be.")
            self._fails = True
        else:
            self._fails = False


class RunLog(TrainerCallback):
    """Writes what happens in a run to `_metrics.jsonl` in its `output_dir`. Does nothing on other ranks than 0.

    `marker`: name of the file by which a checkpoint is known to be complete.
    """

    def __init__(self, mesh: ParallelMesh, throughput: Throughput, parameters: int, marker: str) -> None:
        self.mesh, self.throughput, self.parameters, self.marker = mesh, throughput, parameters, marker
        self._file: LogFile | None = None
        self._details: LogFile | None = None
        self._run = ""
        self._state: Any = None
        self._writes = False
        self._secrets: list[str] = []

    def _write(self, event: str, step: int, file: LogFile | None = None, **fields: Any) -> None:
        if self._file is not None:
            (file or self._file).write({"event": event, "run": self._run, "time": time.time(), "step": step, **fields})

    @contextlib.contextmanager
    def running(self, writes: bool) -> Iterator[None]:
        """Around a run, whose end is noted, also a failure. With `writes=False` there is no log."""
        self._file, self._state, self._writes = None, None, writes and self.mesh.rank == 0
        status: dict[str, Any] = {}
        try:
            yield
        except BaseException as error:
            known = [*secrets_of(os.environ), *self._secrets]
            text = printable(" ".join(str(error).split()), known)[:LONGEST_ERROR]
            status = {"status": "failed", "error": f"{type(error).__name__}: {text}"}
            raise
        finally:
            if self._state is not None:
                is_done = self._state.global_step >= self._state.max_steps
                self._write(
                    "end", self._state.global_step, **(status or {"status": "finished" if is_done else "stopped"})
                )
            self._state = None  # the file stays: an evaluation may follow

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self._writes:
            return
        self._file, self._details = (LogFile(Path(args.output_dir, name)) for name in (RUN_LOG, DETAIL_LOG))
        self._run, self._state = secrets.token_hex(4), state
        self._secrets = list(secrets_of(vars(args)))
        sizes = {name: getattr(self.mesh, f"{name}_size") for name in ("tp", "cp", "pp", "dp", "ep")}
        self._write(
            "begin",
            state.global_step,
            max_steps=state.max_steps,
            world_size=self.mesh.world_size,
            sizes=sizes,
            model=getattr(getattr(model, "stock_class", None), "__name__", ""),
            parameters=self.parameters,
            device=device_name(self.mesh),
            marker=self.marker,
            host=socket.gethostname(),
            numbers=process_numbers(),
            pid=os.getpid(),
            start=process_start(os.getpid()),
        )

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and all(name.startswith(OF_TENSORS) for name in logs):
            self._write("detail", state.global_step, self._details, epoch=state.epoch, metrics=dict(logs))
            return
        own: dict[str, Any] = (
            {"ranks": self.throughput.by_rank} if "loss" in (logs or {}) and self.mesh.world_size > 1 else {}
        )
        self._write("log", state.global_step, epoch=state.epoch, metrics=dict(logs or {}), **own)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._write("save", state.global_step, checkpoint=f"checkpoint-{state.global_step}")


def plain(value: Any) -> Any:
    """`value` of what JSON has."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # of a tensor of several elements, too
        return str(value)
    return number if math.isfinite(number) else str(number)


def device_name(mesh: ParallelMesh) -> str:
    """What the driver calls a GPU, or the type of another device."""
    return torch.cuda.get_device_name(mesh.device) if mesh.device.type == "cuda" else mesh.device.type
