"""A store that fails: every fault at every operation ends well; what it says; what waits; what a URL may be."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from faulty_s3 import FaultyS3
from pool import WorkerPool
from test_remote import contents, write_checkpoint

from hf_nanotron.checkpoint.directory.retention import newest
from hf_nanotron.checkpoint.remote import store as remote
from hf_nanotron.checkpoint.remote.backlog import LocalSpace, beyond_retention, beyond_space
from hf_nanotron.checkpoint.remote.fetch import fetch_newest
from hf_nanotron.checkpoint.remote.retry import Backoff, Retry
from hf_nanotron.checkpoint.remote.store import RemoteStore
from hf_nanotron.checkpoint.remote.upload import Uploader
from hf_nanotron.cli.main import main

QUICK = Backoff(first=0.01, longest=0.02, start=5)
OPTIONS = {"config_kwargs": {"retries": {"max_attempts": 0}, "connect_timeout": 60, "read_timeout": 120}}


@pytest.fixture(scope="module")
def server() -> Iterator[FaultyS3]:
    s3fs = pytest.importorskip("s3fs")
    server = FaultyS3()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
            patch.setenv(f"AWS_{name}", "any")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        for name in ("NO_PROXY", "no_proxy"):
            patch.setenv(name, "127.0.0.1")
        patch.setattr(s3fs.S3FileSystem, "retries", 1)  # its own attempts would hide the faults
        patch.setattr(remote, "PART_BYTES", 64 << 10)
        patch.setattr("moto.s3.models.S3_UPLOAD_PART_MIN_SIZE", 256)
        s3fs.S3FileSystem(endpoint_url=server.endpoint).mkdir("faults")
        yield server
    server.stop()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints, the second with a file that goes in three parts."""
    folder = tmp_path_factory.mktemp("faults")
    write_checkpoint(folder, 1)
    write_checkpoint(folder, 2, 150 << 10)
    return folder


@pytest.fixture(scope="module")
def connection(server: FaultyS3) -> Any:
    """One for all stores: making one takes longer than all else."""
    return RemoteStore("s3://faults/any", {"endpoint_url": server.endpoint, **OPTIONS}).fs


