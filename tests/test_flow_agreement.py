"""Flags of `control` that one rank sets act on all, at the same step. Without a trainer."""

from __future__ import annotations

from typing import Any

from pool import WorkerPool
from transformers import TrainerCallback, TrainerControl

from hf_nanotron.parallel.config import ParallelConfig
from hf_nanotron.parallel.mesh import ParallelMesh
from hf_nanotron.training.agreement.flow import FLAGS, FlowAgreement

LOG, SAVE, EVALUATE, STOP = "should_log", "should_save", "should_evaluate", "should_training_stop"


class Users(TrainerCallback):
    pass


def flags(control: TrainerControl) -> list[str]:
    return [name for name in FLAGS if getattr(control, name)]


def turns(flow: FlowAgreement, control: TrainerControl, step: int, asked: list[str]) -> list[list[str]]:
    """The flags of each turn after a step in which this rank asks for some; acted on, they are down again."""
    for name in asked:
        setattr(control, name, True)
    seen = []
    for _ in flow.turns(lambda: control, step):
        seen.append(flags(control))
        control.should_log = False
        if len(seen) == 2 or LOG not in seen[0]:
            control.should_save = control.should_evaluate = False
    return seen


def agree(steps: list[tuple[list[str], list[str]]]) -> list[list[list[str]]]:
    mesh = ParallelMesh(ParallelConfig())
    callbacks: list[TrainerCallback] = [Users()]
    flow, control = FlowAgreement(mesh, callbacks), TrainerControl()
    assert flow.agrees
    flow.begin_epoch(control, 0)
    assert len(callbacks) == 2  # one that keeps back what would stop in the middle of a step
    seen = [turns(flow, control, step, asked[mesh.rank]) for step, asked in enumerate(steps, 1)]
    mesh.close()
    return seen


def test_flags_of_one_rank_act_on_all(pool: WorkerPool) -> None:
    steps: list[tuple[list[str], list[str]]] = [
        ([], [SAVE]),  # all learn of it in the next step
        ([], []),
        ([LOG], [LOG, EVALUATE]),  # ranks wait for each other anyway: at once, after the log line
        ([STOP], [SAVE]),  # each has one: at once
    ]
    first, second = pool.run(2, agree, steps)
    assert first == second == [[[]], [[SAVE]], [[LOG], [EVALUATE]], [[STOP, SAVE]]]


def test_one_process_sends_nothing() -> None:
    callbacks: list[Any] = [Users()]
    flow, control = FlowAgreement(ParallelMesh(ParallelConfig()), callbacks), TrainerControl()
    flow.begin_epoch(control, 0)
    assert not flow.agrees and len(callbacks) == 1
    assert turns(flow, control, 1, [LOG, SAVE]) == [[SAVE, LOG]]
