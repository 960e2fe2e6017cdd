"""Ranks of one replica that read different samples: an error on every rank before the first step that would use them.

Each case is harmless in stock Trainer. What ranks can agree on, seeded or dealt over data-parallel ranks, trains to the
losses of stock Trainer in one process.
"""

from __future__ import annotations

import multiprocessing
import random
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from pool import WorkerPool
from tiny import History, message, pad_batch, tiny_config, training_arguments
from torch.utils.data import DataLoader, Dataset as TorchDataset, DistributedSampler, IterableDataset
from transformers import AutoModelForCausalLM as StockAuto, Trainer, TrainingArguments

from hf_nanotron import AutoModelForCausalLM, NanotronTrainer, NanotronTrainingArguments

VOCABULARY, LENGTH, SAMPLES = 100, 16, 80
TOPOLOGIES = {"tp2": {"tp_size": 2}, "pp2": {"pp_size": 2}, "dp2-tp2": {"tp_size": 2}, "dp2": {}}
WORLDS = {"tp2": 2, "pp2": 2, "dp2-tp2": 4, "dp2": 2}


def counting(samples: int = SAMPLES) -> Dataset:
    """Each token is the one before plus one."""
    rows = [[(7 * start + place) % VOCABULARY for place in range(LENGTH)] for start in range(samples)]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("model")
    torch.manual_seed(1)
    config = tiny_config(vocab_size=VOCABULARY, num_hidden_layers=2)
    StockAuto.from_config(config).save_pretrained(directory)
    return str(directory)


class Crops(TorchDataset):
    """Random crops of counting rows, which begin anywhere."""

    def __init__(self, draw: Callable[[int], int]) -> None:
        self.rows, self.draw = counting(), draw

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        start = self.draw(1000)
        ids = [(start + place) % VOCABULARY for place in range(11)]
        return {name: self.rows[index][name][:5] + ids for name in ("input_ids", "labels")}


def from_torch(below: int) -> int:
    return int(torch.randint(below, ()))


# In place of the entropy of the system: no seed of a run changes it, each rank has its own, and nothing is by chance.
ENTROPY = random.Random()


def from_entropy(below: int) -> int:
    return ENTROPY.randrange(below)


# ---- data that differs by rank ----

# Of the pairs of ranks the one that differs first is named. Two random orders begin with the same row once in 80 times.
A_PAIR = "of one replica read different samples"


def shuffled_rows(rank: int) -> Any:
    rows = counting().to_list()
    ENTROPY.shuffle(rows)
    return Dataset.from_list(rows)


def other_lengths(rank: int) -> Any:
    return counting(SAMPLES - rank)


def swapped_late(rank: int) -> Any:
    """Rows that no fingerprint looks at, read in the third step, or in the second of two data-parallel ranks."""
    order = list(range(SAMPLES))
    if rank == 1:
        order[9], order[12] = order[12], order[9]
    return counting().select(order)


WRONG: dict[str, tuple[Callable[[int], Any], list[str]]] = {
    "random.shuffle": (
        shuffled_rows,
        ["before its first step: ranks ", A_PAIR, " of 80 is the first of the compared rows", "seed"],
    ),
    "Dataset.shuffle": (lambda rank: counting().shuffle(), [A_PAIR, "shuffle(seed=42)"]),
    "train_test_split": (
        lambda rank: counting().train_test_split(0.1)["train"],
        [A_PAIR, "train_test_split()"],
    ),
    "stream.shuffle": (
        lambda rank: counting().to_iterable_dataset().shuffle(buffer_size=100),
        ["before its first step: ranks ", A_PAIR],
    ),
    "lengths": (
        other_lengths,
        ["the length of train_dataset differs", "80 on rank 0", "79 on rank 1", "before the job"],
    ),
    "entropy": (
        lambda rank: Crops(from_entropy),
        [
            "optimizer step 1: ranks 0 and 1 of one replica",
            "first in micro-batch 1 of 2 (input_ids, labels)",
            "entropy",
        ],
    ),
    "late": (swapped_late, ["ranks 0 and 1 of one replica", "first in micro-batch 1 of 2 (input_ids, labels)"]),
}