def all_of(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def store_at(server: FaultyS3, name: str, connection: Any, backoff: Backoff = QUICK) -> RemoteStore:
    store = RemoteStore(f"s3://faults/{name}", {"endpoint_url": server.endpoint, **OPTIONS}, backoff)
    store._class = lambda **_: connection
    return store


OPERATIONS = {  # of an upload: whether it takes the checkpoint with the large file
    "put": False, "marker": False, "head": False, "get": False, "list": False, "delete": False,
    "create": True, "part": True, "complete": True,
}  # fmt: skip
KINDS = ("500", "503", "reset", "expired", "denied", "no bucket", "slow", "hang", "truncated", "stale")
# Only bodies are cut off, only listings are stale, and each request that hangs takes seconds here.
ONLY = {"truncated": ("put", "marker", "part"), "stale": ("list",), "hang": ("put", "part", "head")}
ONLY["slow"] = ("put", "part", "get", "list")  # no request is told from another
REPEATED = ("503", "denied")  # uploads meet them as "500" and "expired": with --full-matrix
HARMLESS = ("slow", "stale", "reset")  # the last one is sometimes repeated by the HTTP client itself


def upload_faults() -> list[tuple[str, str]]:
    pairs = [(kind, operation) for kind in KINDS for operation in OPERATIONS]
    return [(kind, operation) for kind, operation in pairs if operation in ONLY.get(kind, operation)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_fault_at_every_operation_of_an_upload(
    kind: str, server: FaultyS3, connection: Any, source: Path, pytestconfig: pytest.Config
) -> None:
    if kind in REPEATED and not pytestconfig.getoption("full_matrix"):
        pytest.skip("runs with --full-matrix")
    for each, operation in upload_faults():
        if each != kind:
            continue
        path = source / ("checkpoint-2" if OPERATIONS[operation] else "checkpoint-1")
        store = store_at(server, f"up-{kind}-{operation}".replace(" ", "-"), connection)
        uploader = Uploader(store, source, keep_local=9)
        store.stall_seconds = 1.5 if kind == "hang" else 60.0
        if operation in ("get", "delete"):  # an old marker is read and deleted
            store.fs.pipe_file(f"{store.root}/{path.name}/committed.json", b"old")
        server.inject(kind, operation, times=1 if kind == "hang" else 2)
        uploader.submit(path)
        assert uploader.wait(600), f"{kind} at {operation}: {store.retry.last_error}"
        uploader.close()
        spoilt, server.fault = server.spoilt, None
        assert spoilt, f"{kind} at {operation} did not happen"
        found = store.fs.cat(store.fs.find(store.root))
        assert {key.partition(f"/{path.name}/")[2]: value for key, value in found.items()} == all_of(path), operation
        # A marker that is not there and a bucket that is not look alike; the puts that follow tell.
        missed = kind == "no bucket" and operation in ("get", "head", "delete")
        assert store.retry.retries or kind in HARMLESS or missed, f"{kind} at {operation}"


@pytest.mark.parametrize("kind", ["500", "503", "reset", "slow", "hang", "truncated", "stale"])
def test_every_fault_at_every_operation_of_a_download(
    kind: str, server: FaultyS3, connection: Any, source: Path, tmp_path: Path
) -> None:
    good = store_at(server, "down", connection)
    if not good.checkpoints():
        uploader = Uploader(good, source, keep_local=9)
        for step in (1, 2):
            uploader.submit(source / f"checkpoint-{step}")
        assert uploader.wait(600)
        uploader.close()
    for operation in ("list", "get", "head"):
        if operation != {"stale": "list", "truncated": "get", "hang": "get"}.get(kind, operation):
            continue
        store = store_at(server, "down", connection)
        store.stall_seconds = 1.5 if kind == "hang" else 60.0
        server.inject(kind, operation, times=1 if kind == "hang" else 3)
        fetched = fetch_newest(store, tmp_path / operation)
        spoilt, server.fault = server.spoilt, None
        assert spoilt, f"{kind} at {operation} did not happen"
        assert fetched is not None and fetched.name == "checkpoint-2"
        assert contents(fetched) == contents(source / "checkpoint-2"), operation


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("expired", "ExpiredToken|token has expired.*the credentials are wrong or have expired: renew them"),
        ("denied", "Access Denied.*the credentials lack permissions"),
        ("no bucket", "bucket does not exist.*there is no such bucket"),
    ],
)
def test_what_lasts_is_refused_at_the_start(
    kind: str, said: str, server: FaultyS3, connection: Any, tmp_path: Path
) -> None:
    """At the first attempt: nothing is waited for."""
    for operation, action in (
        ("put", lambda store: Uploader(store, tmp_path)),
        ("list", lambda store: fetch_newest(store, tmp_path)),
    ):
        server.inject(kind, operation, times=9)
        with pytest.raises(ValueError, match=rf"remote_checkpoints='s3://faults/start' (cannot|failed).*: .*({said})"):
            action(store_at(server, "start", connection, Backoff(100, 100, 100)))
        assert server.spoilt == 1 or (kind, operation) == ("no bucket", "list")  # where files are looked for first
        server.fault = None


def test_an_outage_at_the_start_is_waited_for(server: FaultyS3, connection: Any, tmp_path: Path) -> None:
    """Until it is over, or for so many seconds."""
    for kind in ("500", "reset"):
        server.inject(kind, "put", times=5)
        Uploader(store_at(server, "start", connection), tmp_path)
        assert server.spoilt == 5
    server.inject("500", "put", times=10**6)
    with pytest.raises(ValueError, match="remote_checkpoints='s3://faults/start' cannot be written: .*internal error"):
        Uploader(store_at(server, "start", connection, Backoff(0.01, 0.01, start=0.1)), tmp_path)
    server.fault = None


def test_a_connection_that_hangs_while_it_is_made(tmp_path: Path) -> None:
    """The next attempt makes another one."""
    ends, made = threading.Event(), []

    def connect(**options: Any) -> Any:
        made.append(options)
        if len(made) == 1:
            ends.wait(30)
        return fsspec.filesystem("memory")

    store = RemoteStore(f"memory://{tmp_path.name}", backoff=QUICK)
    store._class, store.stall_seconds = connect, 0.2
    store.check_writable()
    ends.set()
    assert len(made) >= 2 and "no data was transferred in 0.2 s" in store.retry.last_error


