"""A resumed run goes on with the next sample, whatever the sizes of the run before: none comes twice, none is left out.

Every sample carries its number (see test_data_order), and what `training_step` is given is written down. The samples
before the checkpoint and after the resume, in the order of one process, are those of the uninterrupted run.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset, concatenate_datasets, interleave_datasets, load_dataset
from pool import WorkerPool
from test_data_order import SAMPLES, Steps, checkpoint, merged, numbered, parallel_maker, samples_of
from tiny import pad_batch, training_arguments
from torch.utils.data import SequentialSampler
from transformers import TrainerControl, TrainerState

from hf_nanotron import NanotronTrainingArguments
from hf_nanotron.data.cursor import Cursor, EpochShape, resume_at, why_not_resumable
from hf_nanotron.data.dealing import Position
from hf_nanotron.data.loader import build_loader
from hf_nanotron.parallel.config import ParallelConfig
from hf_nanotron.parallel.mesh import ParallelMesh
from hf_nanotron.training.data_order import DataOrder
from hf_nanotron.training.loaders import make_loader

# ---- the arithmetic ----


def play(shape: EpochShape, start: int, steps: int) -> int:
    """Where an epoch is after some steps from sample `start`."""
    if steps == shape.steps(start):
        return shape.samples
    return start + steps * shape.global_batch


SHAPES = [(1, 1, 4), (4, 1, 1), (1, 2, 2), (3, 1, 1), (2, 3, 1), (5, 2, 2)]


@pytest.mark.parametrize("epochs", [1, 2, 2.5, 3])
@pytest.mark.parametrize("samples", [1, 8, 11, 23])
def test_the_rest_takes_the_steps_of_an_uninterrupted_run(samples: int, epochs: float) -> None:
    for sizes in SHAPES:
        shape = EpochShape(samples, *sizes, False)
        total = -(-epochs * shape.steps() // 1)
        for epoch, step in itertools.product(range(int(epochs)), range(1, shape.steps() + 1)):
            done = epoch * shape.steps() + step
            over = step == shape.steps()
            cursor = Cursor(done, epoch + over, 0 if over else step * shape.global_batch, {})
            rest = resume_at(cursor, shape, epochs, -1)
            assert rest.max_steps == total, "equal sizes"
            by_steps = resume_at(cursor, shape, 99, int(total))
            assert (by_steps.max_steps, by_steps.num_train_epochs) == (total, rest.num_train_epochs)
            for other_sizes in SHAPES:
                other = EpochShape(samples, *other_sizes, False)
                rest = resume_at(cursor, other, epochs, -1)
                # The loop of Trainer: epochs until the last step.
                epoch_now, at, left = rest.epoch, rest.samples, rest.max_steps - done
                seen = epoch_now * samples + at
                while left:
                    assert epoch_now < rest.num_train_epochs
                    steps = min(left, other.steps(at))
                    seen, left = epoch_now * samples + play(other, at, steps), left - steps
                    epoch_now, at = epoch_now + 1, 0
                wanted = epochs * samples
                if epochs == int(epochs):
                    assert seen == wanted
                else:
                    assert wanted <= seen < wanted + max(shape.global_batch, 2 * other.global_batch)


def test_what_drop_last_leaves_out_is_not_waited_for() -> None:
    shape = EpochShape(11, 2, 2, 1, True)
    assert (shape.rounds(), shape.steps(), shape.rounds(10)) == (3, 3, 0)
    rest = resume_at(Cursor(10, 0, 10, {}), shape, 2, -1)
    assert (rest.epoch, rest.samples, rest.max_steps, rest.num_train_epochs) == (1, 0, 13, 2)
    assert resume_at(Cursor(6, 2, 0, {}), shape, 2, -1).num_train_epochs == 2, "nothing is left"


def test_another_order_is_refused() -> None:
    cursor = Cursor(1, 0, 4, {"kind": "random", "samples": 11, "data_seed": 7, "group": None})
    cursor.check({**cursor.order, "group": 8})
    with pytest.raises(ValueError, match="samples=11, data_seed=7, but.*samples=12, data_seed=8.*ignore_data_skip"):
        cursor.check({**cursor.order, "samples": 12, "data_seed": 8})


# ---- the loader ----


def loader(dataset: Any, dp_rank: int = 0, dp_size: int = 1, batch_size: int = 1, workers: int = 0) -> Any:
    sampler = None if isinstance(dataset, torch.utils.data.IterableDataset) else SequentialSampler(dataset)
    return build_loader(dataset, sampler, pad_batch, batch_size, dp_rank, dp_size, False, 0, True, num_workers=workers)


def ids(batches: Any) -> list[int]:
    return [sample for batch in batches for sample in samples_of(batch)]


class Guarded(torch.utils.data.Dataset):
    """Does not let the first samples be read."""

    def __init__(self, rows: Dataset, first: int) -> None:
        self.rows, self.first = rows, first

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        assert index >= self.first, f"sample {index} was read"
        return self.rows[index]


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_samples_are_not_read(workers: int) -> None:
    batches = loader(Guarded(numbered(), 5), 0, 2, 2, workers)
    batches.start_at(Position(5))
    assert ids(batches) == [5, 6, 9, 10]
    assert batches.position == Position(SAMPLES) and batches.is_finished
    with pytest.raises(AssertionError, match="sample 0 was read"):  # the next epoch begins at the beginning
        list(batches)


def rows_by(factor: int) -> Dataset:
    return numbered().select(range(factor, SAMPLES))


def double(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {name: [value for value in values for _ in range(2)] for name, values in rows.items()}


def sharded() -> IterableDataset:
    return numbered().to_iterable_dataset(num_shards=3)


STREAMS: dict[str, Any] = {
    "shards": sharded,
    "torch format": lambda: sharded().with_format("torch"),
    "map": lambda: sharded().map(lambda row: {"labels": row["input_ids"]}),
    "map batches": lambda: sharded().map(double, batched=True, batch_size=3),
    "filter": lambda: sharded().filter(lambda row: row["input_ids"][0] % 3 != 0),
    "skip, take": lambda: sharded().skip(2).take(7),
    "repeat": lambda: sharded().take(4).repeat(2),
    "concatenate": lambda: concatenate_datasets([sharded(), sharded().take(3)]),
    "in turn": lambda: interleave_datasets([sharded(), rows_by(6).to_iterable_dataset()]),
    "by chance": lambda: interleave_datasets([sharded(), rows_by(6).to_iterable_dataset()], [0.7, 0.3], seed=3),
    "shuffled shards": lambda: sharded().shuffle(seed=4, buffer_size=1),
}


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_goes_on_behind_any_sample(name: str) -> None:
    for epoch in (0, 1):
        whole = loader(STREAMS[name]())
        whole.set_epoch(epoch)
        seen, states = [], []
        for batch in whole:
            seen += samples_of(batch)
            states.append(json.loads(json.dumps(whole.position)))
        assert [samples for samples, _ in states] == list(range(1, len(seen) + 1))
        rest = loader(STREAMS[name]())
        rest.set_epoch(epoch)
        for samples, state in states:
            rest.start_at(Position(samples, state))
            assert ids(rest) == seen[samples:], samples
        assert ids(rest) == seen, "the user's stream itself has no state"


@pytest.mark.parametrize("workers", [(1, 0), (0, 1), (1, 1)])
def test_the_state_of_a_stream_in_a_worker(workers: tuple[int, int]) -> None:
    """It is that of the batch handed out, not of what the worker has read ahead."""
    before, after = workers
    for name in ("shards", "by chance", "shuffled shards"):
        whole = loader(STREAMS[name](), 1, 2, 1, before)
        whole.set_epoch(1)
        batches = iter(whole)
        next(batches), next(batches)
        assert not whole.is_finished and whole.position.samples == 4
        rest = loader(STREAMS[name](), 0, 1, 3, after)
        rest.set_epoch(1)
        rest.start_at(whole.position)
        twin = loader(STREAMS[name]())
        twin.set_epoch(1)
        if name != "by chance" or before == after == 0:
            assert ids(rest) == ids(twin)[4:]
        else:  # chance differs in a worker; what matters is that of the run before
            whole = loader(STREAMS[name](), workers=before)
            whole.set_epoch(1)
            assert ids(rest) == ids(whole)[4:]


def test_streams_that_cannot_be_resumed() -> None:
    assert "no state_dict" in str(why_not_resumable(Stateless(numbered())))
    for stream in (sharded().shuffle(buffer_size=4), sharded().shuffle(buffer_size=4).map(double, batched=True)):
        assert "buffer_size=4" in str(why_not_resumable(stream))
    assert "buffer_size=5" in str(why_not_resumable(interleave_datasets([sharded(), sharded().shuffle(buffer_size=5)])))


# ---- runs ----


class Countable(torch.utils.data.IterableDataset):
    """A stream of torch's own with a state."""

    def __init__(self, rows: Dataset) -> None:
        self.rows, self.begin, self.next, self.epoch = rows, 0, 0, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.begin = state["next"]

    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(self.epoch)).tolist()
        for number in range(self.begin, len(order)):
            self.next = number + 1
            yield self.rows[order[number]]


