"""ZeRO computes what plain data parallelism with AdamW computes, with the collectives it promises and no more."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast
from unittest import mock

import pytest
import torch
from pool import JobError, WorkerPool
from test_gradients import stock_model
from tiny import History, local_gradients, pad_batch, random_dataset, training_arguments
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_nanotron import AutoModelForCausalLM as ParallelAuto, NanotronTrainer, NanotronTrainingArguments
from hf_nanotron.optim.adamw import AdamW
from hf_nanotron.optim.optimizer_link import OptimizerLink
from hf_nanotron.parallel.collectives import all_reduce
from hf_nanotron.parallel.zero import bucketed as zero_module, gradients as gradients_module

SAMPLES = 160
STAGES = (0, 1, 2, 3)
Tensors = dict[str, torch.Tensor]


class Gradients(TrainerCallback):
    """The gradients of the first and of the last step, before they are clipped."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.first: Tensors = {}
        self.last: Tensors = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.last = {name: g.clone() for name, g in local_gradients(self.trainer.model).items()}
        self.first = self.first or self.last


@dataclass
class Trained:
    """Losses and norms of every step; gradients and Adam's moments, whole for this tp rank."""

    losses: list[float]
    norms: list[float]
    first: Tensors = field(default_factory=dict)
    last: Tensors = field(default_factory=dict)
    moments: dict[str, Tensors] = field(default_factory=dict)


def train(directory: str, **overrides: Any) -> tuple[NanotronTrainer, Trained]:
    gradients = Gradients()
    trainer, history = train_plain(directory, gradients, ddp_bucket_cap_mb=1, **overrides)
    return trainer, Trained(history.losses, history.norms, gradients.first, gradients.last, whole_moments(trainer))


def whole_moments(trainer: NanotronTrainer) -> dict[str, Tensors]:
    """Adam's moments, joined over the ranks that share the ZeRO shards."""
    specs = trainer.model.shard_specs
    moments = {}
    for kind in ("exp_avg", "exp_avg_sq"):
        flat = {name: torch.zeros(spec.local_shape).flatten() for name, spec in specs.items()}
        for segment in trainer.weights.segments:
            flat[segment.name][segment.start : segment.stop] = trainer.optimizer.state[segment.master][kind]
        moments[kind] = {n: all_reduce(t, trainer.mesh.shard).view(specs[n].local_shape) for n, t in flat.items()}
    return moments


@functools.cache
def checkpoint(tied: bool, layers: int = 2) -> str:
    directory = tempfile.mkdtemp()
    stock_model("llama", tie_word_embeddings=tied, num_hidden_layers=layers).save_pretrained(directory)
    return directory


@functools.cache
def reference(directory: str, global_batch: int, max_grad_norm: float) -> tuple[Trained, str]:
    """Stock model, stock Trainer, one process: its history, and a file with its moments by Hub name."""
    from transformers import AutoModelForCausalLM

    history, model = History(), AutoModelForCausalLM.from_pretrained(directory)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            **training_arguments(gradient_accumulation_steps=global_batch, max_grad_norm=max_grad_norm)
        ),
        train_dataset=random_dataset(SAMPLES), data_collator=pad_batch, callbacks=[history],
    )  # fmt: skip
    trainer.train()
    state = trainer.optimizer.state
    moments = {k: {n: state[p][k] for n, p in model.named_parameters()} for k in ("exp_avg", "exp_avg_sq")}
    path = f"{directory}/moments-{global_batch}-{max_grad_norm}.pt"
    torch.save(moments, path)
    return Trained(history.losses, history.norms), path


def difference(got: Tensors, expected: Tensors) -> float:
    """Relative L2 distance over all tensors together."""
    assert got.keys() == expected.keys()
    square = sum(float((got[n].double() - expected[n].double()).square().sum()) for n in got)
    return (square / sum(float(t.double().square().sum()) for t in expected.values())) ** 0.5


