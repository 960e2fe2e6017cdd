"""Checkpoints in a bucket: against a server of the S3 protocol on this machine, a folder, and memory."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from pool import WorkerPool

from hf_nanotron.checkpoint.directory.commit import begin, commit, describe
from hf_nanotron.checkpoint.directory.retention import newest
from hf_nanotron.checkpoint.directory.verify import MARKER, check, is_committed
from hf_nanotron.checkpoint.remote import fetch as remote_fetch, retry
from hf_nanotron.checkpoint.remote.fetch import fetch, fetch_newest, fetch_newest_together, newest_remote
from hf_nanotron.checkpoint.remote.retry import Backoff
from hf_nanotron.checkpoint.remote.store import RemoteStore
from hf_nanotron.checkpoint.remote.upload import Uploader
from hf_nanotron.parallel.config import ParallelConfig
from hf_nanotron.parallel.mesh import ParallelMesh

BIG = 20 << 20  # bytes: goes in three parts
# botocore's own attempts would only make the tests of failures wait.
QUICK = {"config_kwargs": {"retries": {"max_attempts": 0}, "connect_timeout": 60, "read_timeout": 120}}
Make = Callable[..., RemoteStore]


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    pytest.importorskip("s3fs")
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "anyone",
            "AWS_SECRET_ACCESS_KEY": "anything",
            "AWS_DEFAULT_REGION": "us-east-1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3").mkdir("bucket")
        yield endpoint
    server.stop()


@pytest.fixture
def url(request: pytest.FixtureRequest, endpoint: str) -> str:
    return f"s3://bucket/{request.node.name}/run"


@pytest.fixture(params=["s3", "file", "memory"])
def any_url(request: pytest.FixtureRequest, tmp_path: Path, endpoint: str) -> str:
    name = request.node.name.replace("[", "-").rstrip("]")
    if request.param == "s3":
        return f"s3://bucket/{name}"
    return f"file://{tmp_path}/far/away" if request.param == "file" else f"memory://{name}"


def write_checkpoint(output_dir: Path, step: int, size: int = 1000) -> Path:
    directory = output_dir / f"checkpoint-{step}"
    begin(directory)
    contents = {"config.json": b"{}", "model.safetensors": os.urandom(size), "tokenizer/vocab.txt": os.urandom(50)}
    for name, data in contents.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(data)
    (directory / "README.md").write_text("A model.\n")
    describe(directory, 0)
    commit(directory, 1, step, 1.0)
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    """But for README.md, which is uploaded for people, and not downloaded."""
    files = (path for path in directory.rglob("*") if path.is_file() and path.name != "README.md")
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def upload(store: RemoteStore, output_dir: Path, *steps: int, **options: Any) -> Uploader:
    uploader = Uploader(store, output_dir, **options)
    for step in steps:
        uploader.submit(output_dir / f"checkpoint-{step}")
    assert uploader.wait(600)
    uploader.close()
    return uploader


def test_what_is_uploaded_is_what_is_fetched(any_url: str, tmp_path: Path) -> None:
    store, path = RemoteStore(any_url), write_checkpoint(tmp_path / "out", 3)
    uploader = upload(store, tmp_path / "out", 3)
    expected = contents(path)
    sizes = {name: len(data) for name, data in expected.items()} | {"README.md": (path / "README.md").stat().st_size}
    assert (uploader.uploaded, store.retry.retries) == (1, 0)
    assert uploader.uploaded_bytes == sum(sizes.values())
    assert store.checkpoints() == {"checkpoint-3": sizes}
    assert newest_remote(store) == "checkpoint-3"
    fetched = fetch_newest(store, tmp_path / "new")
    assert fetched == tmp_path / "new" / "checkpoint-3"
    check(fetched)
    assert contents(fetched) == expected
    assert fetch_newest(store, tmp_path / "new") is None  # as new, so nothing is fetched
    assert uploader.pending() == []


def test_large_files_go_in_parts_and_the_marker_last(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, path = RemoteStore(url), write_checkpoint(tmp_path, 1, BIG)
    ended: list[str] = []
    put = RemoteStore.put

    def recorded(self: RemoteStore, source: Path, file: str, *progress: Any) -> None:
        if source.name == MARKER:  # the server has all the others by now
            there = store.checkpoints()["checkpoint-1"]
            del there["README.md"]
            assert there == {name: len(data) for name, data in contents(path).items() if name != MARKER}
        put(self, source, file, *progress)
        ended.append(source.name)

    monkeypatch.setattr(RemoteStore, "put", recorded)
    upload(store, tmp_path, 1)
    assert ended[-1] == MARKER and len(ended) == 5
    entity = store.fs.info(f"{store.root}/checkpoint-1/model.safetensors")["ETag"]
    assert entity.strip('"').endswith("-3"), "20 MiB in parts of 8 MiB"


def _upload_until_killed(url: str, output_dir: Path, files: int) -> None:
    put, done = RemoteStore.put, []

    def counted(self: RemoteStore, source: Path, file: str, *progress: Any) -> None:
        put(self, source, file, *progress)
        done.append(file)
        if len(done) == files:
            os.kill(os.getpid(), signal.SIGKILL)

    RemoteStore.put = counted  # type: ignore[method-assign]
    upload(RemoteStore(url), output_dir, 2)


@pytest.mark.parametrize("files", [1, 4])
def test_a_killed_upload_is_none_and_the_next_run_completes_it(url: str, tmp_path: Path, files: int) -> None:
    store = RemoteStore(url)
    write_checkpoint(tmp_path, 1)
    upload(store, tmp_path, 1)  # so that the forked process has a used connection to forget
    path = write_checkpoint(tmp_path, 2, BIG)
    process = multiprocessing.get_context("fork").Process(target=_upload_until_killed, args=(url, tmp_path, files))
    process.start()
    process.join(600)
    assert process.exitcode == -signal.SIGKILL
    assert store.checkpoints()["checkpoint-2"] and MARKER not in store.checkpoints()["checkpoint-2"]
    assert newest_remote(store) == "checkpoint-1"

    uploader = Uploader(store, tmp_path)
    uploader.submit_existing()
    uploader.wait(600)
    assert newest_remote(store) == "checkpoint-2"
    assert uploader.uploaded == 1
    assert contents(fetch(store, "checkpoint-2", tmp_path / "new")) == contents(path)


def test_leftovers_of_a_killed_upload_are_deleted(url: str, tmp_path: Path) -> None:
    store = RemoteStore(url)
    store.fs.pipe_file(f"{store.root}/checkpoint-2/model.safetensors", b"half")
    store.fs.pipe_file(f"{store.root}/checkpoint-9/model.safetensors", b"newer, so perhaps somebody's")
    store.fs.pipe_file(f"{store.root}/notes.txt", b"not ours")
    write_checkpoint(tmp_path, 4)
    upload(store, tmp_path, 4)
    assert list(store.checkpoints()) == ["checkpoint-9", "checkpoint-4"]
    assert store.fs.exists(f"{store.root}/notes.txt")


def test_another_checkpoint_of_the_same_step_replaces_the_old_one(url: str, tmp_path: Path) -> None:
    store = RemoteStore(url)
    (write_checkpoint(tmp_path, 1) / "notes.txt").write_text("mine")  # which is not uploaded
    upload(store, tmp_path, 1)
    store.fs.pipe_file(f"{store.root}/checkpoint-1/more.txt", b"not in the next one")
    path = write_checkpoint(tmp_path, 1)
    assert upload(store, tmp_path, 1).uploaded == 1
    assert contents(path).pop("notes.txt") == b"mine"
    assert set(store.checkpoints()["checkpoint-1"]) == {*contents(path), "README.md"} - {"notes.txt"}
    (path / "notes.txt").unlink()
    assert contents(fetch(store, "checkpoint-1", tmp_path / "new")) == contents(path)
    assert upload(store, tmp_path, 1).uploaded == 0  # it is there


def test_only_missing_and_differing_files_are_fetched(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, path = RemoteStore(url), write_checkpoint(tmp_path, 5)
    upload(store, tmp_path, 5)
    expected = contents(path)
    (path / "config.json").unlink()
    damaged = bytearray(expected["model.safetensors"])
    damaged[7] ^= 1
    (path / "model.safetensors").write_bytes(damaged)
    fetched: list[str] = []
    get = RemoteStore.get

    def recorded(self: RemoteStore, file: str, target: Path) -> None:
        assert not is_committed(path)
        fetched.append(file.partition("/")[2])
        get(self, file, target)

    monkeypatch.setattr(RemoteStore, "get", recorded)
    fetch_newest(store, tmp_path)
    assert sorted(fetched) == ["config.json", "model.safetensors"]
    assert contents(path) == expected


def test_an_interrupted_download_is_no_checkpoint(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, new = RemoteStore(url, backoff=Backoff(0.01, start=0)), tmp_path / "new"
    path = write_checkpoint(tmp_path / "out", 5)
    upload(store, tmp_path / "out", 5)
    with monkeypatch.context() as patch:
        patch.setattr(remote_fetch, "WORKERS", 1)
        get = RemoteStore.get

        def broken(self: RemoteStore, file: str, target: Path) -> None:
            get(self, file, target)
            if file.endswith("config.json"):
                target.write_bytes(b"")

        patch.setattr(RemoteStore, "get", broken)
        with pytest.raises(RuntimeError, match="config.json: OSError: received 0 of 2 bytes"):
            fetch_newest(store, new)
    assert newest(new) == []
    fetched = fetch_newest(store, new)
    assert fetched is not None and contents(fetched) == contents(path)
    write_checkpoint(new, 6)
    assert fetch_newest(store, new) is None  # the local one is newer


def test_a_damaged_remote_checkpoint_is_passed_over(url: str, tmp_path: Path) -> None:
    store = RemoteStore(url)
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, step)
    upload(store, tmp_path, 1, 2, 3)
    store.fs.pipe_file(f"{store.root}/checkpoint-3/{MARKER}", b'{"crc32":')
    store.fs.rm_file(f"{store.root}/checkpoint-2/config.json")
    assert newest_remote(store) == "checkpoint-1"


def test_another_programs_directory_is_left_alone(url: str, tmp_path: Path) -> None:
    store = RemoteStore(url)
    write_checkpoint(tmp_path / "out", 1)
    upload(store, tmp_path / "out", 1)
    (tmp_path / "new" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "new" / "checkpoint-1" / "mine.txt").touch()
    with pytest.raises(ValueError, match="not a checkpoint of this program"):
        fetch_newest(store, tmp_path / "new")


def test_retention_on_both_sides(any_url: str, tmp_path: Path) -> None:
    store, uploader = RemoteStore(any_url), None
    uploader = Uploader(store, tmp_path, keep_local=2, save_total_limit=3)
    for step in range(2, 7):
        uploader.submit(write_checkpoint(tmp_path, step), keep=[tmp_path / "checkpoint-2"])
        uploader.wait(600)
    assert list(store.checkpoints()) == ["checkpoint-6", "checkpoint-5", "checkpoint-2"]
    assert [path.name for path in newest(tmp_path)] == ["checkpoint-6", "checkpoint-5", "checkpoint-2"]
    uploader.close()


def test_what_is_not_uploaded_stays_here(url: str, tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write_checkpoint(tmp_path, step)
    upload(RemoteStore(url), tmp_path, 3, 4)
    assert [path.name for path in newest(tmp_path)] == ["checkpoint-4", "checkpoint-2", "checkpoint-1"]


def test_a_server_that_comes_back(
    endpoint: str, tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    moto = pytest.importorskip("moto.server")
    monkeypatch.setattr(pytest.importorskip("s3fs").S3FileSystem, "retries", 1)
    monkeypatch.setattr(logging.getLogger("hf_nanotron"), "propagate", True)
    monkeypatch.setattr(retry, "LOG_SECONDS", 3600.0)
    server = moto.ThreadedMotoServer("127.0.0.1", port, verbose=False)
    server.start()
    backoff = Backoff(first=0.02, longest=0.1, start=0.1)
    options = {"endpoint_url": f"http://127.0.0.1:{port}", **QUICK}
    store = RemoteStore("s3://bucket/back", options, backoff)
    uploader = Uploader(store, tmp_path)
    server.stop()
    server._server.server_close()
    uploader.submit(write_checkpoint(tmp_path, 1))  # it waits for nothing, or would for ever
    while store.retry.retries <= 2:
        assert not uploader.wait(0.05)
    assert uploader.pending() == [tmp_path / "checkpoint-1"] and store.retry.failing_seconds > 0
    missing = uploader.what_is_missing()
    assert "Not uploaded to s3://bucket/back: checkpoint-1 (1." in missing and "onnect" in missing
    assert f"hf-nanotron upload {tmp_path} s3://bucket/back" in missing
    with pytest.raises(ValueError, match=r"s3://bucket/back' failed while looking for runs: Endpoint"):
        newest_remote(RemoteStore("s3://bucket/back", options, backoff))
    with pytest.raises(ValueError, match=r"s3://bucket/back' cannot be written"):
        Uploader(RemoteStore("s3://bucket/back", options, backoff), tmp_path)
    server = moto.ThreadedMotoServer("127.0.0.1", port, verbose=False)
    server.start()
    assert uploader.wait(600) and newest_remote(store) == "checkpoint-1" and uploader.what_is_missing() == ""
    uploader.close()
    server.stop()
    server._server.server_close()
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("s3://bucket/back")]
    failing = [line for line in lines if f"1 checkpoint waits in {tmp_path}" in line]
    assert store.retry.retries > 2 and len(failing) == 1, "once a minute"
    assert sum("responds again" in line for line in lines) == 1


def _use(store: RemoteStore, path: Path) -> None:
    path.write_text(newest_remote(store) or "")


def test_forks_while_uploading(url: str, tmp_path: Path) -> None:
    """Worker processes of a data loader may start at any moment, and might even look at the store."""
    store = RemoteStore(url)
    write_checkpoint(tmp_path, 1)
    write_checkpoint(tmp_path, 2, BIG)
    uploader = upload(store, tmp_path, 1)
    uploader = Uploader(store, tmp_path)
    uploader.submit(tmp_path / "checkpoint-2")
    context, processes = multiprocessing.get_context("fork"), []
    for i in range(2):
        processes.append(context.Process(target=_use, args=(store, tmp_path / f"seen-{i}")))
        processes[-1].start()
        time.sleep(0.05)
    for i, process in enumerate(processes):
        process.join(600)
        assert process.exitcode == 0
        assert (tmp_path / f"seen-{i}").read_text() in ("checkpoint-1", "checkpoint-2")
    uploader.wait(600)
    assert newest_remote(store) == "checkpoint-2"


def _fetch_on_every_rank(url: str, output_dir: Path) -> tuple[int, str]:
    """How many files this rank fetched, and what went wrong."""
    get, fetched = RemoteStore.get, list[str]()

    def recorded(self: RemoteStore, file: str, target: Path) -> None:
        fetched.append(file)
        get(self, file, target)

    RemoteStore.get = recorded  # type: ignore[method-assign]
    said = ""
    try:
        fetch_newest_together(ParallelMesh(ParallelConfig()), RemoteStore(url), output_dir)
    except (ValueError, RuntimeError) as error:
        said = str(error)
    finally:
        RemoteStore.get = get  # type: ignore[method-assign]
    return len(fetched), said


def test_one_rank_fetches_for_all(pool: WorkerPool, tmp_path: Path) -> None:
    url, new = f"file://{tmp_path}/store", tmp_path / "new"
    path = write_checkpoint(tmp_path, 1)
    upload(RemoteStore(url), tmp_path, 1)
    assert pool.run(2, _fetch_on_every_rank, url, new) == [(3, ""), (0, "")]
    assert contents(new / "checkpoint-1") == contents(path) and len(list(new.iterdir())) == 1
    (tmp_path / "other" / "checkpoint-1" / "mine").mkdir(parents=True)
    failed = pool.run(2, _fetch_on_every_rank, url, tmp_path / "other")
    assert "not a checkpoint of this program" in failed[0][1] and "failed on 1 other ranks" in failed[1][1]


END = """
import sys
from pathlib import Path
from hf_nanotron.checkpoint.remote.store import RemoteStore
from hf_nanotron.checkpoint.remote.upload import Uploader
Uploader(RemoteStore(sys.argv[1]), sys.argv[2]).submit(Path(sys.argv[2], "checkpoint-1"))
"""


def test_the_program_ends_while_uploading(url: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 1, 3 * BIG)
    command = [sys.executable, "-c", END, url, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "Traceback" not in done.stderr and "Fatal" not in done.stderr, done.stderr
    name = newest_remote(RemoteStore(url))
    assert name is None or contents(fetch(RemoteStore(url), name, tmp_path / "new")) == contents(path)


def test_wrong_bucket(endpoint: str, tmp_path: Path) -> None:
    store = RemoteStore("s3://no-such-bucket/run")
    with pytest.raises(ValueError, match=r"'s3://no-such-bucket/run' cannot be written: .*bucket does not exist"):
        Uploader(store, tmp_path)
    with pytest.raises(ValueError, match="s3://no-such-bucket/run"):
        newest_remote(store)
    assert newest_remote(RemoteStore("s3://bucket/nothing/here")) is None


@pytest.mark.parametrize("url", ["s4://bucket/run", "bucket/run", "s3://", "s3:/bucket"])
def test_wrong_urls(url: str) -> None:
    with pytest.raises(ValueError, match=f"remote_checkpoints='{url}'"):
        RemoteStore(url)


@pytest.mark.parametrize(("url", "package", "extra"), [("s3://b/r", "s3fs", "remote"), ("gs://b/r", "gcsfs", "gcs")])
def test_missing_package(url: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, url.partition(":")[0], raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"needs {package}: pip install 'hf-nanotron\[{extra}\]'"):
        RemoteStore(url)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep_local=0"):
        Uploader(RemoteStore("memory://run"), tmp_path, keep_local=0)
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(ValueError, match="checkpoint-1 is not committed"):
        Uploader(RemoteStore("memory://run"), tmp_path).submit(tmp_path / "checkpoint-1")


# ---- through the trainer ----


def train_with_a_store(output: str, url: str, max_steps: int, resume: bool, asynchronous: bool) -> list[float]:
    from tiny import History, pad_batch, random_dataset, training_arguments

    from hf_nanotron import AutoModelForCausalLM as ParallelAuto, NanotronTrainer, NanotronTrainingArguments

    values = {"save_strategy": "steps", "save_steps": 2, "max_steps": max_steps, "async_save": asynchronous}
    values |= {"remote_checkpoints": url, "save_total_limit": 2, "lr_scheduler_type": "constant", "warmup_steps": 0}
    args = NanotronTrainingArguments(**training_arguments(output_dir=output, **values))
    model = ParallelAuto.from_pretrained(str(Path(output).parent / "start"), parallel=args.parallel)
    history = History()
    trainer = NanotronTrainer(
        model=model, args=args, train_dataset=random_dataset(64), data_collator=pad_batch, callbacks=[history]
    )
    trainer.train(resume_from_checkpoint=resume or None)
    trainer.mesh.close()
    return history.losses


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_run_moves_to_another_machine(pool: WorkerPool, tmp_path: Path, asynchronous: bool) -> None:
    """It uploads what it commits; an empty output directory elsewhere goes on from the store."""
    from test_gradients import stock_model

    stock_model("llama", num_hidden_layers=2).save_pretrained(tmp_path / "start")
    url = f"file://{tmp_path}/store"
    whole = pool.run(2, train_with_a_store, str(tmp_path / "whole"), f"{url}-whole", 8, False, asynchronous)[0]
    first = pool.run(2, train_with_a_store, str(tmp_path / "here"), url, 6, False, asynchronous)[0]
    assert first == whole[:6]
    assert sorted(p.name for p in (tmp_path / "store").glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    assert [p.name for p in (tmp_path / "here").glob("checkpoint-*")] == ["checkpoint-6"]
    then = pool.run(2, train_with_a_store, str(tmp_path / "there"), url, 8, True, asynchronous)[0]
    assert then == whole[6:]
    assert sorted(p.name for p in (tmp_path / "store").glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]
