"""Stages: where they begin, sets that go on, what may be edited, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_mixture_of_sets import Numbers
from token_files import documents, write_ds

from hf_nanotron.data import Mixture, Stage, Stages, TokenDataset
from hf_nanotron.data.legs import Leg


def in_order(path: Path, length: int, **options: Any) -> TokenDataset:
    return TokenDataset(path, length, token_size=2, shuffle=False, **options)


def numbers(**lengths: int) -> dict[str, Numbers]:
    return {name: Numbers(length) for name, length in lengths.items()}


def test_starts_fall_on_steps(tmp_path: Path) -> None:
    write_ds(tmp_path / "a.ds", documents(400))
    write_ds(tmp_path / "b.ds", documents(400, seed=1))
    stages = Stages(
        [
            Stage(in_order(tmp_path / "a.ds", 8), global_batch_size=4),
            Stage(in_order(tmp_path / "b.ds", 16), start_tokens=100),
            Stage(in_order(tmp_path / "a.ds", 8), start_step=9, global_batch_size=2),
        ]
    )
    assert stages.names == ("a", "b") and stages.sequence_length == 16
    assert stages.plan(3, 12) == (
        Leg(0, 0, 0, 16, 4),  # 4 steps of 32 tokens: the first step boundary behind 100
        Leg(1, 4, 16, 31, 3),
        Leg(2, 9, 31, 37, 2),
    )
    assert stages.counts(37) == {"a": 22, "b": 15}
    assert stages.tokens(37) == {"a": 22 * 8, "b": 15 * 16}
    assert [stages[i]["input_ids"].shape[0] for i in (0, 15, 16, 30, 31)] == [8, 8, 16, 16, 8]
    assert [int(stages[i]["domain"]) for i in (15, 16, 31)] == [0, 1, 0]
    assert stages.plan(3, 6)[-1] == Leg(1, 4, 16, 22, 3), "the run ends in the second stage"


@pytest.mark.parametrize("kill", [0, 1, 2, 3, 4, 6, 7, 8])
def test_rows_of_another_length_go_on_with_the_next_token(tmp_path: Path, kill: int) -> None:
    """Three files over two epochs: what each stage reads is what a hand-written reader would read next."""
    (tmp_path / "set").mkdir()
    files = [
        write_ds(tmp_path / "set" / f"{n}.ds", documents(count, seed=n)).astype(np.int64)
        for n, count in enumerate((10, 4, 8))
    ]
    plan = [(8, 0, 10), (24, 2, 3), (5, 4, 30), (16, 7, 2)]  # length, start, batch

    def stages() -> Stages:
        return Stages(
            [
                Stage(in_order(tmp_path / "set", length), start_step=start, global_batch_size=batch)
                for length, start, batch in plan
            ]
        )

    expected, file, at = [], 0, 0
    for (length, start, batch), stop in zip(plan, (2, 4, 7, 9), strict=True):
        for _ in range(batch * (stop - start)):
            while len(files[file]) - at < length:
                file, at = (file + 1) % len(files), 0
            expected.append(files[file][at : at + length].tolist())
            at += length
    whole = stages()
    whole.plan(1, 9)
    assert [whole[i]["input_ids"].tolist() for i in range(len(whole))] == expected
    assert whole.epochs(len(whole))["set"] > 1
    samples = [leg.first + (kill - leg.step) * leg.batch for leg in whole.legs if leg.step <= kill][-1]
    resumed = stages()
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict(samples))))
    resumed.plan(1, 9)
    assert [resumed[i]["input_ids"].tolist() for i in range(samples, len(whole))] == expected[samples:]
    assert resumed.tokens(len(whole)) == whole.tokens(len(whole))


def test_what_may_be_edited() -> None:
    def stages(second: float = 0.3, start: int = 4, more: tuple[Stage, ...] = (), first: float = 0.5) -> Stages:
        sets = numbers(a=500, b=700)
        return Stages(
            [
                Stage(Mixture(sets, [first, 1 - first]), global_batch_size=2),
                Stage(Mixture(sets, [second, 1 - second]), start_step=start, global_batch_size=2),
                *more,
            ]
        )

    whole = stages()
    whole.plan(2, 10)
    in_first, at_change, in_second = (json.loads(json.dumps(whole.state_dict(n))) for n in (6, 8, 12))

    def resumed(state: Any, edited: Stages) -> tuple[Leg, ...]:
        edited.load_state_dict(state)
        return edited.plan(2, 10)

    assert resumed(in_first, stages(0.9, 7)) == (Leg(0, 3, 6, 14, 2, 6), Leg(1, 7, 14, 20, 2))
    assert resumed(in_first, stages(0.9, 3))[0] == Leg(1, 3, 6, 20, 2), "from here on"
    assert resumed(at_change, stages(0.9))[0] == Leg(1, 4, 8, 20, 2)
    later = Stage(Mixture(numbers(a=500, c=9), [1, 1], max_epochs=None), start_step=6)
    assert resumed(in_second, stages(more=(later,)))[-1] == Leg(2, 6, 12, 20, 2)
    for state, edited, match in [
        (
            in_first,
            stages(first=0.6),
            r"stage 0 has been trained on with weights=\{'a': 0.5, .* add a stage that",
        ),
        (in_first, stages(start=2), "stage 1 begins at start_step=2, but step 3 of stage 0 .* has been trained"),
        (in_second, stages(0.9), "stage 1 has been trained on with weights"),
        (in_second, stages(start=5), "stage 1 has been trained on with start_step=4, and has 5 now"),
        (in_second, Stages(stages().stages[:1]), "stage 1 has been trained on, and there are 1 stages now"),
        ({"counts": {}}, stages(), "no state of stages"),
    ]:
        with pytest.raises(ValueError, match=match):
            resumed(state, edited)


def test_refusals(tmp_path: Path) -> None:
    write_ds(tmp_path / "a.ds", documents(60))
    sets = numbers(a=100)
    mixture = Mixture(sets, [1])

    def staged(*later: Stage, first: Any = mixture) -> Stages:
        return Stages([Stage(first), *later])

    shuffled = {length: TokenDataset(tmp_path / "a.ds", length, token_size=2) for length in (8, 16)}
    for make, match in [
        (lambda: Stages([]), "Stages need a stage"),
        (lambda: Stages([mixture]), "stage 0 is a Mixture; use Stage"),
        (lambda: Stages([Stage(mixture, start_step=3)]), "stage 0 begins at start_step=3: the first stage begins at 0"),
        (lambda: staged(Stage(mixture)), "stage 1 needs one of start_tokens and start_step, and has none"),
        (lambda: staged(Stage(mixture, 3, 3)), "has start_tokens and start_step"),
        (lambda: staged(Stage(mixture, start_step=-1)), "start_step=-1 must be a whole number"),
        (lambda: staged(Stage(mixture, start_step=1, global_batch_size=0)), "global_batch_size=0"),
        (lambda: staged(Stage(mixture, start_step=5), Stage(mixture, start_step=5)), "list them in order"),
        (lambda: staged(Stage(mixture, start_tokens=5)), "does not say how many tokens a row has"),
        (lambda: staged(Stage([1], start_step=5)), None),
        (lambda: staged(Stage(iter([]), start_step=5)), "the data of stage 1 is a list_iterator"),
        (lambda: staged(first=Mixture(sets, [1], schedule=[{"start_samples": 3, "weights": [2]}])), "has a schedule"),
        (lambda: staged(Stage(Mixture(numbers(a=99), [1]), start_step=5)), "sets 'a' of stage 1 .* differ in"),
        (lambda: staged(Stage(Mixture(sets, [1], seed=2), start_step=5)), "by another seed: use seed=0"),
        (
            lambda: Stages([Stage(shuffled[8]), Stage(shuffled[16], start_step=2)]),
            "rows of 16 tokens in stage 1, and of 8 before: shuffled or packed rows .*shuffle=False.*another name",
        ),
    ]:
        if match is None:
            make()
            continue
        with pytest.raises(ValueError, match=match):
            make()
    for stages, match in [
        (staged(Stage(mixture, start_step=0)), "stage 0 would have no step"),
        (staged(Stage(mixture, start_step=30)), r"stage 0 trains on 120 samples \(steps 0 to 30\), but its data ends "
         r"after 100 of them: the set 'a' \(100 rows\) has then been read 1 times; raise max_epochs"),
        (staged(Stage(mixture, start_step=20)), "stage 1 trains on 80 samples .* ends after 20 of them"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=match):
            stages.plan(4, 40)
    with pytest.raises(TypeError, match="call plan"):
        len(staged())
    with pytest.raises(IndexError, match="not planned"):
        staged()[0]


def test_far_stages_are_checked_by_estimates() -> None:
    """The counts of a stage of millions of samples are not run through when the run begins."""
    sets = numbers(a=3_000_000, b=9_000_000)

    def stages(rows: int) -> Stages:
        later = Mixture({**sets, "c": Numbers(rows)}, [1, 1, 2])
        return Stages([Stage(Mixture(sets, [0.5, 0.5])), Stage(later, start_step=2_000)])

    stages(2_000_000).plan(1_000, 4_000)
    with pytest.raises(
        ValueError, match="stage 1 trains on 2000000 samples .* ends after about [0-9]+ of them: the set 'c'"
    ):
        stages(900_000).plan(1_000, 4_000)
