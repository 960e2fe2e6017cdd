"""A checkpoint counts from its marker on, a damaged one is refused by name, and a kill at any moment loses none."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from pool import JobError, WorkerPool
from tiny import tiny_config
from transformers import AutoModelForCausalLM

from hf_nanotron.checkpoint.directory import commit as commit_module, retention as manager, verify
from hf_nanotron.checkpoint.directory.commit import begin, commit, describe, fail, failure, wait_for_ranks
from hf_nanotron.checkpoint.directory.retention import (
    candidates,
    check_together,
    checkpoints,
    choose,
    choose_together,
    is_part,
    newest,
    rotate,
    run_at_hand,
)
from hf_nanotron.checkpoint.directory.runs import Run, marked_run
from hf_nanotron.checkpoint.directory.verify import check, is_committed, is_torn, read_marker
from hf_nanotron.checkpoint.files.checked import write_checked
from hf_nanotron.checkpoint.remote.backlog import bytes_of
from hf_nanotron.checkpoint.state import file as state_file
from hf_nanotron.checkpoint.state.file import StatePiece, write_rank
from hf_nanotron.parallel.config import ParallelConfig
from hf_nanotron.parallel.mesh import ParallelMesh
from hf_nanotron.parallel.shard_spec import ShardSpec

WORLD = 2
TIMEOUT = 300.0  # seconds


def save(output_dir: Path, step: int, block_bytes: int = 64, hub: bool = True, until: str = "committed") -> Path:
    """A checkpoint of two ranks as the trainer writes it, with a training state. `until` stops short of the end."""
    directory = output_dir / f"checkpoint-{step}"
    begin(directory)
    if until == "begun":
        return directory
    (directory / "config.json").write_text(json.dumps({"step": step}))
    (directory / "README.md").write_text("A model.\n")
    generator = torch.Generator().manual_seed(step)
    folder = directory / "training_state"
    state_file.clear(folder)
    for rank in range(WORLD):
        spec = ShardSpec("weight", (90,), None, (), 0)
        half = 90 // WORLD
        tensors = {kind: torch.randn(half, generator=generator) for kind in ("master", "exp_avg")}
        piece = StatePiece(spec, rank * half, (rank + 1) * half, tensors, {"step": step})
        write_rank(folder, rank, [piece], block_bytes)
        written = [folder / f"rank-{rank:05d}.safetensors"]
        if hub:
            shard = directory / f"model-{rank + 1:05d}-of-00002.safetensors"
            shard.write_bytes(random.Random(step * WORLD + rank).randbytes(3000))
            written.append(shard)
        describe(directory, rank, written)
    state_file.commit(folder, WORLD, {"optimizer": None, "scheduler": None, "extra": {"step": step}})
    (directory / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    if until != "described":
        commit(directory, WORLD, step, TIMEOUT)
    return directory


def listed(directory: Path) -> list[str]:
    return sorted(read_marker(directory)["files"])


def flip(path: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


@pytest.fixture(autouse=True)
def synced(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """What was brought to stable storage, in order. It is not, which takes long: a kill is no power failure."""
    paths: list[Path] = []
    monkeypatch.setattr(os, "fsync", lambda handle: paths.append(Path(os.readlink(f"/proc/self/fd/{handle}"))))
    return paths


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts of the manager's warnings."""
    texts: list[str] = []
    monkeypatch.setattr(manager.logger, "warning", texts.append)
    return texts


# ---- folders that vanish ----


def read_while_it_vanishes(read: Callable[[Path], Any], directory: Path, call: int) -> None:
    """`read(directory)`, and `directory` is deleted before one of its system calls: the `call`-th, if there is one."""
    seen = 0

    def watch(_: Any, event: str, function: Any) -> None:
        nonlocal seen
        if event == "c_call" and getattr(function, "__module__", None) in ("posix", "io", "_io"):
            if seen == call:
                shutil.rmtree(directory)
            seen += 1

    sys.setprofile(watch)
    try:
        read(directory)
    finally:
        sys.setprofile(None)


READERS: dict[str, Callable[[Path], Any]] = {
    "is_torn": is_torn,
    "is_committed": is_committed,
    "marked_run": marked_run,
    "is_part": lambda directory: is_part(Run(), directory),
    "newest": lambda directory: newest(directory.parent),
    "candidates": lambda directory: candidates(directory.parent),
    "run_at_hand": lambda directory: run_at_hand(directory.parent),
    "choose": lambda directory: choose(directory.parent),
    "bytes_of": bytes_of,
}


