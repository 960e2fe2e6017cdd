"""Data: their order, loaders, streams, rows of several lengths, losses and what they are divided by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from contract import DP2, PP2, TP2, Kit, both, check_same, lines, ours, outcome, run
from pool import WorkerPool
from tiny import pad_batch, random_dataset
from torch.utils.data import Dataset as TorchDataset, IterableDataset, RandomSampler, WeightedRandomSampler
from transformers import default_data_collator, set_seed


class Seen:
    """A collator that notes the first token of each sample it is given."""

    def __init__(self) -> None:
        self.first: list[int] = []

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        self.first += [row["input_ids"][0] for row in rows]
        return pad_batch(rows)


def numbered(samples: int, length: int = 8) -> Any:
    rows = random_dataset(samples, length=length)
    return rows.map(lambda row, number: {"input_ids": [3 + number, *row["input_ids"][1:]]}, with_indices=True)


ORDERS: dict[str, dict[str, Any]] = {
    "shuffled": {},
    "another seed": {"data_seed": 4},
    "in order": {"train_sampling_strategy": "sequential"},
    "drop_last": {"dataloader_drop_last": True, "train": 7},
    "accumulation": {"gradient_accumulation_steps": 3},
}


def orders(kit: Kit) -> dict[str, Any]:
    said = {}
    for name, options in ORDERS.items():
        collate, rows = Seen(), numbered(options.get("train", 8))
        kit.trainer(data_collator=collate, num_train_epochs=2, **{**options, "train": rows}).train()
        said[name] = collate.first
    return said


def test_samples_come_in_the_order_of_stock(pool: WorkerPool, tmp_path: Path, more: bool) -> None:
    said = check_same(pool, orders, tmp_path, (TP2,) if more else ())
    assert said["shuffled"] != said["another seed"] and said["in order"] == [*range(3, 11)] * 2


WEIGHTS = [1.0 + number for number in range(8)]
SAMPLERS: dict[str, Any] = {
    "random": lambda rows: RandomSampler(rows),
    "random, a generator": lambda rows: RandomSampler(rows, generator=torch.Generator().manual_seed(5)),
    "weighted, a generator": lambda rows: WeightedRandomSampler(WEIGHTS, 8, generator=torch.Generator().manual_seed(5)),
    "weighted": lambda rows: WeightedRandomSampler(WEIGHTS, 8),
}


def with_samplers(kit: Kit) -> dict[str, list[int]]:
    """The first epoch, by samplers of a user."""
    said = {}
    for name, make in SAMPLERS.items():

        class Sampling(kit.Trainer):  # type: ignore[misc, name-defined]
            def _get_train_sampler(self, *args: Any, make: Any = make) -> Any:
                return make(self.train_dataset)

        collate = Seen()
        kit.trainer(base=Sampling, data_collator=collate, train=numbered(8), num_train_epochs=1).train()
        said[name] = collate.first
    return said


def test_samplers_of_users(pool: WorkerPool, tmp_path: Path) -> None:
    """In the first epoch as in stock, but for one that draws from the global generator: it could not be resumed."""
    stock, found = both(pool, with_samplers)
    assert {name for name in SAMPLERS if found[name] != stock[name]} <= {"weighted"}
    assert stock["random"] != stock["weighted, a generator"]


def resumed_sampler(kit: Kit) -> list[list[int]]:
    """Three epochs by a weighted sampler without a generator; the same again from the middle of the second."""

    class Sampling(kit.Trainer):  # type: ignore[misc, name-defined]
        def _get_train_sampler(self, *args: Any) -> Any:
            return WeightedRandomSampler(WEIGHTS, 8)

    seen = []
    for resumes in (None, str(kit.folder / "out" / "checkpoint-6")):
        collate = Seen()
        trainer = kit.trainer(
            base=Sampling,
            data_collator=collate,
            train=numbered(8),
            num_train_epochs=3,
            save_strategy="steps",
            save_steps=6,
        )
        torch.rand(3 if resumes else 0)  # what a script draws must not matter
        trainer.train(resume_from_checkpoint=resumes)
        seen.append(collate.first)
    return seen


def test_a_resume_with_a_sampler_of_a_user(pool: WorkerPool, tmp_path: Path) -> None:
    ((first, rest),) = pool.run(1, run, resumed_sampler, True, str(tmp_path), {})
    assert len(first) == 24 and rest == first[12:]


def by_length(kit: Kit) -> dict[str, Any]:
    """Batches of rows of similar lengths; the seed of their order."""
    said: dict[str, Any] = {}
    for name, data_seed, draws in (("one", 3, 0), ("one again", 3, 5), ("another", 4, 0)):
        collate = Lengths()
        rows = random_dataset(12, length=12, ragged=True)
        trainer = kit.trainer(
            data_collator=collate,
            train=rows,
            num_train_epochs=1,
            train_sampling_strategy="group_by_length",
            data_seed=data_seed,
        )
        set_seed(1)
        torch.rand(draws)
        trainer.train()
        said[name] = collate.lengths
    return said


class Lengths(Seen):
    """Notes the lengths of the rows of each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.lengths: list[list[int]] = []

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        self.lengths.append([len(row["input_ids"]) for row in rows])
        return super().__call__(rows)


