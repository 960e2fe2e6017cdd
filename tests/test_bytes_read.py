"""Each byte of a checkpoint is read at most twice by a whole job, whatever its size; counted by a file system."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from counting_files import CountingFiles, times_read
from family_runs import FAMILIES
from pool import JobError, WorkerPool
from test_gradients import stock_model
from test_saving import run
from transformers import AutoConfig, AutoModelForCausalLM

from hf_nanotron import AutoModelForCausalLM as ParallelAuto, ParallelConfig
from hf_nanotron.checkpoint.hub import read_once, weights as hub_weights
from hf_nanotron.checkpoint.hub.load import load_hub_weights
from hf_nanotron.parallel.mesh import coordinates_in

Reads = list[tuple[str, int, int]]


class NoMap:
    """A handle of `safe_open`, of which no tensor may be read: the map of its file counts nothing."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def keys(self) -> Any:
        return self._handle.keys()

    def get_slice(self, name: str) -> Any:
        found = self._handle.get_slice(name)
        return mock.Mock(spec=["get_shape", "get_dtype"], get_shape=found.get_shape, get_dtype=found.get_dtype)


def load(source: str, sizes: dict[str, Any], part_bytes: int) -> tuple[Reads, dict[str, int], bool]:
    """What this rank reads, its calls, and whether its part of every weight is that of the stock model."""
    files = CountingFiles(source)
    opened = hub_weights.open_safetensors
    with (
        mock.patch.object(hub_weights, "open_safetensors", lambda *args: NoMap(opened(*args))),
        mock.patch.object(read_once, "PART_BYTES", part_bytes),
        files.counting(),
    ):
        model = ParallelAuto.from_pretrained(source, parallel=ParallelConfig(**sizes))
    stock = AutoModelForCausalLM.from_pretrained(source).state_dict()
    equal = all(
        torch.equal(parameter, model.shard_specs[name].slice(stock[model.shard_specs[name].name]))
        for name, parameter in model.named_parameters()
    )
    model.mesh.close()
    return files.reads, dict(files.calls), equal


LAYOUTS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "dp4": (4, "llama", {"zero_stage": 1}),
    "tp2 pp2, tied": (4, "qwen3", {"tp_size": 2, "pp_size": 2}),
    "tp2 dp2": (4, "llama", {"tp_size": 2}),
    "experts": (4, "qwen3_moe", {"tp_size": 2, "ep_size": 4}),
    "two replicas": (8, "llama", {"tp_size": 2, "zero_stage": 1, "dp_replicate_size": 2}),
    "tp2 cp2 pp2": (8, "qwen3", {"tp_size": 2, "cp_size": 2, "pp_size": 2}),
}
DEFAULT = ("tp2 pp2, tied", "experts")


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_job_reads_each_byte_of_the_hub_files_at_most_twice(
    pool: WorkerPool, tmp_path: Path, name: str, pytestconfig: pytest.Config
) -> None:
    """A tied embedding is read by the first stage and by the last; headers by one rank, twice; all else once."""
    if name not in DEFAULT and not pytestconfig.getoption("full_matrix"):
        pytest.skip("with --full-matrix")
    world, family, sizes = LAYOUTS[name]
    overrides = {"tie_word_embeddings": True} if family == "qwen3" else {}
    if family in ("llama", "qwen3"):
        model = stock_model(family, **overrides)
    else:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family]["config"]))
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    results = pool.run(world, load, str(tmp_path), sizes, 10_000)
    assert all(equal for *_, equal in results)
    reads = [read for of_rank, *_ in results for read in of_rank]
    readers = [sum(file.endswith(".safetensors") for file, *_ in of_rank) for of_rank, *_ in results]
    assert min(readers) > 0, "some ranks read nothing"
    files = [path.name for path in tmp_path.glob("*.safetensors")]
    once = total = 0
    for file in files:
        counts = times_read(tmp_path, file, reads)
        assert counts.min() >= 1 and counts.max() <= 2, file
        once, total = once + int((counts == 1).sum()), total + len(counts)
    print(f"{name}: {once} of {total} bytes once, the others twice")
    assert once > 0.8 * total or overrides