class Stateless(Countable):
    load_state_dict = None  # type: ignore[assignment]


def data(kind: str, directory: str) -> Any:
    if kind == "json":
        files = [str(Path(directory, f"{number}.jsonl")) for number in range(3)]
        return load_dataset("json", data_files=files, split="train", streaming=True)
    if kind == "buffer":
        return sharded().shuffle(seed=1, buffer_size=4)
    if kind == "longer":
        return numbered(SAMPLES + 1)
    return {"rows": numbered, "memory": STREAMS["map"], "torch": lambda: Countable(numbered())}.get(
        kind, lambda: Stateless(numbered())
    )()


def size(dp: int, batch: int, window: int, workers: int = 0, **sizes: Any) -> dict[str, Any]:
    """A global batch of dp * batch * window."""
    return {
        "dp": dp,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": window,
        "dataloader_num_workers": workers,
        # A rank of the pool would ask its fork server, which imports everything again.
        "dataloader_multiprocessing_context": "fork" if workers else None,
        **sizes,
    }


EPOCHS = {"max_steps": -1, "num_train_epochs": 3}
GROUPED = {**EPOCHS, "train_sampling_strategy": "group_by_length"}
# Name -> data, arguments, sizes before, the step saved, sizes after. 11 samples are 3 steps with a global batch of 4.
RUNS: dict[str, tuple[str, dict[str, Any], dict[str, Any], int, list[dict[str, Any]]]] = {
    "random": (
        "rows",
        EPOCHS,
        size(2, 1, 2),
        4,
        [size(1, 4, 1, 2), size(4, 1, 1), size(1, 2, 2, pp_size=2), size(2, 3, 1)],
    ),
    "end of epoch": ("rows", EPOCHS, size(1, 4, 1), 6, [size(2, 2, 1), size(1, 5, 1)]),
    "sequential": (
        "rows",
        {"max_steps": 7, "train_sampling_strategy": "sequential"},
        size(1, 2, 2, 2),
        5,
        [size(2, 1, 2), size(1, 1, 4)],
    ),
    "by length": ("rows", GROUPED, size(2, 1, 2), 4, [size(4, 1, 1), size(1, 3, 1)]),
    "drop_last": ("rows", {**EPOCHS, "dataloader_drop_last": True}, size(2, 2, 1), 5, [size(1, 2, 2)]),
    "json": ("json", {"max_steps": 7}, size(2, 1, 2), 5, [size(1, 4, 1, 1), size(4, 1, 1), size(1, 3, 1)]),
    "memory": ("memory", {"max_steps": 6}, size(1, 2, 2, 1), 2, [size(2, 2, 1)]),
    "torch": ("torch", {"max_steps": 7}, size(1, 1, 4), 2, [size(2, 1, 2, 1), size(1, 1, 4)]),
}


