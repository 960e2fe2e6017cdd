"""Nothing is lost between a disk and a store: damaged, replaced and left-behind checkpoints, lagging listings, outages
in the middle of a deletion, other runs. Each case leaves what is good where it was."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from test_runs import X, Y, message, write

from hf_nanotron.checkpoint.directory import own_files
from hf_nanotron.checkpoint.directory.commit import begin, commit, describe
from hf_nanotron.checkpoint.directory.retention import checkpoints, newest
from hf_nanotron.checkpoint.directory.runs import RECORD, Run, marked_run, read_record, write_record
from hf_nanotron.checkpoint.directory.verify import MARKER, check
from hf_nanotron.checkpoint.remote import (
    fetch as remote_fetch,
    run_start as run_start_module,
    runs as remote_runs,
    store as remote,
    upload as remote_upload,
)
from hf_nanotron.checkpoint.remote.backlog import LocalSpace
from hf_nanotron.checkpoint.remote.fetch import fetch_newest
from hf_nanotron.checkpoint.remote.retry import Backoff
from hf_nanotron.checkpoint.remote.run_start import start_run
from hf_nanotron.checkpoint.remote.store import RemoteStore
from hf_nanotron.checkpoint.remote.upload import Uploader
from hf_nanotron.parallel.config import ParallelConfig
from hf_nanotron.parallel.mesh import ParallelMesh

QUICK = Backoff(first=0.01, longest=0.02, start=0.05)
URLS = ["memory://{}/run", "memory://{}/run/", "memory://{}/my run/ü+%20"]


@pytest.fixture(autouse=True)
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The warnings. Nothing is brought to stable storage, which takes long."""
    texts: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    for module in (own_files, remote_fetch, remote_runs, remote_upload, run_start_module):
        monkeypatch.setattr(module.logger, "warning", texts.append)
    return texts


class FaultyStore(RemoteStore):
    """Counts its operations; the n-th of a kind fails, and its listings are what `lag` makes of them."""

    def __init__(self, url: str) -> None:
        super().__init__(url, backoff=QUICK)
        self.count: dict[str, int] = {}
        self.fails: dict[str, set[int]] = {}
        self.lag: Any = dict

    def _note(self, kind: str) -> None:
        self.count[kind] = number = self.count.get(kind, 0) + 1
        if number in self.fails.get(kind, ()):
            raise OSError(f"{kind} {number} fails")

    def checkpoints(self) -> dict[str, dict[str, int]]:
        self._note("list")
        return self.lag(super().checkpoints())

    def read(self, file: str, *args: Any) -> bytes | None:
        self._note("read")
        return super().read(file, *args)

    def remove_file(self, file: str) -> None:
        self._note("remove_file")
        super().remove_file(file)

    def put(self, source: Path, file: str, *args: Any, **options: Any) -> None:
        self._note("record" if file == RECORD else "put")
        super().put(source, file, *args, **options)


def names(folder: Path) -> list[str]:
    return [path.name for path in checkpoints(folder)]


def send(uploader: Uploader, *steps: int) -> None:
    for step in steps:
        uploader.submit(uploader.output_dir / f"checkpoint-{step}")
        assert uploader.wait(600), uploader.store.retry.last_error


def good(store: RemoteStore) -> list[str]:
    """The checkpoints that can be fetched: whole, and with their checksums."""
    found = []
    for name in RemoteStore.checkpoints(store):
        if RemoteStore.read(store, f"{name}/{MARKER}") is None:
            continue
        for file in json.loads(RemoteStore.read(store, f"{name}/{MARKER}") or b"")["files"]:
            assert store.size(f"{name}/{file}") is not None, (name, file)
        found.append(name)
    return found