def test_rows_of_a_part_lie_where_it_says() -> None:
    """Every row of every tensor comes once, in parts of the size asked for, or of one row."""
    tensors = {
        "wide": read_once.StoredTensor("a", "BF16", (7, 300), 0),
        "number": read_once.StoredTensor("a", "F32", (), 4200),
        "none": read_once.StoredTensor("a", "F32", (0, 5), 4204),
        "long": read_once.StoredTensor("a", "F32", (1000,), 4204),
    }
    parts = read_once.plan_parts(tensors, tensors, 1024)
    seen = {name: np.zeros(tensor.rows, dtype=int) for name, tensor in tensors.items()}
    for part in parts:
        for rows in part.rows:
            seen[rows.name][rows.first : rows.last] += 1
            assert rows.at % read_once.ALIGNMENT == 0 and rows.at + rows.size <= part.size
            assert rows.size == (rows.last - rows.first) * tensors[rows.name].row_bytes
        assert part.size <= 1024 + read_once.ALIGNMENT or len(part.rows) == 1
    assert all((counts == 1).all() for counts in seen.values())


@pytest.mark.parametrize(
    "sizes",
    [{"tp_size": 8}, {"tp_size": 8, "pp_size": 4, "cp_size": 2, "dp_replicate_size": 4, "zero_stage": 1}],
    ids=["tp8", "tp8 pp4 cp2, replicas"],
)
def test_a_thousand_ranks_take_turns(sizes: dict[str, Any]) -> None:
    """In a round each rank of a stage reads once, and what it reads comes to all of them, once to each."""
    world, parallel = 1024, ParallelConfig(**sizes)
    copies, shard_size = parallel.weight_copies(world), parallel.shard_size(world)
    stage = [coordinates_in(parallel, world, rank) for rank in range(world)]
    stage = [here for here in stage if here.pp == parallel.pp_size - 1]
    turns = [read_once.turn_of(here, parallel.cp_size, copies) for here in stage]
    assert sorted(turns) == list(range(len(stage)))
    peers = {"tp": lambda c: (c.replica, c.shard), "replica": lambda c: (c.tp, c.shard)}
    peers["shard"] = lambda c: (c.tp, c.replica)
    for turn in range(0, len(stage), 37):
        reader = turns.index(turn)
        has, got = {reader}, Counter({reader: 0})
        for name in ("tp", "replica", "shard"):
            members: dict[Any, list[int]] = {}
            for number, here in enumerate(stage):
                members.setdefault(peers[name](here), []).append(number)
            for ranks in members.values():
                sources = {dict(read_once.ways(turn, stage[r], copies, shard_size)).get(name) for r in ranks}
                assert len(sources) == 1, "ranks of a group disagree on who sends"
                if (source := sources.pop()) is not None:
                    assert ranks[source] in has
                    got.update(set(ranks) - {ranks[source]})
                    has.update(ranks)
        assert has == set(range(len(stage))) and max(got.values()) == 1


def load_where_a_rank_cannot_read(source: str, broken_rank: int) -> None:
    if torch.distributed.get_rank() == broken_rank:

        def broken(handle: int, buffers: Any, offset: int) -> int:
            raise OSError(5, "Input/output error", f"{source}/model.safetensors")

        mock.patch.object(os, "preadv", broken).start()
    try:
        with mock.patch.object(read_once, "PART_BYTES", 10_000):
            ParallelAuto.from_pretrained(source, parallel=ParallelConfig())
    finally:
        mock.patch.stopall()


@pytest.mark.parametrize("broken_rank", [0, 1])
def test_what_one_rank_cannot_read_ends_the_load_on_all(pool: WorkerPool, tmp_path: Path, broken_rank: int) -> None:
    stock_model("llama").save_pretrained(tmp_path)
    with pytest.raises(JobError, match=r"model.safetensors cannot be read \(.*Input/output error") as error:
        pool.run(2, load_where_a_rank_cannot_read, str(tmp_path), broken_rank)
    assert error.value.kinds == {0: "ValueError", 1: "ValueError"}


