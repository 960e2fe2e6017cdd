"""Every way in which a name can leave its folder, in every place that reads one; and links and pipes in its files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
import torch
from forged import INDEX, NANOTRON, PROGRESS, body_of, sign, tensors, write_checkpoint
from safetensors.torch import save_file
from test_inside import ESCAPES

from hf_nanotron.checkpoint.directory.commit import begin, commit, describe
from hf_nanotron.checkpoint.directory.retention import choose
from hf_nanotron.checkpoint.directory.runs import Run
from hf_nanotron.checkpoint.directory.verify import MARKER, check
from hf_nanotron.checkpoint.files.checked import read_checked, write_checked
from hf_nanotron.checkpoint.files.inside import refuse_links
from hf_nanotron.checkpoint.hub.weights import HubWeights
from hf_nanotron.checkpoint.remote import fetch as remote_fetch
from hf_nanotron.checkpoint.remote.fetch import fetch, fetch_newest, newest_remote
from hf_nanotron.checkpoint.remote.store import RemoteStore
from hf_nanotron.checkpoint.remote.upload import Uploader
from hf_nanotron.checkpoint.state import file as state_file
from hf_nanotron.checkpoint.state.read import StoredState
from hf_nanotron.checkpoint.state.training_state import DIRECTORY
from hf_nanotron.convert.folder import check_unchanged, copy_files
from hf_nanotron.convert.nanotron.convert import nanotron_to_hub
from hf_nanotron.convert.nanotron.format import step_folder
from hf_nanotron.training.checkpointer import Checkpointer
from hf_nanotron.training.remote import RemoteUploads
from hf_nanotron.training.snapshots import MemorySnapshots

NAMES = [name for name in ESCAPES if isinstance(name, str)]
SECRET = "of nobody else"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`out/` with a checkpoint at step 1 and one at step 2."""
    output_dir = tmp_path_factory.mktemp("made") / "out"
    write_checkpoint(output_dir, 1)
    write_checkpoint(output_dir, 2)
    return output_dir


@pytest.fixture
def here(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "out")


def rename(mapping: dict[str, Any], old: str, new: str) -> None:
    mapping[new] = mapping.pop(old)


# ---- places that read a name: (folder, the name) -> what reading it raises ----


def _marker(here: Path, name: str) -> None:
    body = body_of(here / "checkpoint-2" / MARKER)
    rename(body["files"], "config.json", name)
    write_checked(here / "checkpoint-2" / MARKER, body, durable=False)


def in_a_marker(here: Path, name: str) -> None:
    _marker(here, name)
    assert choose(here) == here / "checkpoint-1"
    check(here / "checkpoint-2", deep=False)


def in_a_marker_for_a_conversion(here: Path, name: str) -> None:
    _marker(here, name)
    check_unchanged(here / "checkpoint-2", ("*",))


def in_a_description(here: Path, name: str) -> None:
    directory = here / "checkpoint-3"
    begin(directory)
    describe(directory, 0)
    entry = {"bytes": 1, "crc32": "00000000"}
    write_checked(directory / ".written" / "rank-00000.json", {"files": {name: entry}}, durable=False)
    commit(directory, 1, 3, 1.0)


def in_an_index(here: Path, name: str) -> None:
    body = body_of(here / "checkpoint-2" / INDEX)
    rename(body["files"], "rank-00000.safetensors", name)
    for piece in body["pieces"]:
        piece["file"] = piece["file"].replace("rank-00000.safetensors", name)
    write_checked(here / "checkpoint-2" / INDEX, body, durable=False)
    sign(here / "checkpoint-2", INDEX)
    assert choose(here) == here / "checkpoint-1"
    StoredState(here / "checkpoint-2" / DIRECTORY)


def in_a_part_of_an_index(here: Path, name: str) -> None:
    index = body_of(here / "checkpoint-2" / INDEX)
    body = {key: index[key] for key in ("block_bytes", "files", "pieces", "scalars")}
    rename(body["files"], "rank-00000.safetensors", name)
    write_checked(here / "rank-00000.json", body, durable=False)
    state_file.commit(here, 1, {})


