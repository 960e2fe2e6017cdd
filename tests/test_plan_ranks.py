"""A plan's ranks: the real trainer as one rank of an imagined job, what it says to others, and what it takes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from benchmark_scripts import scripts
from pool import JobError, WorkerPool
from tiny import message, tiny_config
from transformers import AutoConfig, TrainerCallback

from hf_nanotron import AutoModelForCausalLM, NanotronTrainer, NanotronTrainingArguments
from hf_nanotron.plan.activations import peak_of_step
from hf_nanotron.plan.deadlock import find_faults
from hf_nanotron.plan.estimate import Estimator
from hf_nanotron.plan.job import Job
from hf_nanotron.plan.memory import rank_memory
from hf_nanotron.plan.outline import Outline
from hf_nanotron.plan.processes import rehearse
from hf_nanotron.plan.rehearse import PLANNED, Rehearsal, Rows, _by_axis, rehearse_role
from hf_nanotron.plan.roles import Role, roles
from hf_nanotron.plan.trace import Event, Recorder, RoleTrace

WATCHED = {"profile_steps": "10-12", "profile_ranks": "all", "metrics_detail": ["weights", "activations"]}
LAYOUT = {"tp_size": 2, "pp_size": 2, "tp_overlap": True, "layers": 4, **WATCHED}
MICRO_BATCHES = 5
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp x pp x dp": (8, LAYOUT),
    "afab": (4, {"pp_size": 4, "pp_schedule": "afab"}),
    "1f1b": (8, {"pp_size": 4}),
    "interleaved": (4, {"pp_size": 2, "pp_schedule": "interleaved_1f1b", "pp_virtual_stages": 2}),
    "zb": (8, {"pp_size": 4, "tp_size": 2, "pp_schedule": "zb"}),
    "zb, two stages a rank": (4, {"pp_size": 2, "pp_schedule": "zb", "pp_virtual_stages": 2}),
    "cp, gather": (8, {"cp_size": 2, "tp_size": 2, "cp_mode": "gather"}),
    "cp, heads": (4, {"cp_size": 2, "cp_mode": "heads"}),
    "ZeRO-0": (4, {"zero_stage": 0}),
    "ZeRO-2, replicas": (8, {"zero_stage": 2, "dp_replicate_size": 2}),
    "ZeRO-3": (4, {"zero_stage": 3, "layers": 2}),
    "ZeRO-3, tp, replicas": (8, {"zero_stage": 3, "tp_size": 2, "dp_replicate_size": 2}),
    "no sequence parallelism": (4, {"tp_size": 2, "sequence_parallel": False}),
    "tied, pp": (4, {"pp_size": 2, "tied": True}),
    "experts, ep": (4, {"ep_size": 2, "family": "qwen3_moe"}),
    "experts, ep, tp, pp": (8, {"ep_size": 2, "tp_size": 2, "pp_size": 2, "family": "qwen3_moe"}),
    "1,000 GPUs": (1000, {"tp_size": 5, "pp_size": 4, "heads": 20}),
}


def job_of(
    world_size: int, family: str = "llama", tied: bool = False, heads: int = 4, layers: int = 8, **arguments: Any
) -> Job:
    """A tiny model in a layout."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    widths = {"hidden_size": 8 * heads, "intermediate_size": 12 * heads}
    sizes = {**widths, "num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": 8}
    config = tiny_config(
        family, num_hidden_layers=layers, tie_word_embeddings=tied, **sizes, **(experts if "moe" in family else {})
    )
    given = {"bf16": True, "per_device_train_batch_size": 2, "gradient_accumulation_steps": MICRO_BATCHES, **arguments}
    return Job(config, given, world_size, 8, 40)


class OwnTrainer(NanotronTrainer):
    """A user's, with a callback: ranks agree on what it asks for."""

    def __init__(self, *args: Any, callbacks: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, callbacks=[*(callbacks or []), Asks()], **kwargs)