class Epochs(TorchDataset):
    """Other rows in each epoch."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return counting()[8 * self.epoch + index]


class UnseededStream(IterableDataset):
    def __iter__(self) -> Any:
        yield from shuffled_rows(0)


class UnseededSampler(NanotronTrainer):
    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        order = list(range(SAMPLES))
        ENTROPY.shuffle(order)
        return order


class Dealing(NanotronTrainer):
    """Deals batches over all processes by hand."""

    def get_train_dataloader(self) -> DataLoader:
        args = self.args
        sampler = DistributedSampler(self.train_dataset, args.world_size, args.process_index)  # type: ignore[arg-type]
        return DataLoader(self.train_dataset, 2, sampler=sampler, collate_fn=pad_batch)  # type: ignore[arg-type]


def make(directory: str, sizes: dict[str, Any], kind: type = NanotronTrainer, **more: Any) -> NanotronTrainer:
    named = {name: more.pop(name) for name in ("train_dataset", "eval_dataset", "callbacks") if name in more}
    given = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, **sizes, **more}
    args = NanotronTrainingArguments(**training_arguments(**given))
    model = AutoModelForCausalLM.from_pretrained(directory, parallel=args.parallel)
    return kind(model=model, args=args, data_collator=pad_batch, **named)


def refused(directory: str, sizes: dict[str, Any]) -> dict[str, str]:
    """What each kind of data is told. Torchrun's processes have states of their own; forked ones share them."""
    rank = torch.distributed.get_rank()
    told = {}
    ENTROPY.seed(rank)
    for name, (data, _) in WRONG.items():
        np.random.seed(from_entropy(2**32))
        np.random.random()  # the first number of datasets' seeds is the same in every fresh process
        rows, made = data(rank), list[NanotronTrainer]()

        def train(rows: Any = rows, made: list[NanotronTrainer] = made) -> None:
            made.append(make(directory, sizes, train_dataset=rows, train_sampling_strategy="sequential"))
            made[0].train()

        told[name] = message(train)
        for trainer in made:
            steps = trainer.state.global_step
            assert steps == (3 - trainer.args.dp_size if name == "late" else 0), (name, steps)
            trainer.model.mesh.close()
    trainer = make(directory, sizes, Dealing, train_dataset=counting())
    told["all processes"] = message(trainer.train)
    told["evaluation"] = message(lambda: trainer.evaluate(shuffled_rows(rank)))
    told["evaluation of a stream"] = message(
        lambda: trainer.evaluate(counting().to_iterable_dataset().shuffle(buffer_size=100))
    )
    told["evaluation of other lengths"] = message(lambda: trainer.predict(other_lengths(rank)))
    told["generation"] = message(lambda: trainer.model.generate(torch.tensor([[5, 6 + rank]]), max_new_tokens=2))
    told["limits"] = message(lambda: trainer.model.generate(torch.tensor([[5, 6]]), max_new_tokens=2 + rank))
    trainer.model.mesh.close()
    return told


MORE = {
    "all processes": ["optimizer step 1: ranks 0 and 1 of one replica", "trainer.mesh.dp_rank"],
    "evaluation": ["evaluation, before its first step: ranks ", A_PAIR],
    "evaluation of a stream": ["Evaluation, batch 1: ranks 0 and 1 of one replica"],
    "evaluation of other lengths": ["ranks make different calls", " calls predict over 7"],
    "generation": ["generate: ranks 0 and 1 of one replica", "(input_ids)"],
    "limits": ["generate: ranks 0 and 1 of one replica", "(max_new_tokens)"],
}


@pytest.mark.parametrize("topology", [pytest.param("tp2", marks=pytest.mark.full_matrix), "pp2", "dp2-tp2"])
def test_ranks_that_read_different_samples_are_told(pool: WorkerPool, checkpoint: str, topology: str) -> None:
    results = pool.run(WORLDS[topology], refused, checkpoint, TOPOLOGIES[topology])
    wanted = {**{name: parts for name, (_, parts) in WRONG.items()}, **MORE}
    for name, parts in wanted.items():
        messages = {result[name] for result in results[:2]}  # of the first replica; dp ranks generate on their own
        assert len(messages) == 1, (name, messages)
        assert all(part in results[0][name] for part in parts), (name, results[0][name])
    for name in WRONG:
        assert len({result[name] for result in results}) == 1, name


# ---- data-parallel ranks ----


def refused_over_dp(directory: str) -> dict[str, str]:
    rank, told = torch.distributed.get_rank(), {}
    ENTROPY.seed(rank)
    for name in ("random.shuffle", "lengths", "entropy"):
        rows = WRONG[name][0](rank)
        told[name] = message(lambda rows=rows: make(directory, {}, train_dataset=rows).train())
    trainer = make(directory, {}, train_dataset=UnseededStream())
    told["stream"] = message(trainer.train)
    told["stream, evaluated"] = message(lambda: trainer.evaluate(UnseededStream()))
    trainer.model.mesh.close()
    trainer = make(directory, {}, UnseededSampler, train_dataset=counting())
    told["sampler"] = message(trainer.train)
    trainer.model.mesh.close()
    return told