def every_stage(directory: str, sizes: dict[str, Any], moments_path: str) -> list[dict[str, Any]]:
    """Train with each stage on this rank's topology. Errors against stage 0 and against the reference's moments."""
    moments = torch.load(moments_path, weights_only=True)
    rows, plain = [], None
    for stage in STAGES:
        replicas = sizes.get("dp_replicate_size", 1) if stage else 1
        trainer, run = train(directory, **{**sizes, "zero_stage": stage, "dp_replicate_size": replicas})
        specs = trainer.model.shard_specs
        expected = {
            kind: {name: spec.slice(whole[spec.name]) for name, spec in specs.items()}
            for kind, whole in moments.items()
        }
        plain = plain or run
        rows.append(
            {
                "stage": stage,
                "losses": run.losses,
                "norms": run.norms,
                "first": difference(run.first, plain.first),
                "last": difference(run.last, plain.last),
                "moments": max(difference(run.moments[kind], expected[kind]) for kind in expected),
                "plain moments": max(difference(run.moments[kind], plain.moments[kind]) for kind in expected),
                "sharded": sum(s.master.numel() for s in trainer.weights.segments)
                / sum(p.numel() for p in (torch.empty(spec.local_shape) for spec in specs.values())),
            }
        )
        trainer.mesh.close()
    return rows


CASES: dict[str, tuple[int, dict[str, Any], bool]] = {
    "dp2 ga1": (2, {"gradient_accumulation_steps": 1}, False),
    "dp2 ga4 tied": (2, {"gradient_accumulation_steps": 4}, True),
    "dp4 ga1 tied": (4, {"gradient_accumulation_steps": 1}, True),
    "dp4 ga4": (4, {"gradient_accumulation_steps": 4}, False),
    "dp4 replicas2 ga2": (4, {"gradient_accumulation_steps": 2, "dp_replicate_size": 2}, False),
    "dp2 tp2 ga1": (4, {"tp_size": 2, "gradient_accumulation_steps": 1}, False),
    "dp2 tp2 ga4 tied": (4, {"tp_size": 2, "gradient_accumulation_steps": 4}, True),
    "dp2 pp2 ga1 tied": (4, {"pp_size": 2, "pp_schedule": "afab", "gradient_accumulation_steps": 1}, True),
    "dp2 pp2 ga4": (4, {"pp_size": 2, "gradient_accumulation_steps": 4}, False),
    "dp2 pp2 interleaved ga4 tied": (
        4,
        {"pp_size": 2, "pp_schedule": "interleaved_1f1b", "pp_virtual_stages": 2, "gradient_accumulation_steps": 4},
        True,
    ),
    "dp4 tp2 ga1": (8, {"tp_size": 2, "gradient_accumulation_steps": 1}, False),
    "dp4 pp2 ga4 tied": (8, {"pp_size": 2, "gradient_accumulation_steps": 4}, True),
    "dp2 tp2 pp2 ga2 tied": (8, {"tp_size": 2, "pp_size": 2, "gradient_accumulation_steps": 2}, True),
}
BY_DEFAULT = (
    "dp2 ga1",
    "dp2 ga4 tied",
    "dp4 replicas2 ga2",
    "dp2 tp2 pp2 ga2 tied",  # test_parity.py has ZeRO with the other schedules
)
SUMS_OF_TWO = ("dp2 ga1", "dp2 ga4 tied", "dp2 pp2 ga4")
TITLE = "ZeRO: relative errors over four steps in fp32, against stage 0 and against stock Trainer in one process"
ROWS: list[str] = []  # conftest.py prints them when all tests have run
COLUMNS = ("owned", "loss", "first grad.", "last grad.", "moments", "loss/stock", "moments/stock")
HEADER = f"{'case':30s} stage " + " ".join(f"{column:>13s}" for column in COLUMNS)


