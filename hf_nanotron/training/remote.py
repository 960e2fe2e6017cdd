"""`remote_checkpoints` in a trainer: it is reached at the start, reported in log lines, and waited for at the end."""

from __future__ import annotations

import time
from typing import Any, cast

import torch
from transformers.utils import logging

from ..checkpoint.remote.backlog import LocalSpace
from ..checkpoint.remote.bar import UploadBar
from ..checkpoint.remote.retry import Backoff
from ..checkpoint.remote.store import RemoteStore
from ..checkpoint.remote.upload import Uploader
from ..parallel.collectives import all_reduce
from ..parallel.together import together_for_long
from ..training_args import NanotronTrainingArguments
from .evaluation import EvaluatingTrainer
from .signals import StopSignals

logger = logging.get_logger(__name__)
LOOK_SECONDS = 0.2  # between two looks whether all is uploaded
MARGIN = 0.2  # of the grace after a signal, in which the run ends


class RemoteTrainer(EvaluatingTrainer):
    """A Trainer that has a store for its checkpoints, on rank 0 with an uploader."""

    args: NanotronTrainingArguments

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._store: RemoteStore | None = None
        self._uploader: Uploader | None = None
        super().__init__(*args, **kwargs)
        self._signals = StopSignals(self.args.save_on_signal)

    def _open_remote(self) -> None:
        """Reach `remote_checkpoints` before the training starts. All ranks together.

        Raises:
            ValueError: if the URL cannot be written, naming it and the reason.
            ImportError: if the package for its protocol is missing, naming the extra.
        """
        args = self.args
        if args.remote_checkpoints is None:
            return
        backoff = Backoff(args.remote_retry_seconds, args.remote_retry_max_seconds, args.remote_start_timeout)
        store = self._store = RemoteStore(args.remote_checkpoints, backoff=backoff)
        min_free = args.remote_min_free_gb
        space = LocalSpace(args.remote_pending_limit, None if min_free is None else min_free * 2**30)

        def open_uploader() -> Uploader | None:
            if self.mesh.rank != 0:
                return None
            output_dir = cast(str, args.output_dir)
            return Uploader(store, output_dir, args.remote_keep_local, args.save_total_limit, space=space)

        self._uploader = together_for_long(self.mesh, f"reaching {store.url}", open_uploader)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._store is not None:
            logs.update(self._remote_figures())
        super().log(logs, start_time)

    def _remote_figures(self) -> dict[str, float]:
        """How the uploads go: how many checkpoints wait, how many attempts have failed, and for how long all have.
        Known to rank 0; all ranks together."""
        figures = torch.zeros(3, dtype=torch.float64, device=self.mesh.device)
        if self._uploader is not None:
            retry = self._uploader.store.retry
            values = [len(self._uploader.pending()), retry.retries, retry.failing_seconds]
            figures = torch.tensor(values, dtype=torch.float64, device=self.mesh.device)
        pending, retries, seconds = all_reduce(figures, self.mesh.world).tolist()
        return {
            "remote_pending_checkpoints": int(pending),
            "remote_retries": int(retries),
            "remote_failing_seconds": round(seconds, 1),
        }

    def _wait_for_uploads(self) -> None:
        """Until all is uploaded, `remote_wait_timeout` is over, or a signal leaves no more time. Then say what is
        missing, which is no error: it is complete on the local disk. By small collectives of all ranks, none of which
        lasts as long as an upload may.
        """
        if self._store is None:
            return
        deadline = time.monotonic() + self.args.remote_wait_timeout
        with UploadBar(self._uploader, self.args.disable_tqdm) as bar:
            while self._waits_on(deadline):
                if self._uploader is not None:
                    self._uploader.wait(LOOK_SECONDS)
                    bar.show()
                else:
                    time.sleep(LOOK_SECONDS)
        if self._uploader is not None and (text := self._uploader.what_is_missing()):
            logger.warning(text)

    def _waits_on(self, deadline: float) -> bool:
        """Whether to go on waiting, the same on every rank. After a signal: while the store answers, and most of the
        grace is left."""
        uploader, signals = self._uploader, self._signals
        busy = uploader is not None and uploader.is_busy and time.monotonic() < deadline
        failing = uploader is not None and uploader.store.retry.failing_since is not None
        ends = signals.seconds_left < MARGIN * signals.grace
        flags = torch.tensor([busy, failing, signals.received is not None, ends], dtype=torch.float32)
        waits, fails, told, over = all_reduce(flags.to(self.mesh.device), self.mesh.world).bool().tolist()
        return waits and not over and not (told and fails)
