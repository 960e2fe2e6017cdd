"""Reports to wandb, trackio and tensorboard, with the real packages and without a network.

tensorboard is in the extra `test`; those of the others run where they are installed.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pool import WorkerPool
from test_cli import command, corpus, tokenizer, write_settings
from tiny import pad_batch, random_dataset, tiny_config, training_arguments
from transformers import AutoModelForCausalLM, set_seed

from hf_nanotron.training import reporting

LAYOUT = {"tp": 2, "cp": 1, "pp": 1, "dp": 1, "ep": 1, "processes": 2}


def train(
    folder: str,
    report_to: str,
    sizes: dict[str, int],
    resume: str | None = None,
    overrides: dict[str, Any] | None = None,
) -> Any:
    """Six steps, or from a checkpoint on; returns the logged losses by step."""
    from hf_nanotron import NanotronTrainer, NanotronTrainingArguments

    os.environ.update(WANDB_MODE="offline", WANDB_DIR=folder, WANDB_SILENT="true", TRACKIO_DIR=f"{folder}/trackio")
    os.environ.pop("TENSORBOARD_LOGGING_DIR", None)
    saves = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "gradient_accumulation_steps": 2}
    values = {**saves, "output_dir": f"{folder}/out", "report_to": report_to, **(overrides or {})}
    args = NanotronTrainingArguments(**training_arguments(**values), **sizes)
    set_seed(0)
    trainer = NanotronTrainer(
        model=AutoModelForCausalLM.from_config(tiny_config(num_hidden_layers=2)),
        args=args,
        train_dataset=random_dataset(12, length=8),
        data_collator=pad_batch,
    )
    trainer.train(resume_from_checkpoint=resume and f"{folder}/{resume}")
    if report_to == "wandb" and trainer.is_world_process_zero():
        import wandb

        wandb.finish()
    return {line["step"]: line["loss"] for line in trainer.state.log_history if "loss" in line}


def files(folder: Path, pattern: str) -> list[Path]:
    return sorted(path for path in folder.rglob(pattern) if path.is_file())


# ---- tensorboard ----


def read_events(folder: Path) -> tuple[dict[int, float], dict[str, Any]]:
    """Losses by step, and the texts, as tensorboard reads a folder of event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    steps = [event.step for event in events.Scalars("train/loss")]
    assert len(steps) == len(set(steps)), "a step was reported twice"
    texts = {
        tag.removesuffix("/text_summary"): json.loads(events.Tensors(tag)[-1].tensor_proto.string_val[0])
        for tag in events.Tags()["tensors"]
    }
    return {event.step: event.value for event in events.Scalars("train/loss")}, texts