@pytest.mark.parametrize("name", CASES)
def test_every_stage_is_plain_data_parallelism(pool: WorkerPool, pytestconfig: pytest.Config, name: str) -> None:
    """Stages 1 to 3 against stage 0 on the same ranks, and all of them against stock Trainer in one process."""
    if name not in BY_DEFAULT and not pytestconfig.getoption("full_matrix"):
        pytest.skip("runs with --full-matrix")
    world, sizes, tied = CASES[name]
    dp = world // sizes.get("tp_size", 1) // sizes.get("pp_size", 1)
    directory = checkpoint(tied, 2 * sizes.get("pp_virtual_stages", 1))
    expected, path = reference(directory, dp * sizes["gradient_accumulation_steps"], 0.0)
    ranks = pool.run(world, every_stage, directory, {**sizes, "max_grad_norm": 0.0}, path)
    for stage in STAGES:
        rows = [rank[stage] for rank in ranks]
        assert all(row["losses"] == rows[0]["losses"] and row["norms"] == rows[0]["norms"] for row in rows)
        plain = ranks[0][0]
        figures = {
            "owned": max(row["sharded"] for row in rows),
            "loss": relative(rows[0]["losses"], plain["losses"]),
            "first grad.": max(row["first"] for row in rows),
            "last grad.": max(row["last"] for row in rows),
            "moments": max(row["plain moments"] for row in rows),
            "loss/stock": relative(rows[0]["losses"], expected.losses),
            "moments/stock": max(row["moments"] for row in rows),
        }
        ROWS.append(f"{name:30s} {stage:5d} " + " ".join(f"{figures[column]:13.1e}" for column in COLUMNS))
        # Stages 2 and 3 add the ranks' gradients in every micro-batch, stages 0 and 1 after the last; and more than two
        # numbers are added in another order by a reduce-scatter than by an all-reduce. Adam's first steps amplify it.
        same_order = name in SUMS_OF_TWO and (stage <= 1 or sizes["gradient_accumulation_steps"] == 1)
        bounds = {"loss": 2e-7, "first grad.": 1e-7, "last grad.": 0 if same_order else 2e-6, "loss/stock": 1e-6}
        bounds |= {"moments": bounds["last grad."], "moments/stock": 1e-5}
        assert all(figures[column] <= bound for column, bound in bounds.items()), (stage, figures, bounds)
        assert relative(rows[0]["norms"], expected.norms) <= 1e-6
        shards = dp // sizes.get("dp_replicate_size", 1) if stage else 1
        assert figures["owned"] <= 1.15 / shards + 0.02


def relative(got: list[float], expected: list[float]) -> float:
    assert len(got) == len(expected)
    return max(abs(a - b) / abs(b) for a, b in zip(got, expected, strict=True))


# ---- collectives ----


def count_collectives(directory: str, sizes: dict[str, Any]) -> tuple[list[list[tuple[str, int]]], int]:
    """What was issued in each optimizer step, in order, and the number of buckets. Backwards count from 0."""
    steps: list[list[tuple[str, int]]] = []
    addresses: dict[int, int] = {}

    def recorded(kind: str, issue: Callable[..., Any]) -> Callable[..., Any]:
        def call(whole: torch.Tensor, group: Any) -> Any:
            steps[-1].append((kind, addresses.setdefault(whole.data_ptr(), len(addresses))))
            return issue(whole, group)

        return call

    class SmallBuckets(NanotronTrainingArguments):
        """For a small model; `ddp_bucket_cap_mb` is at least 1 MiB."""

        gradient_bucket_bytes = 10_000  # type: ignore[assignment]

    original = gradients_module.reduce_scatter_in_place, zero_module.all_gather_in_place
    gradients_module.reduce_scatter_in_place = recorded("reduce_scatter", original[0])
    zero_module.all_gather_in_place = recorded("all_gather", original[1])
    try:
        args = SmallBuckets(**training_arguments(max_steps=3, **sizes))
        model = ParallelAuto.from_pretrained(directory, parallel=args.parallel)
        trainer = NanotronTrainer(
            model=model, args=args, train_dataset=random_dataset(SAMPLES), data_collator=pad_batch
        )
        weights: Any = trainer.weights
        begin, before, after = weights.begin, weights.before_backward, weights.after_backward

        def on_begin() -> None:
            steps.append([])
            begin()

        def before_backward(stage: int, is_last: bool) -> None:
            steps[-1].append(("backward begins", int(is_last)))
            before(stage, is_last)

        def after_backward(stage: int, is_last: bool) -> None:
            steps[-1].append(("backward ends", int(is_last)))
            after(stage, is_last)

        weights.begin, weights.before_backward, weights.after_backward = on_begin, before_backward, after_backward
        trainer.train()
        trainer.mesh.close()
        return steps, len(weights.gradients.buckets)
    finally:
        gradients_module.reduce_scatter_in_place, zero_module.all_gather_in_place = original