def world(sizes: dict[str, Any]) -> int:
    return sizes["dp"] * sizes.get("tp_size", 1) * sizes.get("pp_size", 1)


def global_batch(sizes: dict[str, Any]) -> int:
    return sizes["dp"] * sizes["per_device_train_batch_size"] * sizes["gradient_accumulation_steps"]


Result = tuple[Steps, list[float], int, float]


def train(directory: str, name: str, sizes: dict[str, Any], resume: bool, kind: str = "", **more: Any) -> Result:
    """The samples of this rank by step, the epoch at the end of each, the number of the last step, and the loss."""
    default, arguments, _, step, _ = RUNS[name]
    output = f"{directory}/{name}"
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # may have data workers
    saving = {} if resume else {"save_strategy": "steps", "save_steps": step, "save_total_limit": None}
    sizes = {key: value for key, value in sizes.items() if key != "dp"}
    trainer = parallel_maker(f"{directory}/model", sizes)(
        {"output_dir": output, **arguments, **saving, **more},
        train_dataset=data(kind or default, directory),
        data_collator=pad_batch,
    )
    trainer.train(resume_from_checkpoint=f"{output}/checkpoint-{step}" if resume else None)
    history = [entry for entry in trainer.state.log_history if not resume or entry["step"] > step]
    logs = [entry["epoch"] for entry in history if "loss" in entry]
    loss = history[-1]["train_loss"]
    return trainer.seen, logs, trainer.state.global_step, loss