def test_tensorboard(pool: WorkerPool, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """One rank reports; a resume on another layout goes on in the same folder, from its step on."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (pip install hf-nanotron[tensorboard])")
    losses, _ = pool.run(2, train, str(tmp_path), "tensorboard", {"tp_size": 2})
    (first,) = files(tmp_path, "events.out.tfevents.*")
    found, texts = read_events(first.parent)
    assert found == pytest.approx(losses, rel=1e-5) and sorted(found) == [1, 2, 3, 4, 5, 6]
    assert texts["layout"] == LAYOUT and texts["args"]["tp_size"] == 2 and texts["model_config"]["hidden_size"] == 32

    resumed, _ = pool.run(2, train, str(tmp_path), "tensorboard", {"pp_size": 2}, "out/checkpoint-4")
    assert {path.parent for path in files(tmp_path, "events.out.tfevents.*")} == {first.parent}
    found, texts = read_events(first.parent)
    assert found == pytest.approx(resumed, rel=1e-5) and texts["layout"] == {**LAYOUT, "tp": 1, "pp": 2}

    if not pytestconfig.getoption("full_matrix"):
        return
    elsewhere = {"output_dir": f"{tmp_path}/branch"}
    pool.run(2, train, str(tmp_path), "tensorboard", {"tp_size": 2}, "out/checkpoint-4", elsewhere)
    (branch,) = files(tmp_path / "branch", "events.out.tfevents.*")
    assert branch.parent.name != first.parent.name
    pool.run(2, train, str(tmp_path), "tensorboard", {"tp_size": 2})
    assert len({path.parent for path in files(tmp_path / "out", "events.out.tfevents.*")}) == 2, "a fresh run is new"


def writes_itself(folder: str) -> list[str]:
    """A callback with a writer of the user's own."""
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    from hf_nanotron import NanotronTrainer, NanotronTrainingArguments

    own = TensorBoardCallback(SummaryWriter(f"{folder}/own"))
    trainer = NanotronTrainer(
        model=AutoModelForCausalLM.from_config(tiny_config(num_hidden_layers=2)),
        args=NanotronTrainingArguments(**training_arguments(output_dir=f"{folder}/out", max_steps=1)),
        train_dataset=random_dataset(2, length=8),
        data_collator=pad_batch,
        callbacks=[own],
    )
    trainer.train()
    return [path.parent.name for path in files(Path(folder), "events.out.tfevents.*")]


def test_a_writer_of_a_user(pool: WorkerPool, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (pip install hf-nanotron[tensorboard])")
    assert pool.run(1, writes_itself, str(tmp_path))[0] == ["own"]
    assert read_events(tmp_path / "own")[1]["layout"]["processes"] == 1


# ---- wandb ----


def records(data: bytes) -> Iterator[bytes]:
    """Of a `.wandb` file: a header of 7 bytes, then blocks as in a log of LevelDB."""
    at, parts = 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left  # what is too short for a header is filled up
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def read_offline(path: Path) -> tuple[str, dict[str, Any], dict[int, float]]:
    """Id, config and losses by step of a file that wandb has written offline."""
    from wandb.proto import wandb_internal_pb2

    name, config, losses = "", {}, {}
    for data in records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        name = record.run.run_id or name
        for update in (*record.run.config.update, *record.config.update):
            config[update.key or "/".join(update.nested_key)] = json.loads(update.value_json)
        row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        if "train/loss" in row:
            losses[row["train/global_step"]] = row["train/loss"]
    return name, config, losses


def test_wandb_offline(pool: WorkerPool, tmp_path: Path) -> None:
    """One rank reports; a resume on another layout has the same id, under which wandb joins them."""
    pytest.importorskip("wandb", reason="wandb is not installed (pip install hf-nanotron[wandb])")
    losses, _ = pool.run(2, train, str(tmp_path), "wandb", {"tp_size": 2}, None, {"run_name": "a run"})
    (first,) = files(tmp_path, "*.wandb")
    name, config, found = read_offline(first)
    assert found == pytest.approx(losses, rel=1e-5)
    assert config["layout"] == LAYOUT and config["tp_size"] == 2 and config["hidden_size"] == 32
    first.unlink()
    resumed, _ = pool.run(2, train, str(tmp_path), "wandb", {"pp_size": 2}, "out/checkpoint-4")
    (second,) = files(tmp_path, "*.wandb")
    again, config, found = read_offline(second)
    assert again == name and config["layout"] == {**LAYOUT, "tp": 1, "pp": 2}
    assert found == pytest.approx({step: resumed[step] for step in (5, 6)}, rel=1e-5)
    second.unlink()
    pool.run(2, train, str(tmp_path), "wandb", {"tp_size": 2})
    (third,) = files(tmp_path, "*.wandb")
    assert read_offline(third)[0] != name, "a fresh run is new"


# ---- trackio ----


def read_trackio(folder: str) -> dict[str, Any]:
    """Runs of the project, their configs and losses by step, as trackio reads its files."""
    os.environ["TRACKIO_DIR"] = f"{folder}/trackio"
    from trackio.sqlite_storage import SQLiteStorage

    found = {}
    for name in SQLiteStorage.get_runs("huggingface"):
        rows = SQLiteStorage.get_logs("huggingface", name)
        losses = [(row["train/global_step"], row["train/loss"]) for row in rows if "train/loss" in row]
        found[name] = {"losses": losses, "config": SQLiteStorage.get_run_config("huggingface", name)}
    return found


def test_trackio(tmp_path: Path) -> None:
    """One rank reports; a resume on another layout goes on in the same run."""
    pytest.importorskip("trackio", reason="trackio is not installed (pip install hf-nanotron[trackio])")
    pool = WorkerPool()  # trackio reads TRACKIO_DIR when it is imported
    try:
        losses, _ = pool.run(2, train, str(tmp_path), "trackio", {"tp_size": 2})
        ((name, run),) = pool.run(1, read_trackio, str(tmp_path))[0].items()
        assert dict(run["losses"]) == pytest.approx(losses, rel=1e-5) and run["config"]["layout"] == LAYOUT
        assert name.startswith("out-")
        resumed, _ = pool.run(2, train, str(tmp_path), "trackio", {"pp_size": 2}, "out/checkpoint-4")
        ((again, run),) = pool.run(1, read_trackio, str(tmp_path))[0].items()
        assert again == name and [step for step, _ in run["losses"]] == [1, 2, 3, 4, 5, 6, 5, 6]
        assert dict(run["losses"]) == pytest.approx(resumed, rel=1e-5)
    finally:
        pool.close()


# ---- what is not installed ----


def test_a_package_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence, before a model is made."""
    monkeypatch.setitem(reporting.PACKAGES, "wandb", lambda: False)
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    settings = {
        "model": {"config": {"model_type": "llama", "hidden_size": 0}},
        "tokenizer": str(tmp_path / "tokenizer"),
        "dataset": {"path": corpus(tmp_path), "text_column": "text", "sequence_length": 8},
        "training": {"output_dir": str(tmp_path / "out"), "report_to": "wandb", "use_cpu": True},
    }
    code, _, said = command("train", write_settings(tmp_path, settings))
    assert code == 2 and "report_to='wandb' needs the package wandb, which is not installed: pip install " in said
    assert "'hf-nanotron[wandb]'" in said and not (tmp_path / "out").exists()