@pytest.mark.parametrize("accumulation", [1, 4])
def test_one_reduce_scatter_and_one_all_gather_per_bucket_and_step(pool: WorkerPool, accumulation: int) -> None:
    ranks = pool.run(2, count_collectives, checkpoint(False), {"gradient_accumulation_steps": accumulation})
    assert ranks[0] == ranks[1], "ranks issue different collectives"
    steps, buckets = ranks[0]
    assert buckets > 4 and len(steps) == 3
    for events in steps:
        kinds = [kind for kind, _ in events]
        for kind in ("reduce_scatter", "all_gather"):
            members = [bucket for k, bucket in events if k == kind]
            assert len(members) == len(set(members)) == buckets
        assert kinds.count("backward ends") == accumulation
        last_begins, last_ends = events.index(("backward begins", 1)), events.index(("backward ends", 1))
        first = kinds.index("reduce_scatter")
        assert last_begins < first < last_ends, "the first reduction starts while the last backward runs"
        assert kinds[last_begins:last_ends].count("reduce_scatter") == buckets
        assert set(kinds[:last_begins]) <= {"backward begins", "backward ends"}
        assert kinds.index("all_gather") > last_ends


def test_gradient_shards_are_reduced_every_micro_batch(pool: WorkerPool) -> None:
    """Stage 2 keeps no whole gradient between micro-batches, so it reduces each: the price of its memory."""
    sizes = {"gradient_accumulation_steps": 3, "zero_stage": 2}
    for steps, buckets in pool.run(2, count_collectives, checkpoint(False), sizes):
        for events in steps:
            assert [kind for kind, _ in events].count("reduce_scatter") == 3 * buckets
            assert [kind for kind, _ in events].count("all_gather") == buckets


# ---- steps whose gradient is not finite ----


def train_with_a_broken_gradient(directory: str, sizes: dict[str, Any], broken_ranks: list[int]) -> list[float]:
    """In step 3 an element of one parameter's gradient is infinite on some ranks. Losses of all steps."""
    args = NanotronTrainingArguments(**training_arguments(gradient_accumulation_steps=2, **sizes))
    model = ParallelAuto.from_pretrained(directory, parallel=args.parallel)
    history = History()
    trainer = NanotronTrainer(
        model=model, args=args, train_dataset=random_dataset(SAMPLES), data_collator=pad_batch, callbacks=[history]
    )
    finish = trainer.weights.finish

    def finish_and_break() -> None:
        finish()
        if trainer.state.global_step == 2 and model.mesh.rank in broken_ranks:
            for segment in trainer.weights.segments:
                if "layers.0.mlp" in segment.name or "layers.1" in segment.name:
                    segment.gradient[-1] = float("inf")

    trainer.weights.finish = finish_and_break
    trainer.train()
    trainer.mesh.close()
    return history.losses


@pytest.mark.parametrize(
    "sizes",
    [
        {"zero_stage": 0},
        {"zero_stage": 1},
        pytest.param({"zero_stage": 2}, marks=pytest.mark.full_matrix),  # the norm is that of stage 1's shards
        {"zero_stage": 3},
        {"tp_size": 2},
    ],
    ids=str,
)
def test_a_broken_gradient_ends_the_run_on_every_rank(pool: WorkerPool, sizes: dict[str, Any]) -> None:
    with pytest.raises(JobError) as error:
        # Without shards, what is broken is broken on every copy.
        pool.run(
            2, train_with_a_broken_gradient, checkpoint(False), sizes, [0, 1] if sizes == {"zero_stage": 0} else [1]
        )
    assert set(error.value.kinds.values()) == {"NonFiniteGradientError"} and len(error.value.kinds) == 2
    for part in ("step 3", "'model.layers.0.mlp.", "rank ", "skip_nonfinite_steps"):
        assert part in str(error.value)


