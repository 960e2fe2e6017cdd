"""Trainers that are gone leave no process groups, threads and files behind."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pool import WorkerPool
from test_gradients import stock_model
from tiny import pad_batch, random_dataset, training_arguments

from hf_nanotron import AutoModelForCausalLM as ParallelAuto, NanotronTrainer, NanotronTrainingArguments

Counts = tuple[int, int, int]


def counts() -> Counts:
    """Process groups, threads and open files of this process."""
    groups = dist.distributed_c10d._world.pg_map  # there is no public list
    return len(groups), len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


def trained(directory: str, sizes: dict[str, Any]) -> NanotronTrainer:
    args = NanotronTrainingArguments(**training_arguments(max_steps=1, **sizes))
    trainer = NanotronTrainer(
        model=ParallelAuto.from_pretrained(directory, parallel=args.parallel), args=args,
        train_dataset=random_dataset(8), data_collator=pad_batch,
    )  # fmt: skip
    trainer.train()
    return trainer


def ten_trainers(directory: str, sizes: dict[str, Any]) -> list[Counts]:
    found = []
    for _ in range(10):
        trained(directory, sizes)
        found.append(counts())
    return found


@pytest.mark.parametrize("sizes", [{}, {"zero_stage": 3}], ids=str)
def test_ten_trainers_hold_no_more_than_two(pool: WorkerPool, tmp_path: Any, sizes: dict[str, Any]) -> None:
    stock_model("llama", num_hidden_layers=2).save_pretrained(tmp_path)
    for first, second, *others in pool.run(2, ten_trainers, str(tmp_path), sizes):
        # The groups of the first are still there when the second has made its own, if it was not collected before.
        most = tuple(max(two) for two in zip(first, second, strict=True))
        assert all(one <= bound for found in others for one, bound in zip(found, most, strict=True)), others


def groups_of_ranks_that_collect_at_different_times(directory: str) -> tuple[list[bool], list[float]]:
    """Rank 1 holds the first trainer, then only one of its groups, then nothing. The user has a group too."""
    theirs = dist.new_group([0, 1])
    held: Any = trained(directory, {"tp_size": 2})
    group = held.mesh.tp
    handle, there = group.handle, []
    if dist.get_rank() == 0:
        held = group = None

    def is_there() -> bool:
        return handle in dist.distributed_c10d._world.pg_map

    trained(directory, {"tp_size": 2})
    there.append(is_there())
    held = None
    trained(directory, {"tp_size": 2})
    there.append(is_there())
    group = None
    trained(directory, {"tp_size": 2})
    there.append(is_there())
    one = torch.ones(1)
    if dist.get_rank() < 2:
        dist.all_reduce(one, group=theirs)
    two = torch.ones(1)
    dist.all_reduce(two)
    return there, [float(one), float(two)]


def test_groups_stay_while_any_rank_holds_them(pool: WorkerPool, tmp_path: Any) -> None:
    stock_model("llama", num_hidden_layers=2).save_pretrained(tmp_path)
    for rank, (there, sums) in enumerate(pool.run(4, groups_of_ranks_that_collect_at_different_times, str(tmp_path))):
        assert there == [True, True, False] and sums == [2.0 if rank < 2 else 1.0, 4.0]