def test_data_parallel_ranks_hold_the_same(pool: WorkerPool, checkpoint: str) -> None:
    first, second = pool.run(2, refused_over_dp, checkpoint)
    assert first == second
    assert "ranks 0 and 1 of different replicas read different samples" in first["random.shuffle"]
    assert "80 on rank 0; 79 on rank 1" in first["lengths"]
    assert first["entropy"] == "nothing was raised"  # each crops its own samples
    for name, where in {
        "stream": "optimizer step 1",
        "sampler": "optimizer step 1",
        "stream, evaluated": "Evaluation",
    }.items():
        assert where in first[name] and "ranks 0 and 1 of different replicas read the data in" in first[name], first[
            name
        ]


# ---- what must keep working ----


class Prepared(NanotronTrainer):
    """The tutorials' override."""

    def get_train_dataloader(self) -> DataLoader:
        return self.accelerator.prepare(_plain_loader(self.train_dataset))

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        return self.accelerator.prepare(_short_loader())


class StockPrepared(Trainer):
    def get_train_dataloader(self) -> DataLoader:
        return self.accelerator.prepare(_plain_loader(self.train_dataset))

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        return self.accelerator.prepare(_short_loader())


def _short_loader() -> DataLoader:
    """Its last batch has one sample of seven, and weighs as one."""
    return DataLoader(counting(7), 2, collate_fn=pad_batch)  # type: ignore[arg-type]


def _plain_loader(dataset: Any) -> DataLoader:
    return DataLoader(dataset, 2, shuffle=True, collate_fn=pad_batch)


def seeded_rows() -> Any:
    return counting().shuffle(seed=3)


FINE: dict[str, tuple[type, type, Callable[[], Any], dict[str, Any]]] = {
    "seeded": (NanotronTrainer, Trainer, seeded_rows, {"data_seed": 7}),
    "crops": (NanotronTrainer, Trainer, partial(Crops, from_torch), {"data_seed": 7, "eval_strategy": "steps"}),
    "crops in a worker": (
        NanotronTrainer,
        Trainer,
        partial(Crops, from_torch),
        {"data_seed": 7, "eval_strategy": "steps", "dataloader_num_workers": 1},
    ),
    "stream": (NanotronTrainer, Trainer, lambda: counting().to_iterable_dataset().shuffle(seed=3, buffer_size=9), {}),
    "set_epoch": (NanotronTrainer, Trainer, Epochs, {"data_seed": 7}),
    "prepared": (Prepared, StockPrepared, counting, {}),
}


def worked(directory: str, sizes: dict[str, Any], stock: bool) -> dict[str, list[float]]:
    told = {}
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # may have data workers
    for name, (ours, stocks, data, more) in FINE.items():
        history = History()
        if "dataloader_num_workers" in more:
            more = {**more, "dataloader_multiprocessing_context": "fork"}
        given = {"max_steps": 4, "eval_steps": 2, **more}
        if stock:
            values = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, **given}
            trainer: Any = stocks(
                model=StockAuto.from_pretrained(directory),
                args=TrainingArguments(**training_arguments(**values)),
                data_collator=pad_batch,
                train_dataset=data(),
                eval_dataset=data(),
                callbacks=[history],
            )
        else:
            trainer = make(
                directory, sizes, ours, train_dataset=data(), eval_dataset=data(), callbacks=[history], **given
            )
        trainer.train()
        told[name] = [*history.losses, trainer.evaluate()["eval_loss"]]
        if not stock:
            trainer.model.mesh.close()
    return told


def test_what_ranks_can_agree_on_trains_as_in_one_process(
    pool: WorkerPool, checkpoint: str, pytestconfig: pytest.Config
) -> None:
    wanted = pool.run(1, worked, checkpoint, {}, True)[0]
    for topology in ("tp2", "pp2") if pytestconfig.getoption("full_matrix") else ("tp2",):
        for got in pool.run(2, worked, checkpoint, TOPOLOGIES[topology], False):
            for name, losses in wanted.items():
                assert len(losses) == 5  # of four steps, and of the evaluation
                assert got[name] == pytest.approx(losses, abs=2e-4), (topology, name)


# ---- a resume ----


