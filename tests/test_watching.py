"""A run is watched from its own log: `_metrics.jsonl`, `hf-nanotron top` and `plot`; which rank is slow; profiles."""

from __future__ import annotations

import contextlib
import errno
import gzip
import io
import json
import os
import re
import shlex
import socket
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from pool import JobError, WorkerPool
from test_cli import FRESH, command, corpus, one_line, write_settings
from tiny import checkpoint, message, pad_batch, random_dataset, training_arguments
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_nanotron import NanotronTrainingArguments
from hf_nanotron.cli.top import clean, duration, render
from hf_nanotron.monitor import read_log, run_log
from hf_nanotron.monitor.history import read_history, tokens_of
from hf_nanotron.monitor.ranks import OwnTimes, spread
from hf_nanotron.monitor.read_log import (
    DETAIL_LOG,
    RUN_LOG,
    LogReader,
    joined,
    process_numbers,
    process_start,
    read_runs,
)
from hf_nanotron.monitor.run_log import LogFile, plain
from hf_nanotron.monitor.run_status import status_of
from hf_nanotron.monitor.stragglers import Stragglers

STEPS, LENGTH = 4, 16


class Clock:
    """The clock by which a run measures how long it reads: only reading takes time."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


OF_READING = Clock()


class SlowRows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Rows that rank 1 reads slowly."""

    def __init__(self) -> None:
        self.rows = list(random_dataset(64, LENGTH))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        OF_READING.now += 0.03 * (os.environ.get("RANK") == "1")
        return self.rows[index]