def test_a_broken_step_can_be_left_out(pool: WorkerPool) -> None:
    directory = checkpoint(False)
    sizes = {"lr_scheduler_type": "constant", "warmup_steps": 0, "skip_nonfinite_steps": True}
    for losses in pool.run(2, train_with_a_broken_gradient, directory, sizes, [0]):
        whole = losses
        assert len(losses) == 4 and all(loss == loss for loss in losses)
    unbroken = pool.run(2, train_with_a_broken_gradient, directory, sizes, [])[0]
    assert whole[:3] == unbroken[:3]
    # The fourth step starts from the weights of the third; after an update it would not.
    assert whole[3] != unbroken[3]


# ---- optimizers ----


def user_optimizer(model: Any, kind: str) -> tuple[Any, Any]:
    """Three groups with rates and decays of their own, and a schedule made for that object."""
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for n, p in named.items() if "embed" in n], "lr": 1e-3, "weight_decay": 0.0},
        {"params": [p for n, p in named.items() if "embed" not in n and p.dim() > 1], "weight_decay": 0.2},
        {"params": [p for n, p in named.items() if "embed" not in n and p.dim() == 1], "lr": 2e-3, "weight_decay": 0.0},
    ]
    optimizer = {
        "adamw": lambda: torch.optim.AdamW(groups, lr=4e-3),
        "sgd": lambda: torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True),
        "rmsprop": lambda: torch.optim.RMSprop(groups, lr=1e-3, centered=True),
    }[kind]()
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def train_with_user_optimizer(directory: str, kind: str, sizes: dict[str, Any]) -> tuple[list[float], list[float]]:
    stock = sizes.pop("stock", False)
    values = training_arguments(**sizes)
    history = History()
    if stock:
        from transformers import AutoModelForCausalLM

        model, args, trainer_class = (
            AutoModelForCausalLM.from_pretrained(directory),
            TrainingArguments(**values),
            Trainer,
        )
    else:
        args = NanotronTrainingArguments(**values)
        model, trainer_class = ParallelAuto.from_pretrained(directory, parallel=args.parallel), NanotronTrainer
    trainer = trainer_class(
        model=model, args=args, train_dataset=random_dataset(SAMPLES), data_collator=pad_batch,
        callbacks=[history], optimizers=user_optimizer(model, kind),
    )  # fmt: skip
    trainer.train()
    return history.losses, history.norms


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        pytest.param("adamw", {"zero_stage": 1}, marks=pytest.mark.full_matrix),
        ("sgd", {"zero_stage": 2}),
        ("rmsprop", {"tp_size": 2}),
        ("adamw", {"zero_stage": 3}),
    ],
    ids=str,
)
def test_an_optimizer_made_by_the_user(pool: WorkerPool, kind: str, sizes: dict[str, Any]) -> None:
    directory = checkpoint(False)
    expected = train_with_user_optimizer(directory, kind, {"stock": True, "gradient_accumulation_steps": 4})
    accumulation = 4 // (2 // sizes.get("tp_size", 1))
    for losses, norms in pool.run(
        2, train_with_user_optimizer, directory, kind, {**sizes, "gradient_accumulation_steps": accumulation}
    ):
        assert losses == pytest.approx(expected[0], rel=2e-5)
        assert norms == pytest.approx(expected[1], rel=1e-4)


TRAINER_OPTIMIZERS: list[tuple[str, str | None]] = [
    ("adamw_torch", None),
    ("adamw_torch_fused", None),
    ("sgd", "momentum=0.9"),
    ("adagrad", None),
    ("rmsprop", "momentum=0.5,centered=True"),
]


def train_with(directory: str, overrides: dict[str, Any]) -> list[float]:
    trainer, run = train_plain(directory, **overrides)
    trainer.mesh.close()
    return run.losses


def train_plain(directory: str, watch: Any = None, **overrides: Any) -> tuple[NanotronTrainer, History]:
    """`watch`: one more callback, which is told its trainer."""
    args = NanotronTrainingArguments(**training_arguments(**overrides))
    model = ParallelAuto.from_pretrained(directory, parallel=args.parallel)
    history = History()
    trainer = NanotronTrainer(
        model=model, args=args, train_dataset=random_dataset(SAMPLES), data_collator=pad_batch,
        callbacks=[history] if watch is None else [history, watch],
    )  # fmt: skip
    if watch is not None:
        watch.trainer = trainer
    trainer.train()
    return trainer, history