def test_credentials_that_are_renewed_are_taken_up(
    server: FaultyS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is written anew while the run goes on; the server wants the new key."""
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.delenv(f"AWS_{name}")
    keys = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(keys))

    def write(key: str) -> None:
        keys.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = x\n")

    write("OLD")
    store = RemoteStore("s3://faults/renewed", {"endpoint_url": server.endpoint, **OPTIONS}, QUICK)
    uploader = Uploader(store, tmp_path)
    server.key = "NEW"
    uploader.submit(write_checkpoint(tmp_path, 1))
    while not store.retry.retries:
        uploader.wait(0.02)
    assert "the credentials are wrong or have expired" in store.retry.last_error
    write("NEW")
    assert uploader.wait(600)
    uploader.close()
    server.key = None
    assert len(store.fs.find(store.root)) == 5


# ---- what it says, and what waits, without a server ----


def test_one_line_a_minute_for_a_store(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four files fail 100 times each, a second apart; then the store answers."""
    monkeypatch.setattr(logging.getLogger("hf_nanotron"), "propagate", True)
    now = [0.0]
    retry = Retry("s3://b/run", Backoff(1, 1), clock=lambda: now[0])

    def fail() -> None:
        now[0] += 0.25
        if now[0] < 400:
            raise OSError("no route")

    for each in range(4):
        retry(f"uploading {each}", fail, lambda *_: False, str, pause=lambda seconds: None)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 8 and retry.retries == 1599 and retry.failing_seconds == 0
    assert lines[1] == ("s3://b/run: uploading 0 failed: no route. 241 attempts have failed in 60 s; retrying in 1 s.")
    assert lines[-1] == "s3://b/run responds again after 400 s and 1599 failed attempts."


def test_back_off() -> None:
    backoff = Backoff(2, 60)
    assert [backoff.pause(n) for n in (1, 2, 3, 5, 6, 7, 10**6)] == [2, 4, 8, 32, 60, 60, 60]


class Down(RemoteStore):
    """A store that does not answer until it is told to."""

    up = False

    def _watched(self, action: Any, seconds: float | None = None) -> Any:
        if not self.up:
            raise ConnectionError("no route")
        return super()._watched(action, seconds)

    def check_writable(self) -> None:
        pass


@pytest.mark.parametrize(
    ("limits", "kept", "left"),
    [
        ({}, (), [1, 2, 3, 4, 5]),
        ({"space": LocalSpace(limit=2)}, (), [4, 5]),
        ({"space": LocalSpace(limit=1)}, (2,), [2, 5]),  # the best and the newest, whatever the limit
        ({"space": LocalSpace(min_free=1e18)}, (2,), [2, 5]),  # a full disk
        ({"save_total_limit": 3}, (), [3, 4, 5]),
        ({"save_total_limit": 2}, (1,), [1, 5]),
        ({"save_total_limit": 4, "space": LocalSpace(limit=2)}, (), [4, 5]),
    ],
)
def test_what_waits_while_a_store_is_down(
    limits: dict[str, Any], kept: tuple[int, ...], left: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Down(f"memory://{tmp_path.name}", backoff=QUICK)
    uploader = Uploader(store, tmp_path, keep_local=9, **limits)
    for step in range(1, 6):
        uploader.submit(write_checkpoint(tmp_path, step), keep=[tmp_path / f"checkpoint-{k}" for k in kept])
        while not store.retry.retries:
            uploader.wait(0.01)
    assert [path.name for path in uploader.pending()] == [f"checkpoint-{step}" for step in left]
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{step}" for step in left]
    missing = uploader.what_is_missing()
    assert all(f"checkpoint-{step} (" in missing for step in left) and "no route" in missing
    store.up = True
    assert uploader.wait(600) and uploader.what_is_missing() == ""
    uploader.close()
    assert sorted(store.checkpoints()) == [f"checkpoint-{step}" for step in left]


def test_the_one_on_its_way_is_not_given_up(tmp_path: Path) -> None:
    """Or a store that is merely slower than the run saves would never get a whole one."""
    paths = [write_checkpoint(tmp_path, step) for step in (1, 2, 3)]
    assert beyond_retention(paths, {"checkpoint-1"}, 1) == [paths[1]]
    assert beyond_space(paths, {"checkpoint-1"}, LocalSpace(limit=1)) == [paths[1]]
    assert beyond_space(paths, (), LocalSpace(limit=3, min_free=0)) == [] == beyond_retention(paths, (), None)


def test_checkpoints_of_an_earlier_run_are_not_given_up(tmp_path: Path) -> None:
    """Nobody has asked the store yet whether it has them."""
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, step)
    store = Down(f"memory://{tmp_path.name}", backoff=QUICK)
    uploader = Uploader(store, tmp_path, keep_local=9, space=LocalSpace(limit=1))
    uploader.submit_existing()
    for step in (4, 5):
        uploader.submit(write_checkpoint(tmp_path, step))
    assert len(list(tmp_path.glob("checkpoint-*"))) >= 4 and all(
        (tmp_path / f"checkpoint-{n}").exists() for n in (1, 2, 3, 5)
    )
    store.up = True
    assert uploader.wait(600)
    uploader.close()


def test_a_checkpoint_that_is_deleted_while_it_waits(tmp_path: Path) -> None:
    store = Down(f"memory://{tmp_path.name}", backoff=QUICK)
    uploader = Uploader(store, tmp_path, keep_local=9)
    for step in (1, 2):
        uploader.submit(write_checkpoint(tmp_path, step))
    shutil.rmtree(tmp_path / "checkpoint-1")
    store.up = True
    assert uploader.wait(600)
    uploader.close()
    assert list(store.checkpoints()) == ["checkpoint-2"]


# ---- through the trainer ----


def train_while_the_store_is_down(output: str, url: str, signal_after: float | None) -> dict[str, Any]:
    """A run of two steps whose uploads all fail."""
    from test_gradients import stock_model
    from tiny import pad_batch, random_dataset, training_arguments

    from hf_nanotron import NanotronTrainer, NanotronTrainingArguments

    def fail(self: RemoteStore, *_: Any) -> None:
        raise ConnectionError("no route")

    values = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "remote_checkpoints": url}
    values |= {"remote_retry_seconds": 0.01, "remote_wait_timeout": 3600 if signal_after else 0.3}
    values |= {"save_on_signal": 30.0 if signal_after else 0.0}
    args = NanotronTrainingArguments(**training_arguments(output_dir=output, **values))
    trainer = NanotronTrainer(
        model=stock_model("llama", num_hidden_layers=2),
        args=args,
        train_dataset=random_dataset(8),
        data_collator=pad_batch,
    )
    warnings: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RemoteStore, "put", fail)
        patch.setattr("hf_nanotron.training.remote.logger.warning", warnings.append)
        if signal_after and trainer.mesh.rank == 1:  # not the one that uploads
            wait = trainer._uploads.wait

            def signalled(signals: Any) -> None:
                threading.Timer(signal_after, os.kill, (os.getpid(), signal.SIGTERM)).start()
                wait(signals)

            trainer._uploads.wait = signalled  # type: ignore[method-assign]
        trainer.train()
    history = trainer.state.log_history
    if trainer._uploads.uploader is not None:
        trainer._uploads.uploader.close()
    trainer.mesh.close()
    return {"warnings": warnings, "history": history}


