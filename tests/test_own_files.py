"""Deleting or beginning a checkpoint touches nothing but what a run has written, and nothing through links."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_checkpoint_manager import TIMEOUT, WORLD, save
from tiny import message, tiny_config
from transformers import AutoModelForCausalLM

from hf_nanotron import AutoModelForCausalLM as ParallelAuto
from hf_nanotron.checkpoint.directory import commit as commit_module, own_files
from hf_nanotron.checkpoint.directory.commit import begin, commit, remove
from hf_nanotron.checkpoint.directory.retention import choose, newest, rotate
from hf_nanotron.checkpoint.directory.verify import check, is_committed, is_torn, read_marker
from hf_nanotron.checkpoint.hub.model import write_hub_config
from hf_nanotron.checkpoint.remote.fetch import fetch_newest
from hf_nanotron.checkpoint.remote.store import RemoteStore
from hf_nanotron.checkpoint.remote.upload import Uploader
from hf_nanotron.convert.folder import WEIGHTS, writing

Act = Callable[[Path], None]
Tree = dict[str, str]


@pytest.fixture(autouse=True)
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The warnings. Nothing is brought to stable storage, which takes long."""
    texts: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    for module in (commit_module, own_files):
        monkeypatch.setattr(module.logger, "warning", texts.append)
    return texts


