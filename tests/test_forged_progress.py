"""Forged files that a resume reads besides the index: progress, generators, rates, names of our own files."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_forged import INDEX, PROGRESS, Rank, body_of, sign, write_checkpoint

from hf_nanotron.checkpoint.directory.retention import check_together
from hf_nanotron.checkpoint.directory.runs import Run, write_record
from hf_nanotron.checkpoint.directory.verify import MARKER, check
from hf_nanotron.checkpoint.files.checked import write_checked
from hf_nanotron.checkpoint.files.disk import checksum_of
from hf_nanotron.checkpoint.remote.store import RemoteStore
from hf_nanotron.checkpoint.state.training_state import load_training_state
from hf_nanotron.checkpoint.state.values import encode
from hf_nanotron.convert.folder import load_config

NAN, INF = {"$": "float", "value": "nan"}, {"$": "float", "value": "inf"}
HUGE = 10**400


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("made"), 2)


@pytest.fixture
def checkpoint(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "checkpoint-2")


def refused(action: Callable[[], Any], what: object) -> None:
    with pytest.raises(ValueError) as error:
        action()
    assert type(error.value) is ValueError and len(str(error.value)) < 1000, (what, str(error.value)[:300])


def control(**state: Any) -> dict[str, Any]:
    return {"stateful_callbacks": {"TrainerControl": state}}


WRONG_PROGRESS: list[dict[str, Any]] = [
    {"global_step": 3}, {"global_step": 0}, {"logging_steps": -1}, {"logging_steps": float("nan")},
    {"save_steps": "1"}, {"save_steps": HUGE}, {"eval_steps": float("inf")}, {"epoch": HUGE}, {"best_metric": -HUGE},
    {"num_train_epochs": HUGE}, {"total_flos": HUGE}, {"best_model_checkpoint": 5}, {"log_history": [[]]},
    control(args={"x": 1}), control(args={"should_save": 1}), control(attributes={"_new_step": 5}),
    control(attributes={"should_save": "x"}), {"stateful_callbacks": {"TrainerControl": []}},
]  # fmt: skip
RIGHT_PROGRESS: list[dict[str, Any]] = [
    {"logging_steps": 0}, {"save_steps": 0.5}, {"total_flos": 10**30}, {"log_history": [{"loss": float("nan")}]},
    control(args={"should_save": True}, attributes={}), {"best_metric": float("-inf")},
]  # fmt: skip


def test_progress(checkpoint: Path) -> None:
    """Of another step, and numbers and callbacks that would end the run later."""
    path = checkpoint / PROGRESS
    body = json.loads(path.read_text())
    for mutant in WRONG_PROGRESS + RIGHT_PROGRESS:
        path.write_text(json.dumps({**body, **mutant}))
        sign(checkpoint, PROGRESS)
        if mutant in WRONG_PROGRESS:
            refused(lambda: check(checkpoint, deep=False), mutant)
        else:
            check(checkpoint, deep=False)


def test_names_of_our_own_files_in_a_marker(checkpoint: Path) -> None:
    body = body_of(checkpoint / MARKER)
    for name in (".written/x", ".written", MARKER, f"{MARKER}/x", "training_state", f"{INDEX}/x", "../_run.json"):
        files = {**body["files"], name: {"bytes": 1, "crc32": "00000000"}}
        write_checked(checkpoint / MARKER, {**body, "files": files}, durable=False)
        refused(lambda: check(checkpoint, deep=False), name)


def test_a_checkpoint_without_what_a_resume_needs(checkpoint: Path) -> None:
    """Is skipped by `resume_from_checkpoint=True`."""
    mesh = Rank(0).mesh
    check_together(mesh, checkpoint, needs=(INDEX,))
    body = body_of(checkpoint / MARKER)
    files = {name: entry for name, entry in body["files"].items() if not name.startswith("training_state/")}
    write_checked(checkpoint / MARKER, {**body, "files": files}, durable=False)
    check_together(mesh, checkpoint)
    with pytest.raises(ValueError, match="index.json: it was saved with save_only_model=True"):
        check_together(mesh, checkpoint, needs=(INDEX,))


def test_states_of_generators(checkpoint: Path) -> None:
    good = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
    path, marker = checkpoint / "rng_state.pth", body_of(checkpoint / MARKER)

    def use(value: Any) -> None:
        path.write_bytes(value) if isinstance(value, bytes) else torch.save(value, path)
        entry = {"bytes": path.stat().st_size, "crc32": checksum_of(path)}
        write_checked(checkpoint / MARKER, {**marker, "files": {**marker["files"], path.name: entry}}, durable=False)
        check(checkpoint, deep=False)

    use(good)
    others: list[Any] = [None, 5, "x", [], (), (3,), (3, (1, 2), None), torch.zeros(3), {}, ("MT19937", [1], 0, 0, 0.0)]
    others += [torch.zeros(5056, dtype=torch.uint8)]
    for key in good:
        for other in others:
            refused(lambda key=key, other=other: use({**good, key: other}), (key, other))
        refused(lambda key=key: use({name: good[name] for name in good if name != key}), key)
    calls_eval = b"\x80\x02c__builtin__\neval\n(S'1'\ntR."
    for other in (None, 5, "x", [], torch.zeros(2), b"", b"x", b"PK\x03\x04" + bytes(99), calls_eval):
        refused(lambda other=other: use(other), other)


def test_hyperparameters(checkpoint: Path) -> None:
    """With which no run could go on: not finite, negative, or another attribute of the scheduler."""
    path = checkpoint / INDEX
    body = body_of(path)
    group, scheduler = body["values"]["optimizer"]["groups"][0], body["values"]["scheduler"]
    numbers = [-1.0, NAN, INF, "x", True, HUGE, encode(torch.tensor(float("nan")), ""), encode(torch.tensor(-1.0), "")]
    cases = [(group, key, value) for key in ("lr", "initial_lr", "eps", "weight_decay") for value in numbers]
    cases += [(scheduler, "base_lrs", value) for value in ([NAN], [-1.0], [], ["x"])]
    cases += [(scheduler, key, value) for key in ("last_epoch", "_step_count") for value in (-5, NAN)]
    cases += [(scheduler, "_last_lr", [INF]), (scheduler, "get_lr", 5), (scheduler, "optimizer", 5)]
    for place, key, value in cases:
        before = dict(place)
        place[key] = value
        write_checked(path, body, durable=False)
        rank = Rank(0)
        load = lambda rank=rank: load_training_state(  # noqa: E731
            checkpoint, rank.mesh, rank.segments, rank.optimizer, rank.scheduler
        )
        refused(load, (key, value))
        place.clear()
        place.update(before)


def test_links_in_the_place_of_temporary_files(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "_run.json.tmp").symlink_to(victim)
    write_record(tmp_path / "out", Run("a", "b", 1.0), {})
    assert victim.read_text() == "mine" and not (tmp_path / "out" / "_run.json").is_symlink()


def test_code_of_a_config_is_not_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(body))
    (tmp_path / "own.py").write_text("raise AssertionError")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    refused(lambda: load_config(tmp_path), "auto_map")


@pytest.mark.parametrize("is_cause", [True, False])
def test_errors_that_led_to_an_error_hold_no_password(is_cause: bool) -> None:
    store = RemoteStore("memory://x", {"secret": "pa55w0rd-5ecret"})

    def error(first: str) -> Exception:
        inner, outer = OSError(first), OSError("it failed")
        outer.__cause__, outer.__context__ = (inner if is_cause else None), inner
        return outer

    assert store.shown(error("login with pa55w0rd-5ecret")) is None
    assert store.shown(error("no route to host")) is not None