@pytest.mark.parametrize("signal_after", [None, 0.3], ids=["timeout", "signal"])
def test_a_run_ends_while_its_store_is_down(pool: WorkerPool, tmp_path: Path, signal_after: float | None) -> None:
    """Its result is kept, what is missing is named, and the command uploads it; the metric is the same on each rank."""
    out, url = tmp_path / "out", f"file://{tmp_path}/store"
    first, second = pool.run(2, train_while_the_store_is_down, str(out), url, signal_after)
    names = ("remote_pending_checkpoints", "remote_retries", "remote_failing_seconds")
    logs = [[entry[name] for name in names] for entry in first["history"] if "loss" in entry]
    assert len(logs) == 2 and logs[1][0] == 1 and logs[1][1] >= 0
    assert logs == [[entry[name] for name in names] for entry in second["history"] if "loss" in entry]
    assert second["warnings"] == []
    (said,) = first["warnings"]
    assert said.startswith(f"Not uploaded to {url}: checkpoint-1 (") and "ConnectionError: no route" in said
    assert f"hf-nanotron upload {out} {url}" in said
    assert [path.name for path in newest(out)] == ["checkpoint-2", "checkpoint-1"]
    if signal_after is None:
        main(["upload", str(out), url])
        assert list(RemoteStore(url).checkpoints()) == ["checkpoint-2", "checkpoint-1"]
        assert contents(tmp_path / "store" / "checkpoint-2") == contents(out / "checkpoint-2")
        assert len(newest(out)) == 2


def test_the_upload_command_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "out", 1)
    for arguments, said in (
        ((str(tmp_path / "none"), "memory://x"), "does not exist; give the folder of a run"),
        ((str(tmp_path / "out"), "http://me:word@x/y"), "http://***@x/y"),
        ((str(tmp_path / "out"), "memory://x", "--timeout", "-1"), "must be at least 0"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["upload", *arguments])
        assert ended.value.code == 2
        error = capsys.readouterr().err
        assert said in error and "word" not in error
