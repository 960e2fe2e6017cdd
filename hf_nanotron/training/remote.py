"""`remote_checkpoints` of a run: reached at the start, reported in log lines, and waited for at the end."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from transformers.utils import logging

from ..checkpoint.directory.runs import Run
from ..checkpoint.remote.backlog import LocalSpace
from ..checkpoint.remote.bar import UploadBar
from ..checkpoint.remote.retry import Backoff
from ..checkpoint.remote.store import RemoteStore
from ..checkpoint.remote.upload import Uploader
from ..monitor.ranks import exchange
from ..parallel.collectives import all_reduce
from ..parallel.mesh import ParallelMesh
from ..parallel.together import together, together_for_long
from ..training_args import NanotronTrainingArguments
from .signals import StopSignals

logger = logging.get_logger(__name__)
LOOK_SECONDS = 0.2  # between two looks whether all is uploaded
FIGURES = ("remote_pending_checkpoints", "remote_retries", "remote_failing_seconds")
MARGIN = 0.2  # of the grace after a signal, in which the run ends


class RemoteUploads:
    """The store of a run's checkpoints; on rank 0 with an uploader. All ranks call its methods together.

    Attributes:
        mesh: of the model at hand; given by the trainer.
    """

    mesh: ParallelMesh

    def __init__(self, args: NanotronTrainingArguments) -> None:
        self.args = args
        self.store: RemoteStore | None = None
        self.uploader: Uploader | None = None

    def open(self) -> None:
        """Reach `remote_checkpoints`, before the training starts."""
        args, mesh = self.args, self.mesh
        if args.remote_checkpoints is None:
            return
        backoff = Backoff(args.remote_retry_seconds, args.remote_retry_max_seconds, args.remote_start_timeout)
        store = self.store = RemoteStore(args.remote_checkpoints, backoff=backoff)
        min_free = args.remote_min_free_gb
        space = LocalSpace(args.remote_pending_limit, None if min_free is None else min_free * 2**30)

        def open_uploader() -> Uploader | None:
            if mesh.rank != 0:
                return None
            output_dir = cast(str, args.output_dir)
            return Uploader(store, output_dir, args.remote_keep_local, args.save_total_limit, space=space)

        self.uploader = together_for_long(mesh, f"reaching {store.url}", open_uploader)

    def begin_run(self, run: Run) -> None:
        """Upload what the run has left behind, too."""
        if self.store is not None:
            together(self.mesh, "listing the local checkpoints to upload", lambda: self._submit_existing(run))

    def _submit_existing(self, run: Run) -> None:
        if self.uploader is not None:
            self.uploader.run = run
            self.uploader.submit_existing()

    def own_figures(self) -> dict[str, float]:
        """How many checkpoints wait, how many attempts have failed, and for how long all have. Known to rank 0."""
        if self.store is None:
            return {}
        if self.uploader is None:
            return dict.fromkeys(FIGURES, 0.0)
        retry = self.uploader.store.retry
        return dict(zip(FIGURES, (len(self.uploader.pending()), retry.retries, retry.failing_seconds), strict=True))

    def metrics(self, of_ranks: Mapping[str, Sequence[float]] | None = None) -> dict[str, float]:
        """The `own_figures` of all ranks (exchanged here if not given) as a log line says them. All ranks together."""
        if self.store is None:
            return {}
        if of_ranks is None:
            of_ranks = exchange(self.mesh, self.own_figures())
        pending, retries, seconds = (sum(of_ranks[name]) for name in FIGURES)
        return dict(zip(FIGURES, (int(pending), int(retries), round(seconds, 1)), strict=True))

    def wait(self, signals: StopSignals) -> None:
        """Until all is uploaded, `remote_wait_timeout` is over, or a signal leaves no more time. Then say what is
        missing, which is no error: it is complete on the local disk. By small collectives, none of which lasts as long
        as an upload may.
        """
        if self.store is None:
            return
        deadline = time.monotonic() + self.args.remote_wait_timeout
        with UploadBar(self.uploader, self.args.disable_tqdm) as bar:
            while self._waits_on(deadline, signals):
                if self.uploader is not None:
                    self.uploader.wait(LOOK_SECONDS)
                    bar.show()
                else:
                    time.sleep(LOOK_SECONDS)
        if self.uploader is not None and (text := self.uploader.what_is_missing()):
            logger.warning(text)

    def _waits_on(self, deadline: float, signals: StopSignals) -> bool:
        """Whether to go on waiting, the same on every rank. After a signal: while the store answers, and most of the
        grace is left."""
        uploader = self.uploader
        busy = uploader is not None and uploader.is_busy and time.monotonic() < deadline
        failing = uploader is not None and uploader.store.retry.failing_since is not None
        ends = signals.seconds_left < MARGIN * signals.grace
        flags = torch.tensor([busy, failing, signals.received is not None, ends], dtype=torch.float32)
        waits, fails, told, over = all_reduce(flags.to(self.mesh.device), self.mesh.world).bool().tolist()
        return waits and not over and not (told and fails)