class Asks(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_log = True


def rehearse_here(job: Job, every: list[Role], trainer_class: type = NanotronTrainer) -> list[Rehearsal]:
    """Runs in a worker."""
    done: list[Rehearsal] = []
    for role in every:
        done.append(rehearse_role(job, role, trainer_class, done[0].told if done else None))
    return done


def train_really(job: Job, trainer_class: type = NanotronTrainer) -> tuple[Event, ...]:
    """Runs on every rank of a real job: what it says to others in its step."""
    recorder = Recorder(others=True)
    with tempfile.TemporaryDirectory() as folder:
        args = NanotronTrainingArguments(folder, **{**job.arguments, **PLANNED, "optim": "adamw_torch"})
        with Outline(recorder.watch, recorder.label, has_values=True):
            model = AutoModelForCausalLM.from_config(job.config, parallel=args.parallel)
            trainer = trainer_class(model=model, args=args, train_dataset=Rows(job))
            trainer.train()
        return _by_axis(recorder.events, trainer.mesh)[0]


@pytest.fixture(scope="module")
def rehearsed(pool: WorkerPool) -> list[Rehearsal]:
    job = job_of(8, **LAYOUT)
    found: list[Rehearsal] = pool.run(1, rehearse_here, job, roles(job))[0]
    return found


def shapes(events: tuple[Event, ...]) -> list[tuple[Any, ...]]:
    """What can be compared between jobs: objects of Python have other bytes, and no step is told apart."""
    return [
        (e.op, e.group, e.ranks, e.peer, e.bytes, e.dtype, e.action, e.stage, e.micro_batch)
        for e in events
        if e.dtype != "uint8"
    ]


ONE_OF_A_USER = {"layers": 1, "gradient_accumulation_steps": 1}


@pytest.mark.parametrize(
    "world_size, layout, trainer_class", [(4, LAYOUT, NanotronTrainer), (2, ONE_OF_A_USER, OwnTrainer)]
)
def test_imagined_ranks_say_what_real_ones_say(
    world_size: int, layout: dict[str, Any], trainer_class: type, pool: WorkerPool
) -> None:
    job = job_of(world_size, **layout)
    real = pool.run(world_size, train_really, job, trainer_class)
    for role, told in zip(roles(job), pool.run(1, rehearse_here, job, roles(job), trainer_class)[0], strict=True):
        assert shapes(told.trace.events) == shapes(real[role.rank])
        pipelined = {"send", "recv"} if "pp_size" in layout else set()
        assert {*pipelined, "all_reduce", "all_gather"} <= {event.op for event in told.trace.events}


def test_every_rank_has_one_role() -> None:
    for world_size, layout in LAYOUTS.values():
        job = job_of(world_size, **layout)
        every = roles(job)
        assert sorted(rank for role in every for rank in role.ranks) == list(range(world_size))
        assert every[0].rank == 0 and all(role.rank in role.ranks for role in every)


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_layout_hangs(name: str, pool: WorkerPool, pytestconfig: pytest.Config) -> None:
    if name != "ZeRO-3" and not pytestconfig.getoption("full_matrix"):
        pytest.skip("with --full-matrix")
    world_size, layout = LAYOUTS[name]
    job = job_of(world_size, **layout)
    done = pool.run(1, rehearse_here, job, roles(job))[0]
    assert find_faults([each.trace for each in done]) == []
    assert len(done[0].trace.events) > 10


# ---- seeded faults ----

Change = Callable[[list[Event]], list[Event]]


def at(events: list[Event], *wanted: str, step: int = 1) -> int:
    """The place of a late event that is one of these operations, by `op group`."""
    found = [i for i, e in enumerate(events) if f"{e.op} {e.group}" in wanted and e.step == step]
    return found[len(found) // 2]


def swapped(events: list[Event]) -> list[Event]:
    """Two collectives of one group in the other order."""
    own = [i for i, e in enumerate(events) if e.group == "tp" and e.op not in ("send", "recv")]
    one, other = next((a, b) for a, b in zip(own, own[1:], strict=False) if events[a].op != events[b].op)
    events[one], events[other] = events[other], events[one]
    return events


def without(*wanted: str) -> Change:
    def change(events: list[Event]) -> list[Event]:
        del events[at(events, *wanted)]
        return events

    return change


def changed(*wanted: str, **fields: Any) -> Change:
    def change(events: list[Event]) -> list[Event]:
        place = at(events, *wanted)
        events[place] = replace(events[place], **fields)
        return events

    return change


def messages_reversed(events: list[Event]) -> list[Event]:
    """The message of a pipeline before the one that is due: of another size, as where two tensors change places."""
    own = [i for i, e in enumerate(events) if e.op == "send" and e.group == "pp"]
    one, other = own[0], own[1]  # what comes, and the first tensor
    events[one], events[other] = events[other], events[one]
    return events


FAULTS: dict[str, tuple[int, Change, str]] = {
    "swapped collectives": (1, swapped, "group tp of ranks"),
    "a receive is missing": (2, without("recv pp"), "never receives"),
    "a send is missing": (0, without("send pp"), "never sends"),
    "a wrong size": (1, changed("all_reduce world", bytes=3), "3 bytes"),
    "a wrong size of a message": (0, changed("send pp", bytes=3), "of 3 bytes"),
    "a wrong dtype": (1, changed("reduce_scatter dp", dtype="float64"), "float64"),
    "a rank skips a collective": (3, without("all_reduce world"), "group world of ranks"),
    "a rank skips a message of an exchange": (1, without("send tp"), "never sends"),
    "messages in the other order": (0, messages_reversed, "message 1 from rank"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_seeded_faults_are_found(name: str, rehearsed: list[Rehearsal]) -> None:
    traces = [each.trace for each in rehearsed]
    assert find_faults(traces) == []
    index, change, said = FAULTS[name]
    seeded = replace(traces[index], events=tuple(change(list(traces[index].events))))
    faults = find_faults([*traces[:index], seeded, *traces[index + 1 :]])
    assert faults and said in " ".join(faults)
    assert "rank" in faults[0] and "group" in faults[0] and "step" in faults[0]


def events_of(rank: int, order: list[tuple[str, str]], groups: dict[str, tuple[tuple[int, ...], ...]]) -> RoleTrace:
    """A rank that starts `op group` in this order."""
    made = []
    for op, name in order:
        ranks = next(ranks for ranks in groups[name] if rank in ranks)
        peer = next(r for r in ranks if r != rank) if op in ("send", "recv") else None
        made.append(Event(op, name, ranks, name, 8, "float32", peer, step=1))
    return RoleTrace(Role(rank, None, (rank,)), tuple(made), groups)  # type: ignore[arg-type]


def test_cyclic_waits_of_several_groups_are_found() -> None:
    """In each group the order is the same; over all of them nobody can begin."""
    groups = {"a": ((0, 1), (2, 3)), "b": ((1, 2), (0, 3))}
    a, b = ("all_reduce", "a"), ("all_reduce", "b")
    traces = [events_of(rank, [a, b] if rank % 2 else [b, a], groups) for rank in range(4)]
    assert find_faults([events_of(rank, [a, b], groups) for rank in range(4)]) == []
    assert find_faults([replace(t, events=tuple(sorted(t.events, key=lambda e: e.group))) for t in traces]) == []
    crossed = [events_of(rank, [a, b] if rank in (0, 2) else [b, a], groups) for rank in range(4)]
    assert "wait for each other for ever" in find_faults(crossed)[0]


def test_a_message_and_a_collective_that_wait_for_each_other_are_found() -> None:
    groups = {"a": ((0, 1),), "b": ((0, 1),)}
    fine = [events_of(0, [("send", "a"), ("all_reduce", "b")], groups)]
    fine += [events_of(1, [("recv", "a"), ("all_reduce", "b")], groups)]
    crossed = [fine[0], events_of(1, [("all_reduce", "b"), ("recv", "a")], groups)]
    assert find_faults(fine) == []
    assert "rank 0 waits in send to rank 1" in find_faults(crossed)[0]


# ---- memory ----


def fullest(job: Job) -> int:
    """Runs in a worker."""
    return max(rank_memory(job, each).total for each in rehearse_here(job, roles(job)))


def test_measured_peaks() -> None:
    """Median and worst error of arithmetic over the rows that set nothing."""
    with scripts(["plan_memory", "measured"]) as found:
        rows = found.plan_memory.predict()
        median, worst = found.measured.errors(row.error for row in rows if row.tests)
    assert len(rows) > 30 and sum(row.tests for row in rows) >= 30
    assert median < 0.02 and worst < 0.05


def test_state_of_the_real_trainer_is_that_of_arithmetic(pool: WorkerPool, pytestconfig: pytest.Config) -> None:
    with scripts(["measured"]) as found:
        jobs = {row["name"]: found.measured.job_of(row) for row in found.measured.read("measured_peaks.json")}
    if not pytestconfig.getoption("full_matrix"):
        jobs = {name: job for name, job in jobs.items() if name == "1B, tp 2"}
    for name, job in jobs.items():
        real = pool.run(1, fullest, job)[0]
        assert Estimator(job.config).fullest(job).total == pytest.approx(real, rel=0.01), name


def test_state_of_a_model_too_large_for_this_machine(pool: WorkerPool) -> None:
    """405 billion parameters: 18 bytes each, of which ZeRO divides 12."""
    sizes = {"hidden_size": 16384, "intermediate_size": 53248, "num_attention_heads": 128, "num_key_value_heads": 8}
    config = AutoConfig.for_model("llama", vocab_size=128256, num_hidden_layers=4, **sizes)
    job = Job(config, {"bf16": True, "tp_size": 8, "per_device_train_batch_size": 1}, 64, 8, 4096)
    layer = 16384 * (2 * 16384 + 2 * 1024 + 3 * 53248)
    parameters = (4 * layer + 2 * 128256 * 16384) / 8
    report = pool.run(1, rehearse_here, job, roles(job)[:1])[0][0].report
    state = report.total - report.activations
    assert state / (parameters * (2 + 4 + 12 / 8)) == pytest.approx(1, abs=2e-3)


def test_a_pipeline_holds_by_its_table() -> None:
    """The first of four ranks holds four micro-batches of 1F1B, all of `afab`; the last holds one."""
    jobs = {schedule: job_of(4, pp_size=4, pp_schedule=schedule) for schedule in ("1f1b", "afab")}
    first, last = peak_of_step(jobs["1f1b"], 0).device, peak_of_step(jobs["1f1b"], 2).device
    assert 1.5 < first / last < 2.1
    assert peak_of_step(jobs["afab"], 0).device > 1.15 * first


# ---- refusals ----


@pytest.mark.parametrize(
    "layout, said",
    [
        ({"tp_size": 3}, "does not divide the world size 8"),
        ({"pp_size": 2, "pp_schedule": "interleaved_1f1b"}, "pp_schedule='interleaved_1f1b' with pp_size=2"),
        ({"fp8": "tensorwise", "zero_stage": 3}, "fp8='tensorwise' with zero_stage=3"),
    ],
)
def test_a_plan_refuses_what_the_trainer_refuses(layout: dict[str, Any], said: str, pool: WorkerPool) -> None:
    with pytest.raises(JobError, match="ValueError: .*" + said.replace("'", ".")):
        pool.run(1, rehearse_here, job_of(8, **layout), [Role(0, None, tuple(range(8)))])  # type: ignore[list-item]


def test_sizes_of_a_job() -> None:
    config = tiny_config()
    assert "world_size=0 must be" in message(lambda: Job(config, {}, 0, 8, 16))
    assert "gpus_per_node=8 does not divide world_size=12" in message(lambda: Job(config, {}, 12, 8, 16))
    assert "do not fill a row" in message(lambda: Job(config, {}, 1, 8, 16, (4, 4)))


def test_processes_of_their_own(pytestconfig: pytest.Config) -> None:
    if not pytestconfig.getoption("full_matrix"):
        pytest.skip("with --full-matrix")
    job = job_of(8, **LAYOUT)
    done = rehearse(job, roles(job), NanotronTrainer)
    assert [each.trace.role for each in done] == roles(job)
    assert find_faults([each.trace for each in done]) == []
    refused = job_of(8, tp_size=2, heads=3)
    assert "3" in message(lambda: rehearse(refused, roles(refused), NanotronTrainer))