@pytest.mark.parametrize("until", ["begun", "described", "committed"])
@pytest.mark.parametrize("reader", READERS)
def test_a_folder_may_vanish_while_it_is_read(tmp_path: Path, reader: str, until: str) -> None:
    """Threads delete checkpoints (after an upload, to make room) while others look at them."""
    vanished, whole = 0, save(tmp_path / "whole", 1, until=until)
    if until == "begun":
        shutil.rmtree(whole / ".written")  # an empty folder
    (tmp_path / "run").mkdir()
    while True:
        directory = Path(shutil.copytree(whole, tmp_path / "run" / whole.name))
        read_while_it_vanishes(READERS[reader], directory, vanished)
        if directory.exists():
            break
        vanished += 1
    assert vanished


# ---- the marker ----


def test_marker_lists_every_file_as_readable_json(tmp_path: Path) -> None:
    directory = save(tmp_path, 5)
    check(directory)
    marker = json.loads((directory / "committed.json").read_text())
    assert (marker["step"], marker["hub_weights"], marker["version"]) == (5, True, 1)
    on_disk = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    assert set(marker["files"]) == on_disk - {"committed.json", "README.md"}
    assert not (directory / ".written").exists()
    for name, entry in marker["files"].items():
        assert entry["bytes"] == (directory / name).stat().st_size
        assert (entry["crc32"] is None) == name.startswith("training_state/rank-")


def test_everything_is_durable_before_the_marker(tmp_path: Path, synced: list[Path]) -> None:
    directory = save(tmp_path, 5)
    assert synced[-2:] == [directory / "committed.json.tmp", directory]
    # The training state's index, like the marker, is written under another name.
    paths = {directory / name for name in listed(directory)} | {directory / "training_state", directory, tmp_path}
    assert paths <= set(synced[:-2])


def test_hub_weights_left_out_are_noted(tmp_path: Path) -> None:
    assert read_marker(save(tmp_path, 5, hub=False))["hub_weights"] is False


