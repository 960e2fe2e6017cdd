"""fp32 where it is promised, and dropout that follows the sample and the layer, not the rank that computes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from pool import WorkerPool
from test_gradients import Batch, plain, stock_model
from tiny import History, local_gradients, pad_batch, random_dataset, training_arguments
from transformers import Trainer, TrainingArguments

from hf_nanotron import NanotronTrainer, NanotronTrainingArguments, ParallelConfig
from hf_nanotron.models.sharding.parallelize import parallelize
from hf_nanotron.parallel.collectives import all_gather
from hf_nanotron.parallel.mesh import ParallelMesh
from hf_nanotron.prepare.shard_weights import shard_weights
from hf_nanotron.prepare.training_state import TrainingState
from hf_nanotron.training.step.train_step import TrainStep

DROPOUT = {"attention_dropout": 0.3}
MICRO_BATCHES = 4  # of a step, over all data-parallel ranks
ITEMS = torch.tensor(100)
Parts = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Run:
    """What one rank saw of a step."""

    loss: float
    gradients: Parts
    generator_moved: bool


def step(sizes: dict[str, Any], checkpoint_every: int = 0, dropout: bool = True) -> Run:
    """One step under dropout. The gradients are whole: joined over tensor-parallel ranks."""
    mesh = ParallelMesh(ParallelConfig(**sizes))
    model = parallelize(stock_model("llama", **(DROPOUT if dropout else {})), mesh)
    if checkpoint_every:
        model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=checkpoint_every)
    weights = shard_weights(model, torch.float32, 1000)
    window = [plain(index) for index in range(MICRO_BATCHES)][mesh.dp_rank :: mesh.dp_size]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    share = TrainStep(TrainingState(model, weights)).run(
        [{**batch, "num_items_in_batch": ITEMS} for batch in window], step=3
    )
    moved = not torch.equal(before, torch.get_rng_state())
    # An evaluation must not find anything of the step: it draws nothing, so it leaves the generators alone.
    torch.manual_seed(6)
    before = torch.get_rng_state()
    model.eval()
    with torch.no_grad():
        model(input_ids=plain(0)["input_ids"])
    moved |= not torch.equal(before, torch.get_rng_state())
    loss = torch.stack([share * mesh.is_last_stage * (mesh.tp_rank == 0)])
    total = float(all_gather(loss, mesh.world, 0).sum())
    whole = {name: join(gradient, model, name) for name, gradient in local_gradients(model).items()}
    mesh.close()
    return Run(total, whole, moved)


def join(part: torch.Tensor, model: Any, name: str) -> torch.Tensor:
    spec, group = model.shard_specs[name], model.mesh.tp
    return spec.assemble(list(all_gather(part.unsqueeze(0), group, 0)))


def steps(*arguments: tuple[Any, ...]) -> list[Run]:
    return [step(*these) for these in arguments]


def same(first: list[Run], second: list[Run]) -> bool:
    """Whether two topologies computed the same: all gradients of all their ranks, up to rounding."""
    merged, other = ({n: g for run in runs for n, g in run.gradients.items()} for runs in (first, second))
    assert merged.keys() == other.keys()
    close = all(torch.allclose(merged[n], other[n], rtol=0, atol=2e-5 * float(merged[n].abs().max())) for n in merged)
    return close and abs(first[0].loss - second[0].loss) < 1e-5 * first[0].loss


@pytest.fixture(scope="module")
def one_process(pool: WorkerPool) -> list[Run]:
    return pool.run(1, step, {})


INTERLEAVED = {"pp_size": 2, "pp_schedule": "interleaved_1f1b", "pp_virtual_stages": 2}


@pytest.mark.parametrize(
    ("world_size", "sizes", "checkpoint_every"),
    [
        (1, {}, 1),
        (1, {}, 2),
        (2, {}, 0),
        (2, {"pp_size": 2}, 0),
        (2, {"pp_size": 2, "pp_schedule": "afab"}, 1),
        (2, INTERLEAVED, 2),
        (4, {"pp_size": 2}, 1),
    ],
)
def test_masks_follow_sample_and_layer(
    pool: WorkerPool, one_process: list[Run], world_size: int, sizes: dict[str, Any], checkpoint_every: int
) -> None:
    """The same masks on every pipeline and data-parallel cut, also where they are drawn again."""
    runs = pool.run(world_size, step, sizes, checkpoint_every)
    assert same(one_process, runs)
    assert not any(run.generator_moved for run in runs)


def test_dropout_does_something(pool: WorkerPool, one_process: list[Run]) -> None:
    assert not same(one_process, pool.run(1, step, {}, 0, False))


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_masks_are_drawn_again_under_tensor_parallelism(pool: WorkerPool, sequence_parallel: bool) -> None:
    sizes = {"tp_size": 2, "sequence_parallel": sequence_parallel}
    results = pool.run(2, steps, (sizes,), (sizes, 1), (sizes, 2), (sizes, 0, False))
    kept, every, every_second, without = zip(*results, strict=True)
    assert same(list(kept), list(every))
    assert same(list(kept), list(every_second))
    assert not same(list(kept), list(without))
    assert not any(run.generator_moved for runs in results for run in runs)


def draws(sequence_parallel: bool) -> tuple[int, int]:
    """What the next random number would be: inside the first attention, and before the second layer."""
    mesh = ParallelMesh(ParallelConfig(tp_size=2, sequence_parallel=sequence_parallel))
    model = parallelize(stock_model("llama", **DROPOUT), mesh)
    seen: dict[str, int] = {}

    def record(name: str) -> Any:
        def hook(*_: Any) -> None:
            seen[name] = hash(tuple(torch.get_rng_state().tolist()))

        return hook

    model.model.layers[0].self_attn.o_proj.register_forward_hook(record("inside"))
    model.model.layers[0].register_forward_hook(record("outside"))
    model.train()
    model.streams.begin(0, 0)
    model(input_ids=plain(0)["input_ids"][:, :8])
    model.streams.end()
    mesh.close()
    return seen["inside"], seen["outside"]


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_streams_differ_where_tensors_are_cut(pool: WorkerPool, sequence_parallel: bool) -> None:
    (inside, outside), (other_inside, other_outside) = pool.run(2, draws, sequence_parallel)
    assert inside != other_inside
    assert (outside != other_outside) == sequence_parallel


# ---- precision ----


def accumulate(dtype: torch.dtype, batches: list[Batch]) -> Parts:
    model = parallelize(stock_model("llama").to(dtype), ParallelMesh(ParallelConfig()))
    parameters = dict(model.named_parameters())
    weights = shard_weights(model, dtype, 1 << 20)
    TrainStep(TrainingState(model, weights)).run([{**batch, "num_items_in_batch": ITEMS} for batch in batches], step=0)
    assert all(parameter.grad is None for parameter in parameters.values())
    return {name: gradient.clone() for name, gradient in local_gradients(model).items()}


def test_gradients_accumulate_in_fp32() -> None:
    """bf16 gradients of one micro-batch each, summed in fp32: nothing is rounded in between."""
    batches = [plain(index) for index in range(6)]
    together = accumulate(torch.bfloat16, batches)
    one_by_one = [accumulate(torch.bfloat16, [batch]) for batch in batches]
    for name, gradient in together.items():
        assert gradient.dtype == torch.float32
        expected = torch.zeros_like(gradient)
        by_row = "embed" in name  # each token's gradient is added on its own, and in fp32 from the start
        for single in one_by_one:
            assert by_row or torch.equal(single[name], single[name].bfloat16().float())
            expected += single[name]
        torch.testing.assert_close(gradient, expected, rtol=1e-6 * by_row, atol=1e-8 * by_row)
    assert any(not torch.equal(g, g.bfloat16().float()) for g in together.values())


@dataclass(frozen=True)
class Trained:
    losses: list[float]
    norms: list[float]
    moved: float  # part of the weights that changed
    rounded: bool  # whether the model's weights are the masters' rounded
    dtypes: set[torch.dtype]
    frequencies: torch.dtype


def train(**overrides: Any) -> Trained:
    args = NanotronTrainingArguments(**training_arguments(max_steps=4, gradient_accumulation_steps=2, **overrides))
    history = History()
    trainer = NanotronTrainer(
        model=stock_model("llama"), args=args, train_dataset=random_dataset(32), data_collator=pad_batch,
        callbacks=[history],
    )  # fmt: skip
    masters = {s.name: s.master.view(s.spec.local_shape) for s in trainer.weights.segments}  # whole: dp is 1
    before = {name: master.detach().clone() for name, master in masters.items()}
    trainer.train()
    parameters = dict(trainer.model.named_parameters())
    changed = sum(int((masters[name] != before[name]).sum()) for name in masters)
    result = Trained(
        history.losses,
        history.norms,
        changed / sum(master.numel() for master in masters.values()),
        all(torch.equal(parameters[name], masters[name].to(parameters[name].dtype)) for name in masters),
        {parameter.dtype for parameter in parameters.values()},
        trainer.model.model.rotary_emb.inv_freq.dtype,
    )
    trainer.mesh.close()
    return result


def train_with(overrides: dict[str, Any]) -> Trained:
    return train(**overrides)


@pytest.mark.parametrize("sizes", [{"tp_size": 2}, {"pp_size": 2}], ids=["tp2", "pp2"])
def test_bf16_keeps_fp32_masters(pool: WorkerPool, sizes: dict[str, Any]) -> None:
    """Updates far below bf16's resolution move the masters; everything the model computes with is bf16."""
    small = {"learning_rate": 1e-6, "lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.0}
    full = pool.run(2, train_with, {**sizes, **small})
    for exact, run in zip(full, pool.run(2, train_with, {**sizes, **small, "bf16": True}), strict=True):
        assert run.dtypes == {torch.bfloat16} and exact.dtypes == {torch.float32}
        assert run.frequencies == torch.float32
        assert run.rounded
        assert run.moved > 0.9
        assert run.losses == pytest.approx(exact.losses, rel=1e-2) and run.losses != exact.losses
        assert run.norms == pytest.approx(exact.norms, rel=5e-2)


def test_no_clipping(pool: WorkerPool) -> None:
    """`max_grad_norm=0` leaves the gradients alone, and still reports their norm."""
    history = History()
    overrides = {"max_grad_norm": 0.0, "optim": "sgd", "learning_rate": 0.1}
    Trainer(
        model=stock_model("llama"),
        args=TrainingArguments(**training_arguments(max_steps=4, gradient_accumulation_steps=2, **overrides)),
        train_dataset=random_dataset(32), data_collator=pad_batch, callbacks=[history],
    ).train()  # fmt: skip
    for run in pool.run(2, train_with, {"tp_size": 2, **overrides}):
        assert run.losses == pytest.approx(history.losses, rel=2e-5)
        assert run.norms == pytest.approx(history.norms, rel=1e-4)
