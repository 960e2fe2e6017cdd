"""The samples of every step are those of stock `transformers.Trainer` at the same seed and global batch, in its order.

Every sample carries its number, and what `training_step` is given is written down: with `dp_size` data-parallel ranks,
micro-batch `m` of rank `r` is the stock run's micro-batch `m * dp_size + r` of the same step.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from pool import WorkerPool
from tiny import History, checkpoint, pad_batch, random_dataset, training_arguments
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices

from hf_nanotron.data.dealing import FillerBatch
from hf_nanotron.data.loader import DataParallelLoader, build_loader

SAMPLES = 11  # with a global batch of 4, the last window of an epoch has 3 samples: 2 and 1 for two ranks
GLOBAL_BATCH = 4
SEED = 7  # of tiny.training_arguments
FIRST = 3  # the token that stands for sample 0

Steps = dict[int, list[list[int]]]  # step -> the samples of each micro-batch


def numbered(samples: int = SAMPLES) -> Dataset:
    """Samples of different lengths and numbers of labels whose first token is their number."""
    rows = random_dataset(samples, length=14, seed=2, ragged=True).to_list()
    for index, row in enumerate(rows):
        row["input_ids"][0] = FIRST + index
    return Dataset.from_list(rows)


class Stream(torch.utils.data.IterableDataset):
    """torch's own kind of stream, in another order in every epoch."""

    def __init__(self, rows: Dataset) -> None:
        self.rows, self.epoch = rows, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(self.epoch))
        return iter([self.rows[index] for index in order.tolist()])