def test_from_pretrained_does_not_mind_the_marker(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(tiny_config(num_hidden_layers=2))
    directory = tmp_path / "checkpoint-1"
    begin(directory)
    model.save_pretrained(directory)
    describe(directory, 0)  # rank 0 finds what nobody has described
    commit(directory, 1, 1, TIMEOUT)
    assert read_marker(directory)["hub_weights"] is True
    again = AutoModelForCausalLM.from_pretrained(directory)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    flip(directory / "model.safetensors", random.Random(0))
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged: its crc32"):
        check(directory)


@pytest.mark.parametrize("until", ["begun", "described"])
def test_without_its_marker_it_does_not_count(tmp_path: Path, until: str) -> None:
    directory = save(tmp_path, 5, until=until)
    assert not is_committed(directory) and is_torn(directory) and newest(tmp_path) == []
    with pytest.raises(ValueError, match="checkpoint-5 is not committed: saving it was interrupted"):
        check(directory)


def test_checkpoint_of_another_program_is_refused_with_what_works(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoint-5"
    directory.mkdir()
    (directory / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(ValueError, match="not committed: it has no committed.json.*save_only_model.*from_pretrained"):
        check(directory)
    with pytest.raises(ValueError, match="checkpoint-6 is not a directory"):
        check(tmp_path / "checkpoint-6")


def test_torn_marker_is_refused_at_every_length(tmp_path: Path) -> None:
    directory = save(tmp_path, 5)
    marker = directory / "committed.json"
    whole = marker.read_bytes()
    for length in range(0, len(whole), 7):
        marker.write_bytes(whole[:length])
        assert not is_committed(directory)
        with pytest.raises(ValueError, match="committed.json is truncated or damaged"):
            check(directory, deep=False)


def test_later_version_is_refused_and_not_deleted(tmp_path: Path) -> None:
    directory = save(tmp_path, 5)
    body = {"format": verify.FORMAT, "version": 2, "step": 5, "files": {}}
    write_checked(directory / "committed.json", body)
    with pytest.raises(ValueError, match="version 2; this program reads .* version 1"):
        check(directory)
    save(tmp_path, 6)
    assert rotate(tmp_path, 1) == [] and directory.exists()


# ---- writing ----


def test_beginning_again_leaves_nothing_of_the_old_one(tmp_path: Path) -> None:
    directory = save(tmp_path, 5)
    (directory / "rng_state_7.pth").write_bytes(b"of a larger job")
    begin(directory)
    assert [path.name for path in directory.iterdir()] == [".written"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]
    assert not is_committed(directory) and is_torn(directory)


def test_marker_goes_before_anything_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill between any two file operations of `begin` or of a deletion leaves something torn."""
    directory = save(tmp_path, 5)

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commit_module.Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        begin(directory)
    assert not is_committed(directory) and is_torn(directory)
    assert len(list(directory.iterdir())) > 3  # all else is there


def test_commit_waits_for_ranks_that_write_in_the_background(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoint-5"
    begin(directory)

    def write(rank: int) -> None:
        time.sleep(0.1 * (rank + 1))
        path = directory / f"model-{rank + 1:05d}-of-00003.safetensors"
        path.write_bytes(bytes(100))
        describe(directory, rank, [path])

    threads = [threading.Thread(target=write, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    commit(directory, 3, 5, TIMEOUT)
    for thread in threads:
        thread.join()
    check(directory)
    assert len(listed(directory)) == 3


def test_commit_raises_what_another_rank_has_failed_with(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoint-5"
    begin(directory)
    describe(directory, 0)
    assert failure(directory) is None
    fail(directory, 3, OSError(28, "No space left on device"))
    with pytest.raises(RuntimeError, match="rank-00003: OSError: .*No space left on device"):
        commit(directory, 4, 5, TIMEOUT)
    assert "No space left" in str(failure(directory)) and not is_committed(directory)


def test_commit_gives_up_and_names_the_ranks(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoint-5"
    begin(directory)
    describe(directory, 1)
    with pytest.raises(TimeoutError, match=r"2 of 3 ranks had not written their files after 0.05 s: 0, 2\."):
        wait_for_ranks(directory, 3, 0.05)
    assert not is_committed(directory)


def test_commit_refuses_what_is_not_as_described(tmp_path: Path) -> None:
    directory = save(tmp_path, 5, until="described")
    (directory / "model-00001-of-00002.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match="model-00001-of-00002.safetensors was cut off: it has 5 bytes instead"):
        commit(directory, WORLD, 5, TIMEOUT)
    directory = save(tmp_path, 6, until="described")
    (directory / "training_state" / "index.json").unlink()
    with pytest.raises(ValueError, match="index.json is missing; the training state is completed before"):
        commit(directory, WORLD, 6, TIMEOUT)
    with pytest.raises(ValueError, match="config.json is not in .*checkpoint-6"):
        describe(directory, 0, [tmp_path / "config.json"])
    with pytest.raises(ValueError, match="`begin` comes before `commit`"):
        commit(save(tmp_path, 7), WORLD, 7, TIMEOUT)
    assert [path.name for path in newest(tmp_path)] == ["checkpoint-7"]


# ---- damage ----


def test_each_missing_or_truncated_file_is_named(tmp_path: Path) -> None:
    directory = save(tmp_path, 5)
    assert len(listed(directory)) == 7
    for name in listed(directory):
        path = directory / name
        whole = path.read_bytes()
        path.unlink()
        with pytest.raises(ValueError, match=f"{name} is missing, but committed.json names it"):
            check(directory, deep=False)
        for length in (0, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:length])
            text = f"{name} was cut off: it has {length} bytes instead of {len(whole)}"
            with pytest.raises(ValueError, match=text):
                check(directory, deep=False)
        path.write_bytes(whole + b"\n")
        with pytest.raises(ValueError, match=f"{name} has grown"):
            check(directory, deep=False)
        path.write_bytes(whole)
    check(directory)


def test_each_flipped_bit_is_found_and_named(tmp_path: Path) -> None:
    directory = save(tmp_path, 5)
    chance = random.Random(0)
    for name in [*listed(directory), "committed.json"]:
        path = directory / name
        whole = path.read_bytes()
        for _ in range(40):
            flip(path, chance)
            with pytest.raises(ValueError, match=f"{name}.* damaged"):
                check(directory)
            path.write_bytes(whole)
    check(directory)


def test_every_bit_of_a_training_state_file_is_under_a_checksum(tmp_path: Path) -> None:
    directory = save(tmp_path, 5, block_bytes=16)
    path = directory / "training_state" / "rank-00001.safetensors"
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        with pytest.raises(ValueError, match="rank-00001.safetensors is damaged"):
            check(directory)


def test_unreadable_file_is_refused_and_not_a_crash(tmp_path: Path) -> None:
    directory = save(tmp_path, 5)
    path = directory / "config.json"
    path.unlink()
    path.symlink_to(path.name)  # a loop: an OSError that is not FileNotFoundError
    with pytest.raises(ValueError, match="config.json cannot be read"):
        check(directory)


def test_shares_cover_each_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = save(tmp_path, 5)
    seen: Counter[str] = Counter()
    original: Callable[..., None] = verify.check_length
    monkeypatch.setattr(verify, "check_length", lambda path, *rest: (seen.update([path.name]), original(path, *rest)))
    for count in (1, 2, 3, 16):
        seen.clear()
        for index in range(count):
            check(directory, part=(index, count))
        assert len(seen) == 7 and set(seen.values()) == {1}


def test_what_users_and_tools_change_is_tolerated(tmp_path: Path) -> None:
    directory = save(tmp_path, 5)
    (directory / "README.md").write_text("A much better description.\n")
    (directory / "notes.txt").write_text("loss looks fine\n")
    (directory / ".cache" / "huggingface").mkdir(parents=True)
    (directory / ".cache" / "huggingface" / "lock").touch()
    check(directory)
    (directory / "README.md").unlink()
    check(directory)


# ---- resume ----


def test_steps_are_numbers_and_other_names_are_no_checkpoints(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        save(tmp_path, step)
    shutil.copytree(tmp_path / "checkpoint-100", tmp_path / "checkpoint-200-copy")
    (tmp_path / "checkpoint-300").write_text("a file")
    assert [path.name for path in newest(tmp_path)] == ["checkpoint-100", "checkpoint-10", "checkpoint-9"]
    assert checkpoints(tmp_path / "nowhere") == [] and choose(tmp_path / "nowhere") is None


def test_damaged_ones_are_passed_over_with_a_warning_each(tmp_path: Path, warnings: list[str]) -> None:
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step, until="described" if step == 5 else "committed")
    flip(tmp_path / "checkpoint-4" / "training_state" / "rank-00000.safetensors", random.Random(1))
    (tmp_path / "checkpoint-3" / "trainer_state.json").unlink()
    assert choose(tmp_path) == tmp_path / "checkpoint-2"
    assert len(warnings) == 3
    for text, parts in zip(
        warnings,
        [("checkpoint-5", "interrupted"), ("rank-00000.safetensors", "damaged"), ("trainer_state.json", "missing")],
        strict=True,
    ):
        assert "skipping" in text and all(part in text for part in parts)
    for step in (1, 2):
        flip(tmp_path / f"checkpoint-{step}" / "config.json", random.Random(step))
    assert choose(tmp_path) is None


# ---- rotation ----


def names(output_dir: Path) -> list[str]:
    return sorted(path.name for path in output_dir.iterdir())


def test_rotation_keeps_the_newest(tmp_path: Path) -> None:
    for step in (2, 9, 10, 11):
        save(tmp_path, step)
    assert rotate(tmp_path, None) == rotate(tmp_path, 0) == rotate(tmp_path, 4) == []
    assert [path.name for path in rotate(tmp_path, 2)] == ["checkpoint-2", "checkpoint-9"]
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-11"]
    check(tmp_path / "checkpoint-10")


def test_limit_of_one_with_a_torn_newer_one(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, until="committed" if step in (1, 2) else "described")
    rotate(tmp_path, 1)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
    save(tmp_path, 4)
    rotate(tmp_path, 1)
    assert names(tmp_path) == ["checkpoint-4"]


def test_torn_older_ones_go_and_foreign_ones_stay(tmp_path: Path) -> None:
    save(tmp_path, 1, until="described")
    save(tmp_path, 2, until="begun")
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4" / "model.safetensors").write_bytes(b"of another program")
    assert rotate(tmp_path, 1) == []  # nothing is committed yet
    save(tmp_path, 5)
    assert len(rotate(tmp_path, None)) == 3
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-5"]


def test_best_one_is_protected_and_counts(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    rotate(tmp_path, 2, keep={str(tmp_path / "checkpoint-1")})
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-4"]
    save(tmp_path, 5)
    rotate(tmp_path, 1, keep={str(tmp_path / "checkpoint-1")})
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-5"]


def test_last_whole_one_stays_when_newer_ones_are_damaged(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "checkpoint-3" / "config.json").unlink()
    rotate(tmp_path, 1)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3"]
    assert choose(tmp_path) == tmp_path / "checkpoint-2"


def test_leftovers_of_killed_deletions_are_cleaned(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "checkpoint-1").rename(tmp_path / ".removed-checkpoint-1-5")
    directory = save(tmp_path, 2)
    (directory / ".written").mkdir()
    assert choose(tmp_path) == directory
    rotate(tmp_path, 1)
    assert names(tmp_path) == ["checkpoint-2"] and not (directory / ".written").exists()


def test_deletion_that_fails_is_a_warning(tmp_path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        save(tmp_path, step)

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(manager, "remove", refuse)
    assert rotate(tmp_path, 1) == []
    assert len(warnings) == 1 and "could not delete" in warnings[0] and "checkpoint-1" in warnings[0]


# ---- all ranks of a job ----


def choose_as_job(output_dir: str) -> tuple[str, list[str], list[str]]:
    """What is chosen, what this rank warned of, and which files it has read."""
    mesh = ParallelMesh(ParallelConfig())
    texts: list[str] = []
    read: list[str] = []
    length: Callable[..., None] = verify.check_length
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manager.logger, "warning", texts.append)
        patch.setattr(verify, "check_length", lambda path, *rest: (read.append(str(path)), length(path, *rest)))
        return str(choose_together(mesh, output_dir)), texts, read


def check_as_job(directory: str) -> str:
    mesh = ParallelMesh(ParallelConfig())
    try:
        check_together(mesh, directory)
    except ValueError as error:
        return str(error)
    return "passed"


def crash_as_job(directory: str) -> None:
    mesh = ParallelMesh(ParallelConfig())
    with pytest.MonkeyPatch.context() as patch:
        if mesh.rank == 1:
            patch.setattr(verify, "read_marker", lambda _: 1 / 0)
        check_together(mesh, directory)


def save_as_job(output_dir: str, step: int) -> bool:
    """Every rank writes in a background thread of its own, as an asynchronous save does."""
    mesh = ParallelMesh(ParallelConfig())
    directory = Path(output_dir, f"checkpoint-{step}")
    manager.together(mesh, "saving", lambda: begin(directory) if mesh.rank == 0 else None)

    def write() -> None:
        path = directory / f"model-{mesh.rank + 1:05d}-of-{mesh.world_size:05d}.safetensors"
        path.write_bytes(random.Random(mesh.rank).randbytes(20000))
        describe(directory, mesh.rank, [path])
        if mesh.rank == 0:
            commit(directory, mesh.world_size, step, TIMEOUT)
            rotate(output_dir, 1)

    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    manager.together(mesh, "saving", lambda: None)
    check_together(mesh, directory)
    return is_committed(directory)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_fall_back_together(pool: WorkerPool, tmp_path: Path, world_size: int) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, until="described" if step == 4 else "committed")
    flip(tmp_path / "checkpoint-3" / "model-00002-of-00002.safetensors", random.Random(3))
    results = pool.run(world_size, choose_as_job, str(tmp_path))
    assert {chosen for chosen, _, _ in results} == {str(tmp_path / "checkpoint-2")}
    first, *others = [texts for _, texts, _ in results]
    assert len(first) == 2 and "model-00002-of-00002.safetensors is damaged" in first[1]
    assert not any(others)
    read = Counter(path for _, _, paths in results for path in paths)
    assert len(read) == 14 and set(read.values()) == {1}  # two checkpoints, each file once


def test_ranks_refuse_together(pool: WorkerPool, tmp_path: Path) -> None:
    directory = save(tmp_path, 1)
    assert pool.run(3, check_as_job, str(directory)) == ["passed"] * 3
    (directory / "trainer_state.json").write_text("{}")
    (text,) = set(pool.run(3, check_as_job, str(directory)))
    assert "trainer_state.json was cut off: it has 2 bytes" in text
    assert pool.run(2, choose_as_job, str(tmp_path))[0][0] == "None"


def test_ranks_save_in_background_threads(pool: WorkerPool, tmp_path: Path) -> None:
    for step in (1, 2):
        assert pool.run(4, save_as_job, str(tmp_path), step) == [True] * 4
    assert names(tmp_path) == ["checkpoint-2"]


def test_crash_of_one_rank_leaves_none_waiting(pool: WorkerPool, tmp_path: Path) -> None:
    with pytest.raises(JobError) as failed:
        pool.run(3, crash_as_job, str(save(tmp_path, 1)))
    assert failed.value.kinds == {0: "RuntimeError", 1: "ZeroDivisionError", 2: "RuntimeError"}


# ---- kills ----

KILLS = 80


def save_until_killed(output_dir: Path, step: int, report: Connection) -> None:
    """Save and rotate without end, and say what has just been done."""
    while True:
        report.send(("saving", step))
        save(output_dir, step)
        report.send(("committed", step))
        rotate(output_dir, 2)
        step += 1


class Calls:
    """Counts the calls of this process, of Python and of C, each of which may write to a file; ends it at one of them.

    A moment of a save is a number of calls, which is the same on a slow machine.
    """

    def __init__(self, last: int | None = None) -> None:
        self.count, self.last = 0, last

    def __call__(self, frame: Any, event: str, argument: Any) -> None:
        self.count += 1
        if self.count == self.last:
            os.kill(os.getpid(), signal.SIGKILL)

    def __enter__(self) -> Calls:
        sys.setprofile(self)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)


def save_and_kill(output_dir: Path, step: int, call: int) -> list[tuple[str, int]]:
    """What a process has said that is killed at a call after it began to save."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = os.fork()  # milliseconds, unlike a start from nothing
    if process == 0:
        try:
            with Calls(call):
                save_until_killed(output_dir, step, theirs)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    theirs.close()
    messages = []
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    try:
        while True:
            messages.append(ours.recv())
    except (EOFError, OSError):  # what it was saying when it died does not count
        ours.close()
        return messages


def calls_of_a_save(output_dir: Path) -> int:
    """Of the second, after what is done once."""
    for step in (1, 2):
        with Calls() as calls:
            save(output_dir, step)
    return calls.count


def survive_kills(output_dir: Path) -> tuple[int, Counter[str]]:
    """The last step committed after `KILLS` kills, and after which message they came."""
    chance, saves = random.Random(0), 3 * calls_of_a_save(Path(f"{output_dir}-counted"))
    last, moments = 0, Counter[str]()
    for _ in range(KILLS):
        messages = save_and_kill(output_dir, last + 1, chance.randrange(100, saves))
        moments[messages[-1][0] if messages else "start"] += 1
        reported = max([last, *(step for what, step in messages if what == "committed")])
        for path in newest(output_dir):  # whatever looks complete is
            check(path)
        torn = [path for path in checkpoints(output_dir) if not is_committed(path)]
        assert all(map(is_torn, torn)) and len(torn) <= 2
        found = choose(output_dir)
        if found is None:
            assert reported == 0
            continue
        last = read_marker(found)["step"]
        assert last >= reported
        assert json.loads((found / "config.json").read_text())["step"] == last
        shard = (found / "model-00002-of-00002.safetensors").read_bytes()
        assert shard == random.Random(last * WORLD + 1).randbytes(3000)
    return last, moments


def survive_kills_quickly(output_dir: Path) -> tuple[int, Counter[str]]:
    """In a worker that has all imported and no threads: without warnings, and without waiting for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manager.logger, "warning", lambda text: None)
        patch.setattr(os, "fsync", lambda handle: None)
        return survive_kills(output_dir)


def test_kills_at_random_moments_lose_nothing(pool: WorkerPool, tmp_path: Path) -> None:
    ((last, moments),) = pool.run(1, survive_kills_quickly, tmp_path)
    assert last > KILLS // 16 and moments["saving"] > KILLS // 8, (last, moments)
    save(tmp_path, last + 1)
    rotate(tmp_path, 2)
    assert names(tmp_path) == sorted([f"checkpoint-{last}", f"checkpoint-{last + 1}"])  # and nothing hidden
