"""A place for checkpoints outside the machine, by fsspec URL: `s3://bucket/run`, `gs://...`, `file:///...`.

Below the URL lie the same `checkpoint-N/` as in the output directory. The marker (`committed.json`) is the last object
written and the first one removed: a checkpoint that has it is complete, whatever was interrupted. What an interrupted
multipart upload leaves in a bucket is invisible here; a lifecycle rule of the bucket is what ends it.

Credentials, region and endpoint come from the usual places of the protocol's package (for S3 the environment with
`AWS_ENDPOINT_URL`, `~/.aws`, fsspec's configuration) or from `storage_options`; host, user and password of a server
may be in the URL.

A listing may lag behind, and is never what decides: whether a file is there, and how long it is, its own entry says.
"""

from __future__ import annotations

import os
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from fsspec.callbacks import Callback

from ...redaction import printable, printable_url
from ..directory.retention import is_checkpoint_name, step_of
from ..directory.verify import MARKER
from .errors import MISSING, StoreError, kind_of, reason
from .retry import Backoff, Retry
from .url import GCS, PROTOCOLS, S3, credentials, parse

T = TypeVar("T")
Listing = dict[str, dict[str, int]]  # checkpoint -> bytes of every file by its path within

# Bytes. An s3fs upload holds up to ten parts of each file in memory, of 50 MiB if nobody says otherwise.
PART_BYTES = 8 << 20
LARGEST_MARKER = 256 << 20  # bytes; a file of a checkpoint takes about a hundred
LONGEST_CHAIN = 64  # texts of errors
# Seconds in which some part of a file arrives, or the connection is given up; and in which a deletion or listing ends.
STALL_SECONDS, LONG_SECONDS = 300.0, 3600.0


