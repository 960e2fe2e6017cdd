"""Upload committed checkpoints while training goes on, and delete the surplus on both sides.

By rank 0 alone: a checkpoint is committed only once rank 0 sees the files of all ranks, so it can also send them, and
there is one writer, which knows when the marker's turn has come. Several files go at a time, large ones in parts.

A store that fails ends no run: the checkpoints are safe here. What failed is tried again, with longer and longer
pauses, for as long as there is room for the checkpoints that wait (`LocalSpace`).

An upload that was interrupted has no marker and so does not exist. The next run with the same output directory begins
it again (`submit_existing`); if the local checkpoint is gone too, what is left is deleted once a newer one is there.
"""

from __future__ import annotations

import atexit
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from transformers.utils import logging

from ..directory.commit import remove
from ..directory.retention import is_part, newest, run_at_hand, step_of
from ..directory.runs import Run
from ..directory.verify import MARKER, is_committed, is_marked
from ..files.disk import StrPath
from .backlog import LocalSpace, beyond_retention, beyond_space, bytes_of, in_words
from .runs import StoredRuns
from .send import Changed, Sender, Stopped
from .store import RemoteStore

logger = logging.get_logger(__name__)
T = TypeVar("T")
END_SECONDS = 5.0  # given to a running upload when the program ends


@dataclass
class UploadFigures:
    """What has been uploaded so far. `seconds` is the time spent on it, pauses between attempts included."""

    checkpoints: int = 0
    files: int = 0
    bytes: int = 0
    seconds: float = 0.0

    def add(self, sizes: list[int], seconds: float) -> None:
        """Count a checkpoint by the bytes of its files; none was uploaded if there are none."""
        if sizes:
            self.checkpoints += 1
            self.files += len(sizes)
            self.bytes += sum(sizes)
            self.seconds += seconds