class Fails(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyError("the disk of host n1 is gone, api_key='sk-" + "a1B2" * 10 + "'")


def train(model_dir: str, output_dir: str, fails: int = 0, resume: str | None = None, **overrides: Any) -> str:
    """A run on this rank. Returns what it wrote to stderr."""
    from hf_nanotron import AutoModelForCausalLM as ParallelAuto, NanotronTrainer

    settings = {"output_dir": output_dir, "max_steps": STEPS, "save_strategy": "steps", "save_steps": 2, **overrides}
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        args = NanotronTrainingArguments(**training_arguments(**settings))
        ParallelAuto.from_pretrained(model_dir, parallel=args.parallel).mesh.close()
        # Stock, which is cut in its place: transformers shows its own bar.
        model = AutoModelForCausalLM.from_pretrained(model_dir)
        trainer = NanotronTrainer(
            model=model,
            args=args,
            train_dataset=SlowRows(),
            eval_dataset=random_dataset(4, LENGTH),
            data_collator=pad_batch,
            callbacks=[Fails(fails)],
        )
        trainer.train(resume_from_checkpoint=resume)
        trainer.mesh.close()
    return err.getvalue()


def run_once(model_dir: str, directory: str) -> list[str]:
    profile = {"profile_steps": "1,3-4", "profile_ranks": "all", "gradient_accumulation_steps": 2}
    with mock.patch("hf_nanotron.monitor.ranks.time", OF_READING):
        return [train(model_dir, directory, eval_strategy="steps", eval_steps=2, **profile)]


@pytest.fixture(scope="module")
def run(pool: WorkerPool) -> tuple[Path, list[str]]:
    """Two data-parallel ranks, of which one reads slowly, with evaluations, saves and profiles."""
    folder = tempfile.mkdtemp()
    told = pool.run(2, run_once, checkpoint(), folder)
    return Path(folder), [text for texts in told for text in texts]


# ---- the log ----


def test_the_log_has_every_event(run: tuple[Path, list[str]]) -> None:
    folder, _ = run
    lines = [json.loads(line) for line in (folder / RUN_LOG).read_text().splitlines()]
    assert [line["event"] for line in lines].count("save") == 2
    assert lines[0]["event"] == "begin" and lines[-1]["event"] == "end" and lines[-1]["status"] == "finished"
    assert lines[0]["world_size"] == 2 and lines[0]["sizes"]["dp"] == 2 and lines[0]["max_steps"] == STEPS
    assert lines[0]["parameters"] == AutoModelForCausalLM.from_pretrained(checkpoint()).num_parameters()
    state = json.loads((folder / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    (found,) = read_runs(folder / RUN_LOG)
    for known, line in zip(state["log_history"], found.logs, strict=False):
        assert known.items() <= line.items()
    assert [line["step"] for line in found.logs if "eval_loss" in line] == [2, 4]


def test_the_slow_rank_is_named(run: tuple[Path, list[str]]) -> None:
    """Rank 1 reads for 30 ms a sample."""
    folder, _ = run
    (found,) = read_runs(folder / RUN_LOG)
    for line in found.steps:
        times = line["ranks"]["data_time"]
        assert times["rank"] == 1 and times["max"] >= 0.03 and times["min"] < times["max"]
        assert set(line["ranks"]) == {"step_time", "data_time", "host_time", "probe_time"}
        steps = line["ranks"]["step_time"]
        assert 0 < steps["min"] <= steps["median"] <= steps["max"]
    text = render([found], folder, time.time())
    (row,) = [line for line in text.splitlines() if line.startswith("reading data")]
    assert " 1   slow: " in row


def test_a_rank_that_stays_slow_is_told_once() -> None:
    """In the third line in a row; again after it was not slow; nothing that slows no step."""
    told = Stragglers()

    def line(most: float, rank: int = 3) -> str | None:
        return told.note({"data_time": spread([0.1, 0.1, 0.1, *(most if i == rank else 0.1 for i in (3, 4))])}, 1.0)

    assert [line(0.3) for _ in range(5)][:2] == [None, None]
    assert line(0.1) is None
    found = [line(0.3) for _ in range(4)]
    assert [text is None for text in found] == [True, True, False, True]
    assert found[2] is not None and "rank 3 (reading data, a step)" in found[2] and "slow: 3.0 x the median" in found[2]
    assert [line(0.3, rank) for rank in (3, 4, 3, 4, 3, 4)] == [None] * 6  # never the same one
    assert all(told.note({"data_time": spread([0.01, 0.01, 0.04])}, 1.0) is None for _ in range(4))


def test_spread_and_own_times() -> None:
    assert spread([0.2, 0.1, 0.9, 0.2]) == {"min": 0.1, "median": 0.2, "max": 0.9, "rank": 2}
    own = OwnTimes(torch.device("cpu"))
    assert list(own.reading([1, 2])) == [1, 2]
    own.begin()
    while time.process_time() - (own._began or 0.0) < 0.02:
        pass
    own.end()
    own.pause()
    own.end()  # without a beginning: it counts nothing
    data, host, probe = own.figures()
    assert own.steps == 2 and 0.01 <= host < 1 and 0 <= data < 1 and 0 < probe < 1


def test_a_run_that_fails_says_so_without_secrets(pool: WorkerPool, tmp_path: Path) -> None:
    with pytest.raises(JobError, match="disk of host n1"):
        pool.run(1, train, checkpoint(), str(tmp_path), 3)
    (found,) = read_runs(tmp_path / RUN_LOG)
    assert found.end["status"] == "failed" and found.end["step"] == 3
    assert "KeyError" in found.end["error"] and "n1 is gone" in found.end["error"]
    assert "a1B2" not in (tmp_path / RUN_LOG).read_text()
    code, out, _ = command("top", str(tmp_path), "--once")
    assert code == 0 and "failed: KeyError" in out

    # It goes on in the same folder.
    pool.run(1, train, checkpoint(), str(tmp_path), 0, str(tmp_path / "checkpoint-2"))
    runs = read_runs(tmp_path / RUN_LOG)
    assert [each.begin["step"] for each in runs] == [0, 2] and runs[1].end["status"] == "finished"
    assert [line["step"] for line in joined(runs) if "loss" in line] == [1, 2, 3, 4]
    code, out, _ = command("top", str(tmp_path), "--once")
    assert code == 0 and "runs before" in out and "steps 0 to 3" in out and "KeyError" in out
    history = read_history(tmp_path)
    assert history.series("loss")[0] == [1, 2, 3, 4]
    tokens = history.series("loss", by_tokens=True)[0]
    assert tokens == pytest.approx([LENGTH * step for step in range(1, 5)], rel=1e-6)


def test_no_log_when_it_is_off(pool: WorkerPool, tmp_path: Path) -> None:
    pool.run(1, train_quietly, checkpoint(), str(tmp_path))
    assert not [path.name for path in tmp_path.iterdir() if "metrics" in path.name]
    assert "has no _metrics.jsonl" in one_line(command("top", str(tmp_path), "--once"))


def train_quietly(model_dir: str, directory: str) -> None:
    train(model_dir, directory, run_log=False, max_steps=1, save_strategy="no")


def test_a_line_is_whole_or_left_out(tmp_path: Path) -> None:
    """What a killed run leaves, and what a reader meets while a line is being written."""
    path = tmp_path / RUN_LOG
    begin = {"event": "begin", "run": "a", "time": 1.0, "step": 0, "max_steps": 9}
    LogFile(path).write(begin)
    reader = LogReader(path)
    assert [each.id for each in reader.read()] == ["a"]
    line = json.dumps({"event": "log", "run": "a", "time": 2.0, "step": 1, "metrics": {"loss": 2.5}})
    with path.open("a") as file:
        file.write(line[:20])
    assert reader.read()[0].logs == [] and reader.unreadable == 0
    with path.open("a") as file:
        file.write(line[20:] + "\n" + line[:30])
    assert [each["loss"] for each in reader.read()[0].logs] == [2.5]
    LogFile(path).write({**begin, "run": "b", "time": 3.0})  # another run, after one that was killed
    assert [each.id for each in reader.read()] == ["a", "b"] and reader.unreadable == 1
    path.write_bytes(b'\xff\xfe{"event": "begin"}\n[1]\n{"event":"log","run":1,"time":1,"step":1}\n')
    assert read_runs(path) == []
    assert plain({"a": float("nan"), "b": [float("-inf"), 1], "c": torch.tensor(2.0), "d": Path("x")}) == {
        "a": "nan",
        "b": ["-inf", 1],
        "c": 2.0,
        "d": "x",
    }


def test_a_log_that_cannot_be_written_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link is not followed, and a full disk is a warning, once; when there is room, the log goes on."""
    warnings: list[str] = []
    monkeypatch.setattr(run_log.logger, "warning", warnings.append)
    outside, link = tmp_path / "outside", tmp_path / RUN_LOG
    outside.write_text("mine\n")
    link.symlink_to(outside)
    for log, says in ((LogFile(link), "Too many levels"), (LogFile(tmp_path / "full"), "No space left")):
        for _ in range(3):
            log.write({"event": "log"})
            monkeypatch.setattr(os, "write", no_space)
        monkeypatch.undo()
        monkeypatch.setattr(run_log.logger, "warning", warnings.append)
        assert says in warnings.pop() and not warnings
    assert outside.read_text() == "mine\n"
    log.write({"event": "end"})
    assert (tmp_path / "full").read_text() == '{"event":"log"}\n{"event":"end"}\n' and not warnings


def no_space(handle: int, data: bytes) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_secrets_of_arguments_are_not_in_the_log(tmp_path: Path) -> None:
    """An error of a service may quote a token that no pattern knows."""
    sizes = dict.fromkeys(("tp_size", "cp_size", "pp_size", "dp_size", "ep_size", "world_size"), 1)
    mesh: Any = SimpleNamespace(rank=0, device=torch.device("cpu"), **sizes)
    args = SimpleNamespace(output_dir=str(tmp_path), hub_token="correct-horse", accelerator_config={"key": 1})
    state = SimpleNamespace(global_step=0, max_steps=3, epoch=None)
    log = run_log.RunLog(mesh, SimpleNamespace(by_rank={}), 1, "committed.json")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError), log.running(True):
        log.on_train_begin(args, state, None)
        log.on_log(args, state, None, logs={"loss": 1.0, "of a user": torch.ones(2)})
        raise RuntimeError("401 for user correct-horse")
    (found,) = read_runs(tmp_path / RUN_LOG)
    assert found.end["error"] == "RuntimeError: 401 for user ***" and found.logs[0]["loss"] == 1.0
    assert "correct" not in (tmp_path / RUN_LOG).read_text()


def test_the_end_of_a_long_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who looks at the end keeps few lines, parses few, and is told the same; the next look reads what is new."""
    path, parsed = tmp_path / RUN_LOG, list[bytes]()
    for run in ("00000001", "00000002"):  # the first one was killed
        log = LogFile(path)
        log.write({"event": "begin", "run": run, "time": 0.0, "step": 0, "max_steps": 3000})
        for step in range(1, 1001):
            line = {"event": "log", "run": run, "time": 2.0 * step, "step": step}
            log.write({**line, "metrics": {"loss": 1 / step, "mfu": 0.5}, "epoch": step / 1000})
            if step % 400 == 0:
                log.write({**line, "metrics": {"eval_loss": 3 / step}})
    whole = read_runs(path)
    parse = read_log.parse_line
    monkeypatch.setattr(read_log, "parse_line", lambda data: parsed.append(data) or parse(data))
    reader = LogReader(path, keep=20)
    for each, known in zip(reader.read(), whole, strict=True):
        assert len(each.logs) == 20 and each.logs == known.logs[-20:] and each.latest == known.latest
        assert status_of(each, tmp_path, 2001.0) == status_of(known, tmp_path, 2001.0)
    assert len(parsed) < 100
    parsed.clear()
    LogFile(path).write({"event": "save", "run": "00000002", "time": 2002.0, "step": 1000, "checkpoint": "c"})
    assert reader.read()[1].saves and len(parsed) == 1


# ---- top ----


def written(folder: Path, *lines: dict[str, Any]) -> Path:
    text = "".join(json.dumps({"run": "a", "time": 0.0, "step": 0, **line}) + "\n" for line in lines)
    (folder / RUN_LOG).write_text(text)
    return folder


def test_states_of_a_run(tmp_path: Path) -> None:
    """By hand: 100 steps, one each 2 s, of which 40 are done at second 80."""
    me = {"host": socket.gethostname(), "pid": os.getpid(), "start": process_start(os.getpid())}
    me["numbers"] = process_numbers()
    begin = {"event": "begin", "max_steps": 100, "model": "LlamaForCausalLM", "world_size": 8, "device": "H200", **me}
    logs = [
        {"event": "log", "step": step, "time": 2.0 * step, "metrics": {"loss": 3.0, "mfu": 0.5}}
        for step in range(1, 41)
    ]

    def status(now: float, *more: dict[str, Any], **changes: Any) -> Any:
        runs = read_runs(written(tmp_path, {**begin, **changes}, *logs, *more) / RUN_LOG)
        return status_of(runs[-1], tmp_path, now)

    found = status(81.0)
    assert (found.state, found.step, found.age, found.eta) == ("running", 40, 1.0, 120.0)
    silent = status(80.0 + 61.0)
    assert silent.state == "silent" and "a line came every 2 s before" in silent.why
    assert status(80.0 + 59.0).state == "running"
    gone = status(81.0, start="1")  # another process has the number now
    assert gone.state == "dead" and f"process {os.getpid()} is gone" in gone.why and gone.eta is None
    assert status(81.0, start="1", host="elsewhere").state == "running"  # cannot be looked at
    assert status(81.0, start="1", numbers="pid:[1]").state == "running"  # of a container of this host
    ended = status(9999.0, {"event": "end", "step": 40, "time": 80.5, "status": "stopped"})
    assert ended.state == "stopped" and ended.eta is None
    assert status(81.0, {"event": "save", "step": 40, "checkpoint": "checkpoint-40"}).checkpoint["is_complete"] is None
    # The clock was set back by ten minutes: the time left is that of the measured steps, and a silence is noticed.
    later = {"event": "log", "step": 41, "time": -518.0 + 600, "metrics": {"loss": 3.0, "step_time": 1.5}}
    back = [{**line, "time": line["time"] + 600} for line in logs]
    runs = read_runs(written(tmp_path, begin, *back, later) / RUN_LOG)
    assert status_of(runs[0], tmp_path, 83.0).eta == 59 * 1.5
    assert status_of(runs[0], tmp_path, 282.0).state == "silent"


def test_top(run: tuple[Path, list[str]]) -> None:
    folder, _ = run
    code, out, err = command("top", str(folder), "--once")
    assert code == 0 and not err
    for text in ("finished", "step 4 of 4 (100 %)", "dp 2", "learning rate", "tokens/s", "peak memory", "eval loss"):
        assert text in out
    assert "last checkpoint checkpoint-4 (" in out and "not complete" not in out
    (folder / "checkpoint-4" / "committed.json").rename(folder / "aside")
    try:
        assert "not complete" in command("top", str(folder), "--once")[1]
    finally:
        (folder / "aside").rename(folder / "checkpoint-4" / "committed.json")
    body = json.loads(command("top", str(folder), "--json")[1])
    assert body["state"] == "finished" and body["step"] == 4 and body["checkpoint"]["is_complete"] is True
    assert body["latest"]["loss"] == read_runs(folder / RUN_LOG)[0].steps[-1]["loss"]


def test_top_of_what_is_no_log_of_ours(tmp_path: Path) -> None:
    """Neither a pipe, on which a reader would wait, nor lines that others made."""
    os.mkfifo(tmp_path / RUN_LOG)
    assert "it is no file" in one_line(command("top", str(tmp_path), "--once"))
    (tmp_path / RUN_LOG).unlink()
    odd = {"sizes": [1], "max_steps": "many", "parameters": "x", "pid": "p", "host": 3, "device": None, "marker": 7}
    ranks = {"data_time": {"min": 1, "median": "a", "max": 2, "rank": 0}, "host_time": 3, "probe_time": {}}
    log = {"event": "log", "step": 3, "metrics": {"loss": "nan", "eval_loss": 10**30}, "epoch": "x", "ranks": ranks}
    late, huge = {"event": "log", "time": 1e300}, {"event": "log", "step": 10**400}
    written(tmp_path, {"event": "begin", **odd}, log, {**log, "ranks": [1]}, late, huge, {"event": "save"})
    code, out, err = command("top", str(tmp_path), "--once")
    assert code == 0 and not err and "step 3" in out


def test_top_says_what_is_missing(tmp_path: Path) -> None:
    assert "is no folder" in one_line(command("top", str(tmp_path / "none"), "--once"))
    assert "has no _metrics.jsonl" in one_line(command("top", str(tmp_path)))
    assert "--interval 0.0 must be" in one_line(command("top", str(tmp_path), "--interval", "0"))
    assert [duration(seconds) for seconds in (3, 600, 12000, 200000)] == ["3 s", "10 min", "3 h 20 min", "2 d 7 h"]
    assert clean("a\x1b[2Jb\n") == "a?[2Jb?"


# ---- plot ----


def test_plot(run: tuple[Path, list[str]], tmp_path: Path) -> None:
    """The curves are those of the files, also of a stock Trainer's."""
    pytest.importorskip("matplotlib")
    folder, _ = run
    args = TrainingArguments(**training_arguments(output_dir=str(tmp_path / "stock"), max_steps=3))
    model = AutoModelForCausalLM.from_pretrained(checkpoint())
    stock = Trainer(model=model, args=args, train_dataset=random_dataset(8, LENGTH), data_collator=pad_batch)
    stock.train()
    stock.save_state()
    picture = tmp_path / "curves.svg"
    code, out, err = command("plot", str(folder), str(tmp_path / "stock"), "--output", str(picture))
    assert (code, err) == (0, "") and "trainer_state.json" in out
    text = picture.read_text()
    assert text.count('id="axes_') == 4
    history = read_history(tmp_path / "stock")
    assert history.series("loss") == ([1, 2, 3], [line["loss"] for line in stock.state.log_history if "loss" in line])
    assert read_history(folder / "checkpoint-4").series("loss") == read_history(folder).series("loss")
    refused = one_line(command("plot", str(tmp_path / "stock"), "--by", "tokens", "--output", str(picture)))
    assert "does not say how many tokens" in refused
    code, _, _ = command("plot", str(folder), "--metric", "eval_loss", "--by", "tokens", "--output", str(picture))
    assert code == 0 and picture.read_text().count('id="axes_') == 1
    assert "has not logged it" in one_line(command("plot", str(folder), "--metric", "x", "--output", str(picture)))
    assert "does not exist" in one_line(command("plot", str(tmp_path / "no"), "--output", str(picture)))
    (tmp_path / "empty").mkdir()
    assert "nothing was logged" in one_line(command("plot", str(tmp_path / "empty"), "--output", str(picture)))
    (tmp_path / "empty" / "trainer_state.json").write_text("{}")
    assert "no log_history" in one_line(command("plot", str(tmp_path / "empty"), "--output", str(picture)))


def test_tokens_of_lines() -> None:
    lines = [
        {"step": 2, "tokens_per_second": 50.0, "step_time": 2.0},
        {"step": 2, "eval_loss": 1.0},
        {"step": 5, "tokens_per_second": 10.0, "step_time": 4.0},
    ]
    assert tokens_of(lines) == [200.0, 200.0, 320.0]
    assert tokens_of([{"step": 1, "num_input_tokens_seen": 7}, {"step": 2}]) == [7, 7]
    assert tokens_of([{"step": 1, "loss": 1.0}]) is None


# ---- the page ----


def page_blocks(language: str) -> str:
    page = (Path(__file__).parent.parent / "docs" / "watching.md").read_text(encoding="utf-8")
    return "".join(re.findall(rf"^```{language}\n(.*?)^```", page, re.DOTALL | re.MULTILINE))


def test_commands_of_the_page(
    run: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pool: WorkerPool
) -> None:
    """Each one that watches, on a run whose settings are those that the page shows."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    lines = [shlex.split(line, comments=True) for line in page_blocks("bash").splitlines()]
    (training,) = [words[words.index("train") + 2 :] for words in lines if words[0] == "torchrun"]
    shown = yaml.safe_load(page_blocks("yaml"))["training"]
    settings = yaml.safe_load(FRESH.format(tokenizer=tokenizer_folder(), corpus=corpus(tmp_path), out="out"))
    settings["training"] |= shown | {"max_steps": 12, "metrics_detail_steps": 6, "save_strategy": "no"}
    code, _, err = pool.run(1, command_in, str(tmp_path), "train", write_settings(tmp_path, settings), *training)[0]
    assert code == 0, err
    assert (tmp_path / "out" / "_profile" / "steps-10-12-rank-0.txt").is_file()
    details = [json.loads(line) for line in (tmp_path / "out" / DETAIL_LOG).read_text().splitlines()]
    assert [line["step"] for line in details] == [6, 12]
    assert "weights/model.layers.0.self_attn.q_proj.weight/norm" in details[0]["metrics"]
    (tmp_path / "out-b").symlink_to(run[0])
    watching = [words[1:] for words in lines if words[0] == "hf-nanotron"]
    assert {words[0] for words in watching} == {"top", "plot"} and len(watching) == 7
    for words in watching:
        code, out, err = command(*words)
        assert code == 0 and out and not err, (words, err)
        if words[0] == "plot":
            assert (tmp_path / words[-1]).stat().st_size > 5000


def tokenizer_folder() -> str:
    from test_cli import checkpoint as with_tokenizer

    return with_tokenizer()


def command_in(folder: str, *argv: str) -> tuple[int, str, str]:
    with contextlib.chdir(folder):
        return command(*argv)


# ---- bars ----


def test_one_rank_shows_bars(run: tuple[Path, list[str]]) -> None:
    """Ours, and the one that transformers shows for a stock model."""
    _, (first, second) = run
    assert first.count("Loading weights") >= 2 and "Loading weights" not in second


# ---- profiles ----


def test_profiles(run: tuple[Path, list[str]]) -> None:
    folder, _ = run
    files = {path.name for path in (folder / "_profile").iterdir()}
    names = [f"steps-{steps}-rank-{rank}" for steps in ("1-1", "3-4") for rank in (0, 1)]
    assert files == {f"{name}{suffix}" for name in names for suffix in (".trace.json.gz", ".json", ".txt")}
    for name in names:
        with gzip.open(folder / "_profile" / f"{name}.trace.json.gz") as file:
            events = json.load(file)["traceEvents"]
        actions = {str(e["name"]) for e in events if "micro_batch=" in str(e["name"])}
        assert actions == {f"{kind} stage=0 micro_batch={n}" for kind in ("forward", "backward") for n in (0, 1)}
        table = json.loads((folder / "_profile" / f"{name}.json").read_text())
        assert table["steps"] == (1 if "1-1" in name else 2)
        assert sum(table["parts"].values()) == pytest.approx(table["seconds"], rel=1e-6)
        phases = sum(table["phases"].values()) + table["parts"]["idle"]
        assert phases == pytest.approx(table["seconds"], rel=1e-6)
        assert table["parts"]["matmul"] > 0 and table["parts"]["attention"] > 0 and table["parts"]["communication"] > 0
        assert min(table["phases"][phase] for phase in ("forward", "backward", "optimizer")) > 0
        text = (folder / "_profile" / f"{name}.txt").read_text()
        assert "matrix products" in text and "communication, overlapped" in text


def profile_pipeline(model_dir: str, directory: str, resume: str | None) -> None:
    last = {"profile_steps": "2-3,4", "profile_ranks": "1", "gradient_accumulation_steps": 3, "pp_size": 2}
    train(model_dir, directory, resume=resume, pp_schedule="zb", pp_virtual_stages=1, **last)


def test_profiles_of_a_pipeline(pool: WorkerPool, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Up to the last step, of the rank that was asked for; a resumed run profiles what is left."""
    if not request.config.getoption("full_matrix"):
        pytest.skip("--full-matrix")
    pool.run(2, profile_pipeline, checkpoint(), str(tmp_path), None)
    folder = tmp_path / "_profile"
    names = ["steps-2-3-rank-1", "steps-4-4-rank-1"]
    assert sorted({path.name.split(".")[0] for path in folder.iterdir()}) == names
    for name in names:
        with gzip.open(folder / f"{name}.trace.json.gz") as file:
            events = json.load(file)["traceEvents"]
        actions = {str(e["name"]) for e in events if "micro_batch=" in str(e["name"])}
        kinds = ("forward", "backward", "weight_gradients")
        assert actions == {f"{kind} stage=1 micro_batch={n}" for kind in kinds for n in range(3)}
        table = json.loads((folder / f"{name}.json").read_text())
        assert min(table["phases"][phase] for phase in ("forward", "backward", "optimizer")) > 0
        (folder / f"{name}.txt").unlink()
    pool.run(2, profile_pipeline, checkpoint(), str(tmp_path), str(tmp_path / "checkpoint-2"))
    assert sorted(path.stem for path in folder.glob("*.txt")) == ["steps-3-3-rank-1", "steps-4-4-rank-1"]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"profile_steps": "0-3"}, "'0-3' is neither an optimizer step"),
        ({"profile_steps": "7-3"}, "'7-3' is neither an optimizer step"),
        ({"profile_steps": "ten"}, "'ten' is neither an optimizer step"),
        ({"profile_steps": " "}, "names no step"),
        ({"profile_steps": "3-5,5"}, "has step 5 in two ranges"),
        ({"profile_steps": "3-5", "max_steps": 4}, "has step 5, but training ends at max_steps=4"),
        ({"profile_steps": "1", "profile_ranks": [0, 1]}, "'1' is no rank of this job, whose ranks are 0 to 0"),
        ({"profile_steps": "1", "profile_ranks": "-1"}, "'-1' is no rank of this job"),
        ({"profile_steps": "1", "profile_ranks": []}, "names no rank"),
        ({"profile_ranks": "all"}, "needs profile_steps"),
        ({"metrics_detail": ["weight"]}, "'weight' is not one of 'weights', 'gradients', 'activations'"),
        ({"metrics_detail_steps": 5}, "metrics_detail_steps=5 needs metrics_detail"),
        ({"metrics_detail": "weights", "metrics_detail_steps": 0}, "metrics_detail_steps=0 must be at least 1"),
    ],
)
def test_refused(values: dict[str, Any], says: str) -> None:
    settings = training_arguments(**{"max_steps": 20, **values})
    assert says in message(lambda: NanotronTrainingArguments(**settings))
