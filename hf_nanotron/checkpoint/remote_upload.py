"""Upload committed checkpoints while training goes on, and delete the surplus on both sides.

By rank 0 alone: a checkpoint is committed only once rank 0 sees the files of all ranks, so it can also send them, and
there is one writer, which knows when the marker's turn has come. Several files go at a time, large ones in parts.

An upload that was interrupted has no marker and so does not exist. The next run with the same output directory begins
it again (`submit_existing`); if the local checkpoint is gone too, what is left is deleted once a newer one is there.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers.utils import logging

from .commit import remove
from .manager import newest, run_at_hand
from .remote import RemoteStore, in_parallel, reason, step_of
from .remote_runs import StoredRuns
from .runs import Run
from .verify import MARKER, StrPath, is_committed

logger = logging.get_logger(__name__)
LONGEST_PAUSE = 60.0  # seconds between two attempts
END_SECONDS = 5.0  # given to a running upload when the program ends


@dataclass
class UploadFigures:
    """What has been uploaded so far. `seconds` is the time spent on it, pauses between attempts included."""

    checkpoints: int = 0
    files: int = 0
    bytes: int = 0
    seconds: float = 0.0
    retries: int = 0


class UploadError(RuntimeError):
    """A checkpoint could not be uploaded; the message names URL, file and reason."""


class _Stopped(Exception):
    """The program ends."""


class Uploader:
    """Sends checkpoints to a store, one after the other, from a thread of its own. On rank 0 only.

    Args:
        output_dir: where the local `checkpoint-N/` are.
        keep_local: how many committed local checkpoints stay when uploaded; one that is not uploaded always stays.
        save_total_limit: how many committed ones stay in the store; None or 0: all.
        workers: files at a time.
        attempts: for each file, before the run fails.
        backoff: seconds before the second attempt, doubled for each further one, at most a minute.

    Raises:
        ValueError: for a store that cannot be written, naming it and the reason; for numbers below 1.
    """

    def __init__(
        self,
        store: RemoteStore,
        output_dir: StrPath,
        keep_local: int = 1,
        save_total_limit: int | None = None,
        workers: int = 4,
        attempts: int = 5,
        backoff: float = 2.0,
    ) -> None:
        for name, value in {"keep_local": keep_local, "workers": workers, "attempts": attempts}.items():
            if value < 1:
                raise ValueError(f"{name}={value} of remote checkpoints must be at least 1.")
        store.check_writable()
        self.store, self.output_dir = store, Path(output_dir)
        self.keep_local, self.save_total_limit = keep_local, save_total_limit
        self.workers, self.attempts, self.backoff = workers, attempts, backoff
        self.figures = UploadFigures()
        self.run: Run | None = None  # whose checkpoints are uploaded and counted; None for the run at hand
        self._runs = StoredRuns(store)
        self.local_lock = threading.Lock()  # held while local checkpoints are deleted; others that do so hold it too
        self._waiting: deque[Path] = deque()  # the first one is being uploaded
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._kept: set[str] = set()
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()
        atexit.register(self.close)

    # ---- for the training loop ----

    def submit(self, path: StrPath, keep: Iterable[StrPath] = ()) -> None:
        """Upload a committed checkpoint. Returns at once.

        Args:
            keep: checkpoints that are deleted on neither side from now on, such as the best one; replaces the last one.

        Raises:
            ValueError: if it is not committed.
            UploadError: if an earlier upload has failed.
        """
        self.raise_if_failed()
        path = Path(path)
        if not is_committed(path):
            raise ValueError(f"{path} is not committed, so it cannot be uploaded.")
        with self._changed:
            self._kept = {Path(kept).name for kept in keep}
            if path in list(self._waiting)[1:]:
                return
            self._waiting.append(path)
            if len(self._waiting) > 2:
                logger.warning(
                    f"{len(self._waiting)} checkpoints wait for their upload to {self.store.url}: saving is faster."
                )
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="checkpoint-upload", daemon=True)
                self._thread.start()

    def note_run(self) -> None:
        """Note in the store, as in the output directory, which run is at hand."""
        self._runs.write_record(self.output_dir)

    def submit_existing(self) -> None:
        """Upload the run's committed local checkpoints that are newer than its last one in the store, when training
        starts.

        Raises:
            ValueError: if the store cannot be listed.
        """
        run = self.run or run_at_hand(self.output_dir) or Run()
        committed = [name for name, files in self.store.checkpoints().items() if MARKER in files]
        there = [step_of(name) for name in self._runs.parts(committed, run)]
        for path in reversed(newest(self.output_dir, run)):
            if step_of(path.name) >= max(there, default=-1):
                self.submit(path)

    def pending(self) -> list[Path]:
        """The local checkpoints that must not be deleted, because they are not uploaded yet."""
        with self._changed:
            return list(self._waiting)

    @property
    def is_busy(self) -> bool:
        """Whether checkpoints wait for their upload, which has not failed."""
        return self._failure is None and bool(self.pending())

    def raise_if_failed(self) -> None:
        """Before each step: an upload that has failed for good ends the run.

        Raises:
            UploadError: naming URL, file and reason.
        """
        if self._failure is not None:
            raise UploadError(str(self._failure)) from self._failure

    def wait(self, timeout: float | None = None) -> None:
        """Return when everything is uploaded.

        Args:
            timeout: seconds; None: for as long as it takes.

        Raises:
            UploadError: if an upload has failed for good.
            TimeoutError: naming the checkpoints that are not uploaded.
        """
        with self._changed:
            done = self._changed.wait_for(lambda: not self._waiting or self._failure is not None, timeout)
            names = ", ".join(path.name for path in self._waiting)
        self.raise_if_failed()
        if not done:
            raise TimeoutError(f"{names} not uploaded to {self.store.url} after {timeout:g} s.")

    def close(self) -> None:
        """Stop between two files. What is not uploaded stays for the next run. Called at the program's end, too."""
        if self._pid != os.getpid():  # a forked process has no such thread
            return
        atexit.unregister(self.close)
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(END_SECONDS)
        if self._waiting:
            names = ", ".join(path.name for path in self._waiting)
            logger.warning(f"{names} not uploaded to {self.store.url}; the next run from this directory will do it.")

    # ---- in the thread ----

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._stop.is_set())
                if self._stop.is_set():
                    return
                path = self._waiting[0]
            try:
                self._upload(path)
                try:
                    self._delete_surplus(path)
                except (OSError, UploadError, ValueError) as error:  # no reason to end a run
                    logger.warning(f"surplus checkpoints could not be deleted at {self.store.url}: {reason(error)}")
            except _Stopped:
                return
            except BaseException as error:
                with self._changed:
                    self._failure = error
                    self._changed.notify_all()
                return
            with self._changed:
                self._waiting.popleft()
                self._changed.notify_all()

    def _upload(self, path: Path) -> None:
        start, name, store = time.monotonic(), path.name, self.store
        self._runs.tell_of_others(self.run)
        if self._is_there(path):
            return
        old = self._try(name, lambda: store.checkpoints().get(name, {}))
        if MARKER in old:  # another checkpoint of this step, from before the run went back
            self._try(f"{name}/{MARKER}", lambda: store.remove_file(f"{name}/{MARKER}"))
        sizes = {
            file.relative_to(path).as_posix(): file.stat().st_size
            for file in path.rglob("*")
            if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
        }
        # Large files first, so that none is left alone at the end.
        files = sorted((file for file in sizes if file != MARKER), key=lambda file: -sizes[file])
        in_parallel([partial(self._put, path, file) for file in files], self.workers)
        there = self._try(name, lambda: store.checkpoints().get(name, {}))
        for file in there.keys() - sizes.keys() - {MARKER}:
            self._try(f"{name}/{file}", partial(store.remove_file, f"{name}/{file}"))
        for file in files:
            if there.get(file) != sizes[file]:
                raise UploadError(
                    f"uploading to {store.url}/{name}/{file} failed: {there.get(file)} bytes arrived of {sizes[file]}."
                )
        self._put(path, MARKER)
        self._runs.note(name, path)
        figures = self.figures
        figures.checkpoints, figures.files = figures.checkpoints + 1, figures.files + len(sizes)
        figures.bytes, figures.seconds = figures.bytes + sum(sizes.values()), figures.seconds + time.monotonic() - start

    def _put(self, path: Path, file: str) -> None:
        self._try(f"{path.name}/{file}", lambda: self.store.put(path / file, f"{path.name}/{file}"), path / file)

    def _try(self, what: str, action: Callable[[], Any], source: Path | None = None) -> Any:
        """`action`, again if it fails, with longer and longer pauses.

        Raises:
            UploadError: after the last attempt, or if the file `source` is gone.
        """
        for attempt in range(1, self.attempts + 1):
            if self._stop.is_set():
                raise _Stopped
            try:
                return action()
            except Exception as error:  # each package has its own
                if attempt == self.attempts or (source is not None and not source.exists()):
                    raise UploadError(
                        f"uploading to {self.store.url}/{what} failed after {attempt} attempts: {reason(error)}"
                    ) from error
                self.figures.retries += 1
                logger.warning(f"uploading to {self.store.url}/{what}, attempt {attempt} failed: {reason(error)}")
            self._stop.wait(min(self.backoff * 2 ** (attempt - 1), LONGEST_PAUSE))

    def _is_there(self, path: Path) -> bool:
        """Whether exactly this checkpoint is complete in the store: the marker has all its checksums."""
        return self._try(f"{path.name}/{MARKER}", lambda: self.store.marker(path.name)) == (path / MARKER).read_bytes()

    def _delete_surplus(self, uploaded: Path) -> None:
        kept = {*self._kept, uploaded.name}
        there = self.store.checkpoints()
        committed = [name for name, files in there.items() if MARKER in files]
        doomed = [name for name in there if name not in committed and step_of(name) < step_of(uploaded.name)]
        run = self.run or run_at_hand(self.output_dir) or Run()
        if self.save_total_limit:
            committed = self._runs.parts(committed, run)
            surplus = [name for name in reversed(committed[1:]) if name not in kept]
            doomed += surplus[: max(len(committed) - self.save_total_limit, 0)]
        for name in doomed:
            self._try(name, partial(self.store.remove, name))
        waiting = {path.name for path in self.pending()} - {uploaded.name}
        for path in newest(self.output_dir, run)[self.keep_local :]:
            if path.name in kept | waiting:
                continue
            # Gone from the store by its limit means that it was there.
            if path.name in doomed or self._is_there(path):
                with self.local_lock:
                    remove(path)