def resumed(directory: str, output: str) -> list[str]:
    """Trains with one order, then goes on with others."""
    ENTROPY.seed(0)
    data = counting().shuffle(seed=1)
    steps = {"save_strategy": "steps", "save_steps": 2, "output_dir": output}
    make(directory, {}, train_dataset=data, max_steps=2, **steps).train()
    last, told = f"{output}/checkpoint-2", []
    for other, more in (
        (counting().shuffle(seed=1), {}),
        (counting().shuffle(seed=2), {}),
        (counting().shuffle(seed=2), {"ignore_data_skip": True}),
    ):
        trainer = make(directory, {}, train_dataset=other, max_steps=3, output_dir=tempfile.mkdtemp(), **more)
        told.append(message(lambda trainer=trainer: trainer.train(resume_from_checkpoint=last)))
    streams = [counting().to_iterable_dataset(), counting().shuffle(seed=2).to_iterable_dataset()]
    make(directory, {}, train_dataset=streams[0], max_steps=2, **{**steps, "output_dir": f"{output}/stream"}).train()
    for stream in streams:
        trainer = make(directory, {}, train_dataset=stream, max_steps=3, output_dir=tempfile.mkdtemp())
        told.append(message(lambda t=trainer: t.train(resume_from_checkpoint=f"{output}/stream/checkpoint-2")))
    entropy = {**steps, "output_dir": f"{output}/entropy"}
    make(directory, {}, train_dataset=Crops(from_entropy), max_steps=2, **entropy).train()
    trainer = make(directory, {}, train_dataset=Crops(from_entropy), max_steps=3, output_dir=tempfile.mkdtemp())
    told.append(message(lambda: trainer.train(resume_from_checkpoint=f"{output}/entropy/checkpoint-2")))
    return told


def test_a_resume_over_other_samples_is_refused(pool: WorkerPool, checkpoint: str, tmp_path: Path) -> None:
    same, other, anew, stream, other_stream, entropy = pool.run(1, resumed, checkpoint, str(tmp_path))[0]
    assert {same, anew, stream, entropy} == {"nothing was raised"}
    for told in (other, other_stream):
        assert "differ from those of the checkpoint" in told and "ignore_data_skip=True" in told


def train_crops(directory: str, output: str, sizes: dict[str, Any], resume: bool) -> list[float]:
    """Data-parallel ranks draw different numbers of crops: their generators part."""
    history = History()
    steps = {"save_strategy": "steps", "save_steps": 3, "output_dir": output} if not resume else {}
    trainer = make(
        directory, sizes, train_dataset=Crops(from_torch), callbacks=[history], max_steps=5,
        per_device_train_batch_size=1, gradient_accumulation_steps=2, **steps,
    )  # fmt: skip
    if torch.distributed.get_rank() == 1 and not resume:
        torch.rand(3)
    trainer.train(resume_from_checkpoint=f"{output}/checkpoint-3" if resume else None)
    trainer.model.mesh.close()
    return history.losses


def test_ranks_of_a_replica_go_on_with_one_generator(pool: WorkerPool, checkpoint: str, tmp_path: Path) -> None:
    pool.run(2, train_crops, checkpoint, str(tmp_path), {}, False)
    one, two = pool.run(2, train_crops, checkpoint, str(tmp_path), {"tp_size": 2}, True)
    assert one == two and len(one) >= 2


class Failing(TorchDataset):
    """Cannot be read on one rank, from a sample on."""

    def __init__(self, rank: int) -> None:
        self.rows, self.rank = counting(), rank

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        if index == 9 and self.rank == 1:
            raise OSError("the disk is gone")
        return self.rows[index]


class Ending(torch.utils.data.IterableDataset):
    """A stream that ends earlier on one rank."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __iter__(self) -> Any:
        return iter(counting().select(range(self.samples)))


def broken(directory: str, sizes: dict[str, Any]) -> list[str]:
    rank, told = torch.distributed.get_rank(), []
    for data in (Failing(rank), Ending(12 - 6 * rank)):
        trainer = make(directory, sizes, train_dataset=data, train_sampling_strategy="sequential")
        try:
            trainer.train()
        except Exception as error:
            told.append(f"{type(error).__name__}: {error}")
        if isinstance(data, Ending):
            told.append(message(lambda t=trainer, d=data: t.evaluate(d)))
        trainer.model.mesh.close()
    return told


@pytest.mark.parametrize("topology", ["tp2", "pp2"])
def test_a_rank_that_reads_nothing_more_is_told_of(pool: WorkerPool, checkpoint: str, topology: str) -> None:
    whole, failing = pool.run(2, broken, checkpoint, TOPOLOGIES[topology])
    assert whole[0] == "RuntimeError: optimizer step 2: reading the data failed on rank 1: OSError: the disk is gone"
    assert failing[0] == "OSError: the disk is gone"
    assert whole[1:] == failing[1:]
    said = "optimizer step 2: ranks 0 and 1 of one replica (ranks 0, 1) read different samples: 2 micro-batches and 1"
    assert said in whole[1]
    assert "Evaluation, batch 1: ranks 0 and 1 of one replica" in whole[2]