def test_batches_by_length(pool: WorkerPool) -> None:
    """`data_seed` decides their order; stock draws it from the global generator, whatever `data_seed` says."""
    stock, found = both(pool, by_length)
    for said in (stock, found):
        assert max(map(max, said["one"])) == said["one"][0][0], "the longest row comes first"
        assert sorted(sum(said["one"], [])) == sorted(sum(said["another"], []))
    assert found["one"] == found["one again"] != found["another"]
    assert stock["one"] == stock["another"] != stock["one again"]


# ---- loaders ----


def loaders(kit: Kit) -> dict[str, Any]:
    said: dict[str, Any] = {}
    trainer = kit.trainer(train=7, evaluate=9, batch=4, eval_batch=2)
    said["lengths"] = [len(trainer.get_train_dataloader()), len(trainer.get_eval_dataloader())]
    said["examples"] = [trainer.num_examples(trainer.get_train_dataloader())]
    dropping = kit.trainer(train=7, evaluate=9, batch=4, eval_batch=2, dataloader_drop_last=True)
    said["drop_last"] = [len(dropping.get_train_dataloader()), len(dropping.get_eval_dataloader())]
    said["of another set"] = len(trainer.get_eval_dataloader(random_dataset(3, length=8)))
    said["test"] = len(trainer.get_test_dataloader(random_dataset(5, length=8)))
    first = next(iter(trainer.get_eval_dataloader()))
    said["batch"] = {name: value.sum() for name, value in first.items()}
    workers = kit.trainer(dataloader_num_workers=1, dataloader_persistent_workers=True)
    said["kept"] = workers.get_eval_dataloader() is workers.get_eval_dataloader()
    unkept = kit.trainer()
    said["not kept"] = unkept.get_eval_dataloader() is unkept.get_eval_dataloader()
    return said


def test_loaders(pool: WorkerPool, tmp_path: Path) -> None:
    said = check_same(pool, loaders, tmp_path)
    assert said["kept"] and not said["not kept"] and said["lengths"] == [2, 5]


def columns(kit: Kit) -> dict[str, Any]:
    rows = random_dataset(6, length=8).add_column("note", ["a"] * 6)
    removed = kit.trainer(train=rows, evaluate=rows, max_steps=1, data_collator=default_data_collator)
    kept = kit.trainer(
        train=rows,
        evaluate=rows,
        max_steps=1,
        remove_unused_columns=False,
        data_collator=with_note(default_data_collator),
    )
    own = kit.trainer(
        train=list(rows), max_steps=1, data_collator=default_data_collator
    )  # no columns: a collator removes
    said = {}
    for name, trainer in (("removed", removed), ("kept", kept), ("a list", own)):
        trainer.train()
        said[name] = lines(trainer)
    return said


def with_note(collate: Any) -> Any:
    def collated(rows: list[dict[str, Any]]) -> Any:
        assert all(row.pop("note") == "a" for row in rows)
        return collate(rows)

    return collated


def test_columns_that_no_model_takes(pool: WorkerPool, tmp_path: Path, more: bool) -> None:
    check_same(pool, columns, tmp_path, (DP2,) if more else ())


# ---- streams and rows of several lengths ----


class Stream(IterableDataset):
    """A stream without a length."""

    def __init__(self, rows: Any) -> None:
        self.rows = list(rows)

    def __iter__(self) -> Any:
        yield from self.rows