def train_all(directory: str, jobs: list[tuple[Any, ...]]) -> list[Result]:
    return [train(directory, *job) for job in jobs]


def run_all(pool: WorkerPool, directory: Path, jobs: list[tuple[Any, ...]]) -> list[list[Result]]:
    """Jobs of one number of ranks together. Results of the data-parallel ranks of the first stage, by job."""
    results: dict[int, list[Result]] = {}
    for ranks in sorted({world(job[1]) for job in jobs}):
        numbers = [number for number, job in enumerate(jobs) if world(job[1]) == ranks]
        told = pool.run(ranks, train_all, str(directory), [jobs[number] for number in numbers])
        for place, number in enumerate(numbers):
            results[number] = [told[replica][place] for replica in range(jobs[number][1]["dp"])]
    return [results[number] for number in range(len(jobs))]


def by_step(results: list[Result]) -> dict[int, list[int]]:
    steps = merged([seen for seen, *_ in results])
    return {step: [sample for batch in batches for sample in batch] for step, batches in steps.items()}


def joined(steps: dict[int, list[int]]) -> list[int]:
    return [sample for step in sorted(steps) for sample in steps[step]]


@pytest.fixture(scope="module")
def saved(pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Result]]]:
    """The uninterrupted runs, each with a checkpoint."""
    directory = tmp_path_factory.mktemp("runs")
    Path(directory, "model").symlink_to(checkpoint())
    rows = numbered().to_list()
    for number in range(3):
        lines = [json.dumps(row) + "\n" for row in rows[4 * number : 4 * number + 4]]
        Path(directory, f"{number}.jsonl").write_text("".join(lines))
    jobs = [(name, sizes, False) for name, (_, _, sizes, _, _) in RUNS.items()]
    return directory, dict(zip(RUNS, run_all(pool, directory, jobs), strict=True))


def test_a_resumed_run_goes_on_with_the_next_sample(pool: WorkerPool, saved: Any) -> None:
    directory, whole = saved
    jobs = [(name, sizes, True) for name, (*_, others) in RUNS.items() for sizes in others]
    for (name, sizes, _), results in zip(jobs, run_all(pool, directory, jobs), strict=True):
        kind, arguments, before, step, _ = RUNS[name]
        wanted, got = by_step(whole[name]), by_step(results)
        rest = {number: samples for number, samples in wanted.items() if number >= step}
        _, epochs, last, loss = results[0]
        assert min(got) == step, name
        assert epochs == sorted(epochs) and epochs[0] > whole[name][0][1][step - 1], (name, epochs)
        assert 1 < loss < 20
        if global_batch(sizes) == global_batch(before) and name != "torch":
            assert got == rest, (name, sizes)
            assert epochs == pytest.approx(whole[name][0][1][step:], abs=0.2), name
        elif arguments["max_steps"] < 0:
            assert joined(got) == joined(rest), (name, sizes)
            assert epochs[-1] == 3 and last == step + len(got)
        else:  # a number of steps, not of samples
            common = min(len(joined(got)), len(joined(rest)))
            assert joined(got)[:common] == joined(rest)[:common] and common >= 4, (name, sizes)
            assert last == arguments["max_steps"]


REFUSALS = [
    ("random", {}, "longer", "samples=11, but this run has samples=12"),
    ("random", {"data_seed": 8}, "", "data_seed=7, but this run has data_seed=8"),
    ("random", {"train_sampling_strategy": "sequential"}, "", "kind='random'"),
    ("memory", {}, "buffer", "epoch 0 after sample 8: the stream has a shuffle buffer"),
    ("torch", {}, "stateless", "epoch 0 after sample 8: the stream .* has no state_dict"),
    ("random", {}, "memory", "kind='random', samples=11, data_seed=7, but this run has kind='stream'"),
]


