"""The metrics of a run are those of the whole job. Without a trainer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pool import WorkerPool

from hf_nanotron.data.dealing import FillerBatch
from hf_nanotron.parallel.config import ParallelConfig
from hf_nanotron.parallel.mesh import ParallelMesh
from hf_nanotron.training.run_report import RunReport, logs_next


def batch(rows: int, length: int, *documents: int) -> dict[str, torch.Tensor]:
    positions = {"position_ids": torch.cat([torch.arange(n) for n in documents])[None]} if documents else {}
    return {"input_ids": torch.zeros(rows, length, dtype=torch.long), **positions}


def sum_up(sizes: dict[str, int]) -> tuple[float, float, list[Any]]:
    mesh, added = ParallelMesh(ParallelConfig(**sizes)), list[Any]()
    throughput: Any = SimpleNamespace(add_tokens=lambda *counts: added.extend(count.item() for count in counts))
    last = batch(1, 7, 4, 1, 2)
    batches = [batch(2, 5), last if mesh.dp_rank == 0 else FillerBatch(last)]
    loss = torch.tensor(1.0 + mesh.dp_rank)
    mean, told = RunReport(throughput).sum_step(mesh, loss, batches, mesh.rank == 1)
    mesh.close()
    return mean.item(), told.item(), added


@pytest.mark.parametrize(
    ("sizes", "loss", "tokens", "squares"),
    [
        ({}, 3.0, 27.0, 2 * 2 * 25 + 21),
        ({"tp_size": 2}, 1.0, 17.0, 2 * 25 + 21),
        ({"pp_size": 2}, 1.0, 17.0, 2 * 25 + 21),
        ({"cp_size": 2}, 2.0, 17.0, 2 * 25 + 21),  # each rank has a part of the loss
    ],
)
def test_one_sum_over_the_job(
    pool: WorkerPool, sizes: dict[str, int], loss: float, tokens: float, squares: float
) -> None:
    """Ranks that see the same batch count once, and a batch that only keeps a rank in step has no tokens."""
    for got in pool.run(2, sum_up, sizes):
        assert got == (loss, 1.0, [tokens, squares])


def test_loads_are_reported_once() -> None:
    throughput: Any = SimpleNamespace(report=lambda of_ranks: {"step_time": 2.0})
    mixture = SimpleNamespace(report=lambda loads, which: {f"load_{which}": loads["layer"].item()})
    report, model = RunReport(throughput), SimpleNamespace(mixture=mixture, mesh=SimpleNamespace(rank=0, world_size=1))
    report.loads = {"layer": torch.tensor(3.0)}
    assert report.metrics(model, "all") == {"step_time": 2.0, "load_all": 3.0}  # type: ignore[arg-type]
    assert report.metrics(model, "all") == {"step_time": 2.0}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("strategy", "first", "steps"), [("steps", False, [3, 6]), ("steps", True, [1, 3, 6]), ("no", True, [1])]
)
def test_which_steps_log(strategy: str, first: bool, steps: list[int]) -> None:
    args: Any = SimpleNamespace(logging_strategy=strategy, logging_first_step=first)
    states: list[Any] = [SimpleNamespace(global_step=done, logging_steps=3) for done in range(7)]
    assert [state.global_step + 1 for state in states if logs_next(args, state)] == steps