class Items(TorchDataset):
    """A data set with a length that is none of `datasets`."""

    def __init__(self, rows: Any) -> None:
        self.rows = list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Any:
        return self.rows[number]


def kinds_of_data(kit: Kit) -> dict[str, Any]:
    rows = random_dataset(6, length=8)
    ragged = random_dataset(8, length=12, ragged=True)
    kinds: dict[str, dict[str, Any]] = {
        "a stream": {"train": Stream(rows), "max_steps": 2},
        "a stream, several times": {"train": Stream(rows), "max_steps": 5},
        "a stream of datasets": {"train": rows.to_iterable_dataset(), "max_steps": 4},
        "items": {"train": Items(rows), "num_train_epochs": 1},
        "rows of several lengths": {"train": ragged, "num_train_epochs": 1, "gradient_accumulation_steps": 2},
    }
    said = {}
    for name, options in kinds.items():
        trainer = kit.trainer(**options)
        trainer.train()
        said[name] = lines(trainer)
        if name == "rows of several lengths":  # a rank fills up its own rows alone
            del said[name][-1]["total_flos"]
    return said


def test_kinds_of_data(pool: WorkerPool, tmp_path: Path, more: bool) -> None:
    check_same(pool, kinds_of_data, tmp_path, (DP2,) if more else ())


def loaders_of_users(kit: Kit) -> Any:
    """A `get_train_dataloader` of a subclass, which has no `dataset`."""

    class Twice:
        def __init__(self, loader: Any) -> None:
            self.loader = loader

        def __len__(self) -> int:
            return 2 * len(self.loader)

        def __iter__(self) -> Any:
            yield from self.loader
            yield from self.loader

    class OwnLoader(kit.Trainer):  # type: ignore[misc, name-defined]
        def get_train_dataloader(self) -> Any:
            return Twice(super().get_train_dataloader())

        def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
            return Twice(super().get_eval_dataloader(eval_dataset))

    trainer = kit.trainer(base=OwnLoader, num_train_epochs=1, train_sampling_strategy="sequential")
    trainer.train()
    return [lines(trainer), trainer.evaluate()["eval_loss"]]


def test_loaders_of_users(pool: WorkerPool, tmp_path: Path) -> None:
    log, _ = check_same(pool, loaders_of_users, tmp_path)
    assert log[-1]["step"] == 8


# ---- losses ----


def token_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    logits = outputs["logits"][:, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    return losses / (num_items_in_batch if num_items_in_batch is not None else (labels[:, 1:] != -100).sum())


def losses(kit: Kit) -> dict[str, Any]:
    runs: dict[str, dict[str, Any]] = {
        "one batch": {"batch": 4},
        "the same in micro-batches": {"batch": 2, "gradient_accumulation_steps": 2},
        "a function": {"compute_loss_func": token_loss, "gradient_accumulation_steps": 2},
        "smoothed": {"label_smoothing_factor": 0.2, "gradient_accumulation_steps": 2},
        "clipped": {"max_grad_norm": 0.1},
        "not clipped": {"max_grad_norm": 0.0},
        "recomputed": {"activation_checkpointing": True},
        "tokens seen": {"include_num_input_tokens_seen": "all"},
        "tokens seen without padding": {"include_num_input_tokens_seen": "non_padding", "processing_class": "words"},
        "flos": {},
    }
    said = {}
    for name, options in runs.items():
        if options.get("processing_class"):
            from test_cli import tokenizer

            options = {**options, "processing_class": tokenizer()}
        trainer = kit.trainer(
            train=random_dataset(8, length=10), max_steps=2, train_sampling_strategy="sequential", **options
        )
        trainer.train()
        said[name] = lines(trainer)
    return said


def test_losses(pool: WorkerPool, tmp_path: Path, more: bool) -> None:
    """(By default `test_parity.py` and `test_custom_loss.py` have ranks.)"""
    said = check_same(pool, losses, tmp_path, (TP2,) if more else ())
    whole, parts, own = (said[name][0] for name in ("one batch", "the same in micro-batches", "a function"))
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-5) and own["loss"] == pytest.approx(
        whole["loss"], rel=1e-5
    )
    assert said["tokens seen"][1]["num_input_tokens_seen"] == 40


