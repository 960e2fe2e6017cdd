"""A checkpoint of two ranks, written without a job, and its files after a change with valid checksums."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training_state import Layout, simulated_mesh
from torch import nn
from transformers.optimization import get_scheduler

from hf_nanotron.checkpoint.directory.commit import begin, commit, describe
from hf_nanotron.checkpoint.directory.verify import MARKER
from hf_nanotron.checkpoint.files.checked import read_checked, write_checked
from hf_nanotron.checkpoint.files.disk import checksum_of
from hf_nanotron.checkpoint.state import file as state_file
from hf_nanotron.checkpoint.state.read import StoredState
from hf_nanotron.checkpoint.state.slices import Slice
from hf_nanotron.checkpoint.state.training_state import DIRECTORY, state_pieces, state_values
from hf_nanotron.parallel.shard_spec import ShardSpec, even_parts
from hf_nanotron.parallel.zero.segment import Segment

NANOTRON = Path(__file__).parent / "data" / "nanotron" / "tp2_pp2" / "2"
INDEX = f"{DIRECTORY}/index.json"
PROGRESS = "trainer_state.json"


class Rank:
    """A weight that is cut in two, a vector and a number, with their optimizer."""

    def __init__(self, rank: int) -> None:
        self.mesh = simulated_mesh(Layout(2, 1), rank)
        specs = [ShardSpec("weight", (4, 6), 0, even_parts(4, 2), rank)]
        specs += [ShardSpec(name, shape, rank=rank) for name, shape in {"norm": (3,), "scale": ()}.items()]
        self.segments = []
        for spec in specs:
            size = int(torch.Size(spec.local_shape).numel())
            master = nn.Parameter(torch.arange(size) + 100.0 * rank)
            self.segments.append(Segment(spec.name, spec, 0, size, master, torch.ones(size)))
        self.optimizer = torch.optim.AdamW([s.master for s in self.segments], lr=1e-2)
        self.scheduler = get_scheduler("cosine", self.optimizer, 1, 10)

    def step(self) -> None:
        for segment in self.segments:
            segment.master.grad = segment.master.detach().sin()
        self.optimizer.step()
        self.scheduler.step()


CURSOR = {"step": 1, "epoch": 0, "samples": 4, "order": {"kind": "sequential", "samples": 9, "fingerprint": 77}}


def write_checkpoint(output_dir: Path, step: int) -> Path:
    directory = output_dir / f"checkpoint-{step}"
    begin(directory)
    folder = directory / DIRECTORY
    state_file.clear(folder)
    ranks = [Rank(0), Rank(1)]
    for number, rank in enumerate(ranks):
        rank.step()
        state_file.write_rank(folder, number, state_pieces(rank.segments, rank.optimizer, rank.mesh), 16)
    extra = {"data_cursor": {**CURSOR, "state": {"shard": 1}, "refused": None}}
    state_file.commit(folder, 2, state_values(ranks[0].mesh, ranks[0].optimizer, ranks[0].scheduler, extra))
    (directory / "config.json").write_text("{}")
    progress = {"global_step": step, "epoch": 0.5, "log_history": [{"loss": 1.5, "step": 1}], "best_metric": None}
    (directory / PROGRESS).write_text(json.dumps({**progress, "stateful_callbacks": {"TrainerControl": {"args": {}}}}))
    describe(directory, 0)
    commit(directory, 1, step, 1.0)
    return directory


@pytest.fixture(name="made", scope="module")
def made_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("made"), 2)


@pytest.fixture(name="checkpoint")
def checkpoint_fixture(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "checkpoint-2")


def write_json(path: Path, body: Any) -> None:
    """As `write_checked`, of any value: what is no object has the form of one."""
    if isinstance(body, dict):
        write_checked(path, body, durable=False)
    else:
        write_checked(path, {"x": body}, durable=False)


def sign(directory: Path, *names: str) -> None:
    """Give the marker the lengths and checksums that forged files have."""
    marker = {key: value for key, value in read_checked(directory / MARKER).items() if key != "crc32"}
    for name in names:
        path = directory / name
        marker["files"][name] |= {"bytes": path.stat().st_size}
        if marker["files"][name]["crc32"] is not None:
            marker["files"][name]["crc32"] = checksum_of(path)
    write_checked(directory / MARKER, marker, durable=False)


def body_of(path: Path) -> dict[str, Any]:
    return {key: value for key, value in read_checked(path).items() if key != "crc32"}


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    found = {}
    with StoredState(directory / DIRECTORY) as stored:
        for name, shape in stored.shapes().items():
            for kind, dtype in stored.kinds(name).items():
                whole = Slice.whole(name, shape)
                found[f"{name}|{kind}"] = torch.empty(whole.numel, dtype=dtype)
                stored.fill(whole, kind, found[f"{name}|{kind}"])
    return found
