"""A run over data that brings its order, killed and resumed anywhere, with other sizes, weights and stages.

Whatever the sizes, steps train on the rows of one process that was never stopped, in its order. Here without a model;
test_ordered_training does the same through the trainer.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hf_nanotron.data import Mixture, Stage, Stages
from hf_nanotron.data.cursor import Cursor
from hf_nanotron.data.dealing import FillerBatch
from hf_nanotron.data.loader import build_loader
from hf_nanotron.data.tokens import blend
from hf_nanotron.training.run_order import RunOrder, data_state

RUNS = 1_000
STEPS = 10
BATCHES = (2, 4, 6, 8, 12)
NAMES = ("web", "code", "math")


class Set:
    """A set whose rows are their own numbers; its order in an epoch is turned by the epoch."""

    columns = ("input_ids",)
    sequence_length = 1

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def rows(self, places: Any, epoch: int) -> dict[str, np.ndarray]:
        return {"input_ids": (np.asarray(places)[:, None] + 7 * epoch) % self.length}


SETS = {name: Set(length) for name, length in zip(NAMES, (13, 200, 31), strict=True)}


def mixture(rng: np.random.Generator, **options: Any) -> Mixture:
    names = [name for name in NAMES if rng.random() < 0.8] or ["web"]
    weights = [float(rng.uniform(0.1, 1)) for _ in names]
    return Mixture({name: SETS[name] for name in names}, weights, max_epochs=None, **options)


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    return {"rows": [(int(row["domain"]), int(row["input_ids"])) for row in rows]}


def sizes(rng: np.random.Generator, batch: int) -> tuple[int, int]:
    """Data-parallel size and micro-batch that make up this global batch."""
    found = [(dp, micro) for dp in (1, 2, 3, 4) for micro in (1, 2, 3) if batch % (dp * micro) == 0]
    return found[int(rng.integers(len(found)))]


def train(
    dataset: Any, batch: int, split: tuple[int, int], cursor: Cursor | None, until: int, workers: int = 0, **given: Any
) -> tuple[list[list[tuple[str, int]]], Cursor]:
    """The rows of each step up to step `until`, in the order of one process, and the cursor of a checkpoint there."""
    dp, micro = split
    values = {"max_steps": STEPS, "num_train_epochs": 1, "dataloader_drop_last": False, "accept_changed_data": False}
    parallel = SimpleNamespace(check_micro_batches=lambda number: None)
    rounds = batch // dp // micro
    args: Any = SimpleNamespace(
        gradient_accumulation_steps=rounds, parallel=parallel, full_dp_size=dp, **values | given
    )
    run = RunOrder(args, dataset, cursor, 0, rounds * dp)
    run.resume(compares_times=True)
    run.plan(micro, dp)
    steps: list[list[tuple[str, int]]] = []
    step, samples = run.step, run.begin
    options = {"num_workers": workers, "persistent_workers": True} if workers else {}
    loaders = [
        build_loader(run.dataset, run.sampler, collate, micro, r, dp, False, 0, True, **options) for r in range(dp)
    ]
    for number in run.legs:
        rest = run.begin_epoch(number, samples, False)
        for loader in loaders:
            loader.set_epoch(number)
        readers = [iter(loader) for loader in loaders]
        for done in range(min(rest.steps, until - step)):
            rounds = min(args.gradient_accumulation_steps, rest.rounds - done * args.gradient_accumulation_steps)
            batches = [next(reader) for _ in range(rounds) for reader in readers]
            rows = [row for each in batches if not isinstance(each, FillerBatch) for row in each["rows"]]
            steps.append([(run.dataset.names[domain], row) for domain, row in rows])
            samples = run.legs[number].first + loaders[0].position.samples
        step = run.step + len(steps)
        if step == until:
            break
    state = json.loads(json.dumps(data_state(run.dataset, samples)))
    return steps, Cursor(step, number, samples, run.order, state)


def flat(steps: list[list[Any]]) -> list[Any]:
    return [row for step in steps for row in step]


def follows_each_set(rows: list[tuple[str, int]]) -> bool:
    """Whether each set gives its rows in the order of its epochs, none twice in an epoch and none left out."""
    for name in NAMES:
        found = [row for other, row in rows if other == name]
        length = len(SETS[name])
        if found != [(n % length + 7 * (n // length)) % length for n in range(len(found))]:
            return False
    return True


def random_mixture(seed: int, workers: int) -> None:
    """Killed twice; at each kill other sizes, at the first other weights: as a schedule says it in one process."""
    rng = np.random.default_rng(seed)
    before, after = mixture(rng), mixture(rng)
    kills = sorted(rng.choice(np.arange(1, STEPS), 2, replace=False).tolist())
    seen: list[list[Any]] = []
    cursor, starts = None, []
    for leg, until in enumerate([*kills, STEPS]):
        batch = int(rng.choice(BATCHES))
        steps, cursor = train(after if leg else before, batch, sizes(rng, batch), cursor, until, workers)
        assert all(len(step) == batch for step in steps) and len(steps) == until - sum(map(len, starts))
        starts.append(steps)
        seen += steps
    rows, first = flat(seen), len(flat(starts[0]))
    assert follows_each_set(rows)
    assert before.names == tuple(dict.fromkeys(before.names))
    weights = [
        {name: dict(zip(m.names, m.parts[0].weights, strict=True)).get(name, 0.0) for name in NAMES}
        for m in (before, after)
    ]
    whole = Mixture(SETS, weights[0], max_epochs=None, schedule=[{"start_samples": first, "weights": weights[1]}])
    sets, ordinals = whole.locate(range(len(rows)))
    assert rows == [
        (NAMES[k], (n % len(SETS[NAMES[k]]) + 7 * (n // len(SETS[NAMES[k]]))) % len(SETS[NAMES[k]]))
        for k, n in zip(sets.tolist(), ordinals.tolist(), strict=True)
    ]
    assert cursor is not None and sum(cursor.state["dataset"]["counts"].values()) == len(rows)


def random_end(seed: int) -> None:
    """To the end of a mixture, whose last step has fewer samples, or of half of it."""
    rng = np.random.default_rng(seed)
    options: dict[str, Any] = {"max_epochs": 1, "when_exhausted": ["stop", "redistribute"][seed % 2]}
    sets, weights = {name: SETS[name] for name in ("web", "math")}, [0.4, 0.6]
    whole, batch = Mixture(sets, weights, **options), int(rng.choice(BATCHES))
    given: dict[str, Any] = (
        {"max_steps": 1_000} if seed % 3 else {"max_steps": -1, "num_train_epochs": 0.5 + seed % 2 / 2}
    )
    expected = len(whole)
    if not seed % 3:
        expected = min(expected, int(-(-given["num_train_epochs"] * -(-expected // batch) // 1)) * batch)
    kill = int(rng.integers(1, 3))
    first, cursor = train(Mixture(sets, weights, **options), batch, sizes(rng, batch), None, kill, **given)
    rest, cursor = train(Mixture(sets, weights, **options), batch, sizes(rng, batch), cursor, 1_000, **given)
    rows = whole.rows(range(expected))
    names = [whole.names[k] for k in rows["domain"].tolist()]
    assert flat(first + rest) == list(zip(names, rows["input_ids"][:, 0].tolist(), strict=True))
    assert cursor.samples == expected and len(first + rest) == -(-expected // batch)


def random_stages(seed: int, workers: int) -> None:
    """Killed anywhere; at the kill other sizes, and other stages from there on."""
    rng = np.random.default_rng(seed)

    def later(first: int) -> list[Stage]:
        found: list[Stage] = []
        while first < STEPS and len(found) < 3:
            batch = int(rng.choice(BATCHES)) if rng.random() < 0.7 else None
            found.append(Stage(mixture(rng), start_step=first, global_batch_size=batch))
            first += int(rng.integers(1, 5))
        return found

    whole_batch = 12  # of stages that say none
    planned = later(0)
    kill = int(rng.integers(1, STEPS))
    begun = [stage for stage in planned if stage.start_step < kill]
    edited = begun + later(kill + int(rng.integers(0, 3)))
    stages, now = Stages(planned), Stages(edited)

    def split(of: Stages) -> tuple[int, int]:
        return sizes(rng, int(np.gcd.reduce([stage.global_batch_size or whole_batch for stage in of.stages])))

    steps, cursor = train(stages, whole_batch, split(stages), None, kill, workers)
    assert len(steps) == kill
    more, _ = train(now, whole_batch, split(now), cursor, STEPS, workers)
    expected, _ = train(Stages(edited), whole_batch, (1, 1), None, STEPS)
    assert steps + more == expected
    assert [len(step) for step in expected] == [
        [s.global_batch_size or whole_batch for s in edited if s.start_step <= n][-1] for n in range(STEPS)
    ]
    assert follows_each_set(flat(expected))
    total = now.names and {name: sum(other == name for other, _ in flat(expected)) for name in now.names}
    again = Stages(edited)
    again.load_state_dict(cursor.state["dataset"])
    again.plan(whole_batch, STEPS)
    assert again.counts(len(again)) == total


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are short here: so they cross blocks, too."""
    monkeypatch.setattr(blend, "BLOCK", 16)


def test_random_runs(request: pytest.FixtureRequest) -> None:
    for seed in range(RUNS if request.config.getoption("full_matrix") else RUNS // 8):
        (random_mixture if seed % 2 else random_stages)(seed, 0)


def test_to_the_end_of_a_mixture() -> None:
    for seed in range(24):
        random_end(seed)


def test_with_persistent_workers() -> None:
    for seed in range(2):
        (random_mixture if seed % 2 else random_stages)(seed, 1)