def tree(folder: Path) -> Tree:
    """Everything below a folder: links as such, files by their bytes."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        found[name] = (
            f"-> {os.readlink(path)}" if path.is_symlink() else path.read_bytes().hex() if path.is_file() else ""
        )
    return found


def rotated(directory: Path) -> None:
    save(directory.parent, 9)
    rotate(directory.parent, 1)


def uploaded(directory: Path) -> None:
    """As the thread of an uploader deletes what is stored."""
    path = save(directory.parent, 9)
    uploader = Uploader(RemoteStore(f"memory://{directory.parent}"), directory.parent)
    if is_committed(directory):
        uploader.submit(directory)
    uploader.submit(path)
    uploader.wait(600)
    uploader.close()


def saved(directory: Path) -> None:
    save(directory.parent, 5)
    check(directory)


def fetched(directory: Path) -> None:
    """A store has another checkpoint of this step."""
    far = directory.parent.with_name("far")
    for step in (5, 6):
        save(far, step, block_bytes=16)
    store = RemoteStore(f"memory://{far}")
    uploader = Uploader(store, far)
    uploader.submit(far / "checkpoint-5")
    uploader.wait(600)
    uploader.close()
    fetch_newest(store, directory.parent)


DELETIONS: dict[str, Act] = {"rotate": rotated, "remove": remove, "upload": uploaded}
WRITES: dict[str, Act] = {"begin": begin, "save": saved}


# ---- a checkpoint that is a link ----


@pytest.mark.parametrize("act", [*DELETIONS.values(), *WRITES.values(), fetched])
@pytest.mark.parametrize("target", ["committed", "torn", "foreign", "nothing", "loop", "file"])
def test_of_a_linked_checkpoint_the_link_alone_goes(act: Act, target: str, tmp_path: Path) -> None:
    theirs, ours = tmp_path / "A" / "checkpoint-5", tmp_path / "B" / "checkpoint-5"
    ours.parent.mkdir()
    theirs.parent.mkdir()
    if target in ("committed", "torn"):
        save(theirs.parent, 5, until="committed" if target == "committed" else "described")
        (theirs / ".written").mkdir(exist_ok=True)  # which A may be writing now
    elif target == "foreign":
        theirs.mkdir()
        (theirs / "model.safetensors").write_bytes(b"weights")
    elif target == "file":
        theirs.write_bytes(b"notes")
    ours.symlink_to(ours.name if target == "loop" else theirs)
    before = tree(theirs.parent)
    act(ours)
    assert tree(theirs.parent) == before
    # What is no checkpoint is not deleted; an uploader deletes what it has uploaded.
    if act not in (rotated, uploaded) or target == "committed" or (act is rotated and target == "torn"):
        assert not ours.is_symlink() or act is fetched and target == "committed"


def test_a_linked_checkpoint_is_resumed_and_counts(tmp_path: Path) -> None:
    """Also where it is a link to one of the same folder, which goes only with it."""
    save(tmp_path / "A", 5)
    (tmp_path / "B").mkdir()
    (tmp_path / "B" / "checkpoint-5").symlink_to(tmp_path / "A" / "checkpoint-5")
    assert choose(tmp_path / "B") == tmp_path / "B" / "checkpoint-5"
    (tmp_path / "A" / "checkpoint-7").symlink_to("checkpoint-5")
    assert rotate(tmp_path / "A", 1) == [] and choose(tmp_path / "A") == tmp_path / "A" / "checkpoint-7"
    save(tmp_path / "A", 8)
    rotate(tmp_path / "A", 1)
    assert [path.name for path in (tmp_path / "A").iterdir()] == ["checkpoint-8"]
    (tmp_path / "C").symlink_to(tmp_path / "A")  # a linked output_dir is the folder itself
    save(tmp_path / "C", 9)
    rotate(tmp_path / "C", 1)
    assert [path.name for path in (tmp_path / "A").iterdir()] == ["checkpoint-9"]


def test_leftovers_that_are_links(tmp_path: Path) -> None:
    theirs = save(tmp_path / "A", 5)
    ours = save(tmp_path / "B", 6)
    (tmp_path / "B" / "_removed-checkpoint-3-1").symlink_to(theirs)
    (tmp_path / "B" / "checkpoint-4").mkdir()
    (tmp_path / "B" / "checkpoint-4" / ".written").symlink_to(theirs)
    (ours / ".written").symlink_to(theirs)
    before = tree(theirs)
    rotate(tmp_path / "B", 1)
    assert tree(theirs) == before
    assert [path.name for path in (tmp_path / "B").iterdir()] == ["checkpoint-6"] and not (ours / ".written").exists()


# ---- links in a checkpoint ----


def link_folder(checkpoint: Path, elsewhere: Path) -> None:
    (checkpoint / "training_state").rename(elsewhere / "training_state")
    (checkpoint / "training_state").symlink_to(elsewhere / "training_state")


def link_each(checkpoint: Path, elsewhere: Path) -> None:
    for path in [*checkpoint.glob("*.[js]*"), *checkpoint.glob("training_state/*")]:  # a README.md is the user's
        target = elsewhere / path.relative_to(checkpoint)
        target.parent.mkdir(exist_ok=True)
        path.rename(target)
        path.symlink_to(target)


def link_hard(checkpoint: Path, elsewhere: Path) -> None:
    shutil.copytree(checkpoint, elsewhere, copy_function=os.link, dirs_exist_ok=True)


def link_trace(checkpoint: Path, elsewhere: Path) -> None:
    shutil.rmtree(checkpoint / ".written", ignore_errors=True)
    (checkpoint / ".written").symlink_to(elsewhere)
    (elsewhere / "rank-00000.json").write_text("{}")
    (elsewhere / "notes.txt").write_text("mine")


LINKS = {"folder": link_folder, "files": link_each, "hard": link_hard, "trace": link_trace}


@pytest.mark.parametrize("act", [*DELETIONS.values(), *WRITES.values()])
@pytest.mark.parametrize("link", LINKS.values(), ids=LINKS)
@pytest.mark.parametrize("until", ["committed", "described"])
def test_what_links_in_a_checkpoint_point_to_stays(
    act: Act, link: Callable[[Path, Path], None], until: str, tmp_path: Path
) -> None:
    if act is uploaded and until == "described":
        return  # it deletes committed ones alone
    elsewhere, directory = tmp_path / "elsewhere", save(tmp_path / "run", 5, until=until)
    elsewhere.mkdir()
    link(directory, elsewhere)
    before = tree(elsewhere)
    act(directory)
    assert tree(elsewhere) == before and len(before) >= 2
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    both = ["checkpoint-5", "checkpoint-9"]
    left = {
        rotated: both if link is link_each and until == "committed" else ["checkpoint-9"],  # a linked marker is none
        uploaded: both if link in (link_folder, link_each) else ["checkpoint-9"],  # of which not all can be uploaded
        remove: [],
    }
    assert names == left.get(act, ["checkpoint-5"])


def test_saving_a_model_writes_through_no_link(tmp_path: Path) -> None:
    """And takes away the weights of the model before, by the names of weights: no folders, no models of others."""
    model = ParallelAuto.from_config(tiny_config())
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()
    ours.mkdir()
    names = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "training_args.bin"]
    for number, name in enumerate(names):
        (theirs / name).write_text("theirs")
        if number % 2:
            os.link(theirs / name, ours / name)
        else:
            (ours / name).symlink_to(theirs / name)
    others = {"model_ema.safetensors", "model-best.safetensors", "model.safetensors.bak", "notes.txt"}
    for name in others:
        (ours / name).write_text("mine")
    (ours / "model-00001-of-00002.safetensors").write_text("of the model before")
    (ours / "models.safetensors").mkdir()
    before = tree(theirs)
    write_hub_config(model, ours)
    assert tree(theirs) == before
    assert {path.name for path in ours.iterdir()} == {
        *others,
        "models.safetensors",
        "config.json",
        "generation_config.json",
    }
    assert not (ours / "config.json").is_symlink()
    model.mesh.close()


@pytest.mark.parametrize(
    "name", ["model_ema.safetensors", "training_state/notes.txt", "notes.txt", "training_state/a/b"]
)
def test_a_conversion_overwrites_no_files_of_others(name: str, tmp_path: Path) -> None:
    owned = (*WEIGHTS, "config.json", "training_state")
    far, folder = tmp_path / "far", tmp_path / "folder"
    for each in ("config.json", "model.safetensors", "training_state/index.json"):
        for place in (far, folder):
            (place / each).parent.mkdir(parents=True, exist_ok=True)
            (place / each).write_text("of an earlier conversion")
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("mine")
    before = tree(folder), tree(far)
    said = message(lambda: writing(folder, owned, "config.json", overwrite=True).__enter__())
    assert "no conversion writes" in said and Path(name).name in said and (tree(folder), tree(far)) == before
    (folder / name).unlink()
    shutil.rmtree(folder / "training_state")
    (folder / "training_state").symlink_to(far)
    (tmp_path / "link").symlink_to(folder)
    with writing(tmp_path / "link", owned, "config.json", overwrite=True):
        begin((tmp_path / "link").resolve())
    assert tree(far) == before[1] and os.listdir(folder) == [".written"] and (tmp_path / "link").is_symlink()


# ---- what users put there ----

NOTES = (
    "notes.txt",
    ".hidden",
    ".cache/huggingface/lock",
    "plots/loss.png",
    "training_state/notes.txt",
    "my.safetensors",
)


def add_notes(directory: Path) -> None:
    for name in NOTES:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("mine")
    (directory / "README.md").write_text("What I think of it.\n")
    (directory / "empty").mkdir()
    (directory / "link").symlink_to("/nowhere")


def notes_in(directory: Path) -> Iterator[str]:
    yield from (name for name in NOTES if (directory / name).read_text() == "mine")
    yield from ("README.md",) if (directory / "README.md").read_text() == "What I think of it.\n" else ()
    yield from ("link",) if (directory / "link").is_symlink() else ()


@pytest.mark.parametrize("act", [*DELETIONS.values(), *WRITES.values()])
@pytest.mark.parametrize("until", ["committed", "described"])
def test_a_users_files_stay(act: Act, until: str, tmp_path: Path, told: list[str]) -> None:
    if act is uploaded and until == "described":
        return
    directory = save(tmp_path, 5, until=until)
    add_notes(directory)
    lost = {"README.md"} if until == "described" else set()  # of a save that was interrupted it may be a part
    act(directory) if act is not saved else begin(directory)
    if lost:
        (directory / "README.md").write_text("What I think of it.\n")
    assert set(notes_in(directory)) == {*NOTES, "README.md", "link"}
    if act in WRITES.values():
        assert set(os.listdir(directory)) >= {".written", "empty"} and is_torn(directory)
    else:
        own = {name for name in tree(directory) if (directory / name).is_file()} - {*NOTES, "README.md"}
        assert own == set() and not is_torn(directory) and (directory / "empty").is_dir()
        rotate(tmp_path, 1)
        assert set(notes_in(directory)) == {*NOTES, "README.md", "link"}
    assert sum("kept the files that no run has written" in text for text in told) == 1, told


def test_a_users_files_are_no_part_of_the_new_checkpoint(tmp_path: Path) -> None:
    """Neither at a save in that folder nor where it is interrupted; they may be edited as before."""
    directory = save(tmp_path, 5)
    add_notes(directory)
    for _ in range(2):
        save(tmp_path, 5, until="described")
    commit(directory, WORLD, 5, TIMEOUT)
    listed = set(read_marker(directory)["files"])
    assert listed.isdisjoint({*NOTES, "README.md", "link"}) and "config.json" in listed
    (directory / "notes.txt").write_text("edited")
    check(directory)
    remove(directory)
    assert (directory / "notes.txt").read_text() == "edited"


def test_an_own_readme_goes_and_an_edited_one_stays(tmp_path: Path) -> None:
    for step in (5, 6):
        save(tmp_path, step)
    (tmp_path / "checkpoint-5" / "README.md").write_text("edited")
    for step in (5, 6):
        remove(tmp_path / f"checkpoint-{step}")
    assert tree(tmp_path) == {"checkpoint-5": "", "checkpoint-5/README.md": b"edited".hex()}


@pytest.mark.parametrize(
    "name", ["model.safetensors", "pytorch_model.bin", "config.json", "optimizer.pt", "adapter.safetensors"]
)
def test_a_checkpoint_of_another_program_is_kept_whole(name: str, tmp_path: Path, told: list[str]) -> None:
    directory = tmp_path / "checkpoint-5"
    for other in (name, "notes.txt", "sub/more.txt"):
        (directory / other).parent.mkdir(parents=True, exist_ok=True)
        (directory / other).write_text("theirs")
    before = tree(directory)
    save(tmp_path, 5)
    check(directory)
    assert tree(tmp_path / "_kept-checkpoint-5") == before and "notes.txt" not in tree(directory)
    assert len(told) == 1 and "renamed it to _kept-checkpoint-5" in told[0]
    rotate(tmp_path, 1)
    assert tree(tmp_path / "_kept-checkpoint-5") == before
    assert [path.name for path in newest(tmp_path)] == ["checkpoint-5"]


@pytest.mark.parametrize("name", ["notes.txt", ".hidden", "README.md", "committed.json", "sub/notes.txt"])
def test_notes_in_a_folder_that_is_no_checkpoint_stay_there(name: str, tmp_path: Path) -> None:
    directory = tmp_path / "checkpoint-5"
    (directory / name).parent.mkdir(parents=True)
    (directory / name).write_text('{"mine": 1}')
    save(tmp_path, 5)
    check(directory)
    kept = tmp_path / "_kept-checkpoint-5" if name == "committed.json" else directory  # its name is the marker's
    assert name == "README.md" or (kept / name).read_text() == '{"mine": 1}'
    assert name not in read_marker(directory)["files"]


def test_a_file_of_a_checkpoints_name_and_weights_beside_a_state_are_kept(tmp_path: Path, told: list[str]) -> None:
    (tmp_path / "checkpoint-5").write_text("a file")
    save(tmp_path, 5)
    assert (tmp_path / "_kept-checkpoint-5").read_text() == "a file"
    directory = save(tmp_path, 6, hub=False)
    (directory / "model.safetensors").write_text("converted, by hand")
    save(tmp_path, 6, hub=False)
    check(directory)
    assert (tmp_path / "_kept-checkpoint-6" / "model.safetensors").read_text() == "converted, by hand"
    assert not (directory / "model.safetensors").exists() and len(told) == 3


# ---- what cannot be deleted ----


@pytest.mark.parametrize("fault", ["rename", "parent", "mkdir"])
def test_what_cannot_be_deleted_is_as_it_was(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = save(tmp_path, 5)
    before = tree(directory)

    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        if fault == "parent":
            patch.setattr(commit_module.os, "access", lambda *_: False)
        else:
            patch.setattr(Path, fault, refuse)
        with pytest.raises(PermissionError):
            remove(directory)
    assert tree(directory) == before
    check(directory)


def test_a_mount_point_is_emptied_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = save(tmp_path, 5)
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == directory)
    remove(directory)
    assert not directory.exists() and os.listdir(tmp_path) == []
    directory = save(tmp_path, 5)
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "training_state")
    before = tree(directory / "training_state")
    remove(directory)
    assert tree(directory / "training_state") == before and len(before) == 3  # another file system


@pytest.mark.parametrize("moment", range(8))
def test_a_deletion_that_is_killed_takes_no_notes(moment: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each of its operations; the next run ends it."""
    directory = save(tmp_path, 5, hub=False)
    add_notes(directory)
    (directory / "model.safetensors").write_text("converted, by hand")
    count = 0

    def counted(act: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count > moment * 2:
                raise KeyboardInterrupt
            return act(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in ("unlink", "rename", "replace", "rmdir", "mkdir"):
            patch.setattr(Path, name, counted(getattr(Path, name)))
        try:
            remove(directory)
        except KeyboardInterrupt:
            pass
    save(tmp_path, 6)
    rotate(tmp_path, 1)
    assert set(notes_in(directory)) == {*NOTES, "README.md", "link"}
    assert (directory / "model.safetensors").read_text() == "converted, by hand"
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-5", "checkpoint-6"]


def test_stock_models_of_a_checkpoint_load(tmp_path: Path) -> None:
    """With a user's files beside them."""
    model = AutoModelForCausalLM.from_config(tiny_config())
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "notes.txt").write_text("mine")
    begin(tmp_path / "checkpoint-1")
    model.save_pretrained(tmp_path / "checkpoint-1")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-1").config.vocab_size == 120