def pad_and_mask(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    batch = pad_batch(rows)
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    return {**batch, "attention_mask": (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()}


class Recorder:
    """A trainer that writes down the samples of every micro-batch; those without labels do not count."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: Steps = {}

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        has_labels = inputs["labels"].ne(-100).any(-1)
        samples = (inputs["input_ids"][has_labels, 0] - FIRST).tolist()
        self.seen.setdefault(self.state.global_step, []).append(samples)
        return super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]


class StockRecorder(Recorder, Trainer):
    """Stock Trainer."""


# Two epochs of each. `samples`, `stream` and `collate` are ours, the rest are TrainingArguments.
RUNS: dict[str, dict[str, Any]] = {
    "random": {},
    "batches of two": {"per_device_train_batch_size": 2},
    "one sample left": {"samples": 2 * GLOBAL_BATCH + 1},
    "data_seed": {"data_seed": 11},
    "sequential": {"train_sampling_strategy": "sequential"},
    "drop_last": {"per_device_train_batch_size": 2, "dataloader_drop_last": True},
    "datasets stream": {"stream": "datasets", "samples": 3 * GLOBAL_BATCH, "max_steps": 6},
    "torch stream": {"stream": "torch", "samples": 16, "max_steps": 8, "per_device_train_batch_size": 2},
    "stream left over": {"stream": "torch", "samples": 10, "max_steps": 6},
    "all tokens": {"include_num_input_tokens_seen": "all", "per_device_train_batch_size": 2},
    "tokens": {
        "include_num_input_tokens_seen": "non_padding",
        "per_device_train_batch_size": 2,
        "collate": pad_and_mask,
    },
}


def dataset_for(stream: str | None, samples: int) -> Any:
    if stream == "torch":
        return Stream(numbered(samples))
    if stream == "datasets":
        return numbered(samples).to_iterable_dataset(num_shards=min(3, samples)).shuffle(seed=5, buffer_size=4)
    return numbered(samples)


def train(make: Callable[..., Recorder], run: dict[str, Any], micro_batches: int) -> dict[str, Any]:
    """One run of a trainer, and what is to be equal."""
    run = dict(run)
    dataset, collate = dataset_for(run.pop("stream", None), run.pop("samples", SAMPLES)), run.pop("collate", pad_batch)
    history = History()
    trainer: Any = make(
        {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": micro_batches, **run},
        train_dataset=dataset,
        data_collator=collate,
        callbacks=[history],
    )
    trainer.train()
    return {
        "seen": trainer.seen,
        "losses": history.losses,
        "norms": history.norms,
        "tokens": trainer.state.num_input_tokens_seen,
        "flos": trainer.state.total_flos,
    }


@functools.cache
def reference(name: str) -> dict[str, Any]:
    """A run of stock Trainer, in this process."""

    def make(arguments: dict[str, Any], **kwargs: Any) -> Recorder:
        model = AutoModelForCausalLM.from_pretrained(checkpoint())
        return StockRecorder(model=model, args=TrainingArguments(**training_arguments(**arguments)), **kwargs)

    return train(make, RUNS[name], GLOBAL_BATCH // RUNS[name].get("per_device_train_batch_size", 1))


def parallel_maker(directory: str, sizes: dict[str, Any]) -> Callable[..., Any]:
    """Makes `NanotronTrainer`s with a `Recorder`; call it on every rank."""
    from hf_nanotron import AutoModelForCausalLM as ParallelAuto, NanotronTrainer, NanotronTrainingArguments

    recorder = type("ParallelRecorder", (Recorder, NanotronTrainer), {})

    def make(arguments: dict[str, Any], **kwargs: Any) -> Any:
        args = NanotronTrainingArguments(**training_arguments(**arguments, **sizes))
        model = ParallelAuto.from_pretrained(directory, parallel=args.parallel)
        return recorder(model=model, args=args, **kwargs)

    return make


def train_parallel_runs(directory: str, names: list[str], sizes: dict[str, Any], dp: int) -> dict[str, dict[str, Any]]:
    make = parallel_maker(directory, sizes)
    micro_batches = {name: GLOBAL_BATCH // RUNS[name].get("per_device_train_batch_size", 1) // dp for name in names}
    return {name: train(make, RUNS[name], micro_batches[name]) for name in names}


def merged(parts: list[Steps]) -> Steps:
    """What all data-parallel ranks saw, in the order of one process."""
    assert all(part.keys() == parts[0].keys() for part in parts)
    return {
        step: [batch for round_ in zip(*(part[step] for part in parts), strict=True) for batch in round_ if batch]
        for step in parts[0]
    }


def relative(got: list[float], wanted: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(got, wanted, strict=True))


TOPOLOGIES: dict[str, tuple[int, dict[str, Any], list[str]]] = {
    "dp1": (1, {}, ["random", "drop_last", "torch stream", "tokens"]),
    "dp2": (2, {}, list(RUNS)),
    "dp4": (4, {}, ["one sample left", "sequential", "datasets stream"]),
    "tp2": (2, {"tp_size": 2}, ["random", "all tokens"]),
    "pp2": (2, {"pp_size": 2}, ["random", "one sample left"]),
    "pp2 dp2": (4, {"pp_size": 2, "pp_schedule": "afab"}, ["one sample left", "tokens"]),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.full_matrix] * (name == "dp4")) for name in TOPOLOGIES]
)
def test_order_equals_stock(pool: WorkerPool, name: str) -> None:
    """The samples of every step, its loss and gradient norm, and the tokens and FLOPs counted."""
    world, sizes, names = TOPOLOGIES[name]
    tp, pp = sizes.get("tp_size", 1), sizes.get("pp_size", 1)
    dp = world // (tp * pp)
    results = pool.run(world, train_parallel_runs, checkpoint(), names, sizes, dp)
    for run in names:
        wanted, ranks = reference(run), [result[run] for result in results]
        for stage, part in itertools.product(range(pp), range(tp)):
            replicas = [ranks[(stage * dp + replica) * tp + part] for replica in range(dp)]
            assert merged([replica["seen"] for replica in replicas]) == wanted["seen"], run
        for got in ranks:
            assert relative(got["losses"], wanted["losses"]) < 2e-5, run
            assert relative(got["norms"], wanted["norms"]) < 1e-4, run
            assert got["tokens"] == wanted["tokens"], run
            assert got["flos"] == pytest.approx(wanted["flos"], rel=1e-6), run


HALVES = (range(3), range(3, 6))  # the steps of each epoch


def test_the_order_is_a_shuffle_by_the_data_seed() -> None:
    """The references themselves: other epochs and other seeds have other orders, and every sample comes once."""
    for name in ("random", "data_seed", "batches of two", "one sample left"):
        steps = reference(name)["seen"]
        assert len(steps) == 6, name
        epochs = [[sample for step in half for batch in steps[step] for sample in batch] for half in HALVES]
        samples = list(range(RUNS[name].get("samples", SAMPLES)))
        assert all(sorted(epoch) == samples for epoch in epochs), name
        assert epochs[0] != epochs[1] and samples not in epochs, name
    assert reference("random")["seen"] != reference("data_seed")["seen"]
    assert reference("all tokens")["tokens"] > reference("tokens")["tokens"] > 0


# ---- what stock Trainer does only with several processes, or with another random state ----


def train_grouped(directory: str, dp: int, lengths: list[int] | None) -> Steps:
    """Two epochs in groups of like lengths, which are those of the samples if there is no column that says others."""
    dataset = numbered(3 * GLOBAL_BATCH)
    if lengths is not None:
        dataset = dataset.add_column("length", lengths)
    run = {"max_steps": -1, "num_train_epochs": 2, "train_sampling_strategy": "group_by_length"}
    make = parallel_maker(directory, {"gradient_accumulation_steps": GLOBAL_BATCH // dp})
    trainer = make(run, train_dataset=dataset, data_collator=pad_batch)
    trainer.train()
    return trainer.seen


def test_group_by_length_is_the_same_for_every_dp_size(pool: WorkerPool) -> None:
    """The order that transformers makes for the global batch, from the seed and the epoch."""
    real = [len(row["input_ids"]) for row in numbered(3 * GLOBAL_BATCH)]
    for column in (None, real[::-1]):
        one = pool.run(1, train_grouped, checkpoint(), 1, column)[0]
        order = [
            get_length_grouped_indices(
                column or real, GLOBAL_BATCH, generator=torch.Generator().manual_seed(SEED + epoch)
            )
            for epoch in range(2)
        ]
        assert [sample for step in sorted(one) for batch in one[step] for sample in batch] == [*order[0], *order[1]]
    assert merged(pool.run(2, train_grouped, checkpoint(), 2, column)) == one


def train_weighing_ranks(directory: str, stock: bool, average_tokens: bool) -> tuple[list[float], list[float], Steps]:
    """Two data-parallel ranks, of stock Trainer under DistributedDataParallel or of ours."""
    history = History()
    run = {"max_steps": 4, "gradient_accumulation_steps": 2, "average_tokens_across_devices": average_tokens}
    parts = {"train_dataset": numbered(8), "data_collator": pad_batch, "callbacks": [history]}
    if stock:
        model = AutoModelForCausalLM.from_pretrained(directory)
        trainer: Any = StockRecorder(model=model, args=TrainingArguments(**training_arguments(**run)), **parts)
    else:
        trainer = parallel_maker(directory, {})(run, **parts)
    trainer.train()
    return history.losses, history.norms, trainer.seen


def test_ranks_weigh_the_same_without_average_tokens_across_devices(pool: WorkerPool) -> None:
    """As in stock Trainer with two processes, whose ranks get the same samples."""
    wanted = pool.run(2, train_weighing_ranks, checkpoint(), True, False)
    got = pool.run(2, train_weighing_ranks, checkpoint(), False, False)
    for rank in range(2):
        assert got[rank][2] == wanted[rank][2]
        assert relative(got[rank][0], wanted[rank][0]) < 2e-5
        assert relative(got[rank][1], wanted[rank][1]) < 1e-4
    by_token = pool.run(2, train_weighing_ranks, checkpoint(), False, True)
    assert relative(by_token[0][0], got[0][0]) > 1e-3


def resume(directory: str, output_dir: str) -> list[tuple[Steps, list[float]]]:
    """A run, and another from its checkpoint in the second epoch."""
    run = {"max_steps": 6, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 4}
    make = parallel_maker(directory, {"output_dir": output_dir})
    results = []
    for checkpoint_name in (None, "checkpoint-4"):
        history = History()
        trainer = make(run, train_dataset=numbered(), data_collator=pad_batch, callbacks=[history])
        trainer.train(resume_from_checkpoint=checkpoint_name and f"{output_dir}/{checkpoint_name}")
        results.append((trainer.seen, history.losses))
    return results


def test_a_resumed_run_goes_on_with_the_next_sample(pool: WorkerPool, tmp_path: Path) -> None:
    for (whole, losses), (rest, last_losses) in pool.run(2, resume, checkpoint(), str(tmp_path)):
        assert rest == {step: batches for step, batches in whole.items() if step >= 4}
        assert last_losses == pytest.approx(losses[4:], rel=1e-6)


# ---- the loader alone ----


def loader(dataset: Any, dp_rank: int, dp_size: int, batch_size: int = 2, workers: int = 0) -> DataParallelLoader:
    """A loader as `NanotronTrainer` builds it."""
    sampler = None if isinstance(dataset, torch.utils.data.IterableDataset) else SequentialSampler(dataset)
    return build_loader(dataset, sampler, pad_batch, batch_size, dp_rank, dp_size, False, 0, num_workers=workers)


KINDS = {"dataset": None, "datasets stream": "datasets", "torch stream": "torch"}


def samples_of(batch: dict[str, torch.Tensor]) -> list[int]:
    return (batch["input_ids"][:, 0] - FIRST).tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("samples", [1, 4, 5, 7, 8])
def test_no_sample_twice_and_none_lost(kind: str, samples: int) -> None:
    """Ranks have the same number of batches, of which those without samples of their own have no labels."""
    for dp_size in (1, 2, 4):
        dataset = dataset_for(KINDS[kind], samples)
        parts = [list(loader(dataset, rank, dp_size)) for rank in range(dp_size)]
        assert len({len(part) for part in parts}) == 1
        own = [[batch for batch in part if not isinstance(batch, FillerBatch)] for part in parts]
        fillers = [batch for part in parts for batch in part if isinstance(batch, FillerBatch)]
        rows = [row for batch in itertools.chain(*own) for row in samples_of(batch)]
        assert sorted(rows) == list(range(samples))
        assert all(batch["labels"].eq(-100).all() and batch["input_ids"].shape[0] == 1 for batch in fillers)
        assert sum(map(len, parts)) == sum(map(len, own)) + len(fillers)
        if kind == "dataset":
            assert all(len(loader(dataset, rank, dp_size)) == len(parts[rank]) for rank in range(dp_size))


@pytest.mark.parametrize("kind", KINDS)
def test_a_worker_reads_the_same(kind: str) -> None:
    """`dataloader_num_workers=1`, in two epochs, for a rank that ends with a filler."""
    # (a shuffled stream of datasets has another order in a worker, in stock Trainer too)
    dataset = numbered(5).to_iterable_dataset() if kind == "datasets stream" else dataset_for(KINDS[kind], 5)
    seen: dict[int, list[Any]] = {}
    for workers in (0, 1):
        batches = loader(dataset, 1, 2, workers=workers)
        seen[workers] = []
        for epoch in range(2):
            batches.set_epoch(epoch)
            seen[workers] += [(type(batch), samples_of(batch), batch["labels"].tolist()) for batch in batches]
    assert seen[0] == seen[1]
    assert [kind for kind, *_ in seen[0]] == [dict, FillerBatch] * 2


def test_several_workers_would_change_the_order_of_a_stream() -> None:
    assert len(list(loader(numbered(8), 0, 2, workers=2))) == 2
    with pytest.raises(
        ValueError, match="dataloader_num_workers=2 with an IterableDataset.*use dataloader_num_workers=0 or 1"
    ):
        loader(Stream(numbered(8)), 0, 2, workers=2)