class Uploader:
    """Sends checkpoints to a store, one after the other, from a thread of its own. On rank 0 only.

    Args:
        keep_local: how many committed local checkpoints stay when uploaded. One that is not uploaded stays too, unless
            `space` or `save_total_limit` says otherwise.
        save_total_limit: how many committed ones stay in the store; None or 0: all.
    """

    def __init__(
        self,
        store: RemoteStore,
        output_dir: StrPath,
        keep_local: int = 1,
        save_total_limit: int | None = None,
        workers: int = 4,
        space: LocalSpace | None = None,
    ) -> None:
        for name, value in {"keep_local": keep_local, "workers": workers}.items():
            if value < 1:
                raise ValueError(f"{name}={value} of remote checkpoints must be at least 1.")
        store.check_writable()
        self.store, self.output_dir = store, Path(output_dir)
        self.keep_local, self.save_total_limit = keep_local, save_total_limit
        self.space = space or LocalSpace()
        self.figures = UploadFigures()
        self.damaged: list[str] = []  # names of local checkpoints that are not uploaded, since they are not whole
        store.retry.note = self._note
        self.run: Run | None = None  # whose checkpoints are uploaded and counted; None for the run at hand
        self._runs = StoredRuns(store)
        self.local_lock = threading.Lock()  # held while local checkpoints are deleted; others that do so hold it too
        self._waiting: list[Path] = []  # oldest first; the first one is being uploaded
        self._found: set[Path] = set()  # of these, those of an earlier run, which may be older than what is stored
        self._sender = Sender(store, min(workers, store.transfers or workers), self._try)
        self._changed = threading.Condition()
        self._stop = False
        self._told: set[str] = set()  # names, of which the user knows that they are not uploaded
        self._kept: set[str] = set()
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()
        atexit.register(self.close)

    # ---- for the training loop ----

    def submit(self, path: StrPath, keep: Iterable[StrPath] = ()) -> None:
        """Upload a committed checkpoint. Returns at once, whether the store answers or not.

        Args:
            keep: checkpoints that are deleted on neither side from now on, such as the best one; replaces the last one.
        """
        path = Path(path)
        if not is_committed(path):
            raise ValueError(f"{path} is not committed, so it cannot be uploaded.")
        with self._changed:
            self._kept = {Path(kept).name for kept in keep}
            self._found.discard(path)
        self._add(path)
        self._make_room()

    def _run_at_hand(self) -> Run:
        return self.run or run_at_hand(self.output_dir) or Run()

    def note_run(self) -> None:
        """Note in the store, as in the output directory, which run is at hand."""
        self._runs.write_record(self.output_dir)

    def submit_existing(self) -> None:
        """Upload the run's committed local checkpoints that are newer than its last one in the store, when training
        starts. Returns at once: the store is asked later, by the thread.
        """
        for path in reversed(newest(self.output_dir, self._run_at_hand())):
            with self._changed:
                if path not in self._waiting:
                    self._found.add(path)
            self._add(path)

    def pending(self) -> list[Path]:
        """The local checkpoints that must not be deleted, because they are not uploaded yet; the oldest first."""
        with self._changed:
            return list(dict.fromkeys(self._waiting))

    @property
    def is_busy(self) -> bool:
        """Whether checkpoints wait for their upload."""
        return bool(self._waiting)

    def progress(self) -> tuple[int, int]:
        """Bytes that have been uploaded so far, and those bytes with the ones that wait."""
        with self._changed:
            waiting, sent = list(dict.fromkeys(self._waiting)), sum(self._sender.sent.values())
        done = self.figures.bytes
        return done + sent, done + max(sum(map(bytes_of, waiting)), sent)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until everything is uploaded, or `timeout` seconds. Returns whether everything is."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting, timeout)

    def what_is_missing(self) -> str:
        """In words: the checkpoints that are not uploaded, why, where they are, and what uploads them; else empty."""
        if not (waiting := self.pending()):
            return ""
        self._told |= {path.name for path in waiting}
        names = ", ".join(f"{path.name} ({in_words(bytes_of(path))})" for path in waiting)
        why = f" The last failure: {self.store.retry.last_error}." if self.store.retry.failing_since is not None else ""
        return (
            f"Not uploaded to {self.store.url}: {names}.{why} They are complete in {self.output_dir}. The next run "
            f"with this output_dir and remote_checkpoints uploads those newer than the newest one in the store; or "
            f"run: hf-nanotron upload {self.output_dir} {self.store.url}"
        )

    def close(self) -> None:
        """Stop between two files. What is not uploaded stays for the next run. Called at the program's end, too."""
        if self._pid != os.getpid():  # a forked process has no such thread
            return
        atexit.unregister(self.close)
        with self._changed:
            self._stop = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(END_SECONDS)
        if {path.name for path in self.pending()} - self._told:
            logger.warning(self.what_is_missing())

    # ---- what waits ----

    def _add(self, path: Path) -> None:
        with self._changed:
            if path in self._waiting[1:]:
                return
            self._waiting.append(path)
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="checkpoint-upload", daemon=True)
                self._thread.start()

    def _make_room(self) -> None:
        """Give up checkpoints that wait: what the store would not keep, and what there is no room for."""
        url, free = self.store.url, in_words(shutil.disk_usage(self.output_dir).free)
        mine = self._mine()
        if surplus := beyond_retention(mine, self._spared(), self.save_total_limit):
            self._drop(surplus)
            logger.warning(
                f"deleted {_names(surplus)} before the upload to {url}: {self.save_total_limit} newer checkpoints are "
                "waiting for theirs, and save_total_limit keeps no more."
            )
        mine = [path for path in mine if path not in surplus]
        if doomed := beyond_space(mine, self._spared(), self.space):
            self._drop(doomed)
            logger.warning(
                f"deleted {_names(doomed)} before the upload to {url}, to free disk space: {len(mine)} checkpoints "
                f"were waiting (remote_pending_limit={self.space.limit}), and {free} were free (remote_min_free_gb)."
            )

    def _mine(self) -> list[Path]:
        """Those of the run at hand that wait, but for those from before its start, of which it is not known whether
        they are in the store. Another run of this process may have left some, which do not count."""
        run = self._run_at_hand()
        return [path for path in self.pending() if path not in self._found and is_part(run, path)]

    def _spared(self) -> set[str]:
        """Those that are not given up: the best one, say, and the one on its way, unless the store fails."""
        current = self._waiting[:1] if self.store.retry.failing_since is None else []
        return {*self._kept, *(path.name for path in current)}

    def _drop(self, paths: list[Path]) -> None:
        with self._changed:
            self._waiting = [path for path in self._waiting if path not in paths]
            self._changed.notify_all()
        for path in paths:
            try:
                with self.local_lock:
                    if path.exists():
                        remove(path)
            except OSError as error:  # no reason to end a run
                logger.warning(f"could not delete {path}: {error}")

    # ---- in the thread ----

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._stop)
                if self._stop:
                    return
                path = self._waiting[0]
            sizes: list[int] = []
            start = time.monotonic()
            try:
                if self._is_wanted(path) and not self._is_damaged(path):
                    self._runs.look_for_others(self.run, self.output_dir)
                    if sizes := self._sender.send(path):
                        self._runs.note(path.name, path)
                    self._delete_surplus(path)
            except Stopped:
                return
            except Changed:
                if path in self._waiting and is_committed(path):
                    continue  # there is another checkpoint of this step now
                if path in self._waiting:
                    logger.warning(f"{path} no longer exists, so it is not uploaded to {self.store.url}.")
            except Exception as error:  # reading it failed, say: no reason to end a run
                logger.warning(f"restarting the upload of {path}, which failed: {self.store.says(error)}")
                with self._changed:
                    self._changed.wait_for(lambda: self._stop, self.store.retry.backoff.longest)
                continue
            with self._changed:
                self._sender.sent.clear()
                self.figures.add(sizes, time.monotonic() - start)
                if path in self._waiting:
                    self._waiting.remove(path)
                self._found.discard(path)
                self._changed.notify_all()

    def _is_wanted(self, path: Path) -> bool:
        """Whether a checkpoint is to be uploaded: of an earlier run, those that are as new as what is stored."""
        if path not in self._found:
            return True
        there = self._try(path, "listing the checkpoints", self.store.checkpoints)
        names = [name for name, files in there.items() if MARKER in files]
        committed = self._try(path, "reading markers", lambda: self._runs.parts(names, self._run_at_hand()))
        return step_of(path.name) >= max(map(step_of, committed), default=-1)

    def _is_damaged(self, path: Path) -> bool:
        """Whether a checkpoint is not to be uploaded, because it is not whole. Warns of one."""
        if (fault := self._sender.fault(path)) is not None:
            self.damaged.append(path.name)
            logger.warning(f"{path} is damaged and not uploaded to {self.store.url}: {fault}.")
        return fault is not None

    def _try(self, path: Path, what: str, action: Callable[[], T]) -> T:
        """`Attempt`."""

        def pause(seconds: float) -> None:
            with self._changed:
                self._changed.wait_for(lambda: self._stop or path not in self._waiting, seconds)
            self._check(path)

        self._check(path)
        return self.store.repeat(what, action, lambda error, _: isinstance(error, Changed | Stopped), pause=pause)

    def _note(self) -> str:
        count = len(set(self._waiting))
        return f" {count} checkpoint{'s wait' if count > 1 else ' waits'} in {self.output_dir}." if count else ""

    def _check(self, path: Path) -> None:
        if self._stop:
            raise Stopped
        if path not in self._waiting or not path.exists():
            raise Changed

    def _delete_surplus(self, uploaded: Path) -> None:
        """On both sides. Fails without a fuss: it is tried again after the next upload."""
        try:
            self._delete(uploaded)
        except Exception as error:  # each package has its own
            logger.warning(f"could not delete surplus checkpoints at {self.store.url}: {self.store.says(error)}")

    def _delete(self, uploaded: Path) -> None:
        kept = {*self._kept, uploaded.name}
        there = self.store.checkpoints()
        committed = [name for name, files in there.items() if MARKER in files]
        torn = [name for name in there if name not in committed and step_of(name) < step_of(uploaded.name)]
        # A listing that lags behind may lack a marker.
        torn = [name for name in torn if self.store.marker(name) is None]
        run, surplus = self._run_at_hand(), list[str]()
        if self.save_total_limit:
            committed = self._runs.parts(committed, run)
            surplus = [name for name in reversed(committed[1:]) if name not in kept]
            surplus = surplus[: max(len(committed) - self.save_total_limit, 0)]
            self._runs.forget(surplus)  # another run may have replaced one since its marker was read
            surplus = self._runs.parts(surplus, run)
        for name in torn + surplus:
            self.store.remove(name)
        waiting = {path.name for path in self.pending()} - {uploaded.name}
        for path in newest(self.output_dir, run)[self.keep_local :]:
            if path.name in kept | waiting:
                continue
            # Gone from the store by its limit means that it was there.
            if path.name in surplus or is_marked(path, self.store.marker(path.name)):
                with self.local_lock:
                    if path.exists():  # `rotate` may have been faster
                        remove(path)


def _names(paths: Iterable[Path]) -> str:
    return ", ".join(path.name for path in paths)