# The other tests of this file train with the one; a user's own RMSprop is tried above.
REPEATED = ("adamw_torch_fused", "rmsprop")


@pytest.mark.parametrize(
    ("optim", "optim_args"),
    [pytest.param(*each, marks=[pytest.mark.full_matrix] * (each[0] in REPEATED)) for each in TRAINER_OPTIMIZERS],
    ids=[name for name, _ in TRAINER_OPTIMIZERS],
)
def test_optimizers_of_the_training_arguments(pool: WorkerPool, optim: str, optim_args: str | None) -> None:
    overrides = {"optim": optim, "optim_args": optim_args, "gradient_accumulation_steps": 2}
    directory = checkpoint(False)
    history = History()
    from transformers import AutoModelForCausalLM

    Trainer(
        model=AutoModelForCausalLM.from_pretrained(directory),
        args=TrainingArguments(**training_arguments(**overrides)),
        train_dataset=random_dataset(SAMPLES), data_collator=pad_batch, callbacks=[history],
    ).train()  # fmt: skip
    for losses in pool.run(2, train_with, directory, {**overrides, "gradient_accumulation_steps": 1}):
        assert losses == pytest.approx(history.losses, rel=2e-5)


def test_lion_and_bf16_moments(pool: WorkerPool) -> None:
    """On two ranks as on one: Lion exactly; bf16 moments too, since copies and shards draw the same random bits."""
    directory = checkpoint(True)
    for overrides in ({"optim": "lion_32bit", "learning_rate": 1e-3}, {"optim_state_dtype": "bfloat16"}):
        alone = pool.run(1, train_with, directory, {**overrides, "gradient_accumulation_steps": 2})[0]
        shared = pool.run(2, train_with, directory, {**overrides, "gradient_accumulation_steps": 1})[0]
        assert shared == pytest.approx(alone, rel=2e-5)
    fp32 = pool.run(1, train_with, directory, {"gradient_accumulation_steps": 2})[0]
    assert alone == pytest.approx(fp32, rel=1e-3) and alone != fp32


def bf16_moments_of_both(directory: str, cases: list[dict[str, Any]]) -> list[tuple[Any, Any]]:
    """Of each case, losses and this rank's masters and moments: with the trainer's own AdamW, and the user's."""
    return [(bf16_moments(directory, False, sizes), bf16_moments(directory, True, sizes)) for sizes in cases]


def bf16_moments(directory: str, adopted: bool, sizes: dict[str, Any]) -> tuple[list[float], Tensors]:
    args = NanotronTrainingArguments(**training_arguments(optim_state_dtype="bfloat16", max_steps=3, **sizes))
    model, history = ParallelAuto.from_pretrained(directory, parallel=args.parallel), History()
    named = dict(model.named_parameters())
    groups = [  # in another order than the trainer's
        {"params": [p for p in named.values() if p.dim() == 1], "weight_decay": 0.0},
        {"params": [p for p in reversed(named.values()) if p.dim() > 1], "weight_decay": args.weight_decay},
    ]
    optimizer = AdamW(groups, lr=args.learning_rate, state_dtype=torch.bfloat16) if adopted else None
    trainer = NanotronTrainer(
        model=model, args=args, train_dataset=random_dataset(SAMPLES), data_collator=pad_batch, callbacks=[history],
        optimizers=(optimizer, None),
    )  # fmt: skip
    trainer.train()
    found: Tensors = {}
    for segment in trainer.weights.segments:
        state = trainer.optimizer.state[segment.master]
        found |= {f"{segment.name} {kind}": state[kind] for kind in ("exp_avg", "exp_avg_sq")}
        found[segment.name] = segment.master.detach()
    trainer.mesh.close()
    return history.losses, found


def test_an_adopted_adamw_rounds_as_the_trainers_own(pool: WorkerPool) -> None:
    """To the last bit. Over stages, copies of a tied embedding have other places in the optimizers of their ranks."""
    cases: list[dict[str, Any]] = [{"zero_stage": 1}, {"pp_size": 2, "gradient_accumulation_steps": 2}]
    directory = checkpoint(True)
    ranks = pool.run(2, bf16_moments_of_both, directory, cases)
    for rank in ranks:
        for sizes, ((losses, own), (found, adopted)) in zip(cases, rank, strict=True):
            assert found == losses, sizes
            assert adopted.keys() == own.keys() and all(torch.equal(adopted[name], own[name]) for name in own), sizes
    (_, first), (_, last) = (rank[1][1] for rank in ranks)
    assert torch.equal(first["model.embed_tokens.weight"], last["lm_head.weight"])