def refuse_all(directory: str) -> list[str]:
    told = []
    for name, more, kind, _ in REFUSALS:
        try:
            train(directory, name, size(1, 4, 1), True, kind, **{"max_steps": 8, **more})
            told.append("")
        except ValueError as error:
            told.append(str(error))
    return told


def test_data_that_cannot_be_continued_is_refused(pool: WorkerPool, saved: Any) -> None:
    for told, (*_, message) in zip(pool.run(1, refuse_all, str(saved[0]))[0], REFUSALS, strict=True):
        with pytest.raises(ValueError, match=message):
            raise ValueError(told)
        assert "ignore_data_skip=True" in told


def test_the_data_can_be_started_anew(pool: WorkerPool, saved: Any) -> None:
    jobs = [("torch", size(1, 4, 1), True, "stateless"), ("random", size(1, 4, 1), True, "")]
    results = pool.run(1, train_anew, str(saved[0]), jobs)[0]
    for (name, *_), (seen, *_) in zip(jobs, results, strict=True):
        whole = joined(by_step(saved[1][name]))
        epoch = whole[:SAMPLES] if name == "torch" else whole[SAMPLES : 2 * SAMPLES]
        assert joined(by_step([(seen, [], 0, 0.0)]))[:SAMPLES] == epoch


def train_anew(directory: str, jobs: list[tuple[Any, ...]]) -> list[Result]:
    return [train(directory, *job, ignore_data_skip=True) for job in jobs]


# ---- the order of a run, without a trainer ----


def begin(args: NanotronTrainingArguments, mesh: ParallelMesh, checkpoint: str | None) -> tuple[DataOrder, Any, Any]:
    """A run of 11 samples by windows of 4, its loader, and how many epochs and steps it has."""
    order, data = DataOrder(args), numbered()
    order.begin_run(checkpoint)
    sampler = order.train_sampler(data, lambda: 4)
    batches = make_loader(args, mesh, data, sampler, pad_batch, batch_size=2, is_training=True)
    order.compare(mesh, batches)
    return order, batches, order.plan(batches, data, batch_size=2, global_batch=4, epochs=2, max_steps=6)


def test_the_order_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cursor after a step, and what is left of the epoch for a run that goes on from it."""
    args = NanotronTrainingArguments(
        **training_arguments(output_dir=str(tmp_path), gradient_accumulation_steps=2, num_train_epochs=2, max_steps=-1)
    )
    mesh, state, control = ParallelMesh(ParallelConfig()), TrainerState(), TrainerControl()
    order, batches, planned = begin(args, mesh, None)
    assert planned == (2, 6) and order.progress(0, 0, state) == (0, 0)
    assert order.begin_epoch(batches, 0, 6, state, None) is None
    all_of_them, reading = ids(begin(args, mesh, None)[1]), iter(batches)
    assert ids([next(reading), next(reading)]) == all_of_them[:4]
    state.global_step = 1
    order.end_step(state)
    cursor = order.cursor(control, numbered())
    assert cursor is not None and (cursor["step"], cursor["epoch"], cursor["samples"]) == (1, 0, 4)
    assert state.epoch == pytest.approx(2 / 6) and order.rng_to_restore() is None
    control.should_epoch_stop = True
    ended = order.cursor(control, numbered())
    assert ended is not None and (ended["epoch"], ended["samples"]) == (1, 0)

    state.save_to_json(str(tmp_path / "trainer_state.json"))
    monkeypatch.setattr("hf_nanotron.training.data_order.read_cursor", lambda _: Cursor(**cursor))
    order, batches, planned = begin(args, mesh, str(tmp_path))
    assert planned == (2, 6) and order.progress(7, 7, state) == (0, 2)
    rest = order.begin_epoch(batches, 0, 6, state, str(tmp_path))
    assert rest is not None and (rest.samples, rest.rounds, rest.steps) == (4, 4, 2)
    assert ids(batches) == all_of_them[4:]
    assert order.rng_to_restore() == str(tmp_path) and order.rng_to_restore() is None
    assert order.begin_epoch(batches, 1, 6, state, str(tmp_path)) is None