def overridden_loss(kit: Kit) -> Any:
    """`compute_loss` of a subclass, with the outputs."""

    class Own(kit.Trainer):  # type: ignore[misc, name-defined]
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            labels = inputs["labels"]
            outputs = model(input_ids=inputs["input_ids"])
            loss = 2 * token_loss(outputs, labels, num_items_in_batch)
            return (loss, outputs) if return_outputs else loss

    options = {"compute_metrics": lambda p: {"shape": list(p.predictions.shape)}, "gradient_accumulation_steps": 2}
    trainer = kit.trainer(base=Own, max_steps=2, **options)
    trainer.train()
    return [lines(trainer), trainer.evaluate()["eval_loss"]]


def test_an_overridden_loss(pool: WorkerPool, tmp_path: Path, more: bool) -> None:
    check_same(pool, overridden_loss, tmp_path, (TP2,) if more else ())
    first = pool_error(pool, overridden_loss, tmp_path / "pp")
    assert "compute_loss_func" in first


def pool_error(pool: WorkerPool, scenario: Any, folder: Path) -> str:
    return ours(pool, refusal(scenario), folder, PP2)[0]


class refusal:
    """What a scenario that is refused says; a class, so that it can be sent to other processes."""

    def __init__(self, scenario: Any) -> None:
        self.scenario = scenario

    def __call__(self, kit: Kit) -> str:
        from contract import said

        return said(lambda: self.scenario(kit))


def no_labels(kit: Kit) -> str:
    rows = random_dataset(4, length=8).remove_columns("labels")
    return outcome(lambda: kit.trainer(train=rows, max_steps=1, data_collator=default_data_collator).train())


def test_rows_without_labels_end_with_an_error(pool: WorkerPool) -> None:
    stock, found = both(pool, no_labels)
    assert stock == found == "ValueError"


# ---- seeds ----


def seeds(kit: Kit) -> dict[str, Any]:
    """The order and the losses of runs, whatever was drawn before; `later` is a seed that a script sets itself."""
    said = {}
    for name, seed, later in (("one", 1, None), ("one again", 1, None), ("two", 2, None), ("one, reseeded", 1, 9)):
        collate = Seen()
        trainer = kit.trainer(data_collator=collate, data_seed=None, num_train_epochs=1, train=numbered(8), seed=seed)
        if later is not None:
            set_seed(later)
        torch.rand(5 if name == "one again" else 0)
        trainer.train()
        said[name] = [collate.first, [line["loss"] for line in lines(trainer) if "loss" in line]]
    return said


def test_runs_of_a_seed_are_the_same(pool: WorkerPool) -> None:
    """Bit by bit, and with `data_seed=None` in the order of stock, unless the script seeds torch after the trainer."""
    stock, found = both(pool, seeds)
    assert found["one"] == found["one again"] == found["one, reseeded"] and found["one"] != found["two"]
    assert [found[name][0] for name in ("one", "two")] == [stock[name][0] for name in ("one", "two")]
    assert stock["one, reseeded"][0] != stock["one"][0]


# ---- noise ----


def noisy(kit: Kit) -> dict[str, Any]:
    said = {}
    for name, options in (
        ("plain", {}),
        ("noise", {"neftune_noise_alpha": 5.0}),
        ("again", {"neftune_noise_alpha": 5.0}),
    ):
        trainer = kit.trainer(max_steps=2, **options)
        trainer.train()
        weight = trainer.model.get_input_embeddings()
        said[name] = [lines(trainer)[0]["loss"], len(weight._forward_hooks)]
        evaluated = [trainer.evaluate()["eval_loss"] for _ in range(2)]
        assert evaluated[0] == evaluated[1]
    return said


def test_noise_on_embeddings(pool: WorkerPool, tmp_path: Path, more: bool) -> None:
    """Noise is added while a run goes on, and none is left behind."""
    stock, found = both(pool, noisy)
    for said in (stock, found):
        assert said["noise"][0] != said["plain"][0] and said["noise"][1] == said["plain"][1]
    assert found["noise"] == found["again"]
    if more:
        assert ours(pool, noisy, tmp_path, TP2)[0]["noise"][0] == pytest.approx(found["noise"][0], rel=1e-5)