@pytest.mark.parametrize("fault", ["truncated", "longer", "missing", "linked out", "a folder"])
def test_a_damaged_checkpoint_takes_the_place_of_none(fault: str, tmp_path: Path, told: list[str]) -> None:
    store, here = FaultyStore(f"memory://{tmp_path}/run"), tmp_path / "here"
    uploader = Uploader(store, here, keep_local=1, save_total_limit=1)
    uploader.run = X
    write(here, X, 5)
    send(uploader, 5)
    write(here, X, 10)
    path = here / "checkpoint-10" / "config.json"
    path.unlink()
    if fault in ("truncated", "longer"):
        path.write_text("{" if fault == "truncated" else "{    }")
    elif fault == "linked out":
        (tmp_path / "outside").write_text("{}")
        path.symlink_to(tmp_path / "outside")
    elif fault == "a folder":
        path.mkdir()
    send(uploader, 10)
    assert good(store) == ["checkpoint-5"] and names(here) == ["checkpoint-10", "checkpoint-5"]
    assert sum("checkpoint-10 is damaged and not uploaded" in text for text in told) == 1
    assert uploader.damaged == ["checkpoint-10"]
    uploader.close()


def test_files_that_another_run_has_deleted_meanwhile(tmp_path: Path) -> None:
    """Another writer takes an upload under way for what an interrupted one has left."""
    store, here = FaultyStore(f"memory://{tmp_path}/run"), tmp_path / "here"
    write(here, X, 5)
    uploader = Uploader(store, here)
    uploader.run = X

    def lag(found: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
        if "checkpoint-5" in found and MARKER not in found["checkpoint-5"]:
            RemoteStore.remove(store, "checkpoint-5")
            return RemoteStore.checkpoints(store)
        return found

    store.lag = lag
    send(uploader, 5)
    uploader.close()
    assert good(store) == ["checkpoint-5"]


def test_what_is_torn_in_the_store_stays_here(tmp_path: Path) -> None:
    """A complete local checkpoint, of which an upload was interrupted long ago, is not one that has been uploaded."""
    store, here = FaultyStore(f"memory://{tmp_path}/run"), tmp_path / "here"
    write(here, X, 5, 10)
    store.fs.pipe_file(f"{store.root}/checkpoint-5/config.json", b"{}")
    uploader = Uploader(store, here, keep_local=1, save_total_limit=2)
    uploader.run = X
    send(uploader, 10)
    uploader.close()
    assert good(store) == ["checkpoint-10"] and names(here) == ["checkpoint-10", "checkpoint-5"]
    assert list(RemoteStore.checkpoints(store)) == ["checkpoint-10"]


def test_a_later_run_of_the_process_gives_up_none_of_the_first(tmp_path: Path) -> None:
    store, here = FaultyStore(f"memory://{tmp_path}/run"), tmp_path / "here"
    write(here, X, 5, 10)
    uploader = Uploader(store, here, save_total_limit=1, space=LocalSpace(limit=1))
    uploader.run = X
    store.fails["put"] = set(range(1, 10**4))
    uploader.submit(here / "checkpoint-10")
    uploader.run = Y
    write(here, Y, 1, 2)
    for step in (1, 2):
        uploader.submit(here / f"checkpoint-{step}")
    waiting = [path.name for path in uploader.pending()]
    assert {"checkpoint-10", "checkpoint-2"} <= set(waiting)
    assert marked_run(here / "checkpoint-10") == X
    store.fails.clear()
    assert uploader.wait(600)
    uploader.close()
    assert set(good(store)) == {"checkpoint-10", "checkpoint-2"}


def test_what_another_run_has_replaced_is_not_deleted(tmp_path: Path) -> None:
    """Markers are read once; before a deletion, again."""
    store, here = FaultyStore(f"memory://{tmp_path}/run"), tmp_path / "here"
    write(here, X, 5, 10, 15)
    uploader = Uploader(store, here, keep_local=9, save_total_limit=2)
    uploader.run = X
    send(uploader, 5, 10)
    write(tmp_path / "there", Y, 5)
    other = Uploader(RemoteStore(f"memory://{tmp_path}/run"), tmp_path / "there")
    other.run = Y
    send(other, 5)
    send(uploader, 15)
    for each in (uploader, other):
        each.close()
    assert good(store) == ["checkpoint-15", "checkpoint-10", "checkpoint-5"]


LAGS = {
    "none": dict,
    "empty": lambda found: {},
    "no newest": lambda found: dict(list(found.items())[1:]),
    "no oldest": lambda found: dict(list(found.items())[:-1]),
    "no markers": lambda found: {k: {f: n for f, n in v.items() if f != MARKER} for k, v in found.items()},
    "no files": lambda found: {k: {f: n for f, n in v.items() if f == MARKER} for k, v in found.items()},
    "old lengths": lambda found: {k: {f: n + 1 for f, n in v.items()} for k, v in found.items()},
    "deleted ones": lambda found: {f"checkpoint-{n}": {MARKER: 9, "config.json": 2} for n in (30, 20, 10, 7, 5, 2, 1)},
}


@pytest.mark.parametrize("limit", [1, 3])
@pytest.mark.parametrize("lag", LAGS)
def test_listings_that_lag_behind(lag: str, limit: int, tmp_path: Path) -> None:
    """The newest ones within the limits are on both sides; what a true listing follows on repairs the rest."""
    store, here = FaultyStore(f"memory://{tmp_path}/run"), tmp_path / "here"
    uploader = Uploader(store, here, keep_local=1, save_total_limit=limit)
    uploader.run = X
    store.lag = LAGS[lag]
    for step in (2, 7, 10):
        write(here, X, step)
        send(uploader, step)
        assert f"checkpoint-{step}" in good(store) and f"checkpoint-{step}" in names(here)
    found = good(store)
    assert found[:limit] == ["checkpoint-10", "checkpoint-7", "checkpoint-2"][:limit]
    store.lag = dict
    write(here, X, 20)
    send(uploader, 20)
    uploader.close()
    assert good(store) == ["checkpoint-20", "checkpoint-10", "checkpoint-7"][:limit]
    assert names(here) == ["checkpoint-20"]
    store.lag = LAGS[lag]
    if lag not in ("empty", "no newest", "deleted ones") and (lag, limit) != ("no oldest", 1):
        fetched = fetch_newest(store, tmp_path / "new")
        assert fetched is not None and fetched.name == "checkpoint-20"
        check(fetched)


@pytest.mark.parametrize("kind", ["list", "read", "remove_file"])
def test_an_outage_in_the_middle_of_a_deletion(kind: str, tmp_path: Path) -> None:
    for number in range(1, 6):
        store, here = FaultyStore(f"memory://{tmp_path}/{number}"), tmp_path / str(number)
        uploader = Uploader(store, here, keep_local=1, save_total_limit=2)
        uploader.run = X
        write(here, X, 1, 2)
        send(uploader, 1, 2)
        store.count.clear()
        store.fails[kind] = {number}
        write(here, X, 3)
        send(uploader, 3)
        assert set(good(store)) >= {"checkpoint-3", "checkpoint-2"} and "checkpoint-3" in names(here)
        store.fails.clear()
        write(here, X, 4)
        send(uploader, 4)
        uploader.close()
        assert list(RemoteStore.checkpoints(store)) == good(store) == ["checkpoint-4", "checkpoint-3"]
        assert "checkpoint-4" in names(here)


def test_requests_of_an_upload(tmp_path: Path) -> None:
    """With a limit, a store that has many checkpoints is not read through again at each upload."""
    store, here = FaultyStore(f"memory://{tmp_path}/run"), tmp_path / "here"
    write(here, X, *range(1, 13))
    uploader = Uploader(store, here, keep_local=1, save_total_limit=8)
    uploader.run = X
    send(uploader, *range(1, 13))
    store.count.clear()
    write(here, X, 13)
    send(uploader, 13)
    uploader.close()
    assert len(good(store)) == 8 and names(here) == ["checkpoint-13"]
    assert store.count["list"] == 2 and store.count["put"] == 2


def test_the_record_is_written_again(tmp_path: Path) -> None:
    store, here = FaultyStore(f"memory://{tmp_path}/run"), tmp_path / "here"
    write(here, X, 1)
    write_record(here, X, {})
    uploader = Uploader(store, here)
    uploader.run = X
    store.fails["record"] = {1}
    uploader.note_run()
    assert store.read(RECORD) is None
    send(uploader, 1)
    uploader.close()
    assert store.read(RECORD) == (here / RECORD).read_bytes()


# ---- coming here ----


def write_with_best(folder: Path, run: Run, step: int, best: Any, path: Any = "/elsewhere/checkpoint") -> None:
    directory = folder / f"checkpoint-{step}"
    begin(directory)
    (directory / "config.json").write_text("{}")
    state = {"global_step": step, "best_global_step": best, "best_model_checkpoint": path}
    (directory / "trainer_state.json").write_text(json.dumps(state))
    describe(directory, 0)
    commit(directory, 1, step, 1.0, run.to_dict())


@pytest.mark.parametrize(
    ("best", "path", "fetched"),
    [
        (5, "/elsewhere/checkpoint-5", ["checkpoint-10", "checkpoint-5"]),
        (5, None, ["checkpoint-10"]),
        (None, None, ["checkpoint-10"]),
        (10, "out/checkpoint-10", ["checkpoint-10"]),
        (7, "out/checkpoint-7", ["checkpoint-10"]),  # not there
        (3, "out/checkpoint-3", ["checkpoint-10"]),  # of another run
    ],
)
def test_the_best_one_comes_too(best: Any, path: Any, fetched: list[str], tmp_path: Path) -> None:
    """A disk that is empty gets what a run keeps: the newest and the best."""
    store, here = FaultyStore(f"memory://{tmp_path}/run"), tmp_path / "here"
    uploader = Uploader(store, here, keep_local=9)
    write(here, X, 3)
    uploader.run = X
    send(uploader, 3)
    write(here, Y, 5)
    write_with_best(here, Y, 10, best, path)
    uploader.run = Y
    send(uploader, 5, 10)
    uploader.close()
    there = tmp_path / "there"
    assert fetch_newest(store, there) == there / "checkpoint-10"
    assert names(there) == fetched
    # Interrupted between the two, or gone since.
    if len(fetched) == 2:
        (there / "checkpoint-5" / MARKER).rename(tmp_path / "marker")
        (there / "checkpoint-5" / ".written").mkdir()
        assert fetch_newest(store, there) is None and len(newest(there)) == 2
        check(there / "checkpoint-5")


def test_a_download_deletes_none_of_another_run(tmp_path: Path, told: list[str]) -> None:
    store, here, there = FaultyStore(f"memory://{tmp_path}/run"), tmp_path / "here", tmp_path / "there"
    write(here, Y, 10)
    uploader = Uploader(store, here)
    uploader.run = Y
    send(uploader, 10)
    uploader.close()
    write(there, X, 10)
    assert fetch_newest(store, there) == there / "checkpoint-10"
    assert marked_run(there / "checkpoint-10") == Y and marked_run(there / "_kept-checkpoint-10") == X
    # What the run itself has left behind goes.
    write(tmp_path / "back", Run("y", "earlier", 1.0), 10)
    assert fetch_newest(store, tmp_path / "back") and os.listdir(tmp_path / "back") == ["checkpoint-10"]


def test_a_resume_beside_another_run_in_the_store(tmp_path: Path, told: list[str]) -> None:
    """As for a folder: told, refused, or wanted. What the run itself has left behind is no other's."""
    mesh, store = ParallelMesh(ParallelConfig()), FaultyStore(f"memory://{tmp_path}/run")
    there, here = tmp_path / "there", tmp_path / "here"
    write(there, X, 5, 10)
    uploader = Uploader(store, there, keep_local=9)
    uploader.run = X
    send(uploader, 5, 10)
    uploader.close()
    told.clear()
    write(here, Y, 5, 10)
    write(tmp_path / "elsewhere", Y, 10)
    for folder in (here, tmp_path / "elsewhere"):
        said = message(lambda folder=folder: start_run(mesh, here, f"{folder}/checkpoint-10", False, store))
        assert "remote_checkpoints=" in said and "(checkpoint-10, checkpoint-5)" in said
    start_run(mesh, here, str(here / "checkpoint-10"), None, store)
    assert [text for text in told if "remote_checkpoints=" in text and "checkpoint-10, checkpoint-5" in text]
    told.clear()
    start_run(mesh, here, str(here / "checkpoint-10"), True, store)
    start_run(mesh, there, str(there / "checkpoint-10"), False, store)
    assert not told
    start_run(mesh, tmp_path / "new", str(there / "checkpoint-5"), False, store)  # it went back to 5
    assert not told and read_record(here) is None


@pytest.mark.parametrize("is_noted", [True, False])
def test_clocks_of_hosts_that_differ(is_noted: bool, tmp_path: Path) -> None:
    """A fresh run began after all that are in the store, also where the record is missing."""
    mesh, store, there = ParallelMesh(ParallelConfig()), FaultyStore(f"memory://{tmp_path}/run"), tmp_path / "there"
    ahead = Run("z", "z", 9e9)
    write(there, ahead, 10)
    write_record(there, ahead, {})
    uploader = Uploader(store, there)
    uploader.run = ahead
    send(uploader, 10)
    uploader.close()
    if not is_noted:
        store.remove_file(RECORD)
    run = start_run(mesh, tmp_path / "here", None, True, store)
    assert run.began > ahead.began


@pytest.mark.parametrize("file", [RECORD, f"checkpoint-20/{MARKER}"])
def test_forged_files_that_are_huge_are_not_read(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, here = FaultyStore(f"memory://{tmp_path}/run"), tmp_path / "here"
    write(here, X, 10)
    uploader = Uploader(store, here)
    send(uploader, 10)
    uploader.close()
    store.fs.pipe_file(f"{store.root}/{file}", b"x" * 5000)
    monkeypatch.setattr(remote_runs, "LARGEST_RECORD", 4000)
    monkeypatch.setattr(remote, "LARGEST_MARKER", 4000)
    read = store.fs.cat_file
    monkeypatch.setattr(store.fs, "cat_file", lambda path: pytest.fail(path) if path.endswith(file) else read(path))
    assert fetch_newest(store, tmp_path / "new") == tmp_path / "new" / "checkpoint-10"


@pytest.mark.parametrize("url", URLS)
def test_one_url_within_another(url: str, tmp_path: Path) -> None:
    """`run` and `run2`, `checkpoint-1` and `checkpoint-10`: neither is a part of the other."""
    url = url.format(tmp_path)
    one, two = RemoteStore(url), RemoteStore(url.rstrip("/") + "2")
    for store, run in ((one, X), (two, Y)):
        write(tmp_path / run.id, run, 1, 10, 11)
        uploader = Uploader(store, tmp_path / run.id, keep_local=9)
        uploader.run = run
        send(uploader, 1, 10, 11)
        uploader.close()
    one.remove("checkpoint-1")
    assert good(one) == ["checkpoint-11", "checkpoint-10"]
    assert good(two) == ["checkpoint-11", "checkpoint-10", "checkpoint-1"]
    assert fetch_newest(one, tmp_path / "new") and marked_run(tmp_path / "new" / "checkpoint-11") == X


def test_a_disk_that_is_full_while_fetching(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sentence, no checkpoint that looks complete, and the next time goes on."""
    store, here, there = FaultyStore(f"memory://{tmp_path}/run"), tmp_path / "here", tmp_path / "there"
    write(here, X, 10)
    uploader = Uploader(store, here)
    send(uploader, 10)
    uploader.close()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store, "get", full)
        with pytest.raises(RuntimeError, match="No space left"):
            fetch_newest(store, there)
    assert newest(there) == []
    assert fetch_newest(store, there) == there / "checkpoint-10"
    check(there / "checkpoint-10")