def load_what_one_rank_does_not_see(source: str) -> None:
    own = source if torch.distributed.get_rank() == 0 else f"{source}-elsewhere"
    ParallelAuto.from_pretrained(own, parallel=ParallelConfig())


def test_a_folder_that_one_rank_does_not_see_is_refused(pool: WorkerPool, tmp_path: Path) -> None:
    stock_model("llama").save_pretrained(tmp_path)
    with pytest.raises(JobError, match=r"is a folder on 1 of 2 ranks, but not on rank 1 \(host ") as error:
        pool.run(2, load_what_one_rank_does_not_see, str(tmp_path))
    assert error.value.kinds == {0: "ValueError", 1: "ValueError"}


def load_other_parameters(source: str, order: bool) -> None:
    parallel, rank = ParallelConfig(tp_size=2), torch.distributed.get_rank()
    model = ParallelAuto.from_config(AutoConfig.from_pretrained(source), parallel)
    names = [name for name, _ in model.named_parameters()][: 3 if order else 3 + rank % 2]
    grids = read_once.StageReader.fill

    def fill(self: read_once.StageReader, targets: Any) -> None:
        grids(self, reversed(list(targets)) if order and rank % 2 else targets)

    with mock.patch.object(read_once.StageReader, "fill", fill):
        load_hub_weights(model, source, names)


@pytest.mark.parametrize("order", [False, True], ids=["names", "order"])
def test_ranks_of_a_stage_that_load_other_parameters_are_refused(pool: WorkerPool, tmp_path: Path, order: bool) -> None:
    """Each would wait for what the other does not read."""
    stock_model("llama").save_pretrained(tmp_path)
    said = "ranks 0 and 1 load the same tensors in different orders" if order else "rank 1 loads '.*', and rank 0 does"
    with pytest.raises(JobError, match=f"{said}.* of one pipeline stage") as error:
        pool.run(2, load_other_parameters, str(tmp_path), order)
    assert error.value.kinds == {0: "ValueError", 1: "ValueError"}


# ---- a resume ----


def resume(output: str, overrides: dict[str, Any], step: int) -> tuple[Reads, dict[str, int], list[float]]:
    """What this rank reads of a checkpoint that it resumes, its calls there, and the losses after it."""
    checkpoint = f"{output}/checkpoint-{step}"
    files = CountingFiles(checkpoint)
    with files.counting():
        losses, _ = run(output, {**overrides, "save_strategy": "no"}, checkpoint)
    return files.reads, dict(files.calls), losses


@pytest.mark.parametrize(
    ("world", "sizes"),
    [(2, {"zero_stage": 0, "bf16": True, "ema_decay": 0.5}), (4, {"zero_stage": 1, "dp_replicate_size": 2})],
    ids=["copies", "replicas"],
)
def test_a_resume_reads_each_byte_of_the_training_state_once(
    pool: WorkerPool, tmp_path: Path, world: int, sizes: dict[str, Any], pytestconfig: pytest.Config
) -> None:
    """Ranks that hold copies of the same state get it from the one that reads it."""
    if world > 2 and not pytestconfig.getoption("full_matrix"):
        pytest.skip("with --full-matrix")
    stock_model("llama").save_pretrained(tmp_path / "start")
    sizes = {**sizes, "max_steps": 4, "save_steps": 2}
    expected = pool.run(world, run, str(tmp_path / "out"), sizes)[0][0]
    results = pool.run(world, resume, str(tmp_path / "out"), sizes, 2)
    assert all(losses == expected[2:] for *_, losses in results)
    folder = tmp_path / "out" / "checkpoint-2"
    reads = [read for of_rank, *_ in results for read in of_rank]
    files = [path.relative_to(folder).as_posix() for path in folder.glob("training_state/*.safetensors")]
    assert files
    for file in files:
        counts = times_read(folder, file, reads)
        assert counts.min() == counts.max() == 1, file
    assert not [file for file, *_ in reads if file.startswith("model")]  # the masters are in the training state
    index = times_read(folder, "training_state/index.json", reads)  # by one rank for its checksum, by one for all
    assert index.min() >= 1 and index.max() <= 2