def adopted_streams(directory: str) -> dict[str, tuple[int, tuple[int, int]]]:
    """Of each segment of this rank: where it starts in its parameter, and the stream of the user's AdamW."""
    args = NanotronTrainingArguments(**training_arguments(max_steps=1))
    model = ParallelAuto.from_pretrained(directory, parallel=args.parallel)
    given = {parameter: (70, 300) for parameter in model.parameters() if parameter.dim() > 1}
    optimizer = AdamW(model.parameters(), state_dtype=torch.bfloat16, streams=given)
    trainer = NanotronTrainer(
        model=model, args=args, train_dataset=random_dataset(8), data_collator=pad_batch, optimizers=(optimizer, None)
    )
    trainer.create_optimizer()
    assert len(optimizer.streams) == len(trainer.weights.segments)  # none of parameters that are gone
    trainer.mesh.close()
    return {segment.name: (segment.start, optimizer.streams[segment.master]) for segment in trainer.weights.segments}


def test_an_adopted_adamw_keeps_streams_that_its_user_gave(pool: WorkerPool) -> None:
    """A rank's part of such a parameter draws its part of them. Norms have none here."""
    order, starts = list(stock_model("llama", num_hidden_layers=2).state_dict()), set()
    for found in pool.run(2, adopted_streams, checkpoint(True)):
        for name, (start, stream) in found.items():
            assert stream == ((order.index(name), start) if "norm" in name else (70, 300 + start))
            starts.add(start)
    assert len(starts) > 1  # some parameter is divided


class OnesWritten(TrainerCallback):
    """After every step: whether the model computes with the rounded masters. `publishes`: by a pass of its own."""

    def __init__(self, publishes: bool) -> None:
        self.publishes, self.trainer, self.equal = publishes, cast(Any, None), []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert len(self.trainer.optimizer.rounded) == len(self.trainer.weights.segments)
        if self.publishes:
            self.trainer.optimizer.rounded.clear()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        segments = self.trainer.weights.segments
        self.equal.append(all(torch.equal(s.weight, s.master.bfloat16()) for s in segments))


def train_in_bf16(directory: str, zero_stage: int, publishes: bool) -> list[float]:
    written = OnesWritten(publishes)
    sizes: dict[str, Any] = {"zero_stage": zero_stage, "max_steps": 4}
    _, history = train_plain(directory, written, bf16=True, optim_state_dtype="bfloat16", **sizes)
    assert written.equal == [True] * 4
    return history.losses


def test_weights_are_rounded_by_the_optimizer(pool: WorkerPool) -> None:
    """Our AdamW writes the bf16 weights itself; every loss is that of weights rounded afterwards, to the last bit."""
    directory = checkpoint(True)
    for zero_stage in (0, 1, 2):
        once, twice = (pool.run(2, train_in_bf16, directory, zero_stage, publishes) for publishes in (False, True))
        assert once == twice


class HasRounded(torch.optim.SGD):
    """Of somebody else, with an attribute that is called so by chance."""

    elementwise = rounded = True


def test_weights_are_rounded_where_the_users_optimizer_does_not() -> None:
    """One of ours keeps what its user has it write: that is not the weights of the model, nor all of them."""

    def adamw(parameters: list[nn.Parameter]) -> AdamW:
        return AdamW(parameters, lr=1e-2, rounded={p: torch.zeros_like(p, dtype=torch.float16) for p in parameters})

    args = NanotronTrainingArguments(**training_arguments(max_steps=2, warmup_steps=0, bf16=True))
    makers: list[Any] = [adamw, lambda parameters: HasRounded(parameters, lr=0.1)]
    for make in makers:
        model = stock_model("llama", num_hidden_layers=2)
        trainer = NanotronTrainer(
            model=model, args=args, train_dataset=random_dataset(SAMPLES), data_collator=pad_batch,
            optimizers=(make(list(model.parameters())), None),
        )  # fmt: skip
        before = trainer.model.lm_head.weight.detach().clone()
        trainer.train()
        assert not torch.equal(trainer.model.lm_head.weight, before)
        for segment in trainer.weights.segments:
            assert segment.weight is not None and torch.equal(segment.weight, segment.master.bfloat16())