def _hub(here: Path, name: str) -> Path:
    save_file({"w": torch.zeros(2)}, here / "x")
    (here / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    return here


def in_an_index_of_the_hub(here: Path, name: str) -> None:
    HubWeights(_hub(here, name))


def in_latest_txt(here: Path, name: str) -> None:
    (here / "latest.txt").write_bytes(name.encode(errors="surrogatepass"))
    step_folder(here)


class Store(RemoteStore):
    """A folder of `file:///`, and objects that are listed besides."""

    more: dict[str, Any] = {}

    def checkpoints(self) -> dict[str, dict[str, int]]:
        found = super().checkpoints()
        for name in found:
            if name == "checkpoint-2":
                found[name] = found[name] | self.more
        return found


def _fetched(here: Path, store: RemoteStore) -> None:
    new = here.parent / "a" / "new"
    assert newest_remote(store) == "checkpoint-1"
    assert fetch_newest(store, new) == new / "checkpoint-1"
    check(new / "checkpoint-1")
    assert [path.name for path in new.iterdir()] == ["checkpoint-1"]
    fetch(store, "checkpoint-2", new)


def in_a_listing(here: Path, name: str) -> None:
    store = Store(f"file://{here}")
    store.more = {name: 1}
    _fetched(here, store)


def in_a_remote_marker(here: Path, name: str) -> None:
    _marker(here, name)
    store = Store(f"file://{here}")
    store.more = {name: 2}
    _fetched(here, store)


PLACES = [
    in_a_marker, in_a_marker_for_a_conversion, in_a_description, in_an_index, in_a_part_of_an_index,
    in_an_index_of_the_hub, in_latest_txt, in_a_listing, in_a_remote_marker,
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_no_name_leaves_its_folder(made: Path, tmp_path: Path, place: Callable[[Path, str], None]) -> None:
    """22 ways, each refused by name, and nothing is written outside."""
    for number, name in enumerate(NAMES):
        home = tmp_path / str(number)
        here = shutil.copytree(made, home / "out")
        with pytest.raises(ValueError) as error:
            place(here, name)
        assert type(error.value) is ValueError and len(str(error.value)) < 1500, (name, str(error.value))
        assert {path.name for path in home.iterdir()} <= {"out", "a"}, name
        shutil.rmtree(home)
    assert not any(Path(name).exists() for name in NAMES if name.startswith("/etc"))


def test_other_keys_of_a_listing(here: Path, tmp_path: Path) -> None:
    """What is a file and a folder at once is refused; what the marker does not list is not fetched."""
    store = Store(f"file://{here}")
    store.more = {"config.json/x": 1}
    _refused(lambda: _fetched(here, store), "'config.json' as a file and as a folder")
    shutil.rmtree(tmp_path / "a")
    store.more = {"README.md": 1, ".hidden/x": 5, "a/b/c": 7}
    fetched = fetch_newest(store, tmp_path / "new")
    assert fetched == tmp_path / "new" / "checkpoint-2"
    names = {path.relative_to(fetched).as_posix() for path in fetched.rglob("*") if path.is_file()}
    assert names == {*read_checked(fetched / MARKER)["files"], MARKER}


def test_objects_in_memory(here: Path, tmp_path: Path) -> None:
    """As they would be in a bucket, whose keys may be anything."""
    memory = fsspec.filesystem("memory")
    store = RemoteStore("memory://escapes")
    for path in (path for path in here.rglob("*") if path.is_file()):
        memory.pipe_file(f"/escapes/{path.relative_to(here).as_posix()}", path.read_bytes())
    source = memory.store["/escapes/checkpoint-2/config.json"]
    memory.store["/escapes/checkpoint-2/../../../written"] = source
    new = tmp_path / "a" / "b" / "new"
    assert fetch_newest(store, new) == new / "checkpoint-1"
    assert not (tmp_path / "written").exists()
    del memory.store["/escapes/checkpoint-2/../../../written"]
    assert fetch_newest(store, new) == new / "checkpoint-2"
    memory.rm("/escapes", recursive=True)


# ---- forged remote checkpoints ----


@pytest.mark.parametrize("what", ["index", "progress", "tensor", "marker", "a large marker", "a file of another size"])
def test_a_forged_remote_checkpoint_is_passed_over(
    here: Path, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, texts = here / "checkpoint-2", list[str]()
    if what == "index":
        body = body_of(checkpoint / INDEX)
        entries = body["pieces"][0]["tensors"]
        entries["exp_avg"], entries["exp_avg_sq"] = entries["exp_avg_sq"], entries["exp_avg"]
        write_checked(checkpoint / INDEX, body)
        sign(checkpoint, INDEX)
    elif what == "progress":
        (checkpoint / PROGRESS).write_text("[1]")
        sign(checkpoint, PROGRESS)
    elif what == "tensor":
        path = checkpoint / DIRECTORY / "rank-00001.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    elif what == "marker":
        (checkpoint / MARKER).write_text('{"files": []}')
    elif what == "a large marker":
        os.truncate(checkpoint / MARKER, 1 << 40)
    else:
        (checkpoint / "config.json").write_text("{ }")
    monkeypatch.setattr(remote_fetch.logger, "warning", texts.append)
    new = tmp_path / "new"
    assert fetch_newest(RemoteStore(f"file://{here}"), new) == new / "checkpoint-1"
    assert len(texts) == 1 and "skipping " in texts[0] and "checkpoint-2, trying an earlier" in texts[0]
    assert choose(new) == new / "checkpoint-1"


# ---- links, pipes and devices ----


def _link_out(path: Path) -> None:
    """A link to what was there, in another place: its bytes are right."""
    elsewhere = next(parent for parent in path.parents if parent.name.startswith("test_")) / "elsewhere"
    shutil.rmtree(elsewhere, ignore_errors=True)
    elsewhere.mkdir()
    shutil.move(path, elsewhere / path.name)
    path.symlink_to(elsewhere / path.name)


def _pipe(path: Path) -> None:
    _clear(path)
    os.mkfifo(path)


def _device(path: Path) -> None:
    _clear(path)
    path.symlink_to("/dev/zero")


def _folder(path: Path) -> None:
    _clear(path)
    path.mkdir()


def _loop(path: Path) -> None:
    _clear(path)
    path.symlink_to(path)


def _clear(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


THINGS = [_link_out, _pipe, _device, _folder, _loop]
FILES = ["config.json", PROGRESS, INDEX, f"{DIRECTORY}/rank-00001.safetensors", MARKER]


def _refused(action: Callable[[], Any], *says: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        action()
    assert type(error.value) in (ValueError, FileNotFoundError), repr(error.value)
    assert not says or any(text in str(error.value) for text in says), str(error.value)


@pytest.mark.parametrize("thing", THINGS, ids=lambda thing: thing.__name__)
def test_no_file_of_a_checkpoint_is_something_else(made: Path, tmp_path: Path, thing: Callable[[Path], None]) -> None:
    for number, name in enumerate(FILES):
        here = shutil.copytree(made, tmp_path / str(number) / "deep" / "out")
        thing(here / "checkpoint-2" / name)
        assert choose(here) == here / "checkpoint-1", name
        _refused(lambda here=here: check(here / "checkpoint-2", deep=False), Path(name).name, DIRECTORY)
        if name.startswith(DIRECTORY):
            _refused(lambda here=here: tensors(here / "checkpoint-2"), Path(name).name)
    here = shutil.copytree(made, tmp_path / "folder" / "deep" / "out")
    if thing is not _folder:
        thing(here / "checkpoint-2" / DIRECTORY)
        assert choose(here) == here / "checkpoint-1"


@pytest.mark.parametrize("thing", THINGS, ids=lambda thing: thing.__name__)
def test_no_file_of_the_hub_is_something_else(tmp_path: Path, thing: Callable[[Path], None]) -> None:
    for number, name in enumerate(["model.safetensors.index.json", "model-1.safetensors", "model.safetensors"]):
        folder = tmp_path / str(number) / "a" / "b" / "hub"
        folder.mkdir(parents=True)
        if name == "model.safetensors":
            save_file({"w": torch.zeros(2)}, folder / name)
        else:
            save_file({"w": torch.zeros(2)}, folder / "model-1.safetensors")
            (folder / "model.safetensors.index.json").write_text('{"weight_map": {"w": "model-1.safetensors"}}')
        thing(folder / name)
        _refused(lambda folder=folder: HubWeights(folder))


@pytest.mark.parametrize("thing", THINGS[:3] + THINGS[4:], ids=lambda thing: thing.__name__)
def test_no_file_of_nanotron_is_something_else(tmp_path: Path, thing: Callable[[Path], None]) -> None:
    shard = next(path.relative_to(NANOTRON) for path in sorted(NANOTRON.rglob("*.safetensors")))
    for number, name in enumerate([shard, Path("model_config.json"), Path("model"), Path("config.yaml")]):
        step = shutil.copytree(NANOTRON, tmp_path / str(number) / "a" / "b" / "2")
        if not (step / name).exists():
            (step / name).write_text("{}")
        thing(step / name)
        _refused(lambda step=step: nanotron_to_hub(step, step.parent / "hub"))
        _refused(lambda step=step: refuse_links(step))
    (tmp_path / "latest").mkdir()
    (tmp_path / "latest" / "2").symlink_to(NANOTRON)
    (tmp_path / "latest" / "latest.txt").write_text("2")
    _refused(lambda: step_folder(tmp_path / "latest"), "symbolic link out of")


def test_links_in_the_way_of_a_download(here: Path, tmp_path: Path) -> None:
    """None is followed, and none is written through."""
    outside = tmp_path / "outside"
    store = RemoteStore(f"file://{here}")
    for number, name in enumerate(["", ".written", DIRECTORY, "config.json", f"{DIRECTORY}/rank-00000.safetensors"]):
        outside.mkdir()
        (outside / "config.json").write_text(SECRET)
        new = tmp_path / f"new-{number}"
        (new / "checkpoint-2" / ".written").mkdir(parents=True)
        path = new / "checkpoint-2" / name
        if name in ("", ".written"):
            shutil.rmtree(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(outside / "config.json" if name == "config.json" else outside)
        if name:
            _refused(lambda new=new: fetch_newest(store, new), "symbolic link")
        else:  # of a linked checkpoint the link goes
            assert fetch_newest(store, new) == path and not path.is_symlink()
        assert [path.name for path in outside.iterdir()] == ["config.json"]
        assert (outside / "config.json").read_text() == SECRET
        shutil.rmtree(outside)


def test_links_out_are_neither_committed_nor_uploaded_nor_copied(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(SECRET)
    directory = tmp_path / "out" / "checkpoint-1"
    begin(directory)
    (directory / "config.json").write_text("{}")
    (directory / "vocab.txt").symlink_to(tmp_path / "secret")
    describe(directory, 0)
    commit(directory, 1, 1, 1.0)
    check(directory)
    (directory / "later.txt").symlink_to(tmp_path / "secret")
    assert set(read_checked(directory / MARKER)["files"]) == {"config.json"}
    store = RemoteStore(f"file://{tmp_path}/store")
    uploader = Uploader(store, tmp_path / "out")
    uploader.submit(directory)
    uploader.wait(600)
    uploader.close()
    assert set(store.checkpoints()["checkpoint-1"]) == {"config.json", MARKER}
    _refused(lambda: copy_files(directory, tmp_path / "hub", ("*",)), "symbolic link out of")
    assert not (tmp_path / "hub" / "vocab.txt").exists()


def test_the_best_checkpoint_is_one_of_the_run(tmp_path: Path) -> None:
    """`trainer_state.json` names it by a whole path, which Trainer would load."""
    args: Any = SimpleNamespace(output_dir=str(tmp_path / "out"))
    checkpointer = Checkpointer(args, RemoteUploads(args), MemorySnapshots(args), on_committed=print)
    checkpointer._saved.add(tmp_path / "old/checkpoint-2")
    for folder, step in (("out", 3), ("old", 1), ("other", 3), ("out", 4)):
        directory = tmp_path / folder / f"checkpoint-{step}"
        begin(directory)
        describe(directory, 0)
        commit(directory, 1, step, 1.0, Run("a", "b", 1.0).to_dict() if step == 4 else None)
    (tmp_path / "out" / "checkpoint-3").rename(tmp_path / "out" / "best")
    shutil.copytree(tmp_path / "out" / "best", tmp_path / "out" / "checkpoint-3")
    (tmp_path / "out" / "checkpoint-5").mkdir()
    (tmp_path / "out" / "checkpoint-6").symlink_to(tmp_path / "other" / "checkpoint-3")
    names = {"out/checkpoint-3": True, "old/checkpoint-1": True, "other/checkpoint-3": False, "out/../x/c": False}
    # Of another run, without a marker, a link out, and not named as a run names them.
    names |= dict.fromkeys(("out/checkpoint-4", "out/checkpoint-5", "out/checkpoint-6", "out/best"), False)
    for name, expected in names.items():
        assert checkpointer.is_of_run(tmp_path / name) is expected, name