class RemoteStore:
    """The checkpoints below a URL.

    Makes no connection before its first use, and another one in a forked process: s3fs and its like do their work in a
    thread with an event loop, which a fork does not copy. After some failures, too: credentials that were renewed are
    read by a new connection alone, and those to servers do not outlive an outage.

    Args:
        storage_options: for the protocol's fsspec class, such as `{"endpoint_url": ...}` for S3.

    Attributes:
        retry: repeats what has failed, and counts it.
        transfers: that the store takes at a time, None for as many as one likes.

    Raises:
        ValueError: if `url` has no protocol, or one that does not work here.
        ImportError: if the protocol's package is not installed, naming the extra that brings it.
    """

    def __init__(self, url: str, storage_options: dict[str, Any] | None = None, backoff: Backoff | None = None) -> None:
        place = parse(url)
        self.url, self.protocol = printable_url(url.rstrip("/")), place.protocol
        kind = PROTOCOLS[place.protocol]
        self.transfers, self._is_bucket = kind.transfers, kind.host == "bucket"
        self.retry = Retry(self.url, backoff or Backoff())
        self.stall_seconds = STALL_SECONDS
        self._class, self.root = place.filesystem, place.root
        self._options = {**({"use_listings_cache": False} if kind is S3 else {}), **place.options}
        self._options |= storage_options or {}
        self._secrets = credentials(url, storage_options)
        self._part = {"chunksize": PART_BYTES} if kind in (S3, GCS) else {}
        self._fs: Any = None
        self._pid = 0
        self._lock = threading.Lock()

    @property
    def fs(self) -> Any:
        """The fsspec file system of this process."""
        if self._pid != os.getpid():
            # A forked process is another one, also where a thread of its parent held the lock.
            self._fs, self._pid, self._lock = None, os.getpid(), threading.Lock()
        with self._lock:
            if self._fs is None:
                self._fs = self._class(**self._options, skip_instance_cache=True)
            return self._fs

    def says(self, error: BaseException) -> str:
        """An error in words, without passwords."""
        return printable(reason(error), self._secrets)

    def refusal(self, what: str, error: BaseException) -> StoreError:
        """The error to raise when the store cannot be used."""
        return StoreError(f"remote_checkpoints={self.url!r} {what}: {self.says(error)}", kind_of(error))

    def shown(self, error: BaseException) -> BaseException | None:
        """The error as the cause that a traceback shows; None if a password is in it, or in one that led to it."""
        texts: list[str] = []
        each: BaseException | None = error
        while each is not None and len(texts) < LONGEST_CHAIN:
            texts += [repr(each), str(each), *getattr(each, "__notes__", ())]
            each = each.__cause__ or each.__context__
        is_clean = each is None and all(printable(text, self._secrets) == text for text in texts)
        return error if is_clean and not isinstance(error, StoreError) else None

    # ---- patience ----

    def patiently(self, what: str, action: Callable[[], T]) -> T:
        """`action`, again for a while where waiting may help: for the start of a run, which needs the store."""

        def ends(error: Exception, seconds: float) -> bool:
            return kind_of(error).lasts or seconds >= self.retry.backoff.start

        try:
            return self.repeat(what, action, ends)
        except StoreError:
            raise
        except Exception as error:  # each package has its own
            raise self.refusal(f"failed while {what}", error) from self.shown(error)

    def repeat(self, what: str, action: Callable[[], T], ends: Callable[[Exception, float], bool], **options: Any) -> T:
        """`self.retry`, with a new connection where the old one may be the reason."""

        def attempt() -> T:
            before = self._fs
            try:
                return action()
            except Exception as error:
                # One of a bucket is a pool, which outlives an outage, and making another takes a second.
                stays = self._is_bucket and not kind_of(error).lasts and not isinstance(error, TimeoutError)
                if self._fs is before and not stays:
                    self._fs, self._lock = None, threading.Lock()  # which one that hangs while it connects holds
                raise

        return self.retry(what, attempt, ends, self.says, **options)

    def _watched(self, action: Callable[[Callback], T], seconds: float | None = None) -> T:
        """`action` in a thread, which is left alone if it makes no progress. It may never end: no connection of a
        dead server does for some packages.
        """
        seconds = self.stall_seconds if seconds is None else seconds
        progress, done = _Progress(), threading.Event()
        outcome: list[T] = []
        errors: list[BaseException] = []

        def work() -> None:
            try:
                outcome.append(action(progress))
            except BaseException as error:
                errors.append(error)
            done.set()

        threading.Thread(target=work, name="remote-checkpoint-transfer", daemon=True).start()
        seen = 0
        while not done.wait(seconds):
            if (now := progress.seen()) == seen:
                raise TimeoutError(f"no data was transferred in {seconds:g} s")
            seen = now
        if errors:
            raise errors[0]
        return outcome[0]

    # ---- checkpoints ----

    def check_writable(self) -> None:
        """Write, and delete again, an empty object: what fails here would fail after the first checkpoint."""
        self.patiently("writing", self._probe)

    def _probe(self) -> None:
        path = f"{self.root}/.probe-{uuid.uuid4().hex}"

        def write(_: Callback) -> None:
            if not self._is_bucket:  # where a folder is only a part of a name
                self.fs.makedirs(self.root, exist_ok=True)
            self.fs.pipe_file(path, b"")
            self.fs.rm_file(path)

        try:
            self._watched(write)
        except Exception as error:
            raise self.refusal("cannot be written", error) from self.shown(error)

    def checkpoints(self) -> Listing:
        """All `checkpoint-N`, committed or not, the highest step first, as the store lists them: it may lag behind."""
        found: Listing = {}

        def find(_: Callback) -> Any:
            self.fs.invalidate_cache()
            try:
                return self.fs.find(self.root, detail=True)
            except FileNotFoundError as error:
                no_bucket = kind_of(error) is MISSING
                if no_bucket or self._is_bucket and not self.fs.exists(self.root.split("/")[0]):
                    raise
                return {}

        try:
            entries = self._watched(find, LONG_SECONDS)
        except Exception as error:
            raise self.refusal("cannot be listed", error) from self.shown(error)
        for path, info in entries.items():
            name, _, file = path[len(self.root) + 1 :].partition("/")
            # Of anything else (a folder, which object stores show as an empty object, or a pipe) there are no bytes.
            if file and info["type"] == "file" and is_checkpoint_name(name):
                found.setdefault(name, {})[file] = info["size"]
        return {name: found[name] for name in sorted(found, key=step_of, reverse=True)}

    def marker(self, name: str) -> bytes | None:
        """The bytes of a checkpoint's marker, None if it has none."""
        return self.read(f"{name}/{MARKER}")

    def read(self, file: str, largest: int | None = None) -> bytes | None:
        """The bytes of a small file, None if there is none. Of one that is too large: nothing, which is as damaged.

        Args:
            largest: how many bytes it may have; None for as many as a marker.
        """
        most = LARGEST_MARKER if largest is None else largest

        def take(_: Callback) -> bytes:
            path = f"{self.root}/{file}"
            return self.fs.cat_file(path) if self.fs.info(path)["size"] <= most else b""

        try:
            return self._watched(take)
        except FileNotFoundError:
            return None

    def size(self, file: str) -> int | None:
        """Bytes of a file in the store, by its own entry and not by a listing; None if there is none."""

        def look(_: Callback) -> int:
            self.fs.invalidate_cache()
            return self.fs.info(f"{self.root}/{file}")["size"]

        try:
            return self._watched(look)
        except FileNotFoundError:
            return None

    def put(
        self,
        source: Path,
        file: str,
        progress: Callable[[int], None] = lambda _: None,
        seconds: float | None = None,
    ) -> None:
        """Upload a file.

        Args:
            progress: called with the bytes that have arrived.
            seconds: after which it fails if nothing comes through; None for as many as a large file takes.
        """

        def send(callback: Any) -> None:
            callback.tell = progress
            self.fs.put_file(str(source), f"{self.root}/{file}", callback=callback, **self._part)

        # Other packages than those of S3 and GCS do not say how far they are.
        self._watched(send, seconds or (None if self._part else LONG_SECONDS))

    def get(self, file: str, target: Path) -> None:
        """Download a file."""

        def fetch(callback: Any) -> None:
            callback.target = target
            self.fs.get_file(f"{self.root}/{file}", str(target), callback=callback)

        self._watched(fetch)

    def remove_file(self, file: str) -> None:
        """Delete a file, if it is there."""
        try:
            self._watched(lambda _: self.fs.rm_file(f"{self.root}/{file}"))
        except FileNotFoundError:
            pass

    def remove(self, name: str) -> None:
        """Delete a checkpoint, its marker first."""

        def delete(_: Callback) -> None:
            self.fs.invalidate_cache()
            if self.fs.exists(f"{self.root}/{name}"):
                self.fs.rm(f"{self.root}/{name}", recursive=True)

        if self.marker(name) is not None:
            self.remove_file(f"{name}/{MARKER}")
        self._watched(delete, LONG_SECONDS)


class _Progress(Callback):
    """How many bytes of a file have been transferred.

    Attributes:
        tell: is called with their number.
        target: the file that is being written here, which grows where a package does not call.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tell: Callable[[int], None] = lambda _: None
        self.target: Path | None = None

    def call(self, hook_name: str | None = None, **kwargs: Any) -> None:
        self.tell(self.value)

    def seen(self) -> int:
        """A number that grows with each byte."""
        return self.value + (self.target.stat().st_size if self.target is not None and self.target.exists() else 0)


def in_parallel(actions: Iterable[Callable[[], None]], workers: int) -> None:
    """Do `actions` in threads; after one has failed, begin no more, and raise its error when all have stopped.

    The threads are daemons, unlike those of an executor: one that waits for a dead server does not hold up the end of
    the program.
    """
    waiting, errors = deque(actions), list[BaseException]()

    def work() -> None:
        while not errors:
            try:
                action = waiting.popleft()
            except IndexError:
                return
            try:
                action()
            except BaseException as error:
                errors.append(error)

    threads = [
        threading.Thread(target=work, name=f"remote-checkpoint-{i}", daemon=True)
        for i in range(min(workers, len(waiting)))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