# ---- one owner ----


def test_a_trainer_knows_when_its_model_is_not_its_own() -> None:
    """Two trainers on one model; parameters frozen behind the trainer's back."""

    def trainer(model: Any) -> NanotronTrainer:
        args = NanotronTrainingArguments(**training_arguments(max_steps=1))
        return NanotronTrainer(model=model, args=args, train_dataset=random_dataset(8), data_collator=pad_batch)

    first = trainer(stock_model("llama"))
    first.train()
    second = trainer(first.model)
    second.train()
    with pytest.raises(ValueError, match="another trainer has taken this model"):
        first.train()
    second.model.lm_head.requires_grad_(False)
    with pytest.raises(ValueError, match=r"requires_grad of lm_head.weight \(1 parameters\) was changed"):
        second.train()
    second.model.lm_head.requires_grad_(True)
    second.model.to("cpu")
    with pytest.raises(ValueError, match=r"cannot be moved to torch.bfloat16"):
        second.model.bfloat16()


def test_an_optimizer_with_frozen_parameters_and_mixed_groups() -> None:
    """Frozen parameters may be in its groups, and one group may not be fused though the others are."""
    model = stock_model("llama")
    model.model.embed_tokens.requires_grad_(False)
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for p in named.values() if p.dim() == 1], "fused": False},
        {"params": [p for p in named.values() if p.dim() > 1]},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True)
    before = model.model.embed_tokens.weight.detach().clone()
    args = NanotronTrainingArguments(**training_arguments(max_steps=2, warmup_steps=0))
    trainer = NanotronTrainer(
        model=model, args=args, train_dataset=random_dataset(8), data_collator=pad_batch, optimizers=(optimizer, None)
    )
    head = trainer.model.lm_head.weight.detach().clone()
    trainer.train()
    assert torch.equal(trainer.model.model.embed_tokens.weight, before)
    assert not torch.equal(trainer.model.lm_head.weight, head)


class StopAtTheEnd(TrainerCallback):
    """Ends the epoch with its last step, at which nothing is logged or saved."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_epoch_stop = state.global_step == 3
        control.should_training_stop = False


def train_to_a_broken_end(directory: str) -> None:
    fields = training_arguments(num_train_epochs=1, optim="adamw_torch_fused", logging_steps=100)
    args = NanotronTrainingArguments(**{**fields, "max_steps": -1, "num_train_epochs": 1})
    model = ParallelAuto.from_pretrained(directory, parallel=args.parallel)
    size = args.per_device_train_batch_size * args.gradient_accumulation_steps
    trainer = NanotronTrainer(
        model=model,
        args=args,
        train_dataset=random_dataset(3 * size),
        data_collator=pad_batch,
        callbacks=[StopAtTheEnd()],
    )
    finish = trainer.weights.finish

    def finish_and_break() -> None:
        finish()
        if trainer.state.global_step == 2:
            trainer.weights.segments[0].gradient[-1] = float("inf")

    trainer.weights.finish = finish_and_break  # type: ignore[method-assign]
    try:
        trainer.train()
    finally:
        trainer.mesh.close()


def test_a_broken_last_step_is_reported(pool: WorkerPool) -> None:
    with pytest.raises(JobError) as error:
        pool.run(1, train_to_a_broken_end, checkpoint(False))
    assert set(error.value.kinds.values()) == {"NonFiniteGradientError"} and "step 3" in str(error.value)


def test_a_fused_optimizer_is_not_told_on_the_device_before_it_has_state() -> None:
    weight = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, fused=True)
    weights = mock.Mock(segments=[mock.Mock(master=weight, gradient=torch.ones(4))])
    link = OptimizerLink(optimizer, weights)
    assert not link.skips_on_device
    optimizer.step()
    assert link.skips_on_device
