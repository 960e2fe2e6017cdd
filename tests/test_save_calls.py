"""What a save of 1,024 ranks asks of a file system: files and calls of each rank, and of the rank that commits."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from counting_files import CountingFiles

from hf_nanotron.checkpoint.directory.commit import begin
from hf_nanotron.checkpoint.directory.save import Save
from hf_nanotron.checkpoint.directory.verify import check
from hf_nanotron.checkpoint.state.file import MASTER, StatePiece
from hf_nanotron.checkpoint.state.training_state import DIRECTORY
from hf_nanotron.parallel.shard_spec import ShardSpec, even_parts

VALUES: dict[str, Any] = {
    "layout": {}, "optimizer": {"class": "SGD", "groups": [{"lr": 0.1}]}, "scheduler": None, "extra": {},
}  # fmt: skip


def save_of(directory: Path, rank: int, world: int) -> Save:
    """What rank `rank` of a job with one weight, of which each rank holds a row, writes."""
    spec = ShardSpec("weight", (world, 4), 0, even_parts(world, world), rank)
    master = torch.full((4,), float(rank))
    generators = directory / f"rng_state_{rank}.pth"
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
    torch.save(states, generators)
    save = Save(directory, 1, 5.0, files=[generators], values=VALUES)
    save.pieces = [StatePiece(spec, 0, 4, {MASTER: master}, {"step": 1})]
    return save


def count(tmp_path: Path, world: int) -> tuple[Counter[str], Counter[str], int]:
    """Calls of the rank with the most of them, calls of rank 0, and files of the checkpoint."""
    directory = tmp_path / "checkpoint-1"
    first = CountingFiles(tmp_path)
    with first.counting():
        begin(directory)
        (directory / DIRECTORY).mkdir()
    most: Counter[str] = Counter()
    for rank in range(1, world):
        save = save_of(directory, rank, world)
        files = CountingFiles(tmp_path)
        with files.counting():
            save.finish(SimpleNamespace(rank=rank, world_size=world))  # type: ignore[arg-type]
        most = max(most, files.calls, key=Counter.total)
    save = save_of(directory, 0, world)
    (directory / "trainer_state.json").write_text('{"global_step": 1}')
    with first.counting():
        save.finish(SimpleNamespace(rank=0, world_size=world))  # type: ignore[arg-type]
    return most, first.calls, sum(path.is_file() for path in directory.rglob("*"))


@pytest.mark.parametrize("world", [128, 1024])
def test_a_rank_makes_as_many_calls_in_a_large_job_as_in_a_small_one(
    tmp_path: Path, world: int, pytestconfig: pytest.Config
) -> None:
    """Rank 0 alone makes more in a larger job: nine for each rank, at most."""
    if world > 128 and not pytestconfig.getoption("full_matrix"):
        pytest.skip("with --full-matrix")
    (tmp_path / "small").mkdir()
    (tmp_path / "large").mkdir()
    of_one, small, _ = count(tmp_path / "small", 8)
    again, large, files = count(tmp_path / "large", world)
    print(f"a rank: {dict(of_one)}; rank 0 of 8: {dict(small)}, of {world}: {dict(large)}; {files} files")
    assert again == of_one and of_one.total() <= 16
    assert files <= 2 * world + 8
    assert large.total() - small.total() <= 9 * (world - 8)
    check(tmp_path / "large" / "checkpoint-1", deep=False, part=(1, world))
